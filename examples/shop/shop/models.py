"""The shop's tables."""

from typing import Literal

from sqlalchemy import ForeignKey, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

Status = Literal["placed", "cancelled"]


class Base(DeclarativeBase):
    """All tables of the shop."""


class Stock(Base):
    """The aggregate: whoever changes an order of this sku locks this row first.

    Attributes:
        sequence: The number of the last event about this sku. It rises under the lock, so that events and commits have
            the same order.
    """

    __tablename__ = "stock"

    sku: Mapped[str] = mapped_column(String(40), primary_key=True)
    price: Mapped[int]
    available: Mapped[int]
    sequence: Mapped[int] = mapped_column(default=0)

    def next_sequence(self) -> int:
        self.sequence += 1
        return self.sequence


class Order(Base):
    """An order under the number that the client chose.

    Attributes:
        billed: What has been invoiced, less what has been taken back.
        placed_sequence: Which event of its sku told of it.
        cancelled_sequence: Which event of its sku told of its end.
    """

    __tablename__ = "orders"

    number: Mapped[str] = mapped_column(String(40), primary_key=True)
    sku: Mapped[str] = mapped_column(ForeignKey("stock.sku"))
    quantity: Mapped[int]
    total: Mapped[int]
    status: Mapped[Status] = mapped_column(String(10))
    billed: Mapped[int]
    placed_sequence: Mapped[int]
    cancelled_sequence: Mapped[int | None] = mapped_column(default=None)


class StockMovement(Base):
    """Why the stock is what it is: negative when pieces were reserved, positive when they came back."""

    __tablename__ = "stock_movements"

    id: Mapped[int] = mapped_column(primary_key=True)
    sku: Mapped[str] = mapped_column(ForeignKey("stock.sku"))
    order_number: Mapped[str] = mapped_column(String(40))
    quantity: Mapped[int]
