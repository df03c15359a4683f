"""Wire names to types and back: which destination and key an event has, and which class an incoming one becomes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from operator import attrgetter
from typing import Any

from cqrs_decor._text import qualified_name
from cqrs_decor.broker import TopicPlan
from cqrs_decor.errors import (
    CqrsDecorError,
    DuplicateWireNameError,
    UnknownMessageTypeError,
    UnknownTopicError,
    UnknownVersionError,
)
from cqrs_decor.messages import message_spec


@dataclass(frozen=True, slots=True)
class Route:
    """Where an event goes."""

    topic: str
    name: str
    version: int
    key: Callable[[Any], Any] | None


class Routes:
    """Looks routes up by class, and classes by (topic, wire name, version).

    Args:
        handled: Classes that have a handler here: two of them with one wire name are a fault.
        declared: Classes that are defined in this process: known, so not parked when they come in, but not handled.

    Attributes:
        remembered: For so long consumers know which messages they have had.
    """

    def __init__(self, handled: Iterable[type[Any]] = (), declared: Iterable[type[Any]] = ()) -> None:
        self.remembered: timedelta | None = None
        self._read: set[str | None] = set()
        self._outgoing: dict[type[Any], Route] = {}
        self._incoming: dict[tuple[str, str], dict[int, type[Any]]] = {}
        self.faults: list[CqrsDecorError] = []
        for event_type in handled:
            self._learn(event_type)
        for event_type in declared:
            self._learn_unless_known(event_type)

    def route(self, event_type: type[Any]) -> Route:
        """Where events of this class go.

        Raises:
            UnknownTopicError: It has no topic.
        """
        route = self._outgoing.get(event_type)
        if route is None:
            route = self._outgoing[event_type] = _route_of(event_type)
        return route

    def type_for(self, topic: str, name: str, version: int) -> type[Any]:
        """The class of an incoming event.

        Raises:
            UnknownMessageTypeError: Nothing here knows that name on that topic.
            UnknownVersionError: The name is known, the version is not.
        """
        versions = self._incoming.get((topic, name))
        if versions is None:
            known = {known for where, known in self._incoming if where == topic}
            raise UnknownMessageTypeError(topic, name, known)
        if version not in versions:
            raise UnknownVersionError(name, version, sorted(versions))
        return versions[version]

    def topics(self, event_types: Iterable[type[Any]]) -> list[TopicPlan]:
        """The topics of these events, by name."""
        specs = [message_spec(event_type) for event_type in event_types]
        names = sorted({spec.topic for spec in specs if spec.topic})
        return [
            TopicPlan(
                name=name,
                compacted=all(s.compacted for s in specs if s.topic == name),
                remembered=self.remembered if name in self._read else None,
            )
            for name in names
        ]

    def _learn(self, event_type: type[Any]) -> None:
        spec = message_spec(event_type)
        self._read.add(spec.topic)
        other = self._learn_unless_known(event_type)
        if other is not event_type and spec.topic is not None:
            types = [qualified_name(other), qualified_name(event_type)]
            self.faults.append(DuplicateWireNameError(spec.topic, spec.name, spec.version, types))

    def _learn_unless_known(self, event_type: type[Any]) -> type[Any]:
        spec = message_spec(event_type)
        if spec.topic is None:
            return event_type
        return self._incoming.setdefault((spec.topic, spec.name), {}).setdefault(spec.version, event_type)


def _route_of(event_type: type[Any]) -> Route:
    spec = message_spec(event_type)
    if spec.topic is None:
        raise UnknownTopicError(qualified_name(event_type))
    return Route(spec.topic, spec.name, spec.version, attrgetter(spec.key) if spec.key else None)
