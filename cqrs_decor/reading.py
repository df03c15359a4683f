"""From what a broker delivered to a message and its consumers, or to the reason why it cannot be read."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cqrs_decor.broker import Delivery
from cqrs_decor.clock import Clock
from cqrs_decor.codec import Codec
from cqrs_decor.envelope import Envelope
from cqrs_decor.errors import BodyTooLargeError, UnknownMessageTypeError, WireError
from cqrs_decor.messages import message_spec
from cqrs_decor.pipeline import Plan
from cqrs_decor.routing import Routes


@dataclass(frozen=True, slots=True)
class Read:
    """A message that could be read, and who handles it."""

    envelope: Envelope
    message: Any
    plans: Sequence[Plan]


class Reader:
    """Reads messages of the topics of one service.

    Args:
        service: Stands for all its consumers, where nobody can say whose a message is.
        consumers: The compiled handlers by event class.
        routes: Incoming types.
        codecs: By content type.
        max_body_bytes: A larger body is not read.
    """

    def __init__(
        self,
        service: str,
        consumers: Mapping[type[Any], Sequence[Plan]],
        routes: Routes,
        codecs: Mapping[str, Codec],
        max_body_bytes: int,
    ) -> None:
        self._service = service
        self._consumers = consumers
        self._routes = routes
        self._codecs = codecs
        self._max_body_bytes = max_body_bytes
        self._of_topic, self._of_name = _names(consumers)

    def read(self, content: Envelope | WireError) -> Read:
        """
        Raises:
            WireError: It cannot be read; the error says why.
        """
        if isinstance(content, WireError):
            raise content
        if len(content.data) > self._max_body_bytes:
            raise BodyTooLargeError(len(content.data), self._max_body_bytes)
        message_type = self._routes.type_for(content.topic, content.type, content.version)
        plans = self._consumers.get(message_type, ())
        if not plans:
            return Read(content, None, ())  # declared here, so known, but nobody handles it
        codec = self._codecs.get(content.content_type.partition(";")[0].strip(), self._codecs["application/json"])
        return Read(content, codec.decode(message_type, content.data), plans)

    def concerned(self, delivery: Delivery, error: WireError) -> Sequence[str]:
        """Whose a message is that cannot be read: those who would have to wait for it, in the order of its key.

        What is no envelope may be for any consumer of its topic; a version, or a body, that cannot be read is for the
        consumers of that event. An event of an unknown type is for none of those that are here, so that only the
        service keeps it: a producer that begins to send something new holds up nobody.
        """
        if isinstance(error, UnknownMessageTypeError):
            return (self._service,)
        topic = delivery.partition.topic
        if isinstance(delivery.content, Envelope):
            return self._of_name.get((topic, delivery.content.type)) or (self._service,)
        return self._of_topic.get(topic) or (self._service,)


def envelope_of(delivery: Delivery, clock: Clock) -> Envelope:
    """What there is of an envelope; where it came from stands in for the id of what has none."""
    if isinstance(delivery.content, Envelope):
        return delivery.content
    place = f"{delivery.partition.topic}/{delivery.partition.number}/{delivery.position}"
    return Envelope(
        id=place,
        source="unreadable",
        type="unreadable",
        topic=delivery.partition.topic,
        data=delivery.raw,
        time=clock.now(),
        key=delivery.key,
        content_type="application/octet-stream",
    )


def _names(
    consumers: Mapping[type[Any], Sequence[Plan]],
) -> tuple[Mapping[str, Sequence[str]], Mapping[tuple[str, str], Sequence[str]]]:
    """Names of consumers by topic, and by topic and wire name; each once, in order."""
    of_topic: defaultdict[str, dict[str, None]] = defaultdict(dict)
    of_name: defaultdict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for message_type, plans in consumers.items():
        spec = message_spec(message_type)
        for name in [plan.origin.consumer or "" for plan in plans]:
            of_topic[spec.topic or ""][name] = None
            of_name[spec.topic or "", spec.name][name] = None
    return {at: tuple(names) for at, names in of_topic.items()}, {at: tuple(names) for at, names in of_name.items()}
