"""What an app under test has published, as typed events."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from cqrs_decor.codec import Codec, JsonCodec
from cqrs_decor.envelope import Envelope
from cqrs_decor.messages import message_spec
from cqrs_decor.testing.failures import NotPublishedError

E = TypeVar("E")

Where = Callable[[E], bool]


class Published:
    """The integration events that were committed to the outbox since the app was opened, in the order of writing.

    What a rolled back command emitted is not among them. An event is looked up by topic and wire name, so a class of
    the test's own finds it as well as the producer's.
    """

    def __init__(self, codec: Codec | None = None) -> None:
        self._codec = codec or JsonCodec()
        self._envelopes: dict[tuple[str, str], Envelope] = {}

    def __repr__(self) -> str:
        return f"Published({', '.join(self._listed())})"

    def one(self, event_type: type[E], *, where: Where[E] | None = None) -> E:
        """The only event of its type that fits.

        Raises:
            NotPublishedError: There is none, or more than one.
        """
        found = self.all(event_type, where=where)
        if len(found) != 1:
            raise NotPublishedError("one", event_type.__name__, found, self._listed())
        return found[0]

    def all(self, event_type: type[E], *, where: Where[E] | None = None) -> list[E]:
        """Every event of its type that fits, in order."""
        events = [self._codec.decode(event_type, envelope.data) for envelope in self.envelopes(event_type)]
        return [event for event in events if where is None or where(event)]

    def none(self, event_type: type[E], *, where: Where[E] | None = None) -> None:
        """See that no event of its type fits.

        Raises:
            NotPublishedError: One does.
        """
        found = self.all(event_type, where=where)
        if found:
            raise NotPublishedError("no", event_type.__name__, found, self._listed())

    def envelopes(self, event_type: type[Any] | None = None) -> Sequence[Envelope]:
        """What travels: ids, key, headers and body of each event, of one type or of all."""
        if event_type is None:
            return list(self._envelopes.values())
        spec = message_spec(event_type)
        return [each for each in self._envelopes.values() if (each.topic, each.type) == (spec.topic, spec.name)]

    def note(self, envelopes: Iterable[Envelope]) -> None:
        """Add those that are not known yet; called by the harness."""
        for envelope in envelopes:
            self._envelopes.setdefault((envelope.source, envelope.id), envelope)

    def _listed(self) -> list[str]:
        return [f"{envelope.topic}: {envelope.type} (key {envelope.key!r})" for envelope in self._envelopes.values()]
