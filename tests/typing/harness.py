"""Tests of applications are typed as well. Read by type checkers, never run."""

from datetime import datetime, timedelta
from typing import assert_type

from cqrs_decor import App, Command, Drained, Envelope, IntegrationEvent, Query, UnitOfWork
from cqrs_decor.clock import Clock
from cqrs_decor.memory import MemoryBroker
from cqrs_decor.testing import AppUnderTest, FakeClock, OpenApp


class Place(Command[int]):
    pass


class Count(Query[int]):
    pass


class Placed(IntegrationEvent, topic="orders"):
    sku: str


class Stock:
    pass


async def test_typed(cqrs_app: OpenApp, shop: App) -> None:
    clock = FakeClock()
    async with cqrs_app(shop, overrides={Stock: Stock()}, broker=MemoryBroker(), clock=clock) as app:
        assert_type(app, AppUnderTest)
        assert_type(await app.send(Place()), int)
        assert_type(await app.ask(Count()), int)
        assert_type(app.published.one(Placed), Placed)
        assert_type(app.published.one(Placed, where=lambda event: event.sku == "tea").sku, str)
        assert_type(app.published.all(Placed), list[Placed])
        assert_type(app.published.none(Placed), None)
        assert_type(list(app.published.envelopes()), list[Envelope])
        assert_type(await app.deliver(Placed(sku="tea"), message_id="1"), int)
        assert_type(await app.drain(), Drained)
        assert_type(app.app, App)
        assert_type(app.clock, Clock)
        async with app.unit_of_work() as work:
            assert_type(work, UnitOfWork)


def a_fake_clock_is_a_clock(clock: FakeClock) -> Clock:
    assert_type(clock.now(), datetime)
    assert_type(clock.waits, list[timedelta])
    assert_type(clock.advance(timedelta(seconds=1)), None)
    return clock
