"""Nothing is lost and nothing happens twice, although a process is killed again and again.

One SQLite file is everything: the business tables, the outbox, the broker (a log table) and the inbox. Three processes
run this file:

    conduct   starts the other two, sends SIGKILL to the second several times, and counts at the end
    send      places orders: each is one transaction with a row in `orders` and an event in the outbox
    work      relays the events to the log, and handles each: one transaction with a row in `shipments`

The count is made from the outside, by plain SQL: each order that was committed must have exactly one shipment.

    python examples/demo.py [--commands 3000] [--kills 4] [--seed 1]
"""

import argparse
import asyncio
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from cqrs_decor import (
    App,
    Command,
    IntegrationEvent,
    MessageContext,
    Settings,
    bootstrap,
    command_handler,
    emit,
    event_handler,
    provider,
)
from cqrs_decor_sqlalchemy import LogSettings, LogTableBroker, SqlAlchemyStore

CUSTOMERS = 20


# --- the shop: what you would write -----------------------------------------------------------------------------------


class Base(DeclarativeBase):
    pass


class Customer(Base):
    __tablename__ = "customers"
    id: Mapped[int] = mapped_column(primary_key=True)
    orders: Mapped[int]


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[int]
    number: Mapped[int]


class Shipment(Base):
    __tablename__ = "shipments"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int]
    customer: Mapped[int]
    number: Mapped[int]


class PlaceOrder(Command[int]):
    customer: int


class OrderPlaced(IntegrationEvent, topic="orders", key="customer", name="demo.order-placed"):
    """Events of one customer stay in order, since `customer` is their key."""

    order_id: int
    customer: int
    number: int


@command_handler
async def place_order(command: PlaceOrder, session: AsyncSession) -> int:
    """The order, and the event in the outbox, are committed together or not at all."""
    counted = update(Customer).where(Customer.id == command.customer).values(orders=Customer.orders + 1)
    number = await session.scalar(counted.returning(Customer.orders))
    order = Order(customer=command.customer, number=number)
    session.add(order)
    await session.flush()
    emit(OrderPlaced(order_id=order.id, customer=order.customer, number=order.number))
    return order.id


class Sink:
    """Notes each run of the handler, outside of any transaction: what is tried again is noted again."""

    def __init__(self, file: str) -> None:
        self._connection = sqlite3.connect(file, isolation_level=None)

    def note(self, message_id: str, order_id: int) -> None:
        self._connection.execute("INSERT INTO runs (message_id, order_id) VALUES (?, ?)", (message_id, order_id))


@provider(scope="app")
def sink() -> Sink:
    return Sink(os.environ["DEMO_SINK"])


@event_handler
async def ship(event: OrderPlaced, session: AsyncSession, context: MessageContext, sink: Sink) -> None:
    """Runs at least once; its shipment is there exactly once. There is no code for that here: the inbox sees to it."""
    sink.note(context.id, event.order_id)
    session.add(Shipment(order_id=event.order_id, customer=event.customer, number=event.number))


# --- two processes ----------------------------------------------------------------------------------------------------


async def send(database: str, commands: int, seed: int) -> None:
    """Place orders until there are so many. It relays nothing: events wait in the outbox."""
    chosen = random.Random(seed)
    async with bootstrap(database=database, discover=False) as app:
        for _ in range(commands):
            await app.send(PlaceOrder(customer=chosen.randrange(CUSTOMERS)))


async def work(database: str) -> None:
    """Relay and handle, until SIGTERM. Somebody will not be so polite."""
    app = _with_short_leases(database)
    told_to_stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told_to_stop.set)
    async with app:
        await told_to_stop.wait()


def _with_short_leases(database: str) -> App:
    """`bootstrap(database=..., run="all")` would do. What a killed process held is free again when its lease has ended,
    after 10 to 15 seconds by default: here nobody wants to wait so long. SQLite has one writer, so that handlers side
    by side would only wait for each other.
    """
    store = SqlAlchemyStore.from_url(database)
    log = LogSettings(lease=timedelta(seconds=1.5), beat=timedelta(seconds=0.4))
    return bootstrap(
        database=store,
        broker=LogTableBroker.over(store.database, settings=log),
        service="app",
        run="all",
        discover=False,
        settings=Settings(lease_s=1.5, relay_batch=100, worker_prefetch=200, worker_concurrency=1),
    )


# --- the one who kills, and counts ------------------------------------------------------------------------------------


def conduct(commands: int, kills: int, seed: int) -> int:
    with tempfile.TemporaryDirectory(prefix="cqrs-decor-demo-") as folder:
        outside = Outside(Path(folder))
        print(f"demo: {commands} commands, {kills} kills, seed {seed}, all in one SQLite file")
        with _child("send", outside.url, str(commands), str(seed)) as sender, _progress(commands) as show:
            _kill_again_and_again(outside, kills, commands, random.Random(seed), show)
            with _child("work", outside.url) as worker:
                _wait(lambda: show(outside) and sender.poll() is not None and outside.is_quiet(), worker, limit_s=120)
                worker.terminate()
                worker.wait(timeout=30)
        return outside.report(commands)


def _kill_again_and_again(outside: "Outside", kills: int, commands: int, chosen: random.Random, show: "Show") -> None:
    """Each time let it handle a part of the orders, see that it is in the middle of something, and kill it."""
    for number in range(1, kills + 1):
        enough = outside.handled() + chosen.randint(commands // (4 * kills), commands // (2 * kills))
        with _child("work", outside.url) as worker:
            _wait(partial(_is_in_the_middle, outside, enough, show), worker, limit_s=60)
            handled, in_flight = outside.handled(), outside.in_flight()
            assert in_flight > 0, "it had nothing in hand: killing it proves nothing"
            worker.kill()
            worker.wait()
        show.say(f"SIGKILL {number}: {handled} handled, {in_flight} under way")


def _is_in_the_middle(outside: "Outside", enough: int, show: "Show") -> bool:
    return show(outside) and outside.handled() >= enough and outside.in_flight() > 0


class Outside:
    """Knows nothing of the library: looks into the files with SQL."""

    def __init__(self, folder: Path) -> None:
        self.database, self.sink = folder / "shop.db", folder / "sink.db"
        self.url = f"sqlite+aiosqlite:///{self.database}"
        os.environ["DEMO_SINK"] = str(self.sink)
        for file, script in ((self.database, SHOP), (self.sink, SINK)):
            with closing(sqlite3.connect(file)) as connection:
                connection.executescript(script)
        asyncio.run(_make_tables(self.url))

    def handled(self) -> int:
        return self._count("SELECT count(*) FROM shipments")

    def in_flight(self) -> int:
        """In the outbox, or in the log and not yet acknowledged."""
        return self._count("SELECT count(*) FROM cqrs_outbox") + self._unacknowledged()

    def is_quiet(self) -> bool:
        return self.in_flight() == 0

    def report(self, commands: int) -> int:
        """Print what became of the orders; 0 if each has exactly one shipment."""
        orders = self._count("SELECT count(*) FROM orders")
        published = self._count("SELECT count(DISTINCT message_id) FROM cqrs_log")
        repeats = self._count("SELECT count(*) FROM cqrs_log") - published
        reruns = self._count("SELECT count(*) - count(DISTINCT message_id) FROM runs", self.sink)
        handled = self._count("SELECT count(DISTINCT order_id) FROM shipments")
        doubled = self._count("SELECT count(*) FROM shipments") - handled
        lost = self._count("SELECT count(*) FROM orders WHERE id NOT IN (SELECT order_id FROM shipments)")
        overtaken = self._count(OVERTAKEN)

        print(f"demo: {repeats} events were published again after a kill, {reruns} handler runs were tried again")
        print(f"demo: {doubled} shipments doubled, {overtaken} out of order for their customer")
        print(f"demo: {orders} commands, {published} events published, {handled} handled, {lost} lost")
        return int({orders, published, handled} != {commands} or lost + doubled + overtaken > 0)

    def _unacknowledged(self) -> int:
        return self._count(
            """
            SELECT coalesce(sum(lane.next_position - 1 - coalesce(reader.position, 0)), 0)
            FROM cqrs_log_lane AS lane
            LEFT JOIN cqrs_log_position AS reader ON reader.topic = lane.topic AND reader.lane = lane.lane
            """
        )

    def _count(self, query: str, file: Path | None = None) -> int:
        with closing(sqlite3.connect(file or self.database, timeout=10)) as connection:
            return int(connection.execute(query).fetchone()[0])


SHOP = f"""
PRAGMA journal_mode = WAL;
CREATE TABLE customers (id INTEGER PRIMARY KEY, orders INTEGER NOT NULL);
CREATE TABLE orders (id INTEGER PRIMARY KEY, customer INTEGER NOT NULL, number INTEGER NOT NULL);
CREATE TABLE shipments (
    id INTEGER PRIMARY KEY, order_id INTEGER NOT NULL, customer INTEGER NOT NULL, number INTEGER NOT NULL
);
WITH RECURSIVE count (id) AS (SELECT 0 UNION ALL SELECT id + 1 FROM count WHERE id + 1 < {CUSTOMERS})
INSERT INTO customers SELECT id, 0 FROM count;
"""

SINK = """
PRAGMA journal_mode = WAL;
CREATE TABLE runs (id INTEGER PRIMARY KEY, message_id TEXT NOT NULL, order_id INTEGER NOT NULL);
"""

OVERTAKEN = """
SELECT count(*)
FROM (SELECT number, row_number() OVER (PARTITION BY customer ORDER BY id) AS place FROM shipments)
WHERE number <> place
"""


async def _make_tables(url: str) -> None:
    """An app that is entered makes its own tables in an SQLite file; on a server `cqrs-decor db upgrade` does."""
    async with bootstrap(database=url, discover=False):
        pass


# --- processes and the bar --------------------------------------------------------------------------------------------


class Show:
    """The bar. Returns True, so that it can stand in a condition."""

    def __init__(self, progress: Progress, commands: int) -> None:
        self._progress = progress
        self._task = progress.add_task("handled", total=commands)

    def __call__(self, outside: Outside) -> bool:
        self._progress.update(self._task, completed=outside.handled())
        return True

    def say(self, line: str) -> None:
        self._progress.console.print(line, highlight=False)


@contextmanager
def _progress(commands: int) -> Generator[Show]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        yield Show(progress, commands)


@contextmanager
def _child(*arguments: str) -> Generator["subprocess.Popen[bytes]"]:
    """This file once more, in a process of its own."""
    child = subprocess.Popen([sys.executable, __file__, *arguments])
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def _wait(condition: Callable[[], bool], worker: "subprocess.Popen[bytes]", limit_s: float) -> None:
    ends = time.monotonic() + limit_s
    while not condition():
        if worker.poll() is not None:
            sys.exit(f"demo: the second process ended by itself, with {worker.returncode}")
        if time.monotonic() > ends:
            sys.exit(f"demo: nothing came of it within {limit_s:g} s")
        time.sleep(0.05)


def main() -> int:
    if sys.argv[1:2] == ["send"]:
        database, commands, seed = sys.argv[2:]
        asyncio.run(send(database, int(commands), int(seed)))
        return 0
    if sys.argv[1:2] == ["work"]:
        asyncio.run(work(*sys.argv[2:]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commands", type=int, default=3_000)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    options = parser.parse_args()
    return conduct(options.commands, options.kills, options.seed)


if __name__ == "__main__":
    sys.exit(main())
