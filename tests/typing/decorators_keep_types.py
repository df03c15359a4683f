"""A decorated function is the function that it was. Read by type checkers, never run."""

from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from datetime import timedelta
from typing import Any, assert_type

from cqrs_decor import (
    CallNext,
    Command,
    DomainEvent,
    IntegrationEvent,
    MessageContext,
    Middleware,
    Query,
    Registry,
    Retry,
    bootstrap,
    command_handler,
    event_handler,
    middleware,
    on_shutdown,
    on_startup,
    provider,
    query_handler,
)


class Ship(Command[int]):
    pass


class HowMany(Query[int]):
    pass


class Noted(DomainEvent):
    pass


class Shipped(IntegrationEvent, topic="shipping"):
    pass


class Stock:
    pass


@command_handler
async def bare(command: Ship, stock: Stock) -> int:
    return 1


@command_handler(name="ship", retry=Retry(max_attempts=2), timeout=3, concurrency=4, message=Ship)
async def with_options(command: Ship, stock: Stock) -> int:
    return 1


@command_handler(timeout=timedelta(seconds=3))
def plain(command: Ship) -> int:
    return 1


@command_handler
class ShipHandler:
    def __init__(self, stock: Stock) -> None:
        self.stock = stock

    async def handle(self, command: Ship) -> int:
        return 1


@query_handler
async def count(query: HowMany) -> int:
    return 1


@query_handler(timeout=1.5)
async def count_with_options(query: HowMany) -> int:
    return 1


@event_handler
async def note(event: Noted) -> None: ...


@event_handler(isolated=True)
async def note_later(event: Noted) -> None: ...


@event_handler(name="bill", retry=Retry(max_attempts=5))
async def bill(event: Shipped, context: MessageContext) -> None: ...


@event_handler(message=(Noted, Shipped))
async def either(event: Noted | Shipped) -> None: ...


@provider
def stock() -> Stock:
    return Stock()


@provider(scope="app")
async def stock_for_all() -> AsyncIterator[Stock]:
    yield Stock()


@provider(scope="message")
def stock_for_one() -> Iterator[Stock]:
    yield Stock()


@middleware
async def watch(message: Any, call_next: CallNext) -> Any:
    return await call_next(message)


@middleware
class Watch:
    def __init__(self, stock: Stock) -> None:
        self.stock = stock

    async def __call__(self, message: Any, call_next: CallNext) -> Any:
        return await call_next(message)


@on_startup
async def warm_up(stock: Stock) -> None: ...


@on_shutdown
def cool_down() -> None: ...


Handler = Callable[[Ship, Stock], Coroutine[Any, Any, int]]


async def functions_are_what_they_were(command: Ship) -> None:
    as_a_handler: Handler = bare
    as_another: Handler = with_options
    assert_type(await as_a_handler(command, Stock()), int)
    assert_type(await as_another(command, Stock()), int)
    assert_type(await bare(command, Stock()), int)
    assert_type(await with_options(command, stock=Stock()), int)
    assert_type(plain(command), int)
    assert_type(await count(HowMany()), int)
    assert_type(await count_with_options(HowMany()), int)
    assert_type(await either(Noted()), None)
    assert_type(stock(), Stock)
    assert_type(stock_for_all(), AsyncIterator[Stock])
    assert_type(stock_for_one(), Iterator[Stock])
    assert_type(cool_down(), None)


async def classes_are_what_they_were(command: Ship) -> None:
    handler = ShipHandler(Stock())
    assert_type(handler, ShipHandler)
    assert_type(handler.stock, Stock)
    assert_type(await handler.handle(command), int)
    assert_type(Watch(Stock()), Watch)


def both_shapes_are_middlewares() -> list[Middleware]:
    return [watch, Watch(Stock())]


async def a_registry_has_the_same_decorators() -> None:
    sales = Registry("sales")

    @sales.command_handler
    async def ship(command: Ship) -> int:
        return 1

    @sales.event_handler(name="bill")
    async def billing(event: Shipped) -> str:
        return ""

    @sales.provider(scope="app")
    def new_stock() -> Stock:
        return Stock()

    assert_type(await ship(Ship()), int)
    assert_type(await billing(Shipped()), str)
    assert_type(new_stock(), Stock)
    assert_type(sales.bind(Ship, ShipHandler), None)
    assert_type(sales.bind((Noted, Shipped), either, name="either", retry=Retry(), timeout=3), None)
    bootstrap(registry=[sales, Registry("stock")], middlewares=[watch, Watch], on_startup=[warm_up])
