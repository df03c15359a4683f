"""What billing does about orders. Each handler is a consumer: inbox row, invoice and events are one transaction."""

from sqlalchemy.ext.asyncio import AsyncSession

from billing.messages import InvoiceIssued, InvoiceVoided, OrderCancelled, OrderPlaced
from billing.models import Invoice, Posting
from cqrs_decor import emit, event_handler


@event_handler(name="issue_invoice")
async def issue_invoice(event: OrderPlaced, session: AsyncSession) -> None:
    await session.merge(Invoice(order_number=event.number, amount=event.total, sequence=1))
    session.add(Posting(order_number=event.number, amount=event.total))
    emit(InvoiceIssued(order_number=event.number, sequence=1, amount=event.total))


@event_handler(name="void_invoice")
async def void_invoice(event: OrderCancelled, session: AsyncSession) -> None:
    """The invoice is there: an order is placed before it is cancelled, and events of one key arrive in order."""
    invoice = await session.get_one(Invoice, event.number, with_for_update=True)
    invoice.sequence = 2
    session.add(Posting(order_number=event.number, amount=-invoice.amount))
    emit(InvoiceVoided(order_number=event.number, sequence=invoice.sequence, amount=invoice.amount))
