"""Finds the message that kills the process: marks ahead of what is dispatched, single steps after a crash.

Before a worker dispatches anything of a partition it notes up to which position it may have something in hand, far
enough ahead that one note covers many messages. A note that is still there when another worker takes over means that
the one before vanished with that in hand: everything up to there goes in single steps, each noted as a suspect before
it is dispatched. A suspect that a worker vanished with goes alone, and is parked when that has happened too often: then
the cause is found, and what has not been accused goes on as ever.
"""

import logging
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from anyio.abc import TaskGroup

from cqrs_decor.broker import Partition
from cqrs_decor.errors import StoreUnavailableError
from cqrs_decor.in_hand import Work
from cqrs_decor.inbox import InboxStore, Mark
from cqrs_decor.observers import CrashSuspected, Observers
from cqrs_decor.patience import Patience
from cqrs_decor.places import Places

T = TypeVar("T")

_logger = logging.getLogger(__name__)

_CRASHES_AT_MOST = 3


@dataclass(slots=True)
class _Steps:
    """A partition that goes in single steps.

    Attributes:
        until: Up to this position.
        waiting: What has come in of it.
        walking: Somebody takes the steps.
        explained: It is known by now what the last worker vanished with.
    """

    until: int
    waiting: deque[Work] = field(default_factory=deque[Work])
    walking: bool = False
    explained: bool = False


class Stepping:
    """Decides for one subscription what may be dispatched at once, and dispatches the rest step by step.

    Args:
        group: The consumer group.
        owner: This worker, among all that there ever were.
        inbox: Where marks are noted.
        places: Where handlers run: a suspect gets all of them.
        ahead: So many messages are to be covered by one note.
        patience: Asks the inbox until it answers: nothing is dispatched unmarked.
        observers: Told of each suspicion.
        dispatch: Gives a work to its consumers, on its own; whether nothing of its key is before it.
    """

    def __init__(
        self,
        group: str,
        owner: str,
        inbox: InboxStore,
        places: Places,
        *,
        ahead: int,
        patience: Patience,
        observers: Observers,
        dispatch: Callable[[Work], bool],
    ) -> None:
        self._group = group
        self._owner = owner
        self._inbox = inbox
        self._places = places
        self._ahead = ahead
        self._patience = patience
        self._observers = observers
        self._dispatch = dispatch
        self._until: dict[Partition, int] = {}
        self._known: set[Partition] = set()
        self._steps: dict[Partition, _Steps] = {}
        self._crashes: dict[Partition, dict[int, int]] = {}
        self._explained = False

    async def admit(self, works: Sequence[Work], tasks: TaskGroup) -> list[Work]:
        """Those that may be dispatched at once; they are marked. The others follow in single steps.

        Called by one task at a time, with what was received, in order.
        """
        await self._look_at_new({work.delivery.partition for work in works}, works)
        free = [work for work in works if work.delivery.partition not in self._steps]
        for work in works:
            steps = self._steps.get(work.delivery.partition)
            if steps is not None:
                steps.waiting.append(work)
                if not steps.walking:
                    steps.walking = True
                    tasks.start_soon(self._walk, work.delivery.partition, steps)
        await self._mark_ahead(free)
        return free

    async def leave(self, partitions: Collection[Partition] | None = None) -> None:
        """Take the marks off: nothing of these partitions is in hand any more. All of them, if none are named.

        It is tried once: a mark that stays makes the next reader careful for a while, no more.
        """
        left = self._known if partitions is None else self._known.intersection(partitions)
        self._known = self._known - left
        for partition in left:
            self._until.pop(partition, None)
            self._steps.pop(partition, None)
            self._crashes.pop(partition, None)
        await self._unmark(left)

    async def lift(self) -> None:
        """Take off the marks of what is not under suspicion, for the time of an outage of the broker: others may get
        the partitions meanwhile, and nobody has vanished. What comes after it is marked again.
        """
        lifted = [partition for partition in self._until if partition not in self._steps]
        for partition in lifted:
            del self._until[partition]
        await self._unmark(lifted)

    async def _unmark(self, partitions: Iterable[Partition]) -> None:
        places = [(partition.topic, partition.number) for partition in partitions]
        if not places:
            return
        try:
            await self._inbox.unmark(self._group, self._owner, places)
        except StoreUnavailableError as error:
            facts = {"action": "marks_left", "partitions": len(places)}
            _logger.warning("marks could not be taken off: %s", type(error).__name__, extra=facts)

    # --- marks ------------------------------------------------------------------------------------------------------

    async def _look_at_new(self, partitions: Collection[Partition], works: Sequence[Work]) -> None:
        """Whether whoever read these before has vanished."""
        new = {(each.topic, each.number): each for each in partitions if each not in self._known}
        if not new:
            return
        found = await self._ask(lambda: self._inbox.take_marks(self._group, self._owner, list(new)), works)
        if found is None:
            return
        self._known.update(new.values())
        for mark in found:
            partition = new[mark.topic, mark.partition]
            begins_at = next(work.delivery.position for work in works if work.delivery.partition == partition)
            crashes = _counted(mark, begins_at)
            self._crashes[partition] = crashes
            self._steps[partition] = _Steps(mark.until, explained=self._explained)
            self._suspect(mark, max(crashes.values(), default=0))

    async def _mark_ahead(self, works: Sequence[Work]) -> bool:
        """See that all of these are covered; False if they were given up first."""
        positions: dict[Partition, list[int]] = {}
        for work in works:
            if not work.given_up:  # its partition may have a new reader, whose mark this would replace
                positions.setdefault(work.delivery.partition, []).append(work.delivery.position)
        short = {at: each for at, each in positions.items() if each[-1] > self._until.get(at, -1)}
        if not short:
            return True
        reach = {at: each[-1] + self._ahead * _stride(each) for at, each in short.items()}
        marks = [self._mark(at, until) for at, until in reach.items()]
        if not await self._note(marks, works):
            return False
        self._until.update(reach)
        return True

    def _mark(self, partition: Partition, until: int, suspect: int | None = None) -> Mark:
        """What is known of crashes goes along: a mark for one message must not acquit the others."""
        reach = max(until, self._until.get(partition, until))
        crashes = dict(self._crashes.get(partition, {}))
        return Mark(topic=partition.topic, partition=partition.number, until=reach, suspect=suspect, crashes=crashes)

    async def _note(self, marks: Collection[Mark], works: Sequence[Work]) -> bool:
        """Note marks; False if all that they are for was given up first."""

        async def note() -> bool:
            await self._inbox.mark(self._group, self._owner, marks)
            return True

        return await self._ask(note, works) or False

    async def _ask(self, ask: Callable[[], Awaitable[T]], works: Sequence[Work]) -> T | None:
        """None if all that it is for was given up."""

        def given_up() -> bool:
            return all(work.given_up for work in works)

        return None if given_up() else await self._patience.until_answered(ask, given_up)

    # --- steps ------------------------------------------------------------------------------------------------------

    async def _walk(self, partition: Partition, steps: _Steps) -> None:
        """One message at a time, until the positions pass what the last worker had in hand, or its end is explained."""
        while steps.waiting:
            explained = steps.explained and not self._crashes.get(partition)
            if explained or steps.waiting[0].delivery.position > steps.until:
                await self._go_on(partition, steps)
                return
            work = steps.waiting.popleft()
            await self._step(partition, steps, work)
            if not steps.waiting:
                await self._note([self._mark(partition, steps.until)], [work])
        steps.walking = False

    async def _step(self, partition: Partition, steps: _Steps, work: Work) -> None:
        """Take one message in hand until each of its consumers has tried it once, or it is over.

        One that waits behind another of its key is not waited for: should it kill the process later, the next worker
        comes to it again, with nothing before it.
        """
        position = work.delivery.position
        crashes = self._crashes.get(partition, {}).get(position, 0)
        survived = work.watched()
        if crashes >= _CRASHES_AT_MOST:
            work.crashes = crashes
            self._explain()
        elif crashes:
            work.place = partial(self._alone, partition, steps, work)
        else:
            await self._note([self._mark(partition, steps.until, position)], [work])
        if not self._dispatch(work):
            return
        await survived.wait()
        self._crashes.get(partition, {}).pop(position, None)

    @asynccontextmanager
    async def _alone(self, partition: Partition, steps: _Steps, work: Work) -> AsyncGenerator[None, None]:
        """With nothing else running in this worker: should it vanish again, it was this message. Entered for reading it
        and for each try, so that its count stays until it has been tried.

        That it is out of hand is on record before the next suspect goes: else that one, when it kills, takes this one
        along.
        """
        async with self._places.all():
            if not await self._note([self._mark(partition, steps.until, work.delivery.position)], [work]):
                raise StoreUnavailableError("the inbox", "a suspect could not be noted, so it is not run")
            try:
                yield
            except Exception:  # whatever it is: the process is still there
                await self._note([self._mark(partition, steps.until)], [work])
                raise
            await self._note([self._mark(partition, steps.until)], [work])

    def _explain(self) -> None:
        """One crash has one cause, also for what is met later of the same worker. Should there be another killer after
        all, it will be found by one crash more.
        """
        self._explained = True
        for steps in self._steps.values():
            steps.explained = True

    async def _go_on(self, partition: Partition, steps: _Steps) -> None:
        """The last step has been taken: what waits goes as ever. More may come in while it is being marked."""
        marked = True
        while marked and self._goes_beyond_its_mark(partition, steps.waiting):
            marked = await self._mark_ahead(list(steps.waiting))
        self._steps.pop(partition, None)
        for work in steps.waiting:
            self._dispatch(work)

    def _goes_beyond_its_mark(self, partition: Partition, works: Iterable[Work]) -> bool:
        """Whether any of these is uncovered. What was given up is never marked, so it is not waited for."""
        until = self._until.get(partition, -1)
        return any(not work.given_up and work.delivery.position > until for work in works)

    def _suspect(self, mark: Mark, crashes: int) -> None:
        place = f"{mark.topic}/{mark.partition}"
        self._observers.notice(CrashSuspected(part="worker", place=place, until=mark.until, crashes=crashes))
        _logger.warning(
            "a worker vanished with messages of %s in hand: single steps up to position %d",
            place,
            mark.until,
            extra={"action": "crash_suspected", "place": place, "position": mark.suspect, "crashes": crashes},
        )


def _counted(mark: Mark, begins_at: int) -> dict[int, int]:
    """Crashes by position, the last one with them. What is before the first message that comes has been dealt with."""
    crashes = dict(mark.crashes)
    if mark.suspect is not None:
        crashes[mark.suspect] = crashes.get(mark.suspect, 0) + 1
    return {position: count for position, count in crashes.items() if position >= begins_at}


def _stride(positions: Sequence[int]) -> int:
    """How far apart positions are: in some brokers partitions share one row of numbers."""
    return max(1, (positions[-1] - positions[0]) // max(1, len(positions) - 1))
