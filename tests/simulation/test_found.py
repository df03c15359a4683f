"""What seeds have found, in the small."""

from datetime import timedelta

from cqrs_decor.envelope import Envelope
from cqrs_decor.lanes import HeldLane, lane_of
from cqrs_decor.memory import MemoryStore
from cqrs_decor.outbox import ClaimedRecord, FailedRecord, Settlement
from cqrs_decor.testing import FakeClock

LEASE = timedelta(seconds=10)


class Bench:
    """Two records of one lane, each with a key of its own."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.store = MemoryStore(clock=self.clock)

    async def write(self) -> None:
        first = lane_of("entries", "k0", "")
        second = next(key for key in map("k{}".format, range(1, 10_000)) if lane_of("entries", key, "") == first)
        transaction = await self.store.begin()
        transaction.add([self._record("refused", "k0"), self._record("kills", second)])
        await transaction.commit()

    async def take(self, owner: str) -> HeldLane:
        """The lane, once whoever had it is missed."""
        self.clock.advance(LEASE + timedelta(seconds=1))
        taken = await self.store.outbox.acquire(owner, LEASE, 100, in_hand=3)
        return next(each.lane for each in taken if each.lane.number == lane_of("entries", "k0", ""))

    async def step(self, lane: HeldLane) -> ClaimedRecord:
        (record,) = await self.store.outbox.step([lane], until=100)
        return record

    def _record(self, name: str, key: str) -> Envelope:
        return Envelope(
            id=name, source="shop", type="entry", topic="entries", key=key, data=b"{}", time=self.clock.now()
        )


async def test_a_record_that_comes_due_before_it_does_not_acquit_the_accused() -> None:
    """A record that is tried again now and then would else keep one that kills relays from ever being parked."""
    bench = Bench()
    await bench.write()
    lane = await bench.take("first")
    refused = await bench.step(lane)
    later = FailedRecord(record=refused, error="refused", delay=LEASE)
    await bench.store.outbox.settle(Settlement(lanes=[lane], failed=[later], stepped=True))
    accused = await bench.step(lane)
    lane = await bench.take("second")

    again = await bench.step(lane)
    if again.envelope.id == "refused":
        await bench.store.outbox.settle(Settlement(lanes=[lane], delivered=[again], stepped=True))
        again = await bench.step(lane)

    assert accused.envelope.id == again.envelope.id == "kills"
    assert again.crashes == 1
