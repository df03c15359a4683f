"""A database, a broker, a sink and the processes of one test."""

import os
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from cqrs_decor.crash_points import CrashPoint
from cqrs_decor.testing.faults import freeze_environment
from cqrs_decor_sqlalchemy import SqlAlchemyStore
from tests.fault.invariants import (
    Delivered,
    Left,
    effects_happen_once,
    nothing_is_lost,
    nothing_is_stranded,
    order_is_kept,
    repeats_are_few,
    there_are_no_ghosts,
)
from tests.fault.oracle import KafkaPositions, Ledger, LogPositions, Sink
from tests.fault.processes import Victim, until
from tests.fault.victim import BATCH, PREFETCH

AGGREGATES = 7
QUIET_LIMIT_S = 60

IN_FLIGHT = 3 * BATCH + PREFETCH
"""What one process can have in hand: three batches of its relay between claim and settlement, and what its worker has
received and not acknowledged.
"""


class World:
    """Everything of one test; made by `world_of`.

    Attributes:
        cut_off: How many processes (or connections) ended with work in hand; each may cause repeats.

    Args:
        database: URL of an empty database.
        broker: `log`, or the URL of Kafka.
        topic: Also the name of the service, and so of the consumer group.
        folder: For the sink and the output of victims.
    """

    def __init__(
        self, database: str, broker: str, topic: str, folder: Path, positions: KafkaPositions | None = None
    ) -> None:
        self.ledger = Ledger(database)
        self.cut_off = 0
        self.positions = positions or LogPositions(self.ledger)
        self._database = database
        self._broker = broker
        self._topic = topic
        self._folder = folder
        self._sink = folder / "sink.db"
        self._victims: list[Victim] = []

    # --- processes --------------------------------------------------------------------------------------------------

    def start(
        self,
        role: str,
        *,
        freeze_at: tuple[CrashPoint, int] | None = None,
        freeze_while_publishing: tuple[int, int] | None = None,
        unsafe: str | None = None,
        group: int = 0,
    ) -> Victim:
        """A process that relays (`relay`), works (`work`) or both (`all`), until it is told to stop, or killed."""
        arguments = _option("--unsafe", unsafe)
        if freeze_while_publishing is not None:
            arguments += _option("--freeze-while-publishing", "{}:{}".format(*freeze_while_publishing))
        return self._start(role, arguments, freeze_at, group)

    def start_sending(
        self,
        count: int,
        *,
        seed: int,
        tasks: int = 3,
        freeze_at: tuple[CrashPoint, int] | None = None,
        unsafe: str | None = None,
        group: int = 0,
    ) -> Victim:
        """A process that writes so many entries, and ends."""
        arguments = ["--count", str(count), "--seed", str(seed), "--tasks", str(tasks)]
        arguments += ["--aggregates", str(AGGREGATES), *_option("--unsafe", unsafe)]
        return self._start("send", arguments, freeze_at, group)

    def kill(self, victim: Victim) -> None:
        victim.kill()
        self.cut_off += 1

    async def stop(self, victim: Victim) -> None:
        """SIGTERM; it must end by itself, and well. What it had done out of order may come again, as after a kill."""
        victim.terminate()
        await victim.ends_well(limit_s=30)
        self.cut_off += 1

    def kill_group(self, leader: Victim) -> None:
        """SIGKILL the leader's whole process group at once."""
        os.killpg(leader.pid, signal.SIGKILL)
        self.cut_off += len(self._victims)
        for victim in self._victims:
            victim.clear_away()

    def logs(self) -> str:
        return "\n".join(victim.log() for victim in self._victims)

    def _start(self, role: str, arguments: list[str], freeze_at: tuple[CrashPoint, int] | None, group: int) -> Victim:
        name = f"{role}{len(self._victims)}"
        environment: Mapping[str, str] = {"FAULT_TOPIC": self._topic}
        if freeze_at is not None:
            environment = {**environment, **freeze_environment(freeze_at[0], after=freeze_at[1])}
        where = ["--database", self._database, "--broker", self._broker, "--sink", str(self._sink)]
        names = ["--topic", self._topic, "--name", name]
        victim = Victim(name, [role, *where, *names, *arguments], environment, self._folder, group)
        self._victims.append(victim)
        return victim

    # --- what can be seen -------------------------------------------------------------------------------------------

    def deliveries(self) -> list[Delivered]:
        return list(Sink.deliveries(self._sink))

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

    async def handles(self, count: int, limit_s: float = 60) -> None:
        """Wait until so many effects are there."""
        await until(partial(self._has_handled, count), f"{count} entries were handled", limit_s, self.logs)

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

    async def check(self) -> None:
        """Every invariant. Call it when everything is quiet. What the processes logged stands below a failure."""
        try:
            await self._check()
        except AssertionError as error:
            error.add_note(self.logs())
            raise

    async def _check(self) -> None:
        committed, effects = await self.ledger.committed(), await self.ledger.effects()
        deliveries = self.deliveries()
        assert committed, "nothing was committed: this run proves nothing"
        there_are_no_ghosts(committed, deliveries)
        nothing_is_stranded(await self.left())
        nothing_is_lost(committed, deliveries, effects)
        effects_happen_once(effects)
        order_is_kept(deliveries)
        repeats_are_few(deliveries, at_most=self.cut_off * IN_FLIGHT)

    async def close(self) -> None:
        for victim in self._victims:
            victim.clear_away()
        await self.positions.close()
        await self.ledger.close()


@asynccontextmanager
async def world_of(
    database: str, broker: str, topic: str, folder: Path, positions: KafkaPositions | None = None
) -> AsyncIterator[World]:
    """A world with all its tables, whose processes end with the block."""
    world = World(database, broker, topic, folder, positions)
    try:
        await _make_tables(database)
        await world.ledger.create(AGGREGATES)
        Sink.create(folder / "sink.db")
        yield world
    finally:
        await world.close()


async def _make_tables(database: str) -> None:
    store = SqlAlchemyStore.from_url(database)
    try:
        await store.schema.upgrade()
    finally:
        await store.close()


def _option(name: str, value: str | None) -> list[str]:
    return [] if value is None else [name, value]
