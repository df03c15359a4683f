"""The worker: takes messages from the broker to their consumers, in order per key, each effect once.

Delivery -> marked -> queue of its key, or a batch of many keys -> each consumer's chain (inbox row, handler and outbox
rows in one transaction) -> acknowledged with everything before it.
"""

import logging
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import anyio
from anyio.abc import TaskGroup

from cqrs_decor._ids import new_id
from cqrs_decor._loop import Outage, Signal, Turns
from cqrs_decor.acknowledging import Acknowledging
from cqrs_decor.batches import Batches
from cqrs_decor.broker import Broker, Delivery, Partition, Start, Subscription
from cqrs_decor.clock import Clock
from cqrs_decor.codec import Codec
from cqrs_decor.consuming import Consuming
from cqrs_decor.crash_points import reach
from cqrs_decor.envelope import Envelope
from cqrs_decor.errors import (
    BrokerUnavailableError,
    MessageKillsWorkersError,
    StoreUnavailableError,
    UnknownMessageTypeError,
    WireError,
)
from cqrs_decor.in_hand import InHand, Work
from cqrs_decor.lanes import lane_of
from cqrs_decor.observers import Observers, PartitionsPaused
from cqrs_decor.parking import Parking
from cqrs_decor.patience import Patience
from cqrs_decor.pipeline import Plan
from cqrs_decor.places import Places
from cqrs_decor.queues import Queues
from cqrs_decor.reading import Read, Reader, envelope_of
from cqrs_decor.retrying import Retrying
from cqrs_decor.routing import Routes
from cqrs_decor.stepping import Stepping
from cqrs_decor.store import Store

_logger = logging.getLogger(__name__)

_RECEIVE_WAIT = timedelta(seconds=1)
_GLANCE = timedelta(milliseconds=20)
"""So long is waited for other partitions while a busy one is paused that may go on at any moment."""
_REVOKE_LIMIT_S = 20.0
_LEAVE_LIMIT_S = 1.0
_WORTH_A_BATCH = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLimits:
    """How much a worker does at a time.

    Attributes:
        concurrency: Keys (or batches) handled at a time.
        prefetch: Messages in memory at most, those included that are done and not acknowledged yet.
        prefetch_bytes: The sum of their bodies, at most.
        batch: Messages of an optimistic batch at most.
        max_body_bytes: A larger body is parked unread.
        park_unknown: Whether an event of an unknown type is parked, or left out.
    """

    concurrency: int
    prefetch: int
    prefetch_bytes: int = 64 * 2**20
    batch: int = 50
    max_body_bytes: int
    park_unknown: bool


class Worker:
    """Consumes the topics of one service. Run any number of processes; the broker shares the partitions among them.

    Args:
        service: The consumer group.
        broker: Where messages come from.
        store: Inbox and transactions.
        consumers: The compiled handlers by event class.
        routes: Incoming types.
        codecs: By content type.
        limits: How much at a time.
        start: Where a new group begins.
        clock: Time.
        observers: Told of each outcome.
        store_turns: Of all in this process that wait for the same database.
        broker_turns: Of all in this process that wait for the same broker.

    Attributes:
        owner: The name under which it marks what it has in hand, among all workers that there ever were.
        progress_at: When something was last finished, or there was nothing to do; `clock.elapsed()`.
        paused: So many partitions have their share in memory and do not get on; the others go on.
    """

    def __init__(
        self,
        service: str,
        broker: Broker,
        store: Store,
        consumers: Mapping[type[Any], Sequence[Plan]],
        routes: Routes,
        codecs: Mapping[str, Codec],
        *,
        limits: WorkerLimits,
        start: Start,
        clock: Clock,
        observers: Observers,
        store_turns: Turns | None = None,
        broker_turns: Turns | None = None,
    ) -> None:
        self.progress_at = clock.elapsed()
        self.paused = 0
        self._service = service
        self._broker = broker
        self._store = store
        self._limits = limits
        self._start: Start = start
        self._clock = clock
        self._observers = observers
        self._topics = sorted({topic.name for topic in routes.topics(consumers)})
        self.owner = new_id()
        self._broker_outage = Outage("the broker", _logger, clock, observers, broker_turns)
        self._store_outage = Outage("the inbox", _logger, clock, observers, store_turns)

        self._places = Places(limits.concurrency)
        self._reader = Reader(service, consumers, routes, codecs, limits.max_body_bytes)
        self._patience = Patience(store, self._store_outage, clock)
        self._parking = Parking(store.inbox, self._patience, clock, observers)
        self._consuming = Consuming(
            store, self._places, self._parking, self._patience, self._store_outage, clock, observers
        )
        self._batches = Batches(
            consumers, store.inbox, self._reader, self._places, self._consuming, self._store_outage, clock, observers
        )
        plans = {plan.origin.consumer: plan for plans in consumers.values() for plan in plans}
        self._retrying = Retrying(
            service,
            {name: plan for name, plan in plans.items() if name is not None},
            store,
            self._reader,
            self._consuming,
            self._parking,
            self._patience,
            clock,
        )

        self._room = Signal()
        self._finished = Signal()
        self._much_finished = Signal()
        self._stopping = False
        self._receiving: anyio.CancelScope | None = None
        self._subscription: Subscription | None = None
        self._begin_anew()

    def _begin_anew(self) -> None:
        """A subscription has nothing to do with the one before it: all of that comes again."""
        self._in_hand = InHand(self._limits.prefetch, self._limits.prefetch_bytes, self._clock, self._room.set)
        self._queues = Queues(self._limits.concurrency, self._serve)
        self._lanes: dict[int, deque[Work]] = {}
        self._stepping = Stepping(
            self._service,
            self.owner,
            self._store.inbox,
            self._places,
            ahead=self._limits.prefetch,
            patience=self._patience,
            observers=self._observers,
            dispatch=self._dispatch_single,
        )

    # --- what others may ask ----------------------------------------------------------------------------------------

    @property
    def topics(self) -> Sequence[str]:
        return self._topics

    @property
    def handled(self) -> int:
        """So many messages consumers have handled since the start."""
        return self._consuming.handled

    @property
    def parked(self) -> deque[str]:
        """The last that were parked, each in words."""
        return self._parking.parked

    @property
    def in_flight(self) -> int:
        """So many messages are in memory that have not their outcome yet."""
        return self._in_hand.unfinished

    @property
    def idle(self) -> bool:
        return self._in_hand.unfinished == 0

    async def backlog(self) -> int:
        """Messages that wait for this worker at the broker; raises BrokerUnavailableError while it is away."""
        return 0 if self._subscription is None else await self._subscription.backlog()

    @property
    def subscribed(self) -> bool:
        return self._subscription is not None or not self._topics

    # --- run and stop -----------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Receive nothing more; `run` ends when what is in flight is done and acknowledged."""
        self._stopping = True
        self._in_hand.give_up()
        if self._receiving is not None:
            self._receiving.cancel()  # what it may have had in hand was not acknowledged, so it comes again
        self._finished.set()
        self._room.set()

    async def run(self) -> None:
        """Consume until stopped or cancelled. What is cancelled in flight is delivered again to whoever comes next."""
        while not self._stopping:
            if not self._topics:
                await self._finished.wait(_RECEIVE_WAIT.total_seconds())
                continue
            try:
                await self._consume_subscription()
            except* BrokerUnavailableError as group:
                await self._broker_outage.wait(group.exceptions[0])

    async def _consume_subscription(self) -> None:
        joining = self._broker.subscribe(
            self._service, self._topics, start=self._start, on_revoked=self._finish_revoked
        )
        async with joining as subscription:
            self._begin_anew()
            self._subscription = subscription
            self._acknowledging = Acknowledging(
                subscription, self._in_hand, self._broker_outage, lambda: self._stopping
            )
            try:
                async with anyio.create_task_group() as tasks:
                    self._tasks = tasks
                    self._queues.serve_in(tasks)
                    tasks.start_soon(self._acknowledging.run, self._finished, self._much_finished)
                    tasks.start_soon(self._retrying.run)
                    await self._receive_all(subscription, tasks)
                    await self._finish()
                    tasks.cancel_scope.cancel()
                await self._acknowledging.acknowledge()
            finally:
                self._subscription = None
                await self._leave()

    async def _finish(self) -> None:
        """After `stop`: what runs ends; what only waits is left to the next reader."""
        await self._retrying.finish()
        while self._in_hand.unfinished:
            await self._finished.wait(_RECEIVE_WAIT.total_seconds())

    async def _leave(self) -> None:
        """Take the marks off, unless it is cancelled in the middle of something: that looks like what kills workers."""
        if not self._in_hand.running:
            with anyio.move_on_after(_LEAVE_LIMIT_S, shield=True):
                await self._stepping.leave()

    async def _finish_revoked(self, partitions: Collection[Partition]) -> None:
        """Before partitions go: finish what runs, drop what waits, acknowledge what is done."""
        works = self._in_hand.give_up(partitions)
        with anyio.move_on_after(_REVOKE_LIMIT_S):
            await self._in_hand.until_still(works)
        if self._subscription is not None:
            await self._acknowledging.acknowledge()
        self._in_hand.forget(partitions)
        await self._stepping.leave(partitions)

    # --- receive ----------------------------------------------------------------------------------------------------

    async def _receive_all(self, subscription: Subscription, tasks: TaskGroup) -> None:
        while not self._stopping:
            works = self._in_hand.take(await self._receive(subscription))
            if self._stopping:
                self._in_hand.give_up()
            if works:
                reach("worker.received")
                for work in await self._stepping.admit(works, tasks):
                    self._dispatch(work)
            elif self.idle:
                self.progress_at = self._clock.elapsed()

    async def _receive(self, subscription: Subscription) -> Sequence[Delivery]:
        """What comes next of the partitions that are not full; nothing if there is no room, or on a stop."""
        wait = await self._room_for_more()
        room = self._in_hand.room()
        if room <= 0 or self._stopping:
            return ()
        deliveries: Sequence[Delivery] = ()
        try:
            with anyio.CancelScope() as self._receiving:
                deliveries = await subscription.receive(room, wait, paused=self._in_hand.full)
        except BrokerUnavailableError as error:
            await self._stepping.lift()
            await self._broker_outage.wait(error)
        else:
            self._broker_outage.over()
        return deliveries

    async def _room_for_more(self) -> timedelta:
        """Wait a moment for room where there is none; returns how long to wait for messages."""
        if self._in_hand.room() <= 0:
            await self._room.wait(_RECEIVE_WAIT.total_seconds())
        stuck, full = self._in_hand.stuck, self._in_hand.full
        self._tell_paused(len(stuck))
        if len(full) == len(stuck):
            return _RECEIVE_WAIT
        await self._room.wait(_GLANCE.total_seconds())
        return _RECEIVE_WAIT if len(self._in_hand.full) == len(stuck) else _GLANCE

    def _tell_paused(self, paused: int) -> None:
        if paused != self.paused:
            self.paused = paused
            self._observers.notice(PartitionsPaused(group=self._service, paused=paused))

    # --- queue ------------------------------------------------------------------------------------------------------

    def _dispatch(self, work: Work) -> None:
        """Into a batch if its topic is batched, unless others of its key are on their own."""
        if work.delivery.partition.topic not in self._batches.topics or work.key in self._queues:
            self._dispatch_single(work)
            return
        number = self._lane_of(work.delivery)
        lane = self._lanes.get(number)
        if lane is None:
            self._lanes[number] = deque([work])
            self._tasks.start_soon(self._serve_lane, number)
        else:
            lane.append(work)

    def _lane_of(self, delivery: Delivery) -> int:
        """Not by `hash`: another process, and a test that is run again, must take the same turns."""
        content = delivery.content
        key = content.key if isinstance(content, Envelope) else delivery.key
        return lane_of(delivery.partition.topic, key, str(delivery.position), self._limits.concurrency)

    def _dispatch_single(self, work: Work) -> bool:
        """Queue it behind the others of its key.

        Returns:
            Whether it is the first in its queue.
        """
        return self._queues.add(work)

    async def _serve(self, work: Work) -> None:
        work.running = True
        self._end(work, done=not work.given_up and await self._handle(work))

    async def _serve_lane(self, number: int) -> None:
        """One batch after the other. What a batch leaves goes on its own, and so does what comes later of its keys."""
        lane = self._lanes[number]
        while lane:
            left = await self._handle_batch([lane.popleft() for _ in range(min(len(lane), self._limits.batch))])
            for work in left:
                self._dispatch_single(work)
            for _ in range(len(lane) if left else 0):
                work = lane.popleft()
                if work.key in self._queues:
                    self._dispatch_single(work)
                else:
                    lane.append(work)
        del self._lanes[number]

    async def _handle_batch(self, batch: Sequence[Work]) -> Sequence[Work]:
        """Returns those that have to go on their own; the others have their outcome."""
        works = [work for work in batch if not work.given_up]
        if len(works) < _WORTH_A_BATCH:
            return batch
        for work in works:
            work.running = True
        done = set(await self._batches.handle(works))
        for work in works:
            if work in done:
                self._end(work, done=True)
            else:
                work.running = False
        return [work for work in batch if work not in done]

    def _end(self, work: Work, *, done: bool) -> None:
        self._in_hand.finish(work, done=done)
        self.progress_at = self._clock.elapsed()
        self._finished.set()
        if self._in_hand.has_much_done:
            self._much_finished.set()

    # --- handle -----------------------------------------------------------------------------------------------------

    async def _handle(self, work: Work) -> bool:
        """Bring a work to an outcome on record with each of its consumers; False if it was given up first."""
        if work.crashes:
            return await self._park(work, MessageKillsWorkersError(work.crashes))
        try:
            read = await self._read(work)
        except StoreUnavailableError:
            if work.given_up:  # its partition went to another reader while it waited to be alone
                return False
            raise
        except UnknownMessageTypeError as error:
            return not self._limits.park_unknown or await self._park(work, error)
        except WireError as error:
            return await self._park(work, error)
        work.expect(len(read.plans))
        return await self._consuming.by_all(work, read)

    async def _read(self, work: Work) -> Read:
        if work.place is None:
            return self._reader.read(work.delivery.content)
        async with work.place():  # decoding runs code of the user's as well: a suspect is alone with it
            return self._reader.read(work.delivery.content)

    async def _park(self, work: Work, error: WireError) -> bool:
        envelope = envelope_of(work.delivery, self._clock)
        for consumer in self._reader.concerned(work.delivery, error):
            if not await self._parking.park(work, consumer, envelope, error, 0):
                return False
        return True
