"""Runs of messages in one transaction, for consumers that may be rerun: optimistic, undone as a whole if one fails."""

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from cqrs_decor._loop import Outage
from cqrs_decor.clock import Clock
from cqrs_decor.consuming import Consuming
from cqrs_decor.context import MessageContext, current_context
from cqrs_decor.crash_points import reach
from cqrs_decor.dispatch import Next
from cqrs_decor.envelope import Envelope
from cqrs_decor.errors import WireError
from cqrs_decor.in_hand import QueueKey, Work
from cqrs_decor.inbox import InboxStore, Noted
from cqrs_decor.messages import message_spec
from cqrs_decor.observers import BatchUndone, Observers
from cqrs_decor.pipeline import Plan
from cqrs_decor.places import Places
from cqrs_decor.reading import Read, Reader
from cqrs_decor.unit_of_work import UnitOfWork

_logger = logging.getLogger(__name__)

_Item = tuple[Work, Read]


class Batches:
    """Handles batches of one worker.

    A topic is batched if every consumer of it here is optimistic: otherwise messages of one key would take two ways,
    and overtake each other.

    Args:
        consumers: The compiled handlers by event class.
        inbox: Where messages are noted.
        reader: Reads them.
        places: Where a batch runs: it takes one.
        consuming: Counts and tells the outcomes.
        outage: Told when the store answers.
        clock: Time.
        observers: Told of batches that were undone.
    """

    def __init__(
        self,
        consumers: Mapping[type[Any], Sequence[Plan]],
        inbox: InboxStore,
        reader: Reader,
        places: Places,
        consuming: Consuming,
        outage: Outage,
        clock: Clock,
        observers: Observers,
    ) -> None:
        self.topics = _batched_topics(consumers)
        self._inbox = inbox
        self._reader = reader
        self._places = places
        self._consuming = consuming
        self._outage = outage
        self._clock = clock
        self._observers = observers

    async def handle(self, works: Sequence[Work]) -> Collection[Work]:
        """Handle works of batched topics, in order, each consumer's in one transaction.

        Returns:
            Those that have their outcome with each consumer. The others are to be handled one by one: nothing is noted
            of them, or they cannot be read, or have to wait behind a parked one.
        """
        items, left = self._read(works)
        by_consumer: dict[str, tuple[Plan, list[_Item]]] = {}
        for item in items:
            for plan in item[1].plans:
                by_consumer.setdefault(plan.origin.consumer or "", (plan, []))[1].append(item)
        async with self._places.one:
            for plan, share in by_consumer.values():
                left.update(await self._in_one(plan, share))
        return [work for work in works if work not in left]

    def _read(self, works: Sequence[Work]) -> tuple[list[_Item], set[Work]]:
        """What can be read, and what cannot: with that goes whatever comes after it in its key."""
        items: list[_Item] = []
        left: set[Work] = set()
        keys: set[QueueKey] = set()
        for work in works:
            try:
                read = self._reader.read(work.delivery.content)
            except WireError:  # the single way finds it out once more, and parks it
                read = None
                keys.add(work.key)
            if read is None or work.key in keys:
                left.add(work)
            else:
                items.append((work, read))
        return items, left

    async def _in_one(self, plan: Plan, items: Sequence[_Item]) -> Collection[Work]:
        """Note and handle them in one transaction; returns those that have to go one by one."""
        began = self._clock.elapsed()
        unit_of_work = UnitOfWork(plan.origin.begin)
        try:
            noted = await self._run(plan, items, unit_of_work)
        except Exception as error:  # whatever it was: the single way finds out which one failed, and judges it
            await unit_of_work.rollback()
            self._tell_undone(plan, len(items), error)
            return [work for work, _ in items]
        except BaseException:
            await unit_of_work.rollback()
            raise
        reach("worker.committed")
        self._outage.over()
        for (_, read), answer in zip(items, noted, strict=True):
            if answer is not Noted.HELD:
                outcome = "done" if answer is Noted.NEW else "duplicate"
                self._consuming.tell(plan, read.envelope, outcome, 1, began)
        return [work for (work, _), answer in zip(items, noted, strict=True) if answer is Noted.HELD]

    async def _run(self, plan: Plan, items: Sequence[_Item], unit_of_work: UnitOfWork) -> Sequence[Noted]:
        transaction = await unit_of_work.open()
        envelopes = [read.envelope for _, read in items]
        noted = await self._inbox.record_all(transaction, plan.origin.consumer or "", envelopes)
        _refuse_overtaking(envelopes, noted)
        chain = plan.batched
        if chain is None:
            raise AssertionError("a batch for a consumer that has no chain for it")
        for (_, read), answer in zip(items, noted, strict=True):
            if answer is Noted.NEW:
                await _call(chain, plan, read, unit_of_work)
        await unit_of_work.commit()
        return noted

    def _tell_undone(self, plan: Plan, messages: int, error: Exception) -> None:
        consumer, name = plan.origin.consumer or "", type(error).__name__
        self._observers.notice(BatchUndone(consumer=consumer, messages=messages, error=name))
        _logger.info(
            "a batch was undone, its messages go one by one: %s",
            name,
            extra={"action": "batch_undone", "consumer": consumer, "messages": messages},
        )


class _OvertakenError(Exception):
    """The key of a message became free while its batch was being noted: a later one must not go before it."""


def _refuse_overtaking(envelopes: Sequence[Envelope], noted: Sequence[Noted]) -> None:
    held: set[tuple[str, str | None]] = set()
    if Noted.HELD not in noted:
        return
    for envelope, answer in zip(envelopes, noted, strict=True):
        if answer is Noted.HELD:
            held.add((envelope.topic, envelope.key))
        elif answer is Noted.NEW and (envelope.topic, envelope.key) in held:
            raise _OvertakenError


async def _call(chain: Next, plan: Plan, read: Read, unit_of_work: UnitOfWork) -> None:
    context = MessageContext.of(read.message, plan.origin, envelope=read.envelope)
    context.kept.unit_of_work = unit_of_work
    token = current_context.set(context)
    try:
        await chain(read.message, context)
    finally:
        context.close()
        current_context.reset(token)


def _batched_topics(consumers: Mapping[type[Any], Sequence[Plan]]) -> frozenset[str]:
    plans_of: dict[str, list[Plan]] = {}
    for message_type, plans in consumers.items():
        plans_of.setdefault(message_spec(message_type).topic or "", []).extend(plans)
    wanted = {topic for topic, plans in plans_of.items() if any(plan.batched for plan in plans)}
    batched = {topic for topic in wanted if all(plan.batched for plan in plans_of[topic])}
    for topic in sorted(wanted - batched):
        others = sorted({plan.spec.name for plan in plans_of[topic] if not plan.batched})
        _logger.warning(
            "no batches on topic %s: %s are not optimistic", topic, ", ".join(others), extra={"action": "not_batched"}
        )
    return frozenset(batched)
