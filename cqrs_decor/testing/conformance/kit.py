"""What the kits have in common: how a test of a kit is run, and what a subclass may not do."""

from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta
from typing import ClassVar, NoReturn, TypeVar, cast

import anyio
import pytest

from cqrs_decor._ids import new_id
from cqrs_decor.envelope import Envelope

K = TypeVar("K")
P = TypeVar("P")


class Kit:
    """Base of the kits.

    Attributes:
        patience: How long a test waits for what must happen, before it fails.
        time_limit: How long one test may run.
    """

    patience: ClassVar[timedelta] = timedelta(seconds=30)
    time_limit: ClassVar[timedelta] = timedelta(seconds=90)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        overridden = [name for name in vars(cls) if name.startswith("test_") and hasattr(super(cls, cls), name)]
        if overridden:
            raise TypeError(
                f"{cls.__qualname__} overrides {', '.join(overridden)}: a kit is passed as it is.\n"
                "Fix: add tests under names of your own, or take the capability from the card of what is tested."
            )

    async def eventually(self, holds: Callable[[], bool], what: str) -> None:
        """Wait until `holds()`; fail with `what` when patience is at its end."""
        with anyio.move_on_after(self.patience.total_seconds()):
            while not holds():  # noqa: ASYNC110 - what is waited for is a plugin's: it sets no event of ours
                await anyio.sleep(0.005)
        assert holds(), f"not within {self.patience.total_seconds():g} s: {what}"

    def run(self, opened: Callable[[], AbstractAsyncContextManager[P]], test: Callable[[P], Awaitable[None]]) -> None:
        """Run a test on a part that is opened for it, in an event loop of its own."""
        __tracebackhide__ = True

        async def main() -> None:
            async with opened() as part:
                with anyio.fail_after(self.time_limit.total_seconds()):
                    await test(part)

        try:
            anyio.run(main, backend="asyncio")
        except ExceptionGroup as group:
            _raise_innermost(group)


def _raise_innermost(group: ExceptionGroup[Exception]) -> NoReturn:
    """A failed assertion reads better without the task groups that it came through."""
    __tracebackhide__ = True
    first, *others = group.exceptions
    if others:
        raise group
    if isinstance(first, ExceptionGroup):
        _raise_innermost(cast("ExceptionGroup[Exception]", first))
    raise first


def as_test(run: Callable[[K], None], test: Callable[..., object]) -> Callable[[K], None]:
    """Give a function the name and the docstring of the test that it runs; its signature stays its own."""
    run.__name__, run.__qualname__, run.__doc__ = test.__name__, test.__qualname__, test.__doc__
    run.__module__ = test.__module__
    return run


def require(part: object, card: object, capability: str) -> None:
    """Skip a test of what a part does not claim to do."""
    if not getattr(card, capability):
        pytest.skip(f"{type(part).__name__} does not declare the capability {capability!r}")


def sample(topic: str, key: str | None = "a", *, type: str = "kit.sample", data: bytes = b"{}") -> Envelope:
    """An envelope with a fresh id."""
    return Envelope(id=new_id(), source="kit", type=type, topic=topic, key=key, data=data, time=datetime.now(UTC))


def full_sample(topic: str) -> Envelope:
    """An envelope with a value in every attribute, none of them plain ASCII where that is not required."""
    return Envelope(
        id=f"id/ü-{new_id()}",
        source="//shop.example/zürich 1",
        type="shop.order-plåced",
        topic=topic,
        data='{"text": "żółć 🍵", "n": 1}'.encode(),
        time=datetime(2024, 2, 29, 23, 59, 59, 123456, tzinfo=UTC),
        version=7,
        key="🔑 №1",
        content_type="application/vnd.shop+json; charset=utf-8",
        correlation_id="correlation ü",
        causation_id="causation ß",
        sequence=12,
        traceparent="00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        headers={"tenant": "naïve 🏠", "empty": "", "X-Mixed-Case": "1", "dotted.name": "a=b; c"},
    )


def ids_of(envelopes: Iterable[Envelope]) -> list[str]:
    return [envelope.id for envelope in envelopes]


def ids_by_key(envelopes: Iterable[Envelope]) -> dict[str | None, list[str]]:
    """The ids of each key in the order given; of an id that comes again only the first place counts."""
    by_key: dict[str | None, list[str]] = {}
    for envelope in envelopes:
        ids = by_key.setdefault(envelope.key, [])
        if envelope.id not in ids:
            ids.append(envelope.id)
    return by_key
