"""What the harness raises when a test is to fail: errors of the library that are assertions as well."""

from collections.abc import Sequence

from cqrs_decor.errors import CqrsDecorError


class ParkedError(CqrsDecorError, AssertionError):
    """Messages were parked. What their handlers raised last is the cause of this error.

    Attributes:
        parked: Consumer, message and reason of each.
    """

    code = "CD801"

    def __init__(self, parked: Sequence[str]) -> None:
        self.parked = tuple(parked)
        shown = "".join(f"\n  {line}" for line in self.parked)
        super().__init__(
            f"Parked: {len(self.parked)}.{shown}",
            fix="mend the handler, or expect it: `with pytest.raises(ParkedError)`",
        )

    def caused_by(self, errors: Sequence[Exception]) -> "ParkedError":
        """Chain what the handlers raised, so that the report of the test shows their lines."""
        if errors:
            self.__cause__ = errors[0] if len(errors) == 1 else ExceptionGroup("what the handlers raised", errors)
        return self


class NotPublishedError(CqrsDecorError, AssertionError):
    """What was published is not what the test expected.

    Attributes:
        event: The event type that was asked for.
        found: How many of it fitted.
        published: Topic and type of everything that was published.
    """

    code = "CD802"

    def __init__(self, expected: str, event: str, found: Sequence[object], published: Sequence[str]) -> None:
        self.event, self.found, self.published = event, len(found), tuple(published)
        fitting = "".join(f"\n  {each!r}" for each in found)
        everything = "".join(f"\n  {line}" for line in self.published) or "\n  nothing"
        super().__init__(
            f"Expected {expected} {event}, found {len(found)}.{fitting}\nPublished:{everything}",
            fix="see that its command was sent and committed; events of consumers are there after `await app.drain()`",
        )


class NoSuchConsumerError(CqrsDecorError, AssertionError):
    """A test delivered what nobody here consumes."""

    code = "CD803"

    def __init__(self, topic: str, name: str, topics: Sequence[str]) -> None:
        self.topic, self.name, self.topics = topic, name, tuple(topics)
        super().__init__(
            f"Nothing in this app consumes topic {topic!r}, so nobody would get {name!r}.\n"
            f"Consumed: {', '.join(self.topics) or 'none'}.",
            fix="decorate a handler of it with @event_handler, in a module that the app imports",
        )
