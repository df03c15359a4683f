"""Billing's tables, in a database of its own."""

from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """All tables of billing."""


class Invoice(Base):
    """The read model: what is known about an order here.

    Attributes:
        sequence: The number of the last event about it: 1 issued, 2 voided.
    """

    __tablename__ = "invoices"

    order_number: Mapped[str] = mapped_column(String(40), primary_key=True)
    amount: Mapped[int]
    sequence: Mapped[int]


class Posting(Base):
    """A line of the journal. Nothing unique is in it: an event that took effect twice would show as a second line."""

    __tablename__ = "postings"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_number: Mapped[str] = mapped_column(String(40))
    amount: Mapped[int]
