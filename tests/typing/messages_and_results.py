"""What send and ask give back, and what a message promises. Read by type checkers, never run."""

from dataclasses import dataclass
from datetime import timedelta
from typing import assert_type

from cqrs_decor import (
    App,
    Command,
    DomainEvent,
    Drained,
    ECSTEvent,
    IntegrationEvent,
    NotificationEvent,
    Query,
    Retry,
    RetryLater,
    Returns,
    UnitOfWork,
    bootstrap,
    emit,
    message,
)


class PlaceOrder(Command[int]):
    sku: str


class Rename(Command[None]):
    name: str


class FindOrders(Query[list[str]]):
    limit: int = 10


class MayFind(Query[str | None]):
    sku: str


@dataclass(frozen=True)
class Ping(Returns[str]):
    name: str


@message(topic="pings", key="name", name="shop.pinged", version=2)
@dataclass(frozen=True)
class Pinged:
    name: str


class Noted(DomainEvent):
    sku: str


class OrderPlaced(IntegrationEvent, topic="orders", key="order_id", name="shop.order-placed", version=3):
    order_id: int


class OrderChanged(NotificationEvent, topic="orders", key="order_id"):
    order_id: int


class OrderState(ECSTEvent, topic="order-state", key="order_id"):
    order_id: int


class Money:
    """A plain class of the domain's."""


class Pay(Command[Money]):
    pass


async def results(app: App) -> None:
    assert_type(await app.send(PlaceOrder(sku="tea")), int)
    assert_type(await app.send(Rename(name="a")), None)
    assert_type(await app.send(Pay()), Money)
    assert_type(await app.send(Ping("a")), str)
    assert_type(await app.ask(FindOrders()), list[str])
    assert_type(await app.ask(MayFind(sku="tea")), str | None)
    assert_type(await app.ask(Ping("a")), str)


async def what_promises_no_result_cannot_be_sent(app: App) -> None:
    """mypy reports an ignore that is not needed: these are errors, or this file is one."""
    await app.send(Noted(sku="tea"))  # type: ignore[arg-type]
    await app.ask(OrderPlaced(order_id=1))  # type: ignore[arg-type]
    await app.send("place order")  # type: ignore[arg-type]


async def with_a_session(app: App, session: object) -> None:
    assert_type(await app.send(PlaceOrder(sku="tea"), session=session), int)


async def events(app: App) -> None:
    assert_type(emit(OrderPlaced(order_id=1), Noted(sku="tea"), Pinged("a")), None)
    assert_type(await app.publish(OrderPlaced(order_id=1)), None)
    app.outbox.add(object(), OrderPlaced(order_id=1), OrderState(order_id=1), OrderChanged(order_id=1))


async def life() -> None:
    app = bootstrap("shop.orders", broker="kafka://localhost", database="sqlite:///shop.db", service="shop")
    assert_type(app, App)
    async with app as entered:
        assert_type(entered, App)
        drained = await entered.drain(timeout=5)
        assert_type(drained, Drained)
        assert_type(drained.published, int)
        assert_type(drained.parked, list[str])
    async with app.running_as(overrides={int: 3}) as running:
        assert_type(running, App)


async def a_unit_of_work(app: App) -> None:
    async with app.unit_of_work() as work:
        assert_type(work, UnitOfWork)
        assert_type(work.resource(Money), Money)


def fields_keep_their_types(command: PlaceOrder, pinged: Pinged) -> None:
    assert_type(command.sku, str)
    assert_type(pinged, Pinged)
    assert_type(pinged.name, str)
    assert_type(Pinged("a"), Pinged)


def durations() -> None:
    assert_type(Retry(first_delay=timedelta(seconds=1)).delay(1), timedelta)
    assert_type(RetryLater(3).delay, timedelta)
    assert_type(RetryLater(timedelta(seconds=3)).delay, timedelta)
