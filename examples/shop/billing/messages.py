"""What billing hears from the shop, in its own words, and what it tells."""

from cqrs_decor import IntegrationEvent

# The shop owns these two: its topic and its wire names, but only the fields that billing reads.


class OrderPlaced(IntegrationEvent, topic="shop.orders", key="sku", name="shop.order-placed"):
    sku: str
    sequence: int
    number: str
    total: int


class OrderCancelled(IntegrationEvent, topic="shop.orders", key="sku", name="shop.order-cancelled"):
    sku: str
    sequence: int
    number: str


class InvoiceIssued(IntegrationEvent, topic="billing.invoices", key="order_number", name="billing.invoice-issued"):
    order_number: str
    sequence: int
    amount: int


class InvoiceVoided(IntegrationEvent, topic="billing.invoices", key="order_number", name="billing.invoice-voided"):
    order_number: str
    sequence: int
    amount: int
