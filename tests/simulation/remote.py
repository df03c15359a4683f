"""Store and broker as one process sees them: every call goes over its line, where a seed may do it harm."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Any, ClassVar, NoReturn, Protocol, TypeVar

from cqrs_decor.broker import Capabilities, Delivery, Partition, Revoked, Start, Subscription
from cqrs_decor.envelope import Envelope
from cqrs_decor.errors import (
    BrokerError,
    BrokerUnavailableError,
    CommitOutcomeUnknownError,
    RecordRejectedError,
    StoreUnavailableError,
)
from cqrs_decor.memory import MemoryBroker, MemoryStore, MemoryTransaction
from cqrs_decor.outbox import Ear, Heard, WakeUps
from cqrs_decor.store import StoreCard
from tests.simulation.line import Caller, Line, Server

T = TypeVar("T")

_DATABASE = "simulated database"
_BROKER = "simulated broker"

_ABANDONED_S = 2.0
"""A transaction whose connection is gone is rolled back within this time."""

_LISTENS_FOR_S = 20.0
"""A connection that is listened on is lost after this time on average."""

_USED_LATELY = 0.9
"""The share of transactions whose connection is not tried before its first statement."""

_SESSION_S = 2.0
"""A reader that is gone is left out of its group after this time."""

_REBALANCE_S = 3.0
"""A reader that does not let go of partitions within this time loses them."""

_CHUNK = 16
"""Envelopes that leave a process at once."""


def store_away(reason: str) -> StoreUnavailableError:
    return StoreUnavailableError(_DATABASE, reason)


def broker_away(reason: str) -> BrokerUnavailableError:
    return BrokerUnavailableError(_BROKER, reason)


class ConflictError(Exception):
    """The database chose this transaction as the victim of a deadlock."""


class Part:
    """Some part of a store: each of its methods is a call over the line, whatever it is called."""

    def __init__(self, line: Line, model: Any, *, waiting: Collection[str] = ()) -> None:
        self._line = line
        self._model = model
        self._waiting = waiting

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._model, name)

        async def call(*args: Any, **options: Any) -> Any:
            return await self._line.call(name, partial(method, *args, **options), waits=name in self._waiting)

        setattr(self, name, call)
        return call


class RemoteOutbox(Part):
    """An outbox, and the wake-ups of its database."""

    def __init__(self, line: Line, server: Server, store: MemoryStore) -> None:
        super().__init__(line, store.outbox)
        self.lane_count = store.outbox.lane_count
        model = store.outbox.wake_ups
        self.wake_ups = None if model is None else RemoteWakeUps(line, server, model)


class RemoteWakeUps:
    """Wake-ups over a connection that is lost now and then, sometimes without anybody being told."""

    def __init__(self, line: Line, server: Server, model: WakeUps) -> None:
        self._line = line
        self._server = server
        self._model = model
        self._ears: list[RemoteEar] = []

    async def send(self) -> None:
        await self._line.call("wake", self._model.send)

    def listen(self, owner: str) -> "RemoteEar":
        ear = RemoteEar(self._line, self._server, partial(self._model.listen, owner))
        self._ears.append(ear)
        return ear

    def abandon(self) -> None:
        """The process is gone: nobody listens any more."""
        for ear in self._ears:
            ear.hang_up()


class RemoteEar:
    """One connection that is listened on."""

    def __init__(self, line: Line, server: Server, listen: Callable[[], AbstractAsyncContextManager[Ear]]) -> None:
        self._line = line
        self._server = server
        self._listen = listen
        self._heard: deque[Heard] = deque()
        self._woken: asyncio.Future[None] | None = None
        self._lost = False
        self._listening: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "RemoteEar":
        await self._line.call("listen", self._begin)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hang_up()

    async def hear(self) -> Heard:
        while not self._heard:
            if self._lost:
                raise store_away("the connection that is listened on is lost")
            self._woken = self._server.loop.create_future()
            await self._woken
        return self._heard.popleft()

    def hang_up(self) -> None:
        if self._listening is not None:
            self._listening.cancel()

    async def _begin(self) -> None:
        random = self._server.chance.random
        self._listening = self._server.start(self._pass_on())
        if not self._server.chance.is_quiet:
            self._server.later(random.expovariate(1 / _LISTENS_FOR_S), self._lose)

    async def _pass_on(self) -> None:
        async with self._listen() as ear:
            while True:
                heard = await ear.hear()
                if not self._line.is_down:
                    self._server.later(self._server.chance.latency(), self._tell, heard)

    def _lose(self) -> None:
        self.hang_up()
        self._server.chance.faults["listening lost"] += 1
        if self._server.chance.random.random() < 0.5:  # else it stays half open: nothing is heard, and nothing said
            self._lost = True
            self._wake()

    def _tell(self, heard: Heard) -> None:
        self._heard.append(heard)
        self._wake()

    def _wake(self) -> None:
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)


class RemoteInbox(Part):
    """An inbox: what belongs to a transaction goes over the connection of that transaction."""

    def __init__(self, line: Line, store: MemoryStore) -> None:
        super().__init__(line, store.inbox, waiting=("park", "hold_back"))

    async def record(self, transaction: "RemoteTransaction", consumer: str, envelope: Envelope) -> Any:
        return await transaction.execute("record", lambda inner: self._model.record(inner, consumer, envelope))

    async def record_all(self, transaction: "RemoteTransaction", consumer: str, envelopes: Sequence[Envelope]) -> Any:
        return await transaction.execute("record_all", lambda inner: self._model.record_all(inner, consumer, envelopes))

    async def unpark(self, transaction: "RemoteTransaction", parked_id: int) -> Any:
        return await transaction.execute("unpark", lambda inner: self._model.unpark(inner, parked_id))


class RemoteTransaction:
    """A transaction on a connection that may break: then the database rolls it back, sooner or later.

    Args:
        ended: Told once the process has no more to do with it.
    """

    def __init__(
        self, line: Line, server: Server, inner: MemoryTransaction, ended: Callable[["RemoteTransaction"], None]
    ) -> None:
        self._line = line
        self._server = server
        self._inner = inner
        self._ended = ended
        self._broken = False
        self._rolled_back = False
        self._statement: asyncio.Task[Any] | None = None

    def add(self, envelopes: Sequence[Envelope]) -> None:
        self._inner.add(envelopes)

    def at_commit(self, change: Callable[[], object]) -> None:
        """Part of the transaction as a row would be; without a call of its own."""
        self._inner.at_commit(change)

    def mark(self) -> object:
        return self._inner.mark()

    def holds(self, mark: object) -> bool:
        return self._inner.holds(mark)

    def resource(self, kind: type[T]) -> NoReturn:
        self._inner.resource(kind)

    async def run_sync(self, function: Callable[[], T]) -> T:
        raise AssertionError("nothing in a simulation may run in a thread")

    async def execute(self, what: str, statement: Callable[[MemoryTransaction], Coroutine[Any, Any, T]]) -> T:
        """A statement that may wait for a lock."""
        if self._broken:
            raise store_away("the connection is broken")
        if self._server.chance.happens("conflict"):
            await self.rollback()
            raise ConflictError
        try:
            result: T = await self._line.call(what, partial(self._carry_out, statement), waits=True)
        except StoreUnavailableError:
            self.abandon()
            raise
        return result

    async def commit(self) -> None:
        if self._broken:
            raise store_away("the connection is broken")
        try:
            await self._line.call("commit", self._inner.commit, error=_unknown_outcome)
        except CommitOutcomeUnknownError:
            self.abandon()
            raise
        self._broken = True
        self._ended(self)

    async def rollback(self) -> None:
        """The database does it also when it is not told: the connection ends."""
        self._leave(self._server.chance.latency())

    def abandon(self) -> None:
        """The connection is gone; the database finds out after a while, and may first carry out what was sent."""
        self._leave(self._server.chance.random.random() * _ABANDONED_S)

    def _leave(self, delay: float) -> None:
        if not self._broken:
            self._broken = True
            self._server.later(delay, self._roll_back)
            self._ended(self)

    # --- what the database does -------------------------------------------------------------------------------------

    async def _carry_out(self, statement: Callable[[MemoryTransaction], Coroutine[Any, Any, T]]) -> T:
        if self._rolled_back:
            raise store_away("the transaction was rolled back")
        self._statement = asyncio.current_task()
        try:
            return await statement(self._inner)
        finally:
            self._statement = None

    def _roll_back(self) -> None:
        self._rolled_back = True
        if self._statement is not None:
            self._statement.cancel()
        carry_out(self._inner.rollback())


def _unknown_outcome(reason: str) -> CommitOutcomeUnknownError:
    return CommitOutcomeUnknownError(f"{_DATABASE} ({reason})")


def carry_out(work: Coroutine[Any, Any, T]) -> T:
    """Run what never waits."""
    try:
        work.send(None)
    except StopIteration as end:
        value: T = end.value
        return value
    raise AssertionError(f"{work!r} waits")


class RemoteStore:
    """The database over the line of one process."""

    card = StoreCard(durable=True, shared=True, concurrent_writers=True, crash_may_lose="nothing")

    def __init__(self, line: Line, server: Server, store: MemoryStore) -> None:
        self.name = _DATABASE
        self.resources: dict[type[Any], bool] = {}
        self.schema = None
        self.outbox = RemoteOutbox(line, server, store)
        self.inbox = RemoteInbox(line, store)
        self._line = line
        self._server = server
        self._store = store
        self._open: dict[RemoteTransaction, None] = {}  # in the order of their beginning, for the sake of the seed

    def __getattr__(self, name: str) -> Any:
        """The parts that a relay and a worker have no need of, unharmed."""
        return getattr(self._store, name)

    async def open(self) -> None:
        """Each call finds its own connection."""

    async def close(self) -> None:
        """None is kept."""

    async def begin(self, *, read_only: bool = False) -> RemoteTransaction:
        """A connection from the pool, which is tried first only when it has been there for long."""
        begin = partial(self._store.begin, read_only=read_only)
        fresh = self._server.chance.random.random() < _USED_LATELY
        inner = carry_out(begin()) if fresh else await self._line.call("begin", begin)
        transaction = RemoteTransaction(self._line, self._server, inner, self._forget)
        self._open[transaction] = None
        return transaction

    def _forget(self, transaction: RemoteTransaction) -> None:
        del self._open[transaction]

    def abandon(self) -> None:
        """The process is gone: so are its connections."""
        for transaction in list(self._open):
            transaction.abandon()
        if self.outbox.wake_ups is not None:
            self.outbox.wake_ups.abandon()

    def is_transient(self, error: BaseException) -> bool:
        return isinstance(error, ConflictError)

    def is_unavailable(self, error: BaseException) -> bool:
        return False

    def log_broker(self) -> None:
        return None


class Refusals(Protocol):
    """Which envelopes the broker does not take, and what else may come of them."""

    def refuses(self, envelope: Envelope) -> bool: ...

    def killer_among(self, envelopes: Sequence[Envelope]) -> int | None: ...

    def die_of(self, envelope: Envelope) -> None: ...

    def landed(self, envelope: Envelope) -> None: ...


class RemoteBroker:
    """The broker over the line of one process: what was sent lands in order, also after the process was killed."""

    capabilities = Capabilities(
        durable=True,
        ordered_by_key=True,
        replayable=True,
        shared=True,
        creates_topics=True,
        crash_may_lose="nothing",
        crash_may_repeat="what was sent and not yet answered",
        crash_may_reorder="nothing",
    )

    reader: ClassVar[type["RemoteSubscription"]]
    """How it reads; planted bugs have their own."""

    def __init__(
        self, line: Line, server: Server, broker: MemoryBroker, refusals: Refusals, owner: Caller, *, patience_s: float
    ) -> None:
        self.name = _BROKER
        self._line = line
        self._server = server
        self._broker = broker
        self._refusals = refusals
        self._owner = owner
        self._patience_s = patience_s
        self._lands_at = 0.0
        self._readers: list[RemoteSubscription] = []

    def __getattr__(self, name: str) -> Any:
        """What only `doctor` and start-up ask."""
        return getattr(self._broker, name)

    async def open(self) -> None:
        """Each call finds its own connection."""

    async def close(self) -> None:
        """None is kept."""

    async def publish(self, envelopes: Sequence[Envelope]) -> Sequence[BrokerError | None]:
        chance, loop = self._server.chance, self._server.loop
        refused: set[tuple[str, str]] = set()
        replies: list[asyncio.Future[list[BrokerError | None]]] = []
        fate = chance.fate()
        killer = self._refusals.killer_among(envelopes)
        cut_at = killer
        if killer is None and fate in ("request lost", "crash before"):
            cut_at = chance.random.randrange(len(envelopes) + 1)
        for start in range(0, len(envelopes), _CHUNK):
            chunk = envelopes[start : start + _CHUNK]
            if self._line.is_down or (cut_at is not None and start + len(chunk) > cut_at):
                if killer is not None:
                    self._refusals.die_of(envelopes[killer])
                await self._break(fate)
            slow = chance.random.random() * self._patience_s if fate in ("slow", "belated", "crash after") else 0.0
            self._lands_at = max(self._lands_at, loop.time() + chance.latency() + slow)
            replies.append(loop.create_future())
            self._server.later(self._lands_at - loop.time(), self._land, chunk, refused, replies[-1])
            await asyncio.sleep(chance.latency() / 4)
        if fate in ("belated", "crash after"):
            await self._break(fate)
        outcomes = [outcome for reply in replies for outcome in await reply]
        if fate == "reply lost":
            raise broker_away(fate)
        return outcomes

    async def _break(self, fate: str) -> NoReturn:
        """The connection breaks here, or the process dies: what was sent before is on its way."""
        if fate.startswith("crash") or self._owner.dead:
            await self._line.die(f"{fate} publish")
        raise broker_away(fate)

    def _land(
        self,
        chunk: Sequence[Envelope],
        refused: set[tuple[str, str]],
        reply: "asyncio.Future[list[BrokerError | None]]",
    ) -> None:
        outcomes: list[BrokerError | None] = []
        accepted: list[Envelope] = []
        for envelope in chunk:
            place = None if envelope.key is None else (envelope.topic, envelope.key)
            if place in refused or self._refusals.refuses(envelope):
                outcomes.append(RecordRejectedError(_BROKER, envelope.topic, "not today"))
                if place is not None:
                    refused.add(place)
            else:
                outcomes.append(None)
                accepted.append(envelope)
        for envelope in accepted:
            self._refusals.landed(envelope)
        carry_out(self._broker.publish(accepted))
        if not reply.done():
            reply.set_result(outcomes)

    def subscribe(
        self, group: str, topics: Sequence[str], *, start: Start = "earliest", on_revoked: Revoked | None = None
    ) -> "RemoteSubscription":
        reader = self.reader(self._line, self._server, self._owner, self._join(group, topics, start, on_revoked))
        self._readers.append(reader)
        return reader

    def _join(
        self, group: str, topics: Sequence[str], start: Start, on_revoked: Revoked | None
    ) -> "Callable[[], AbstractAsyncContextManager[Subscription]]":
        revoke = None if on_revoked is None else partial(self._revoke, on_revoked)
        return lambda: self._broker.subscribe(group, topics, start=start, on_revoked=revoke)

    async def _revoke(self, on_revoked: Revoked, partitions: Collection[Partition]) -> None:
        """Have the process let go of partitions, for as long as the broker waits for it."""
        letting_go = self._owner.start(lambda: _awaited(on_revoked(partitions)))
        if letting_go is not None:
            await asyncio.wait([letting_go], timeout=_REBALANCE_S)

    def abandon(self) -> None:
        """The process is gone: its readers are found missing after a while."""
        for reader in self._readers:
            self._server.later(_SESSION_S, reader.expire)


async def _awaited(work: Awaitable[None]) -> None:
    await work


class RemoteSubscription:
    """A reader of a group, whose session with the broker may end before it wants it to."""

    def __init__(
        self,
        line: Line,
        server: Server,
        owner: Caller,
        join: "Callable[[], AbstractAsyncContextManager[Subscription]]",
    ) -> None:
        self._line = line
        self._server = server
        self._owner = owner
        self._join = join
        self._session: AbstractAsyncContextManager[Subscription] | None = None
        self._inner: Subscription | None = None
        self._left = False

    async def __aenter__(self) -> "RemoteSubscription":
        try:
            await self._connect()
        except BrokerUnavailableError:
            self._left = True  # the broker may have a session all the same, that nobody keeps up
            self._server.later(_SESSION_S, self.expire)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left = True
        self._server.later(self._server.chance.latency(), self.expire)

    async def receive(self, limit: int, wait: timedelta, **options: Any) -> Sequence[Delivery]:
        fate = self._server.chance.fate()
        if self._line.is_down or fate not in ("well", "slow"):
            await asyncio.sleep(self._server.chance.latency())
            if fate.startswith("crash"):
                await self._line.die(f"{fate} receive")
            if fate in ("reply lost", "belated"):
                self.expire()  # it was away for too long
            raise broker_away(fate)
        if self._inner is None:
            await self._connect()
        assert self._inner is not None
        return await self._inner.receive(limit, wait, **options)

    async def ack(self, deliveries: Sequence[Delivery]) -> None:
        inner = self._inner
        if inner is not None:
            await self._line.call("ack", partial(inner.ack, deliveries))

    async def backlog(self) -> int:
        return 0 if self._inner is None else await self._inner.backlog()

    def expire(self) -> None:
        """The broker leaves this reader out of its group; what it had goes to the others, and nobody is asked."""
        session, self._session, self._inner = self._session, None, None
        if session is not None:
            self._server.start(session.__aexit__(None, None, None))

    async def _connect(self) -> None:
        await self._line.call("join", self._enter, waits=True)

    async def _enter(self) -> None:
        """What the broker does; also for a process that has died, or given up, meanwhile."""
        session = self._join()
        inner = await session.__aenter__()
        if self._session is not None or self._left or self._owner.dead:
            await session.__aexit__(None, None, None)
            return
        self._session, self._inner = session, inner


RemoteBroker.reader = RemoteSubscription
