"""The worker: takes messages from the broker to their consumers, in order per key, each effect once.

Delivery -> envelope -> message -> queue of its key -> each consumer's chain (inbox row, handler and outbox rows in one
transaction) -> acknowledged with everything before it.
"""

import logging
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import takewhile
from typing import Any

import anyio
from anyio.abc import TaskGroup

from cqrs_decor._loop import Outage, Signal
from cqrs_decor.broker import Broker, Delivery, Partition, Start, Subscription
from cqrs_decor.clock import Clock
from cqrs_decor.codec import Codec
from cqrs_decor.context import MessageContext, current_context
from cqrs_decor.crash_points import reach
from cqrs_decor.envelope import Envelope
from cqrs_decor.errors import (
    BodyTooLargeError,
    BrokerUnavailableError,
    CommitOutcomeUnknownError,
    CqrsDecorError,
    Park,
    RetryLater,
    StoreUnavailableError,
    UnknownMessageTypeError,
    WireError,
)
from cqrs_decor.inbox import DUPLICATE, ParkedMessage
from cqrs_decor.observers import MessageConsumed, Observers
from cqrs_decor.pipeline import Plan
from cqrs_decor.retry import WORKER_RETRY, Retry
from cqrs_decor.routing import Routes
from cqrs_decor.stages.retries import TRANSIENT_RETRY, is_hopeless
from cqrs_decor.store import Store

_logger = logging.getLogger(__name__)

_RECEIVE_WAIT = timedelta(seconds=1)
_RETRIES_EVERY_S = 2.0
_RETRIES_AT_ONCE = 50
_REVOKE_LIMIT_S = 20.0
_CONFLICTS = 50
"""So often a message may lose a race in the database (deadlock, busy) before it counts as a failure of its handler."""

QueueKey = tuple[object, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLimits:
    """How much a worker does at a time.

    Attributes:
        concurrency: Keys handled at a time.
        prefetch: Messages in memory at most.
        max_body_bytes: A larger body is parked unread.
        park_unknown: Whether an event of an unknown type is parked, or left out.
    """

    concurrency: int
    prefetch: int
    max_body_bytes: int
    park_unknown: bool


@dataclass(slots=True)
class _Tries:
    """How often one consumer has run for one message, and how often the database made it start over."""

    attempts: int = 0
    conflicts: int = 0


@dataclass(slots=True, eq=False)
class _Work:
    """A delivery on its way through this process."""

    delivery: Delivery
    done: bool = False


@dataclass(slots=True)
class _Progress:
    """What came from one partition and is not acknowledged yet, in order."""

    waiting: deque[_Work] = field(default_factory=deque[_Work])

    def finished_prefix(self) -> list[Delivery]:
        return [work.delivery for work in takewhile(lambda work: work.done, self.waiting)]

    def drop(self, count: int) -> None:
        for _ in range(count):
            self.waiting.popleft()


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
    ) -> None:
        self.handled = 0
        self.parked: list[str] = []
        self._service = service
        self._broker = broker
        self._store = store
        self._consumers = consumers
        self._routes = routes
        self._codecs = codecs
        self._limits = limits
        self._start: Start = start
        self._clock = clock
        self._observers = observers
        self._topics = sorted({topic.name for topic in routes.topics(consumers)})
        self._plans = {plan.origin.consumer: plan for plans in consumers.values() for plan in plans}
        self._slots = anyio.Semaphore(limits.concurrency)
        self._queues: dict[QueueKey, deque[_Work]] = {}
        self._progress: dict[Partition, _Progress] = {}
        self._revoked: set[Partition] = set()
        self._in_flight = 0
        self._room = Signal()
        self._finished = Signal()
        self._acknowledging = anyio.Lock()
        self._stopping = False
        self._stop_requested = anyio.Event()
        self._receiving: anyio.CancelScope | None = None
        self._subscription: Subscription | None = None
        self._broker_outage = Outage("the broker", _logger, clock, observers)
        self._store_outage = Outage("the inbox", _logger, clock, observers)

    @property
    def topics(self) -> Sequence[str]:
        return self._topics

    @property
    def idle(self) -> bool:
        return self._in_flight == 0

    async def backlog(self) -> int:
        """Messages that wait for this worker at the broker; raises BrokerUnavailableError while it is away."""
        return 0 if self._subscription is None else await self._subscription.backlog()

    @property
    def subscribed(self) -> bool:
        return self._subscription is not None or not self._topics

    def stop(self) -> None:
        """Receive nothing more; `run` ends when what is in flight is done and acknowledged."""
        self._stopping = True
        self._stop_requested.set()
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
            self._subscription = subscription
            self._queues, self._progress, self._revoked, self._in_flight = {}, {}, set(), 0
            try:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._acknowledge_all, subscription)
                    tasks.start_soon(self._retry_parked)
                    await self._receive_all(subscription, tasks)
                    await self._finish()
                    tasks.cancel_scope.cancel()
                await self._acknowledge(subscription)
            finally:
                self._subscription = None

    # --- receive ----------------------------------------------------------------------------------------------------

    async def _receive_all(self, subscription: Subscription, tasks: TaskGroup) -> None:
        while not self._stopping:
            room = self._limits.prefetch - self._in_flight
            if room <= 0:
                await self._room.wait(_RECEIVE_WAIT.total_seconds())
                continue
            deliveries: Sequence[Delivery] = ()
            try:
                with anyio.CancelScope() as self._receiving:
                    deliveries = await subscription.receive(room, _RECEIVE_WAIT)
            except BrokerUnavailableError as error:
                await self._broker_outage.wait(error)
                continue
            self._broker_outage.over()
            for delivery in deliveries:
                self._accept(delivery, tasks)
            if deliveries:
                reach("worker.received")

    def _accept(self, delivery: Delivery, tasks: TaskGroup) -> None:
        """Queue a delivery behind the others of its key; a task serves the queue while it has anything in it."""
        work = _Work(delivery)
        self._in_flight += 1
        self._progress.setdefault(delivery.partition, _Progress()).waiting.append(work)
        key = _queue_key(delivery)
        queue = self._queues.get(key)
        if queue is None:
            self._queues[key] = deque([work])
            tasks.start_soon(self._serve, key)
        else:
            queue.append(work)

    async def _serve(self, key: QueueKey) -> None:
        queue = self._queues[key]
        while queue:
            work = queue[0]
            if not self._stopping and work.delivery.partition not in self._revoked:
                work.done = await self._handle(work.delivery)
            queue.popleft()
            self._in_flight -= 1
            self._room.set()
            self._finished.set()
        del self._queues[key]

    # --- acknowledge ------------------------------------------------------------------------------------------------

    async def _acknowledge_all(self, subscription: Subscription) -> None:
        while True:
            await self._finished.wait(_RECEIVE_WAIT.total_seconds())
            await self._acknowledge(subscription)

    async def _acknowledge(self, subscription: Subscription) -> None:
        """Acknowledge what is done with everything before it done; repeated until the broker has it."""
        async with self._acknowledging:
            finished = [
                (progress, progress.finished_prefix())
                for partition, progress in self._progress.items()
                if partition not in self._revoked
            ]
            deliveries = [delivery for _, prefix in finished for delivery in prefix]
            if deliveries and await self._is_taken(subscription, deliveries):
                for progress, prefix in finished:  # only now: what a stop cuts off here is acknowledged at its end
                    progress.drop(len(prefix))

    async def _is_taken(self, subscription: Subscription, deliveries: Sequence[Delivery]) -> bool:
        """Acknowledge until the broker has it; False if a stop came first."""
        while True:
            reach("worker.before_ack")
            try:
                await subscription.ack(deliveries)
            except BrokerUnavailableError as error:
                await self._broker_outage.wait(error)
                if self._stopping:
                    return False  # the next reader is told again, and the inbox knows
                continue
            reach("worker.acked")
            return True

    async def _finish_revoked(self, partitions: Collection[Partition]) -> None:
        """Before partitions go: finish what runs, drop what waits, acknowledge what is done."""
        waiting = [work for partition in partitions for work in self._progress.get(partition, _Progress()).waiting]
        running = {id(queue[0]) for queue in self._queues.values() if queue}
        started = [work for work in waiting if id(work) in running]
        with anyio.move_on_after(_REVOKE_LIMIT_S):
            while any(not work.done for work in started):
                await self._clock.sleep(0.02)  # an event per message would cost more than this rare wait
        if self._subscription is not None:
            await self._acknowledge(self._subscription)
        self._revoked.update(partitions)
        for partition in partitions:
            self._progress.pop(partition, None)

    async def _finish(self) -> None:
        """After `stop`: what runs ends; what only waits is left to the next reader."""
        while self._in_flight:
            await self._finished.wait(_RECEIVE_WAIT.total_seconds())

    # --- handle -----------------------------------------------------------------------------------------------------

    async def _handle(self, delivery: Delivery) -> bool:
        """Bring one delivery to an outcome on record with each of its consumers; False if a stop came first."""
        try:
            envelope, message = self._read(delivery)
        except UnknownMessageTypeError as error:
            return not self._limits.park_unknown or await self._park_unread(delivery, error)
        except WireError as error:
            return await self._park_unread(delivery, error)
        return await self._consume_all(self._consumers.get(message.__class__, ()), envelope, message)

    def _read(self, delivery: Delivery) -> tuple[Envelope, Any]:
        if isinstance(delivery.content, WireError):
            raise delivery.content
        return delivery.content, self._decode(delivery.content)

    def _decode(self, envelope: Envelope) -> Any:
        if len(envelope.data) > self._limits.max_body_bytes:
            raise BodyTooLargeError(len(envelope.data), self._limits.max_body_bytes)
        message_type = self._routes.type_for(envelope.topic, envelope.type, envelope.version)
        if message_type not in self._consumers:
            return None  # declared here, so known, but nobody handles it
        codec = self._codecs.get(envelope.content_type.partition(";")[0].strip(), self._codecs["application/json"])
        return codec.decode(message_type, envelope.data)

    async def _consume_all(self, plans: Sequence[Plan], envelope: Envelope, message: Any) -> bool:
        """Each handler is a consumer of its own: one that fails does not hold up the others."""
        if len(plans) == 1:
            return await self._consume(plans[0], envelope, message)
        outcomes: list[bool] = []

        async def consume(plan: Plan) -> None:
            outcomes.append(await self._consume(plan, envelope, message))

        async with anyio.create_task_group() as tasks:
            for plan in plans:
                tasks.start_soon(consume, plan)
        return all(outcomes)

    async def _consume(self, plan: Plan, envelope: Envelope, message: Any, parked: ParkedMessage | None = None) -> bool:
        """Run one consumer until it is done or the message is parked; False if a stop came first.

        Waiting for the next attempt holds no place.
        """
        began = self._clock.elapsed()
        tries = _Tries()
        while True:
            tries.attempts += 1
            try:
                async with self._slots:
                    result = await self._attempt(plan, envelope, message, tries.attempts, parked)
            except Exception as error:  # whatever a handler raises is judged by its policy, none is dropped
                if not await self._wait_for_next(plan, envelope, error, tries):
                    return await self._park(plan.origin.consumer or "", envelope, error, tries.attempts)
                if self._stopping:
                    return False
            else:
                self._store_outage.over()
                self._tell(plan, envelope, "duplicate" if result is DUPLICATE else "done", tries.attempts, began)
                return True

    async def _wait_for_next(self, plan: Plan, envelope: Envelope, error: Exception, tries: _Tries) -> bool:
        """Wait before the next attempt; False when there is none. An outage or a lost race for a row is no attempt."""
        if self._is_outage(error):
            tries.attempts -= 1
            await self._store_outage.wait(error)
            return True
        if self._store.is_transient(error) and tries.conflicts < _CONFLICTS:
            tries.attempts -= 1
            tries.conflicts += 1
            await self._wait_unless_stopped(TRANSIENT_RETRY.delay(tries.conflicts))
            return True
        delay = _delay(plan.spec.options.retry or WORKER_RETRY, error, tries.attempts)
        if delay is None:
            return False
        self._tell_of_retry(plan, envelope, error, tries.attempts, delay)
        await self._wait_unless_stopped(delay)
        return True

    async def _wait_unless_stopped(self, delay: timedelta) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._cancel_at_stop, tasks.cancel_scope)
            await self._clock.sleep(delay.total_seconds())
            tasks.cancel_scope.cancel()

    async def _cancel_at_stop(self, scope: anyio.CancelScope) -> None:
        await self._stop_requested.wait()
        scope.cancel()

    async def _attempt(
        self, plan: Plan, envelope: Envelope, message: Any, attempt: int, parked: ParkedMessage | None
    ) -> Any:
        context = MessageContext.of(message, plan.origin, envelope=envelope)
        context.kept.attempt = attempt
        context.kept.parked_id = None if parked is None else parked.id
        token = current_context.set(context)
        try:
            result = await plan.own(message, context)
            reach("worker.committed")
            return result
        finally:
            context.close()
            current_context.reset(token)

    def _is_outage(self, error: Exception) -> bool:
        """Nothing about the message: the database is away, or broke during the commit, and then the inbox knows."""
        return isinstance(error, StoreUnavailableError | CommitOutcomeUnknownError) or self._store.is_unavailable(error)

    # --- park -------------------------------------------------------------------------------------------------------

    async def _park(self, consumer: str, envelope: Envelope, error: Exception, attempts: int) -> bool:
        """Keep the message aside; repeated until it is stored, since the next step is to acknowledge it."""
        parked = ParkedMessage(
            consumer=consumer,
            envelope=envelope,
            error=_described(error),
            attempts=attempts,
            parked_at=self._clock.now(),
        )
        while True:
            try:
                await self._store.inbox.park(parked)
                break
            except StoreUnavailableError as outage:
                if self._stopping:
                    return False
                await self._store_outage.wait(outage)
        self.parked.append(f"{consumer}: {envelope.type} {envelope.id}: {parked.error}")
        facts = {"action": "message_parked", "consumer": consumer, "message_id": envelope.id, "topic": envelope.topic}
        _logger.error("parked a message: %s", type(error).__name__, extra={**facts, "attempts": attempts})
        outcome = MessageConsumed(
            consumer=consumer, message=envelope.type, outcome="parked", attempts=attempts, seconds=0
        )
        self._observers.notice(outcome)
        return True

    async def _park_unread(self, delivery: Delivery, error: WireError) -> bool:
        return await self._park(self._service, _envelope_of(delivery, self._clock), error, 0)

    async def _retry_parked(self) -> None:
        """Try again what an operator asked for; whoever takes it out of the parked ones in his transaction has it."""
        consumers = [name for name in self._plans if name is not None]
        while True:
            await self._clock.sleep(_RETRIES_EVERY_S)
            try:
                for parked in await self._store.inbox.retries([*consumers, self._service], _RETRIES_AT_ONCE):
                    await self._retry(parked)
            except StoreUnavailableError as error:
                await self._store_outage.wait(error)

    async def _retry(self, parked: ParkedMessage) -> None:
        try:
            message = self._decode(parked.envelope)
        except WireError as error:
            await self._park(parked.consumer, parked.envelope, error, parked.attempts)
            return
        plan = self._plans.get(parked.consumer)
        if plan is not None:
            await self._consume(plan, parked.envelope, message, parked)
            return
        await self._consume_all(self._consumers.get(message.__class__, ()), parked.envelope, message)
        transaction = await self._store.begin()
        try:
            await self._store.inbox.unpark(transaction, parked.id)
            await transaction.commit()
        finally:
            await transaction.rollback()

    # --- tell -------------------------------------------------------------------------------------------------------

    def _tell(self, plan: Plan, envelope: Envelope, outcome: str, attempts: int, began: float) -> None:
        self.handled += outcome == "done"
        if self._observers:
            self._observers.notice(
                MessageConsumed(
                    consumer=plan.origin.consumer or "",
                    message=envelope.type,
                    outcome=outcome,
                    attempts=attempts,
                    seconds=self._clock.elapsed() - began,
                )
            )

    def _tell_of_retry(self, plan: Plan, envelope: Envelope, error: Exception, attempt: int, delay: timedelta) -> None:
        _logger.warning(
            "a consumer failed and will try again: %s",
            type(error).__name__,
            extra={
                "action": "consumer_retry",
                "consumer": plan.origin.consumer,
                "message_id": envelope.id,
                "attempt": attempt,
                "delay_s": delay.total_seconds(),
            },
        )


def _queue_key(delivery: Delivery) -> QueueKey:
    """Messages of a (topic, key) wait for each other; those without a key wait for nobody."""
    content = delivery.content
    key = content.key if isinstance(content, Envelope) else delivery.key
    if key is None:
        return (delivery.partition, delivery.position)
    return (delivery.partition.topic, key, delivery.partition.epoch)


def _delay(policy: Retry, error: Exception, attempt: int) -> timedelta | None:
    """The wait before the next attempt, or None when the message is to be parked."""
    if isinstance(error, RetryLater):
        return error.delay if attempt < policy.max_attempts else None
    if is_hopeless(error) or not policy.allows(error, attempt):
        return None
    return policy.delay(attempt)


def _described(error: Exception) -> str:
    """Type and text of an error; of one that is not ours only the type, since its text may quote the payload."""
    if isinstance(error, CqrsDecorError):
        return f"{type(error).__name__} ({error.code}): {error.problem}"
    if isinstance(error, Park | RetryLater):
        return f"{type(error).__name__}: {error}"
    return type(error).__name__


def _envelope_of(delivery: Delivery, clock: Clock) -> Envelope:
    """What there is of an envelope; where it came from stands in for the id of what has none."""
    if isinstance(delivery.content, Envelope):
        return delivery.content
    place = f"{delivery.partition.topic}/{delivery.partition.number}/{delivery.position}"
    return Envelope(
        id=place,
        source="unreadable",
        type="unreadable",
        topic=delivery.partition.topic,
        data=delivery.raw,
        time=clock.now(),
        key=delivery.key,
        content_type="application/octet-stream",
    )
