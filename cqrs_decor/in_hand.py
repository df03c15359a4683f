"""What a worker has in hand: delivered and not acknowledged yet, in order per partition, never more than agreed."""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import takewhile

import anyio

from cqrs_decor.broker import Delivery, Partition
from cqrs_decor.clock import Clock
from cqrs_decor.envelope import Envelope

_STUCK_AFTER_S = 1.0
"""A partition that is full for so long does not get on; before that it may just be busy."""


class Turn:
    """One message's time with this worker: until it is done, or until it has to be given up."""

    __slots__ = ("_naps", "given_up", "lets_others_go", "place")

    def __init__(self) -> None:
        self.given_up = False
        self.place: Callable[[], AbstractAsyncContextManager[None]] | None = None
        """Where its first attempt runs, if not in any place that is free."""
        self.lets_others_go: Callable[[], AbstractContextManager[None]] = nullcontext
        """Entered while it waits."""
        self._naps: list[anyio.CancelScope] = []

    async def nap(self, clock: Clock, seconds: float) -> None:
        """Wait; not a moment longer than until it is given up."""
        if self.given_up:
            return
        with self.lets_others_go(), anyio.CancelScope() as nap:
            self._naps.append(nap)
            try:
                await clock.sleep(seconds)
            finally:
                self._naps.remove(nap)

    def give_up(self) -> None:
        """A stop, or its partition goes to another reader: what runs may end, nothing more begins."""
        self.given_up = True
        for nap in self._naps:
            nap.cancel()

    def survived(self) -> None:
        """The process is still there after the first attempt of one consumer."""


QueueKey = tuple[object, ...]


class Work(Turn):
    """A delivery on its way through this process.

    Attributes:
        key: Works with the same one wait for each other: those of a (topic, key). One without a key waits for nobody.
        done: It has an outcome on record with each of its consumers.
        running: Something is being done about it.
        crashes: So many workers vanished with it in hand that it is not run again; 0 for all others.
    """

    __slots__ = ("_survived", "_untried", "crashes", "delivery", "done", "key", "running")

    def __init__(self, delivery: Delivery) -> None:
        super().__init__()
        self.delivery = delivery
        self.key = _queue_key(delivery)
        self.done = False
        self.running = False
        self.crashes = 0
        self._untried = 1
        self._survived: anyio.Event | None = None

    def expect(self, consumers: int) -> None:
        """So many consumers are going to try it."""
        self._untried = consumers

    def survived(self) -> None:
        self._untried -= 1
        if self._untried <= 0:
            self.over()

    def over(self) -> None:
        """Whatever happens to it from now on, it is no suspect any more."""
        self.place = None
        if self._survived is not None:
            self._survived.set()

    def watched(self) -> anyio.Event:
        """Set as soon as every consumer has tried it once and the process is still there, or it is over."""
        self._survived = anyio.Event()
        return self._survived


def _queue_key(delivery: Delivery) -> QueueKey:
    content = delivery.content
    key = content.key if isinstance(content, Envelope) else delivery.key
    if key is None:
        return (delivery.partition, delivery.position)
    return (delivery.partition.topic, key, delivery.partition.epoch)


@dataclass(slots=True)
class _Line:
    """What came from one partition and is not acknowledged yet, in order."""

    works: deque[Work] = field(default_factory=deque[Work])
    size: int = 0


class InHand:
    """All works of one subscription. Used on one event loop.

    No partition gets more than a share of what is free, which leaves room for those that have sent nothing yet: one
    that does not get on (a key that waits for its next attempt holds up every acknowledgement behind it) must not
    starve the others.

    Args:
        limit: Works at most.
        size_limit: Bytes of their bodies, at most; one message more may come in above it.
        clock: Tells how long a partition has been full.
        room: Called when there is room again where there was none.

    Source: dynamic queue length thresholds in a shared memory (Choudhury & Hahne, IEEE/ACM Transactions on Networking,
    1998).
    """

    def __init__(self, limit: int, size_limit: int, clock: Clock, room: Callable[[], None]) -> None:
        self.unfinished = 0
        self._limit = limit
        self._size_limit = size_limit
        self._clock = clock
        self._tell_of_room = room
        self._lines: dict[Partition, _Line] = {}
        self._count = 0
        self._size = 0
        self._usual_size = 1
        self._full: dict[Partition, float] = {}
        self._gone: dict[tuple[str, int], Partition] = {}
        self._changed = anyio.Event()

    @property
    def full(self) -> Collection[Partition]:
        """Partitions that have their share in hand."""
        return list(self._full)

    @property
    def stuck(self) -> Collection[Partition]:
        """Partitions that have been full for longer than it takes to work off a share."""
        before = self._clock.elapsed() - _STUCK_AFTER_S
        return [partition for partition, since in self._full.items() if since <= before]

    @property
    def running(self) -> bool:
        return any(work.running for line in self._lines.values() for work in line.works)

    @property
    def has_much_done(self) -> bool:
        """Whether so much waits for its acknowledgement that room might become short, or that little else is left."""
        done = self._count - self.unfinished
        return done * 8 >= self._limit or done * 2 >= self._count

    def room(self) -> int:
        """How many more may come in at once; 0 for none."""
        free, free_size = self._limit - self._count, self._size_limit - self._size
        if free <= 0 or (self._count and free_size <= 0):
            return 0
        return min(_share(free), _share(free_size // self._usual_size))

    def take(self, deliveries: Sequence[Delivery]) -> list[Work]:
        """Take what was delivered; what comes from a partition that is gone already is left out."""
        works = [
            Work(delivery)
            for delivery in deliveries
            if self._gone.get((delivery.partition.topic, delivery.partition.number)) != delivery.partition
        ]
        for work in works:
            line = self._lines.setdefault(work.delivery.partition, _Line())
            line.works.append(work)
            line.size += len(work.delivery.raw)
        if works:
            size = sum(len(work.delivery.raw) for work in works)
            self._usual_size = max(1, size // len(works))
            self.unfinished += len(works)
            self._count += len(works)
            self._size += size
            self._look_for_full({work.delivery.partition for work in works})
        return works

    def finish(self, work: Work, *, done: bool) -> None:
        """Nothing more is being done about this one."""
        work.running, work.done = False, done
        work.over()
        self.unfinished -= 1
        self._changed.set()

    def finished(self) -> dict[Partition, list[Delivery]]:
        """What is done with everything before it done, by partition."""
        prefixes = {
            partition: [work.delivery for work in takewhile(lambda work: work.done, line.works)]
            for partition, line in self._lines.items()
        }
        return {partition: prefix for partition, prefix in prefixes.items() if prefix}

    def drop(self, finished: dict[Partition, list[Delivery]]) -> None:
        """Forget what was acknowledged."""
        was_full = not self.room()
        for partition, prefix in finished.items():
            line = self._lines.get(partition)
            if line is None:
                continue  # it went away meanwhile
            for delivery in prefix:
                line.works.popleft()
                line.size -= len(delivery.raw)
                self._count -= 1
                self._size -= len(delivery.raw)
        if self._look_for_room(finished) or (was_full and self.room()):
            self._tell_of_room()

    def give_up(self, partitions: Collection[Partition] | None = None) -> list[Work]:
        """Give up all works, or those of these partitions; what runs goes on to the end of its attempt."""
        lines = self._lines.values() if partitions is None else [self._lines.get(each, _Line()) for each in partitions]
        works = [work for line in lines for work in line.works]
        for work in works:
            work.give_up()
        return works

    async def until_still(self, works: Collection[Work]) -> None:
        """Wait until nothing is being done about any of these."""
        while any(work.running for work in works):
            self._changed = anyio.Event()
            await self._changed.wait()

    def forget(self, partitions: Collection[Partition]) -> None:
        """These belong to somebody else from now on."""
        for partition in partitions:
            self._gone[partition.topic, partition.number] = partition
            self._full.pop(partition, None)
            line = self._lines.pop(partition, _Line())
            self._count -= len(line.works)
            self._size -= line.size
        self._tell_of_room()

    def _look_for_full(self, partitions: Iterable[Partition]) -> None:
        share, size_share = _share(self._limit - self._count), _share(self._size_limit - self._size)
        for partition in partitions:
            line = self._lines[partition]
            if len(line.works) >= share or line.size >= size_share:
                self._full.setdefault(partition, self._clock.elapsed())

    def _look_for_room(self, partitions: Iterable[Partition]) -> bool:
        """Half a share rather than one less than a share: else it would be paused and resumed all the time."""
        share, size_share = _share(self._limit - self._count), _share(self._size_limit - self._size)
        emptied = [
            partition
            for partition in partitions
            if partition in self._full
            and len(self._lines[partition].works) <= share // 2
            and self._lines[partition].size <= size_share // 2
        ]
        for partition in emptied:
            del self._full[partition]
        return bool(emptied)


def _share(free: int) -> int:
    """What one partition may have of what is free."""
    return max(1, free // 4)
