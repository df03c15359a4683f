"""A command, its domain event and its integration event, all in memory: `python examples/quickstart.py`."""

import asyncio
from typing import assert_type

from cqrs_decor import (
    Command,
    DomainEvent,
    Envelope,
    IntegrationEvent,
    MessageContext,
    bootstrap,
    command_handler,
    emit,
    event_handler,
)

invoiced: list[str] = []
envelopes: list[Envelope] = []


class PlaceOrder(Command[int]):  # the type argument is what send() returns
    sku: str
    quantity: int


class StockReserved(DomainEvent):  # stays in this process
    sku: str
    quantity: int


class OrderPlaced(IntegrationEvent, topic="orders", key="sku", name="shop.order-placed"):  # leaves it
    sku: str


@command_handler
async def place_order(command: PlaceOrder) -> int:
    emit(OrderPlaced(sku=command.sku), StockReserved(sku=command.sku, quantity=command.quantity))
    return 100 + command.quantity


@event_handler
async def refuse_more_than_there_is(event: StockReserved) -> None:  # in the command's own transaction
    if event.quantity > 9:
        raise ValueError(f"only 9 x {event.sku} are left")


@event_handler
async def write_invoice(event: OrderPlaced, context: MessageContext) -> None:  # in the worker, from the broker
    invoiced.append(event.sku)
    if context.envelope is not None:
        envelopes.append(context.envelope)


cqrs = bootstrap(discover=False)


async def main() -> None:
    async with cqrs:
        order = assert_type(await cqrs.send(PlaceOrder(sku="tea", quantity=2)), int)
        print(f"send() returned {order}; {await cqrs.drain()}")
        try:
            await cqrs.send(PlaceOrder(sku="tea", quantity=10))
        except ValueError as error:
            print(f"refused by the domain event's handler: {error}; {await cqrs.drain()}")
        await cqrs.broker.publish(envelopes[:1])  # a broker may always deliver a message again
        print(f"delivered twice, handled once: {invoiced}; {await cqrs.drain()}")


asyncio.run(main())
