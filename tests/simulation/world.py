"""One run: processes on a database and a broker, in trouble until enough was written, then left alone."""

import asyncio
import gc
import inspect
import logging
import random
import sys
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from time import perf_counter
from types import SimpleNamespace
from typing import Any
from uuid import UUID

from cqrs_decor import Settings, _ids, assembly
from cqrs_decor.discovery import FindEntryPoints, installed
from cqrs_decor.inbox import InboxFilter
from cqrs_decor.memory import MemoryBroker
from cqrs_decor.outbox import OutboxFilter
from tests.simulation.chance import QUIET, Chance, Odds
from tests.simulation.line import Server
from tests.simulation.loop import VirtualLoop, current_owner
from tests.simulation.models import WatchedInbox, WatchedOutbox, WatchedStore
from tests.simulation.oracle import InvariantBrokenError, Oracle
from tests.simulation.process import Kind, Process, SkewedClock, Surroundings
from tests.simulation.remote import RemoteBroker
from tests.simulation.shop import CONSUMERS, SERVICE, is_plain

_TRACED = 400

_REST_WITHIN_S = 600.0
"""Virtual time for all to be done once nothing goes wrong any more; retries wait up to a minute."""

_IN_FLIGHT_BATCHES = 3

_KILLS_WORKERS = "(CD607)"
_UNLUCKY_AFTER = 3
"""So many workers are killed in a row with the same message in hand, and then it is parked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What a run is like.

    Attributes:
        messages: As many are written at least.
        rate: Messages written per second of virtual time.
        outbox, inbox: The models of both; planted bugs have their own.
        remote_broker: How processes see the broker; planted bugs have their own.
    """

    seed: int
    messages: int
    odds: Odds = field(default_factory=Odds)
    relays: int = 3
    workers: int = 3
    producers: int = 3
    aggregates: int = 60
    rate: float = 300.0
    settings: Settings = field(
        default_factory=lambda: Settings(
            lease_s=3.0,
            relay_batch=60,
            poll_interval_s=0.25,
            worker_prefetch=120,
            worker_concurrency=8,
            drain_limit_s=5.0,
        )
    )
    outbox: type[WatchedOutbox] = WatchedOutbox
    inbox: type[WatchedInbox] = WatchedInbox
    remote_broker: type[RemoteBroker] = RemoteBroker


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run came to.

    Attributes:
        digest: Equal for two runs that did the same.
        broken: What did not hold; None if all did.
        trace: The last events before.
    """

    seed: int
    messages: int
    virtual_s: float
    real_s: float
    repeats: int
    faults: Counter[str]
    digest: str
    broken: str | None = None
    trace: tuple[str, ...] = ()

    @property
    def per_minute(self) -> float:
        return self.messages / self.real_s * 60


def simulate(scenario: Scenario) -> Outcome:
    """Run a scenario to its end, or to the first promise that does not hold."""
    began = perf_counter()
    chance = Chance(scenario.seed, scenario.odds)
    loop = VirtualLoop(chance.random)
    world = World(scenario, loop, chance)
    with _seeded(chance), _alone(), _overheard(world), _without_last_words():
        try:
            loop.run_until_complete(world.run())
            broken = None
        except InvariantBrokenError as error:
            broken = str(error)
        finally:
            world.end()
            loop.close()
    return Outcome(
        seed=scenario.seed,
        messages=len(world.oracle.committed),
        virtual_s=loop.time(),
        real_s=perf_counter() - began,
        repeats=world.oracle.repeats,
        faults=chance.faults,
        digest=f"{loop.time():.6f}-{chance.random.getrandbits(64):016x}",
        broken=broken,
        trace=tuple(world.lines()) if broken else (),
    )


class World:
    """The processes of a run, and what befalls them."""

    def __init__(self, scenario: Scenario, loop: VirtualLoop, chance: Chance) -> None:
        self._scenario = scenario
        self._loop = loop
        self._chance = chance
        self._trace: deque[tuple[float, str, str, str]] = deque(maxlen=_TRACED)
        self._broken: asyncio.Future[None] = loop.create_future()
        self.oracle = Oracle(CONSUMERS, broken=self._break)
        clock = SkewedClock(loop, chance.random)
        self._inbox = scenario.inbox()
        self._store = WatchedStore(clock, scenario.outbox(clock, self.oracle), self._inbox)
        self._broker = MemoryBroker(partitions=8)
        self.around = Surroundings(
            loop=loop,
            chance=chance,
            oracle=self.oracle,
            store=self._store,
            inbox=self._inbox,
            broker=self._broker,
            database=Server("database", loop, chance, self.note),
            cluster=Server("broker", loop, chance, self.note),
            settings=scenario.settings,
            note=self.note,
            gone=self._gone,
            remote_broker=scenario.remote_broker,
        )
        self._processes: list[Process] = []
        self._dead: list[Process] = []
        self._wanted: dict[Kind, int] = {
            "relay": scenario.relays,
            "worker": scenario.workers,
            "producer": scenario.producers,
        }
        self._born = 0

    # --- trace ------------------------------------------------------------------------------------------------------

    def note(self, who: str, what: str, how: str) -> None:
        self._trace.append((self._loop.time(), who, what, how))

    def lines(self) -> Iterator[str]:
        for at, who, what, how in self._trace:
            yield f"{at:12.6f}  {who:<14} {what:<16} {how}"

    def _break(self, error: InvariantBrokenError) -> None:
        self.note("oracle", "broken", str(error))
        if not self._broken.done():
            self._broken.set_exception(error)

    # --- a run ------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        story = asyncio.ensure_future(self._story())
        await asyncio.wait([story, self._broken], return_when=asyncio.FIRST_COMPLETED)
        if self._broken.done():
            self._broken.result()
        story.result()
        self._broken.cancel()

    async def _story(self) -> None:
        for kind in self._wanted:
            for _ in range(self._wanted[kind]):
                self._begin(kind)
        troubles = asyncio.ensure_future(self._trouble())
        await self._write()
        troubles.cancel()
        await self._heal()
        await self._until_rest()
        self.oracle.at_rest(repeats_at_most=self._repeats_at_most())

    def end(self) -> None:
        """Nothing runs any more: take everything apart."""
        self._chance.use(QUIET)
        for process in self._processes:
            process.dead = True
        for process in [*self._dead, *self._processes]:
            process.bury()
        if self._broken.done() and not self._broken.cancelled():
            self._broken.exception()

    async def _write(self) -> None:
        """Have commands sent until enough messages were written."""
        scenario, chance = self._scenario, self._chance
        while len(self.oracle.committed) < scenario.messages:
            writers = [each for each in self._processes if each.kind == "producer" and each.app is not None]
            if writers:
                aggregate = f"a{chance.random.randrange(scenario.aggregates)}"
                natures = tuple(self._nature() for _ in range(chance.random.choice((1, 1, 2, 3, 5))))
                writer = chance.random.choice(writers)
                writer.start(lambda w=writer, a=aggregate, n=natures: w.write(a, n))  # type: ignore[misc]
            await asyncio.sleep(chance.random.expovariate(scenario.rate / 3.2))

    def _nature(self) -> str:
        for fault, nature in _NATURES:
            if self._chance.happens(fault):
                return nature
        return "plain"

    # --- troubles ---------------------------------------------------------------------------------------------------

    async def _trouble(self) -> None:
        """Something happens to some process, or to a server, again and again."""
        chance, odds = self._chance, self._chance.odds
        troubles = {
            "kills": self._kill,
            "stops": self._stop,
            "pauses": self._pause,
            "steps": self._step_clock,
            "outages": self._take_away,
            "cuts": self._cut,
            "changes": self._change,
        }
        rates = [getattr(odds, name) for name in troubles]
        while sum(rates):
            await asyncio.sleep(chance.random.expovariate(sum(rates)))
            name = chance.random.choices(list(troubles), rates)[0]
            chance.faults[name] += 1
            troubles[name]()

    def _any(self) -> Process:
        return self._chance.random.choice(self._processes)

    def _kill(self) -> None:
        self._any().kill("by the seed")

    def _stop(self) -> None:
        self._any().stop()

    def _pause(self) -> None:
        """SIGSTOP, for up to two leases; then SIGCONT."""
        process = self._any()
        if process.stopped:
            return
        process.stopped = True
        seconds = self._chance.random.random() * 2 * self._scenario.settings.lease_s
        self.note(process.name, "paused", f"{seconds:.3f} s")
        self._loop.call_later(seconds, self._resume, process)

    def _resume(self, process: Process) -> None:
        self.note(process.name, "resumed", "")
        self._loop.resume(process)

    def _step_clock(self) -> None:
        self._any().clock.skew = timedelta(seconds=self._chance.random.uniform(-300, 300))

    def _take_away(self) -> None:
        """A server is away for all, for up to two leases."""
        server = self._chance.random.choice((self.around.database, self.around.cluster))
        server.away_until = self._loop.time() + self._chance.random.random() * 2 * self._scenario.settings.lease_s
        self.note(server.name, "away", f"until {server.away_until:.3f}")

    def _cut(self) -> None:
        """The network between one process and a server is cut."""
        process = self._any()
        line = self._chance.random.choice((process.to_store, process.to_broker))
        line.cut_until = self._loop.time() + self._chance.random.random() * 2 * self._scenario.settings.lease_s
        self.note(process.name, "cut off", f"until {line.cut_until:.3f}")

    def _change(self) -> None:
        """A worker or a relay more, or one less."""
        kind: Kind = self._chance.random.choice(("worker", "relay"))
        usual = self._scenario.workers if kind == "worker" else self._scenario.relays
        self._wanted[kind] = usual + self._chance.random.choice((-1, 0, 1))
        alive = [each for each in self._processes if each.kind == kind]
        for process in alive[self._wanted[kind] :]:
            process.stop()
        for _ in range(self._wanted[kind] - len(alive)):
            self._begin(kind)

    def _begin(self, kind: Kind) -> None:
        self._born += 1
        process = Process(kind, f"{kind}-{self._born}", self.around)
        self._processes.append(process)
        self.note(process.name, "begins", "")
        process.begin()

    def _gone(self, process: Process) -> None:
        """It ended; another takes its place after a while."""
        process.dead = True
        self._processes.remove(process)
        self._dead.append(process)
        self.around.database.later(self._chance.random.random() * 2.0, self._replace, process.kind)

    def _replace(self, kind: Kind) -> None:
        dead, self._dead = self._dead, []
        for process in dead:
            process.bury()
        if sum(each.kind == kind for each in self._processes) < self._wanted[kind]:
            self._begin(kind)

    # --- the end ----------------------------------------------------------------------------------------------------

    async def _heal(self) -> None:
        """Nothing goes wrong any more, what was wrong is mended, and everybody is there."""
        self._chance.use(QUIET)
        self.around.mended = True
        for server in (self.around.database, self.around.cluster):
            server.away_until = 0.0
        for process in self._processes:
            process.to_store.cut_until = process.to_broker.cut_until = 0.0
        self.note("all", "healed", "")

    async def _until_rest(self) -> None:
        await self._look_for_innocent()
        until = self._loop.time() + _REST_WITHIN_S
        while left := await self._left():
            if self._loop.time() > until:
                self.oracle.refuse(f"I7 stranded: {left}")
            await self._operate()
            await asyncio.sleep(1.0)

    async def _operate(self) -> None:
        """An operator asks for everything that is parked once more."""
        parked = await self._store.outbox.find(OutboxFilter(state="parked", limit=1_000))
        await self._store.outbox.retry([each.id for each in parked], who="simulation")
        kept = await self._store.inbox.find(InboxFilter(limit=1_000))
        await self._store.inbox.retry([each.id for each in kept], who="simulation")

    async def _look_for_innocent(self) -> None:
        """Nothing is parked but what fails, or kills, whenever it is tried; what stands behind it did not fail. A plain
        message with which three workers were killed by something else, one after the other, had bad luck: nobody could
        tell it from a killer.
        """
        parked = await self._store.outbox.find(OutboxFilter(state="parked", limit=1_000))
        kept = await self._store.inbox.find(InboxFilter(held=False, limit=1_000))
        unlucky = {
            self._broker.partitions_of(topic)[partition][position].id
            for (topic, partition, position), kills in self._inbox.kills().items()
            if kills >= _UNLUCKY_AFTER
        }
        for each in (*parked, *kept):
            if is_plain(each.envelope) and not (each.envelope.id in unlucky and _KILLS_WORKERS in (each.error or "")):
                self.oracle.refuse(f"parked, though nothing ails it: {each.envelope.id}, {each.error}")

    async def _left(self) -> str:
        """What is still somewhere on the way; nothing if all is done."""
        backlog = await self._store.outbox.backlog()
        parked = await self._store.inbox.parked_count()
        unread = self._unacknowledged()
        if not (backlog.pending or backlog.parked or parked or unread):
            return ""
        return (
            f"{backlog.pending} pending and {backlog.parked} parked in the outbox, {parked} parked in the inbox, "
            f"{unread} not acknowledged"
        )

    def _unacknowledged(self) -> int:
        """By the broker's own books: a reader could only tell what it was given itself."""
        group = self._broker._groups.get(SERVICE)  # pyright: ignore[reportPrivateUsage]
        acknowledged = {} if group is None else group._acknowledged  # pyright: ignore[reportPrivateUsage]
        topics = self._broker._topics  # pyright: ignore[reportPrivateUsage]
        return sum(
            len(log) - acknowledged.get((topic, number), 0)
            for topic in topics
            for number, log in enumerate(topics[topic])
        )

    def _repeats_at_most(self) -> int:
        """Whatever made a relay uncertain may have repeated all that it had in hand."""
        return self._chance.faults.total() * _IN_FLIGHT_BATCHES * self._scenario.settings.relay_batch


_NATURES = (
    ("refused_always", "refused"),
    ("raising_always", "raises"),
    ("killing_relays", "kills relays"),
    ("killing_workers", "kills workers"),
)


@contextmanager
def _seeded(chance: Chance) -> Generator[None]:
    """Message ids and jitter come from the seed."""
    state, uuids = random.getstate(), _ids.uuid_utils
    random.seed(chance.random.getrandbits(64))
    ids: Any = SimpleNamespace(uuid7=lambda: UUID(int=chance.random.getrandbits(128)))
    _ids.uuid_utils = ids
    try:
        yield
    finally:
        _ids.uuid_utils = uuids
        random.setstate(state)


@contextmanager
def _overheard(world: "World") -> Generator[None]:
    """What the library says goes to the trace, and nowhere else."""
    logger, ear = logging.getLogger("cqrs_decor"), _Ear(world)
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    logger.addHandler(ear)
    try:
        yield
    finally:
        logger.removeHandler(ear)
        logger.setLevel(level)
        logger.propagate = propagate


class _Ear(logging.Handler):
    """Hears every warning; that a loop failed by a fault of its own is a promise broken."""

    def __init__(self, world: "World") -> None:
        super().__init__(logging.WARNING)
        self._world = world

    def handle(self, record: logging.LogRecord) -> bool:
        owner = current_owner.get()
        if owner is None or owner.dead:  # dead: it is being taken apart
            return False
        text = record.getMessage()
        self._world.note(owner.name, "says", text)
        if record.exc_info is not None:
            told = "".join(traceback.format_exception(record.exc_info[1]))
            self._world.oracle.refuse(f"{owner.name}: {text}\n{told}")
        return True


@contextmanager
def _without_last_words() -> Generator[None]:
    """What a killed process had made and not begun, or not ended, is no mistake of anybody's when it is collected."""
    hook = sys.unraisablehook

    def overhear(unraisable: Any) -> None:
        if not inspect.iscoroutine(unraisable.object) and not inspect.isasyncgen(unraisable.object):
            hook(unraisable)

    sys.unraisablehook = overhear
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
            yield
            gc.collect()
    finally:
        sys.unraisablehook = hook


@contextmanager
def _alone() -> Generator[None]:
    """What happens to be installed has no part in it, and looking for it takes longer than all else at a start."""
    load_all, assembly.load_all = assembly.load_all, _nothing_installed
    try:
        yield
    finally:
        assembly.load_all = load_all


def _nothing_installed(group: str, find: FindEntryPoints = installed) -> dict[str, Any]:
    return {}
