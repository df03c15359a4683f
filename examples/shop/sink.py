"""An oracle outside the services: notes every delivery to every consumer, before anything else happens to it.

Switched on by CQRS_DECOR_HANDLERS=sink, with SINK_DATABASE; the services know nothing of it. Rows are written in
autocommit, so that they stay when the handler's transaction is rolled back or its process is killed.
"""

import os
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import DateTime, String, func, insert
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from cqrs_decor import CallNext, MessageContext, middleware, provider


class Base(DeclarativeBase):
    """The table of the sink."""


class SunkDelivery(Base):
    """One delivery of one message to one consumer; ids rise in the order of arrival."""

    __tablename__ = "deliveries"

    id: Mapped[int] = mapped_column(primary_key=True)
    consumer: Mapped[str] = mapped_column(String(100))
    message_id: Mapped[str] = mapped_column(String(100))
    type: Mapped[str] = mapped_column(String(100))
    key: Mapped[str] = mapped_column(String(100))
    sequence: Mapped[int]
    attempt: Mapped[int]
    arrived_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=func.now())


@dataclass(frozen=True, slots=True)
class Sink:
    """The sink's database, in autocommit."""

    engine: AsyncEngine

    async def note(self, message: Any, context: MessageContext) -> None:
        envelope = context.envelope
        if envelope is None or context.consumer is None:
            return
        row = {
            "consumer": context.consumer,
            "message_id": envelope.id,
            "type": envelope.type,
            "key": envelope.key,
            "sequence": message.sequence,
            "attempt": context.attempt,
        }
        async with self.engine.connect() as connection:
            await connection.execute(insert(SunkDelivery).values(row))


@provider(scope="app")
async def sink() -> AsyncGenerator[Sink]:
    # A lost sink row would only look like a lost message if the database itself crashed: it need not wait for the disk.
    relaxed = {"server_settings": {"synchronous_commit": "off"}}
    engine = create_async_engine(os.environ["SINK_DATABASE"], isolation_level="AUTOCOMMIT", connect_args=relaxed)
    yield Sink(engine)
    await engine.dispose()


@middleware
class NoteDeliveries:
    """Stands outside the inbox: it sees repeats, which the inbox then drops."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    async def __call__(self, message: Any, call_next: CallNext) -> Any:
        await self._sink.note(message, MessageContext.current())
        return await call_next(message)
