"""A database, a broker, a sink and the processes of one test."""

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from anyio import to_thread
from sqlalchemy import make_url

from cqrs_decor._loop import cancel_and_wait
from cqrs_decor.broker import Broker
from cqrs_decor.crash_points import CrashPoint
from cqrs_decor.envelope import Envelope
from cqrs_decor.outbox import OutboxFilter
from cqrs_decor.testing.faults import freeze_environment
from cqrs_decor_sqlalchemy import SqlAlchemyStore
from tests.fault.invariants import (
    Delivered,
    InvariantBrokenError,
    Left,
    effects_happen_once,
    faults_are_visible,
    no_session_is_left_behind,
    nothing_grows,
    nothing_is_lost,
    nothing_is_stranded,
    nothing_runs_beside_itself,
    order_is_kept,
    recovers_soon,
    repeats_are_few,
    there_are_no_ghosts,
)
from tests.fault.oracle import KafkaPositions, Ledger, LogPositions, Sink
from tests.fault.parts import IN_FLIGHT, LEASE_S, broker_at
from tests.fault.processes import Footprint, Victim, until
from tests.fault.proxy import Proxy
from tests.fault.samples import Sampler
from tests.fault.setups import WIDE
from tests.services.kafka import KafkaServer
from tests.services.server import Server

AGGREGATES = 7
QUIET_LIMIT_S = 60
PATIENCE = 1 if WIDE else 3
"""Times the bound of I6. Long runs have the machine for themselves; what runs with each change may have to share it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a world stands on.

    Attributes:
        name: Store and broker, such as `postgres-kafka`.
        database: URL of an empty database.
        victims_database: As victims reach it, where that is another way (a pooler).
        broker: `log`, or the URL of Kafka.
        topic: Also the name of the service, and so of the consumer group.
        database_server: What serves the database, for a test to kill; it is the harness's own. None for SQLite.
        kafka: The harness's own Kafka, and the proxy whose address it also tells.
        pooler: What stands between victims and database.
        disk: Where the database's files lie, when that is a small disk of their own.
        seed: Of this run.
    """

    name: str
    database: str
    broker: str
    topic: str
    victims_database: str | None = None
    database_server: Server | None = None
    kafka: tuple[KafkaServer, Proxy] | None = None
    pooler: Server | None = None
    disk: Path | None = None
    partitions: int = 1
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Blow:
    """One fault as it was dealt: when, what, and how much was in the outbox then."""

    at: float
    what: str
    in_flight: int | None


@dataclass(slots=True)
class Course:
    """What happened in a run, for the report."""

    began: float = field(default_factory=time.monotonic)
    blows: list[Blow] = field(default_factory=list[Blow])
    over_at: float | None = None
    recovery_s: float | None = None
    committed: int = 0
    delivered: int = 0
    violations: list[str] = field(default_factory=list[str])


class World:
    """Everything of one test; made by `world_of`.

    Attributes:
        cut_off: How many processes (or connections) ended with work in hand; each may cause repeats.
        chance: Seeded: every choice of a scenario comes from it.
        course: What happened, for the report.

    Args:
        setup: Where everything is.
        folder: For the sink and the output of victims.
    """

    def __init__(self, setup: Setup, folder: Path) -> None:
        self.setup = setup
        self.ledger = Ledger(setup.database)
        self.cut_off = 0
        self.chance = random.Random(setup.seed)
        self.course = Course()
        self.positions = _positions(setup, self.ledger)
        self.sampler = Sampler(self.ledger, folder / "sink.db")
        self._database = setup.victims_database or setup.database
        self._broker = setup.broker
        self._folder = folder
        self._sink = folder / "sink.db"
        self._victims: list[Victim] = []
        self._watched: list[tuple[Victim, Footprint]] = []
        self._sessions: int | None = None
        self._elsewhere: str | None = None
        self._proxies = ExitStack()
        self._sampling: asyncio.Task[None] | None = None

    # --- processes --------------------------------------------------------------------------------------------------

    def start(
        self,
        role: str,
        *options: str,
        freeze_at: tuple[CrashPoint, int] | None = None,
        freeze_while_publishing: tuple[int, int] | None = None,
        unsafe: str | None = None,
        version: int = 1,
        group: int = 0,
    ) -> Victim:
        """A process that relays (`relay`), works (`work`) or both (`all`), until it is told to stop, or killed.

        Args:
            role: What it does.
            options: More for its command line: see `tests.fault.victim`.
            freeze_at: Where it stops itself, and at which time.
            freeze_while_publishing: In which batch, and after how many turns of its loop.
            unsafe: Which protection is switched off.
            version: Of the event that it knows.
            group: The process group to join; 0 for one of its own.
        """
        arguments = [*options, *_option("--unsafe", unsafe)]
        if freeze_while_publishing is not None:
            arguments += _option("--freeze-while-publishing", "{}:{}".format(*freeze_while_publishing))
        self.fault_is_over()
        return self._start(role, arguments, freeze_at, version, group)

    def start_sending(
        self,
        count: int,
        *options: str,
        tasks: int = 3,
        pause_s: float = 0.0,
        freeze_at: tuple[CrashPoint, int] | None = None,
        unsafe: str | None = None,
        version: int = 1,
        group: int = 0,
    ) -> Victim:
        """A process that writes so many entries, named `<its name>-0` and so on, and ends."""
        arguments = ["--count", str(count), "--seed", str(self.chance.randrange(10**6)), "--tasks", str(tasks)]
        arguments += [
            "--aggregates",
            "0",
            str(AGGREGATES),
            "--pause",
            str(pause_s),
            *options,
            *_option("--unsafe", unsafe),
        ]
        return self._start("send", arguments, freeze_at, version, group)

    def kill(self, victim: Victim) -> None:
        self.deal(f"kill {victim.name}")
        victim.kill()

    async def freeze(self, victim: Victim) -> None:
        """SIGSTOP: its connections stay open, and its leases run out. Only the sink it must not hold up: that is no
        part of what is tried.
        """
        self.deal(f"freeze {victim.name}")
        await until(partial(self._is_frozen, victim), f"{victim.name} stood still", 10)

    def _is_frozen(self, victim: Victim) -> bool:
        victim.pause()
        if Sink.is_free(self._sink):
            return True
        victim.resume()
        return False

    async def stop(self, victim: Victim) -> None:
        """SIGTERM; it must end by itself, and well. What it had done out of order may come again, as after a kill."""
        self.deal(f"stop {victim.name}")
        victim.terminate()
        await victim.ends_well(limit_s=30)

    def kill_group(self, leader: Victim) -> None:
        """SIGKILL the leader's whole process group at once."""
        for victim in self._victims:
            self.deal(f"kill {victim.name}")
        os.killpg(leader.pid, signal.SIGKILL)
        for victim in self._victims:
            victim.clear_away()

    async def watch(self, victim: Victim) -> None:
        """From now on it must not grow (I8), nor what the database has of it. Call it once it has done some work."""
        self._watched.append((victim, victim.footprint()))
        self._sessions = await self.ledger.sessions()

    def shows(self, victim: Victim, moment: str, action: str, **facts: Any) -> None:
        """The fault is visible (I9): this moment, where the facts are as given, and this action in the log."""
        try:
            told = len(victim.moments(moment, **facts))
            faults_are_visible(victim.name, moment, told, action, victim.logged(action))
        except InvariantBrokenError as error:
            self.course.violations.append(str(error))
            error.add_note(victim.log())
            raise

    def logs(self) -> str:
        return "\n".join(victim.log() for victim in self._victims)

    def _start(
        self,
        role: str,
        arguments: list[str],
        freeze_at: tuple[CrashPoint, int] | None,
        version: int,
        group: int,
    ) -> Victim:
        name = f"{role}{len(self._victims)}"
        environment: Mapping[str, str] = {
            "FAULT_TOPIC": self.setup.topic,
            "FAULT_VERSION": str(version),
            "PGSSLMODE": "disable",  # else libpq tries twice, with and without: connections are counted here
            "PGGSSENCMODE": "disable",
        }
        if self._elsewhere is not None:
            environment = {**environment, "FAULT_ELSEWHERE": self._elsewhere}
        if freeze_at is not None:
            environment = {**environment, **freeze_environment(freeze_at[0], after=freeze_at[1])}
        where = ["--database", self._database, "--broker", self._broker, "--sink", str(self._sink)]
        names = ["--topic", self.setup.topic, "--name", name]
        pooler = ["--pooler"] if self.setup.victims_database else []
        victim = Victim(name, [role, *where, *names, *pooler, *arguments], environment, self._folder, group)
        self._victims.append(victim)
        return victim

    # --- faults -----------------------------------------------------------------------------------------------------

    def deal(self, what: str, *, cuts_off: int = 1) -> None:
        """Note a fault, just before it is dealt, and how many processes it may cost what they have in hand."""
        self.cut_off += cuts_off
        samples = self.sampler.samples
        in_flight = samples[-1].pending if samples else None
        self.course.blows.append(Blow(at=time.monotonic(), what=what, in_flight=in_flight))
        self.course.over_at = time.monotonic()

    def fault_is_over(self) -> None:
        """From now on the time until recovery is counted (I6)."""
        if self.course.blows:
            self.course.over_at = time.monotonic()

    async def open_second_topic(self) -> None:
        """Victims that are started from now on know it: `--elsewhere` says what goes there."""
        self._elsewhere = f"{self.setup.topic}-elsewhere"
        await self._kafka().create_topic(self._elsewhere)
        self.fault_is_over()

    async def delete_second_topic(self) -> None:
        assert self._elsewhere is not None
        self.deal("a topic deleted")  # its reader starts over with its partitions
        await self._kafka().delete_topic(self._elsewhere)

    def proxy_to_database(self) -> Proxy:
        """Victims that are started from now on reach the database through it."""
        url = make_url(self._database)
        assert url.port is not None, "a file has no connection to cut"
        proxy = self._proxies.enter_context(Proxy(url.port))
        self._database = url.set(port=proxy.port).render_as_string(hide_password=False)
        return proxy

    def proxy_to_broker(self) -> Proxy:
        """Victims that are started from now on reach Kafka through it."""
        assert self.setup.kafka is not None, "a log table is reached through the database"
        proxy = self.setup.kafka[1]
        self._broker = f"kafka://127.0.0.1:{proxy.port}"
        return proxy

    async def limit_connections(self, limit: int) -> None:
        """Victims become another role than the harness, which may have so many connections; -1 for any number."""
        await self.ledger.run(f"ALTER ROLE {self.setup.topic} CONNECTION LIMIT {limit}")
        ended = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{self.setup.topic}'"
        await self.ledger.run(ended)

    async def use_a_role_of_their_own(self) -> None:
        """Limits do not hold for the superuser that the harness is."""
        role = self.setup.topic
        await self.ledger.run(f"CREATE ROLE {role} LOGIN")
        await self.ledger.run(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}")
        await self.ledger.run(f"GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {role}")
        self._database = make_url(self._database).set(username=role).render_as_string(hide_password=False)

    def reach_directly(self) -> None:
        """Victims that are started from now on go through no proxy any more."""
        self._database = self.setup.victims_database or self.setup.database
        self._broker = self.setup.broker

    async def kill_database(self) -> None:
        self.deal("kill database", cuts_off=len(self._victims))
        await to_thread.run_sync(self._database_server().kill)

    async def start_database(self) -> None:
        await to_thread.run_sync(self._database_server().start)
        self.fault_is_over()

    async def kill_broker(self) -> None:
        self.deal("kill broker", cuts_off=len(self._victims))
        await to_thread.run_sync(self._kafka().kill)

    async def start_broker(self) -> None:
        await to_thread.run_sync(self._kafka().start)
        self.fault_is_over()

    def _kafka(self) -> KafkaServer:
        assert self.setup.kafka is not None, "a log table is reached through the database"
        return self.setup.kafka[0]

    def _database_server(self) -> Server:
        assert self.setup.database_server is not None, "a file is served by nobody"
        return self.setup.database_server

    # --- what can be seen -------------------------------------------------------------------------------------------

    def deliveries(self) -> list[Delivered]:
        return list(Sink.deliveries(self._sink))

    async def in_flight(self) -> int:
        """What is in the outbox, or at the broker and not acknowledged (R2: it must be something before a kill)."""
        return await self.ledger.pending() + await self.unacknowledged()

    async def has_work_in_hand(self) -> None:
        """Wait until something is in flight (R2)."""

        async def some() -> bool:
            return await self.in_flight() > 0

        await until(some, "something was in flight", 20, self.logs)

    def called_away(self) -> int:
        """How many records may have been published twice, since their relay was too slow."""
        return sum(victim.called_away() for victim in self._victims)

    async def all_is_published(self) -> bool:
        return await self.ledger.pending() == 0

    async def unacknowledged(self) -> int:
        """What the broker has and the consumer group has not acknowledged."""
        acknowledged = await self.positions.acknowledged()
        return await self.positions.published() - acknowledged

    async def effects_not_acknowledged(self) -> int:
        """Effects that were committed, of messages that the broker would deliver again."""
        acknowledged = await self.positions.acknowledged()
        return len(await self.ledger.effects()) - acknowledged

    async def quiet(self, limit_s: float = QUIET_LIMIT_S) -> None:
        """Wait until nothing is on the way any more, neither in the outbox nor at the broker. What is still there when
        the time is up is for the invariants to complain of.
        """
        try:
            await until(self._is_quiet, "nothing was on the way", limit_s)
        except TimeoutError:
            pass  # the check that follows says what is stranded, and what is missing because of that

    async def quiet_or_stuck(self) -> None:
        """As `quiet`, for what many faults have held up: the limit is for each effect more, not for all of them."""
        handled = -1
        while not await self._is_quiet() and (now := len(await self.ledger.effects())) > handled:
            handled = now
            await self.quiet()

    async def handles(self, count: int, limit_s: float = 60) -> None:
        """Wait until so many effects are there."""
        await until(partial(self._has_handled, count), f"{count} entries were handled", limit_s, self.logs)

    async def delivers(self, count: int, limit_s: float = 60) -> None:
        """Wait until the sink has seen so many deliveries."""
        await until(lambda: len(self.deliveries()) >= count, f"{count} were delivered", limit_s, self.logs)

    async def handles_more(self, count: int, limit_s: float = 60) -> None:
        """Wait until there are so many effects more than now."""
        await self.handles(len(await self.ledger.effects()) + count, limit_s)

    async def commits(self, count: int, limit_s: float = 60) -> None:
        """Wait until so many entries are committed."""

        async def committed() -> bool:
            return len(await self.ledger.committed()) >= count

        await until(committed, f"{count} entries were committed", limit_s, self.logs)

    async def _is_quiet(self) -> bool:
        return await self.ledger.pending() == 0 and await self.unacknowledged() == 0

    async def _has_handled(self, count: int) -> bool:
        return len(await self.ledger.effects()) >= count

    async def left(self) -> Left:
        return Left(
            pending=await self.ledger.pending(),
            parked=await self.ledger.parked(),
            unacknowledged=await self.unacknowledged(),
        )

    @asynccontextmanager
    async def open_broker(self) -> AsyncGenerator[Broker]:
        """The broker for the test itself: what it publishes comes from no outbox."""
        async with self.open_store() as store:
            broker: Any = broker_at(self.setup.broker, store)
            await broker.open()
            try:
                yield broker
            finally:
                await broker.close()

    async def take_outbox(self) -> list[Envelope]:
        """What a relay would publish, taken away from it."""
        envelopes = await self.outbox()
        await self.ledger.run("DELETE FROM cqrs_outbox")
        return envelopes

    async def outbox(self) -> list[Envelope]:
        async with self.open_store() as store:
            return [record.envelope for record in await store.outbox.find(OutboxFilter(limit=10_000))]

    async def make_outbox_older(self, *, without: str = "note") -> None:
        """Write what waits as a release before did, which did not know one part of the event."""
        async with self.open_store() as store:
            for record in await store.outbox.find(OutboxFilter(limit=10_000)):
                event = json.loads(record.envelope.data)
                del event[without]
                await self.ledger.rewrite_body(record.id, json.dumps(event).encode())

    def runs(self) -> list[str]:
        """Entries, in the order in which their handlers ended for the last time."""
        ended = {span.what: span.ended for span in Sink.spans(self._sink, "run") if span.ended is not None}
        return sorted(ended, key=ended.__getitem__)

    @asynccontextmanager
    async def open_store(self) -> AsyncGenerator[SqlAlchemyStore]:
        """The store for the test itself, as an operator's tools use it."""
        store = SqlAlchemyStore.from_url(self.setup.database)
        try:
            yield store
        finally:
            await store.close()

    # --- what must hold ---------------------------------------------------------------------------------------------

    async def check(
        self,
        *,
        parked: int = 0,
        unhandled: int = 0,
        ordered: bool = True,
        at_most_repeats: int | None = None,
        lease_s: float = LEASE_S,
    ) -> None:
        """Every invariant. Call it when everything is quiet. What the processes logged stands below a failure.

        Args:
            parked: So many records or messages were parked on purpose.
            unhandled: So many entries have no effect because of that.
            ordered: Whether there is an order to keep (I4).
            at_most_repeats: Instead of what the faults so far may have caused (I5). What a process that was too slow
                lost to another, or called away from the broker, comes on top.
            lease_s: Of the relays: recovery may take as long, and five seconds (I6).
        """
        if at_most_repeats is None:
            at_most_repeats = self.cut_off * IN_FLIGHT
        at_most_repeats += sum(victim.leases_lost() for victim in self._victims) * IN_FLIGHT + self.called_away()
        await self.sampler.look()
        try:
            await self._check(parked, unhandled, at_most_repeats, (lease_s + 5) * PATIENCE)
            if ordered:
                order_is_kept(self.deliveries())
        except AssertionError as error:
            self.course.violations.append(str(error))
            error.add_note(self.logs())
            raise

    async def _check(self, parked: int, unhandled: int, at_most_repeats: int, recovery_s: float) -> None:
        committed, effects = await self.ledger.committed(), await self.ledger.effects()
        deliveries = self.deliveries()
        self.course.committed, self.course.delivered = len(committed), len(deliveries)
        assert committed, "nothing was committed: this run proves nothing"
        there_are_no_ghosts(committed, deliveries)
        nothing_is_stranded(await self.left(), parked=parked)
        nothing_is_lost(committed, deliveries, effects, unhandled=unhandled)
        effects_happen_once(effects)
        nothing_runs_beside_itself(Sink.spans(self._sink, "run"), "I3 beside: a handler for the same entry")
        repeats_are_few(deliveries, at_most=at_most_repeats)
        self._check_recovery(recovery_s)
        for victim, before in self._watched:
            nothing_grows(victim.name, before, victim.footprint())
        if self._sessions is not None:
            no_session_is_left_behind(self._sessions, await self.ledger.sessions())

    def _check_recovery(self, at_most_s: float) -> None:
        if self.course.over_at is not None:
            self.course.recovery_s = self.sampler.recovery_s(self.course.over_at)
            recovers_soon(self.course.recovery_s, at_most_s)

    def no_lane_was_in_two_hands(self) -> None:
        """No two relays had records of one lane on their way to the broker at a time."""
        batches = Sink.spans(self._sink, "publish")
        assert len({batch.process for batch in batches}) > 1, "only one relay published: this run proves nothing"
        try:
            nothing_runs_beside_itself(batches, "a lane was published")
        except InvariantBrokenError as error:
            self.course.violations.append(str(error))
            raise

    def begin_sampling(self) -> None:
        """In a task of its own: a fixture is entered and left by different tasks, which no task group survives."""
        self._sampling = asyncio.create_task(self.sampler.run())

    async def close(self) -> None:
        for victim in self._victims:
            victim.clear_away()
        if self._sampling is not None:
            await cancel_and_wait(self._sampling)
        if self.setup.kafka is not None:
            self.setup.kafka[1].heal()
        self._proxies.close()
        await self.positions.close()
        await self.ledger.close()


@asynccontextmanager
async def world_of(setup: Setup, folder: Path) -> AsyncGenerator[World]:
    """A world with all its tables, whose processes end with the block."""
    world = World(setup, folder)
    try:
        await _make_tables(setup.database)
        await world.ledger.create(AGGREGATES)
        Sink.create(folder / "sink.db")
        world.begin_sampling()
        yield world
    finally:
        await world.close()


async def _make_tables(database: str) -> None:
    store = SqlAlchemyStore.from_url(database)
    try:
        await store.schema.upgrade()
    finally:
        await store.close()


def _positions(setup: Setup, ledger: Ledger) -> KafkaPositions | LogPositions:
    if setup.kafka is None:
        return LogPositions(ledger)
    return KafkaPositions(setup.kafka[0].bootstrap, setup.topic, setup.partitions)


def _option(name: str, value: str | None) -> Sequence[str]:
    return [] if value is None else [name, value]
