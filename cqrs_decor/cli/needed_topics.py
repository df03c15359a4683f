"""Which topics an app reads and which it may write."""

from collections.abc import Sequence

from cqrs_decor.assembly import Parts
from cqrs_decor.broker import TopicPlan
from cqrs_decor.messages import integration_event_types


def consumed_topics(parts: Parts) -> list[TopicPlan]:
    """Those that a handler here reads; the app does not start without them."""
    return parts.examined.routes.topics(parts.examined.consumers)


def emitted_topics(parts: Parts) -> list[TopicPlan]:
    """Those of every other event that is declared in the app's modules."""
    consumed = {topic.name for topic in consumed_topics(parts)}
    return [topic for topic in parts.examined.routes.topics(integration_event_types()) if topic.name not in consumed]


def needed_topics(parts: Parts, only: Sequence[str] = ()) -> list[TopicPlan]:
    """Both, by name."""
    every = [*consumed_topics(parts), *emitted_topics(parts)]
    return sorted((topic for topic in every if not only or topic.name in only), key=lambda topic: topic.name)
