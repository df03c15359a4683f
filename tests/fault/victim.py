"""One process of a small application, to be killed.

    python -m tests.fault.victim ROLE --database URL --broker log|kafka://... --sink FILE --topic NAME [...]

Roles: `send` writes entries and ends; `relay`, `work` and `all` run until SIGTERM. Each entry is one transaction: it
locks its aggregate's row, takes the next number of that aggregate, and emits an event with both. The consumer writes an
effect row in its transaction; every delivery, also one that the inbox drops, is noted at the sink first.

It tells what it does in lines of JSON on its standard output. Where it is to die, the environment says
(`cqrs_decor.testing.faults`) or `--freeze-while-publishing`.
"""

import argparse
import asyncio
import json
import logging
import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import anyio
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from cqrs_decor import (
    App,
    Command,
    IntegrationEvent,
    MessageContext,
    Moment,
    Registry,
    Settings,
    bootstrap,
    emit,
)
from cqrs_decor.observers import BatchPublished
from cqrs_decor.pipeline import CallNext
from cqrs_decor.testing import faults
from cqrs_decor_kafka import KafkaBroker
from cqrs_decor_sqlalchemy import LogSettings, LogTableBroker, SqlAlchemyStore
from tests.fault import unsafe
from tests.fault.oracle import Sink

LEASE_S = 1.5
SESSION_S = 3
BATCH = 20
PREFETCH = 40
TOPIC = os.environ.get("FAULT_TOPIC", "entries")

registry = Registry("fault")


class Write(Command[None]):
    entry: str
    aggregate: int


class Written(IntegrationEvent, topic=TOPIC, key="aggregate", name="fault.written"):
    entry: str
    aggregate: int
    number: int


@registry.command_handler
async def write(command: Write, session: AsyncSession, publish: unsafe.PublishDirectly) -> None:
    values = {"aggregate": command.aggregate, "entry": command.entry}
    await session.execute(text("UPDATE aggregate SET number = number + 1 WHERE id = :aggregate"), values)
    number = await session.scalar(text("SELECT number FROM aggregate WHERE id = :aggregate"), values)
    await session.execute(
        text("INSERT INTO ledger (entry, aggregate, number) VALUES (:entry, :aggregate, :number)"),
        {**values, "number": number},
    )
    event = Written(entry=command.entry, aggregate=command.aggregate, number=number or 0)
    if publish.wanted:
        await publish(event, TOPIC, str(event.aggregate))
    else:
        emit(event)
    say(wrote=command.entry)


@registry.event_handler(name="apply")
async def apply(event: Written, session: AsyncSession, context: MessageContext) -> None:
    await session.execute(
        text("INSERT INTO effect (entry, message_id, process) VALUES (:entry, :message_id, :process)"),
        {"entry": event.entry, "message_id": context.id, "process": os.getpid()},
    )


class NoteDelivery:
    """Outside of transaction and inbox, so that it sees what the inbox drops, and what is rolled back."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    async def __call__(self, message: Any, call_next: CallNext) -> Any:
        if isinstance(message, Written):
            context = MessageContext.current()
            self._sink.note(context.id, message.entry, message.aggregate, message.number, context.attempt)
        return await call_next(message)


class SayWhatWasPublished:
    def notice(self, moment: Moment) -> None:
        if isinstance(moment, BatchPublished):
            say(published=moment.delivered)


# --- roles ------------------------------------------------------------------------------------------------------------


async def send(options: argparse.Namespace) -> None:
    """Write `--count` entries under names of this process, `--tasks` at a time. A database that is away costs entries
    that were never committed, not the process.
    """
    chosen = random.Random(options.seed)
    entries = iter(
        [(f"{options.name}-{number}", chosen.randrange(options.aggregates)) for number in range(options.count)]
    )
    async with _app(options, "none") as app, anyio.create_task_group() as tasks:
        for _ in range(options.tasks):
            tasks.start_soon(_send_all, app, entries)
    say(ended=options.name)


async def _send_all(app: App, entries: Any) -> None:
    for entry, aggregate in entries:
        try:
            await app.send(Write(entry=entry, aggregate=aggregate))
            say(committed=entry)
        except Exception as error:  # what it may be is the store's business; all else must end the test
            if not app.store.is_unavailable(error) and not app.store.is_transient(error):
                raise
            say(failed=entry, error=type(error).__name__)
            await asyncio.sleep(0.05)


async def run(options: argparse.Namespace) -> None:
    """Relay, work or both, until SIGTERM."""
    told_to_stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, told_to_stop.set)
    loop.add_signal_handler(signal.SIGUSR1, _log_where_all_tasks_are)
    async with _app(options, {"relay": "relay", "work": "worker", "all": "all"}[options.role]):
        say(started=options.role)
        await told_to_stop.wait()
    say(ended=options.name)


@asynccontextmanager
async def _app(options: argparse.Namespace, loops: Any) -> AsyncIterator[App]:
    store = SqlAlchemyStore.from_url(options.database)
    broker = _broker(options.broker, store)
    app = bootstrap(
        database=unsafe.store(options.unsafe, store),
        broker=unsafe.broker(options.unsafe, _freezing(options.freeze_while_publishing, broker)),
        service=options.topic,
        registry=registry,
        discover=False,
        run=loops,
        middlewares=[NoteDelivery(Sink(options.sink))],
        observers=[SayWhatWasPublished()],
        settings=Settings(lease_s=LEASE_S, relay_batch=BATCH, worker_prefetch=PREFETCH, worker_concurrency=4),
    )
    app.container.register(unsafe.PublishDirectly, instance=unsafe.publish_directly(options.unsafe, broker))
    async with app:
        yield app


def _broker(where: str, store: SqlAlchemyStore) -> Any:
    """Short leases and sessions: a test waits for their end after each kill."""
    if where == "log":
        settings = LogSettings(lease=timedelta(seconds=LEASE_S), beat=timedelta(seconds=LEASE_S / 4))
        return LogTableBroker.over(store.database, settings=settings)
    return KafkaBroker.from_url(f"{where}?session_timeout_s={SESSION_S}&heartbeat_interval_s={SESSION_S / 6}")


# --- dying ------------------------------------------------------------------------------------------------------------


class FreezesWhilePublishing:
    """Stands still (SIGSTOP) in the middle of a batch: `steps` turns of the loop after the publish has begun, without
    hearing of its outcome.
    """

    def __init__(self, broker: Any, batch: int, steps: int) -> None:
        self._broker = broker
        self._left = batch
        self._steps = steps

    def __getattr__(self, name: str) -> Any:
        return getattr(self._broker, name)

    async def publish(self, envelopes: Any) -> Any:
        self._left -= 1
        if self._left:
            return await self._broker.publish(envelopes)
        publishing = asyncio.create_task(self._broker.publish(envelopes))
        for _ in range(self._steps):
            await anyio.lowlevel.checkpoint()
        say(publishing=len(envelopes), arrived=publishing.done())
        os.kill(os.getpid(), signal.SIGSTOP)
        return await publishing


def _freezing(when: str | None, broker: Any) -> Any:
    if when is None:
        return broker
    batch, steps = when.split(":")
    return FreezesWhilePublishing(broker, int(batch), int(steps))


def _log_where_all_tasks_are() -> None:
    """For who looks into a run that does not end."""
    for task in asyncio.all_tasks():
        task.print_stack()


def say(**facts: Any) -> None:
    """One write for a line: a kill leaves no half of it."""
    os.write(1, json.dumps(facts).encode() + b"\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["send", "relay", "work", "all"])
    for name in ("--database", "--broker", "--sink", "--topic", "--name"):
        parser.add_argument(name, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=0)
    parser.add_argument("--tasks", type=int, default=3)
    parser.add_argument("--aggregates", type=int, default=1)
    parser.add_argument("--freeze-while-publishing", metavar="BATCH:STEPS")
    parser.add_argument("--unsafe", choices=unsafe.WAYS)
    options = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s %(message)s")
    faults.enable()
    asyncio.run(send(options) if options.role == "send" else run(options))


if __name__ == "__main__":
    main()
