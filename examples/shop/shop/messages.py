"""What the shop can be asked to do, what it tells others, and what it hears from billing."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from cqrs_decor import Command, DomainEvent, IntegrationEvent, Query
from shop.models import Status

Number = Annotated[str, Field(min_length=1, max_length=40)]


class OrderView(BaseModel):
    """An order as clients see it."""

    model_config = ConfigDict(from_attributes=True)

    number: str
    sku: str
    quantity: int
    total: int
    status: Status
    billed: int


class PlaceOrder(Command[OrderView]):
    """The client chooses the number, so that asking again after a lost reply places nothing twice."""

    number: Number
    sku: str
    quantity: Annotated[int, Field(ge=1, le=100)]


class CancelOrder(Command[OrderView]):
    number: Number


class GetOrder(Query[OrderView]):
    number: Number


class StockReserved(DomainEvent):
    sku: str
    order_number: str
    quantity: int


class StockReleased(DomainEvent):
    sku: str
    order_number: str
    quantity: int


class OrderPlaced(IntegrationEvent, topic="shop.orders", key="sku", name="shop.order-placed"):
    sku: str
    sequence: int
    number: str
    total: int


class OrderCancelled(IntegrationEvent, topic="shop.orders", key="sku", name="shop.order-cancelled"):
    sku: str
    sequence: int
    number: str


# Billing owns these two: its topic and its wire names, but only the fields that the shop reads.


class InvoiceIssued(IntegrationEvent, topic="billing.invoices", key="order_number", name="billing.invoice-issued"):
    order_number: str
    sequence: int
    amount: int


class InvoiceVoided(IntegrationEvent, topic="billing.invoices", key="order_number", name="billing.invoice-voided"):
    order_number: str
    sequence: int
    amount: int
