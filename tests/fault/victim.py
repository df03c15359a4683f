"""One process of a small application, to be killed.

    python -m tests.fault.victim ROLE --database URL --broker log|kafka://... --sink FILE --topic NAME [...]

Roles: `send` writes entries and ends; `relay`, `work` and `all` run until SIGTERM. The application is that of
`entries.py`. Every delivery, also one that the inbox drops, is noted at the sink first.

It tells what it does, and each moment that an observer is told of, in lines of JSON on its standard output; its log
has the `action=` of each line. Where it is to die, the environment says (`cqrs_decor.testing.faults`) or
`--freeze-while-publishing`. Other options make its handler slow or some entries poisonous, or set its clock wrong.
"""

import argparse
import asyncio
import json
import logging
import random
import signal
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import anyio

from cqrs_decor import App, Settings, bootstrap
from cqrs_decor.cli.health_server import served
from cqrs_decor.clock import SystemClock
from cqrs_decor.counters import Counters
from cqrs_decor.health import Health
from cqrs_decor.observers import Observer
from cqrs_decor.testing import faults
from tests.fault import unsafe
from tests.fault.entries import Conduct, NoteDelivery, Write, Written, registry
from tests.fault.misfits import RefusesSome, WrongClock, freezing
from tests.fault.oracle import Sink
from tests.fault.parts import SETTINGS, broker_at, store_at
from tests.fault.witnesses import NotesBatches, SayMoments, WithActions, say


async def send(options: argparse.Namespace) -> None:
    """Write `--count` entries under names of this process, `--tasks` at a time. A database that is away costs entries
    that were never committed, not the process.
    """
    chosen = random.Random(options.seed)
    numbered = [f"{options.name}-{number}" for number in range(options.count)]
    aggregates = [chosen.randrange(*options.aggregates) for _ in numbered]
    entries = iter(
        [
            Write(
                entry=entry,
                aggregate=aggregate,
                note="x" * options.big.get(entry, 1),
                silent=options.in_two_transactions,
                elsewhere=aggregate in options.elsewhere,
            )
            for entry, aggregate in zip(numbered, aggregates, strict=True)
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
    counters = Counters()
    async with _app(options, {"relay": "relay", "work": "worker", "all": "all"}[options.role], counters) as app:
        health = Health(app, SystemClock(), counters)
        health.note_started()
        async with served(health, host="127.0.0.1", port=0 if options.health else None) as address:
            say(started=options.role, health=address)
            await told_to_stop.wait()
    say(ended=options.name)


@asynccontextmanager
async def _app(options: argparse.Namespace, loops: Any, *observers: Observer) -> AsyncGenerator[App]:
    sink = Sink(options.sink)
    store = store_at(options.database, pooled=options.pooler)
    broker = broker_at(options.broker, store)
    noted = NotesBatches(RefusesSome(broker, options.refuse) if options.refuse else broker, sink)
    published = unsafe.broker(options.unsafe, freezing(options.freeze_while_publishing, noted))
    app = bootstrap(
        database=unsafe.store(options.unsafe, store),
        broker=published,
        service=options.topic,
        registry=registry,
        discover=False,
        run=loops,
        middlewares=[NoteDelivery(sink)],
        observers=[SayMoments(), *observers],
        settings=Settings(**{**SETTINGS, **options.set}),
    )
    app.container.register(unsafe.PublishDirectly, instance=unsafe.publish_directly(options.unsafe, broker))
    app.container.register(Conduct, instance=Conduct(sink, options.slow, options.poison))
    if options.clock:
        app = app.configured(clock=WrongClock(*options.clock))
    async with app:
        yield app


def _log_where_all_tasks_are() -> None:
    """For who looks into a run that does not end."""
    for task in asyncio.all_tasks():
        task.print_stack()


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
    parser.add_argument("--elsewhere", type=json.loads, default=(), help="aggregates with another topic: [0, 3]")
    parser.add_argument("--pause", type=float, default=0.0, metavar="SECONDS", help="after each entry")
    parser.add_argument("--big", type=json.loads, default={}, help='notes of so many bytes: {"send0-9": 2000000}')
    parser.add_argument("--refuse", type=int, default=0, metavar="BATCHES", help="so many are refused in part")
    parser.add_argument("--freeze-while-publishing", metavar="BATCH:STEPS")
    parser.add_argument("--unsafe", choices=unsafe.WAYS)
    parser.add_argument("--health", action="store_true", help="answer probes, at an address that is told")
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
