"""What the shop does. Transactions begin before a handler and are committed after it: no handler commits."""

from sqlalchemy.ext.asyncio import AsyncSession

from cqrs_decor import command_handler, emit, event_handler, query_handler
from shop.errors import NumberTakenError, OutOfStockError, UnknownOrderError, UnknownSkuError
from shop.messages import (
    CancelOrder,
    GetOrder,
    InvoiceIssued,
    InvoiceVoided,
    OrderCancelled,
    OrderPlaced,
    OrderView,
    PlaceOrder,
    StockReleased,
    StockReserved,
)
from shop.models import Order, Stock, StockMovement


@command_handler
async def place_order(command: PlaceOrder, session: AsyncSession) -> OrderView:
    stock = await session.get(Stock, command.sku, with_for_update=True)
    if stock is None:
        raise UnknownSkuError(command.sku)
    known = await session.get(Order, command.number)
    if known is not None:
        return _same_order(known, command)
    order = Order(
        number=command.number,
        sku=command.sku,
        quantity=command.quantity,
        total=command.quantity * stock.price,
        status="placed",
        billed=0,
        placed_sequence=stock.next_sequence(),
    )
    session.add(order)
    emit(StockReserved(sku=order.sku, order_number=order.number, quantity=order.quantity))
    emit(OrderPlaced(sku=order.sku, sequence=order.placed_sequence, number=order.number, total=order.total))
    return OrderView.model_validate(order)


@command_handler
async def cancel_order(command: CancelOrder, session: AsyncSession) -> OrderView:
    order = await _order(command.number, session)
    stock = await session.get_one(Stock, order.sku, with_for_update=True)
    await session.refresh(order, with_for_update=True)  # it may have changed while we waited for the stock
    if order.status == "placed":
        order.status = "cancelled"
        order.cancelled_sequence = sequence = stock.next_sequence()
        emit(StockReleased(sku=order.sku, order_number=order.number, quantity=order.quantity))
        emit(OrderCancelled(sku=order.sku, sequence=sequence, number=order.number))
    return OrderView.model_validate(order)


@query_handler
async def get_order(query: GetOrder, session: AsyncSession) -> OrderView:
    return OrderView.model_validate(await _order(query.number, session))


@event_handler
async def move_stock(event: StockReserved | StockReleased, session: AsyncSession) -> None:
    """In the transaction of the command: a reservation that fails takes the order and its outbox row with it."""
    stock = await session.get_one(Stock, event.sku)
    quantity = -event.quantity if isinstance(event, StockReserved) else event.quantity
    stock.available += quantity
    if stock.available < 0:
        raise OutOfStockError(event.sku)
    session.add(StockMovement(sku=event.sku, order_number=event.order_number, quantity=quantity))


@event_handler(name="note_billed")
async def note_billed(event: InvoiceIssued | InvoiceVoided, session: AsyncSession) -> None:
    """In the worker, in a transaction with its inbox row: adding is safe, since no message is added twice."""
    order = await session.get_one(Order, event.order_number, with_for_update=True)
    order.billed += event.amount if isinstance(event, InvoiceIssued) else -event.amount


async def _order(number: str, session: AsyncSession) -> Order:
    order = await session.get(Order, number)
    if order is None:
        raise UnknownOrderError(number)
    return order


def _same_order(known: Order, command: PlaceOrder) -> OrderView:
    if (known.sku, known.quantity) != (command.sku, command.quantity):
        raise NumberTakenError(command.number)
    return OrderView.model_validate(known)
