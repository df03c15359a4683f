"""One process of a small application, to be killed.

    python -m tests.fault.victim ROLE --database URL --broker log|kafka://... --sink FILE --topic NAME [...]

Roles: `send` writes entries and ends; `relay`, `work` and `all` run until SIGTERM. Each entry is one transaction: it
locks its aggregate's row, takes the next number of that aggregate, and emits an event with both. The consumer writes an
effect row in its transaction; every delivery, also one that the inbox drops, is noted at the sink first.

It tells what it does, and each moment that an observer is told of, in lines of JSON on its standard output; its log
has the `action=` of each line. Where it is to die, the environment says (`cqrs_decor.testing.faults`) or
`--freeze-while-publishing`. Other options make its handler slow or some entries poisonous, or set its clock wrong.
"""

import argparse
import asyncio
import json
import logging
import os
import random
import signal
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any

import anyio
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from cqrs_decor import (
    App,
    Command,
    IntegrationEvent,
    MessageContext,
    Moment,
    Registry,
    Retry,
    Settings,
    bootstrap,
    emit,
)
from cqrs_decor.clock import SystemClock
from cqrs_decor.errors import RecordRejectedError
from cqrs_decor.lanes import lane_of
from cqrs_decor.observers import BatchPublished, MessageConsumed, MessageDispatched
from cqrs_decor.pipeline import CallNext
from cqrs_decor.testing import faults
from cqrs_decor_kafka import KafkaBroker
from cqrs_decor_sqlalchemy import LogSettings, LogTableBroker, SqlAlchemyStore, StoreSettings
from tests.fault import unsafe
from tests.fault.oracle import Sink

LEASE_S = 1.5
SESSION_S = 3
BATCH = 20
PREFETCH = 40
TOPIC = os.environ.get("FAULT_TOPIC", "entries")
VERSION = int(os.environ.get("FAULT_VERSION", "1"))
"""Of the event that this process writes and reads: an older or newer release of the same application."""

registry = Registry("fault")


class Write(Command[int]):
    """Write an entry; returns its number. A silent one emits nothing."""

    entry: str
    aggregate: int
    note: str
    silent: bool = False


class Written(IntegrationEvent, topic=TOPIC, key="aggregate", name="fault.written", version=VERSION):
    entry: str
    aggregate: int
    number: int
    note: str = "written before there were notes"


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


async def _apply(event: Written, session: AsyncSession, context: MessageContext, conduct: Conduct) -> None:
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
        if isinstance(message, Written):
            context = MessageContext.current()
            self._sink.note(context.id, message.entry, message.aggregate, message.number, context.attempt)
        return await call_next(message)


class SayMoments:
    """All but those that come with each message."""

    def notice(self, moment: Moment) -> None:
        if isinstance(moment, MessageDispatched) or (isinstance(moment, MessageConsumed) and moment.outcome == "done"):
            return
        if isinstance(moment, BatchPublished):
            say(published=moment.delivered)
        say(moment={"name": type(moment).__name__, **asdict(moment)})


class RefusesSome:
    """A broker that refuses some keys of the first so many batches, as one does whose partition has no leader."""

    def __init__(self, broker: Any, batches: int) -> None:
        self._broker = broker
        self._left = batches
        self._chance = random.Random(batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._broker, name)

    async def publish(self, envelopes: Any) -> Any:
        refused: set[str] = set()
        if self._left:
            self._left -= 1
            refused = {key for key in {envelope.key for envelope in envelopes} if self._chance.random() < 0.5}
        taken = [envelope for envelope in envelopes if envelope.key not in refused]
        outcomes = iter(await self._broker.publish(taken) if taken else [])
        no = RecordRejectedError("refusing", TOPIC, "not today")
        return [no if envelope.key in refused else next(outcomes) for envelope in envelopes]


class NotesBatches:
    """Notes at the sink which lanes are on their way to the broker, from when to when."""

    def __init__(self, broker: Any, sink: Sink) -> None:
        self._broker = broker
        self._sink = sink

    def __getattr__(self, name: str) -> Any:
        return getattr(self._broker, name)

    async def publish(self, envelopes: Any) -> Any:
        lanes = Counter(lane_of(envelope.topic, envelope.key, envelope.id) for envelope in envelopes)
        with ExitStack() as spans:
            for lane, count in lanes.items():
                spans.enter_context(self._sink.span("publish", str(lane), count))
            return await self._broker.publish(envelopes)


# --- roles ------------------------------------------------------------------------------------------------------------


async def send(options: argparse.Namespace) -> None:
    """Write `--count` entries under names of this process, `--tasks` at a time. A database that is away costs entries
    that were never committed, not the process.
    """
    chosen = random.Random(options.seed)
    numbered = [f"{options.name}-{number}" for number in range(options.count)]
    entries = iter(
        [
            Write(
                entry=entry,
                aggregate=chosen.randrange(*options.aggregates),
                note="x" * options.big.get(entry, 1),
                silent=options.in_two_transactions,
            )
            for entry in numbered
        ]
    )
    async with _app(options, "none") as app, anyio.create_task_group() as tasks:
        for _ in range(options.tasks):
            tasks.start_soon(_send_all, app, entries, options.pause)
    say(ended=options.name)


async def _send_all(app: App, entries: Any, pause_s: float) -> None:
    for command in entries:
        try:
            number = await app.send(command)
            if command.silent:
                event = Written(entry=command.entry, aggregate=command.aggregate, number=number)
                await app.publish(event)
            say(committed=command.entry)
            await anyio.sleep(pause_s)
        except Exception as error:  # what it may be is the store's business; all else must end the test
            if not app.store.is_unavailable(error) and not app.store.is_transient(error):
                raise
            say(failed=command.entry, error=type(error).__name__)
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
async def _app(options: argparse.Namespace, loops: Any) -> AsyncGenerator[App]:
    sink = Sink(options.sink)
    store = _store(options)
    broker = broker_at(options.broker, store)
    noted = NotesBatches(RefusesSome(broker, options.refuse) if options.refuse else broker, sink)
    published = unsafe.broker(options.unsafe, _freezing(options.freeze_while_publishing, noted))
    app = bootstrap(
        database=unsafe.store(options.unsafe, store),
        broker=published,
        service=options.topic,
        registry=registry,
        discover=False,
        run=loops,
        middlewares=[NoteDelivery(sink)],
        observers=[SayMoments()],
        settings=Settings(**{**SETTINGS, **options.set}),
    )
    app.container.register(unsafe.PublishDirectly, instance=unsafe.publish_directly(options.unsafe, broker))
    app.container.register(Conduct, instance=Conduct(sink, options.slow, options.poison))
    if options.clock:
        app = app.configured(clock=WrongClock(*options.clock))
    async with app:
        yield app


SETTINGS: dict[str, Any] = {
    "lease_s": LEASE_S,
    "publish_timeout_s": LEASE_S * 0.6,
    "relay_batch": BATCH,
    "worker_prefetch": PREFETCH,
    "worker_concurrency": 4,
}


def _store(options: argparse.Namespace) -> SqlAlchemyStore:
    settings = StoreSettings(timeout=timedelta(seconds=4), idle_limit=timedelta(seconds=1))
    if not options.pooler:
        return SqlAlchemyStore.from_url(options.database, settings=settings)
    asyncpg = {"statement_cache_size": 0, "prepared_statement_cache_size": 0}
    arguments = asyncpg if "+asyncpg" in options.database else {"prepare_threshold": None}
    return SqlAlchemyStore(create_async_engine(options.database, connect_args=arguments), settings=settings)


def broker_at(where: str, store: SqlAlchemyStore) -> Any:
    """Short leases and sessions: a test waits for their end after each kill."""
    if where == "log":
        settings = LogSettings(lease=timedelta(seconds=LEASE_S), beat=timedelta(seconds=LEASE_S / 4))
        return LogTableBroker.over(store.database, settings=settings)
    url = f"{where}?session_timeout_s={SESSION_S}&heartbeat_interval_s={SESSION_S / 6}"
    return KafkaBroker.from_url(f"{url}&publish_timeout_s=4&commit_timeout_s=4&connect_timeout_s=4")


class WrongClock(SystemClock):
    """A wall clock that is off, and after a second jumps by so much more. What has elapsed it measures right."""

    def __init__(self, off_s: float, jump_s: float) -> None:
        self._off = timedelta(seconds=off_s)
        self._jump = timedelta(seconds=jump_s)
        self._jumps_at = self.elapsed() + 1

    def now(self) -> datetime:
        jumped = self._jump if self.elapsed() >= self._jumps_at else timedelta(0)
        return super().now() + self._off + jumped


class WithActions(logging.Formatter):
    """The `action=` that a line of the log carries is what alerts are made of: it must be seen (I9)."""

    def format(self, record: logging.LogRecord) -> str:
        action = getattr(record, "action", None)
        return super().format(record) + (f" action={action}" if action else "")


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
    parser.add_argument("--aggregates", type=int, nargs=2, default=(0, 1), metavar=("FROM", "TO"))
    parser.add_argument("--in-two-transactions", action="store_true", help="publish what was committed before")
    parser.add_argument("--pause", type=float, default=0.0, metavar="SECONDS", help="after each entry")
    parser.add_argument("--big", type=json.loads, default={}, help='notes of so many bytes: {"send0-9": 2000000}')
    parser.add_argument("--refuse", type=int, default=0, metavar="BATCHES", help="so many are refused in part")
    parser.add_argument("--freeze-while-publishing", metavar="BATCH:STEPS")
    parser.add_argument("--unsafe", choices=unsafe.WAYS)
    parser.add_argument("--set", type=json.loads, default={}, help="settings over those of a victim, as JSON")
    parser.add_argument("--pooler", action=argparse.BooleanOptionalAction, help="the database is behind PgBouncer")
    parser.add_argument("--slow", type=float, default=0.0, metavar="SECONDS", help="what each run of the handler takes")
    parser.add_argument("--poison", type=json.loads, default={}, help='which entries end the handler: {"a-1": "raise"}')
    parser.add_argument("--clock", type=float, nargs=2, metavar=("OFF", "JUMP"), help="seconds")
    options = parser.parse_args()
    log = logging.StreamHandler()
    log.setFormatter(WithActions("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[log])
    faults.enable()
    asyncio.run(send(options) if options.role == "send" else run(options))


if __name__ == "__main__":
    main()
