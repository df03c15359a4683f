"""The small application that every victim is a process of: entries are written, and applied once each.

Each entry is one transaction: it locks its aggregate's row, takes the next number of that aggregate, and emits an event
with both. The consumer writes an effect row in its transaction.
"""

import os
from datetime import timedelta
from typing import Any

import anyio
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from cqrs_decor import Command, IntegrationEvent, MessageContext, Registry, Retry, emit
from cqrs_decor.pipeline import CallNext
from tests.fault import unsafe
from tests.fault.oracle import Sink
from tests.fault.witnesses import say

TOPIC = os.environ.get("FAULT_TOPIC", "entries")
ELSEWHERE = os.environ.get("FAULT_ELSEWHERE", TOPIC)
"""A second topic, where a test has one."""

VERSION = int(os.environ.get("FAULT_VERSION", "1"))
"""Of the event that this process writes and reads: an older or newer release of the same application."""

registry = Registry("fault")


class Write(Command[int]):
    """Write an entry; returns its number. A silent one emits nothing; `elsewhere` is another topic."""

    entry: str
    aggregate: int
    note: str
    silent: bool = False
    elsewhere: bool = False


class Written(IntegrationEvent, topic=TOPIC, key="aggregate", name="fault.written", version=VERSION):
    entry: str
    aggregate: int
    number: int
    note: str = "written before there were notes"


class WrittenElsewhere(IntegrationEvent, topic=ELSEWHERE, key="aggregate", name="fault.written-elsewhere"):
    entry: str
    aggregate: int
    number: int


class PoisonError(Exception):
    """What a handler raises for an entry that it can do nothing with."""


class Conduct:
    """How the handler of this process behaves.

    Args:
        sink: Where its runs are noted.
        slow_s: How long each run takes.
        poison: How entries of which kind end it: `raise` an error, or `exit` the interpreter.
    """

    def __init__(self, sink: Sink, slow_s: float, poison: dict[str, str]) -> None:
        self.sink = sink
        self.slow_s = slow_s
        self._poison = poison

    def harm(self, entry: str) -> None:
        match self._poison.get(entry):
            case "raise":
                raise PoisonError(entry)
            case "exit":
                say(poisoned=entry)
                os._exit(9)
            case _:
                return


@registry.command_handler
async def write(command: Write, session: AsyncSession, publish: unsafe.PublishDirectly) -> int:
    values = {"aggregate": command.aggregate, "entry": command.entry}
    await session.execute(text("UPDATE aggregate SET number = number + 1 WHERE id = :aggregate"), values)
    number = await session.scalar(text("SELECT number FROM aggregate WHERE id = :aggregate"), values)
    await session.execute(
        text("INSERT INTO ledger (entry, aggregate, number) VALUES (:entry, :aggregate, :number)"),
        {**values, "number": number},
    )
    if command.elsewhere:
        emit(WrittenElsewhere(entry=command.entry, aggregate=command.aggregate, number=number or 0))
        return number or 0
    event = Written(entry=command.entry, aggregate=command.aggregate, number=number or 0, note=command.note)
    if publish.wanted:
        await publish(event, TOPIC, str(event.aggregate))
    elif not command.silent:
        emit(event)
    say(wrote=command.entry)
    return event.number


@registry.event_handler(name="apply", retry=Retry(max_attempts=3, first_delay=timedelta(milliseconds=20)))
async def apply(event: Written, session: AsyncSession, context: MessageContext, conduct: Conduct) -> None:
    with conduct.sink.span("run", event.entry):
        await _apply(event, session, context, conduct)


@registry.event_handler(name="apply-elsewhere")
async def apply_elsewhere(
    event: WrittenElsewhere, session: AsyncSession, context: MessageContext, conduct: Conduct
) -> None:
    with conduct.sink.span("run", event.entry):
        await _apply(event, session, context, conduct)


async def _apply(
    event: Written | WrittenElsewhere, session: AsyncSession, context: MessageContext, conduct: Conduct
) -> None:
    await anyio.sleep(conduct.slow_s)
    conduct.harm(event.entry)
    await session.execute(
        text("INSERT INTO effect (entry, message_id, process) VALUES (:entry, :message_id, :process)"),
        {"entry": event.entry, "message_id": context.id, "process": os.getpid()},
    )


class NoteDelivery:
    """Outside of transaction and inbox, so that it sees what the inbox drops, and what is rolled back."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    async def __call__(self, message: Any, call_next: CallNext) -> Any:
        if isinstance(message, Written | WrittenElsewhere):
            context = MessageContext.current()
            self._sink.note(context.id, message.entry, message.aggregate, message.number, context.attempt)
        return await call_next(message)
