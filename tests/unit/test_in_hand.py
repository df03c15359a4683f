"""Memory is bounded, and what does not get on starves nobody."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from cqrs_decor import Registry, Settings
from cqrs_decor.broker import Delivery, Partition
from cqrs_decor.in_hand import InHand
from cqrs_decor.lanes import lane_of
from cqrs_decor.memory import MemoryBroker
from cqrs_decor.observers import PartitionsPaused
from cqrs_decor.testing import FakeClock
from tests.unit.apps import eventually
from tests.unit.shop import HOURS, Moments, Paid, paid, shop_with

pytestmark = pytest.mark.feature("B6")


def deliveries(number: int, partition: Partition, *, size: int = 10, first: int = 0) -> list[Delivery]:
    envelope = paid(data=b"x" * size)
    return [
        Delivery(partition=partition, position=first + n, content=envelope, raw=envelope.data, key="a")
        for n in range(number)
    ]


P0, P1 = (Partition(topic="payments", number=number) for number in (0, 1))


def in_hand(limit: int = 100, size_limit: int = 1_000_000, **options: Any) -> InHand:
    return InHand(limit, size_limit, **{"clock": FakeClock(), "room": lambda: None, **options})


def test_a_partition_is_full_at_its_share_and_again_open_at_half_of_it() -> None:
    """One that is paused and resumed with every message would cost more than it saves."""
    hand = in_hand(limit=100)
    works = hand.take(deliveries(19, P0))
    before = list(hand.full)
    works += hand.take(deliveries(1, P0, first=19))
    full = list(hand.full)
    for work in works[:8]:
        hand.finish(work, done=True)
    hand.drop(hand.finished())
    still = list(hand.full)
    hand.finish(works[8], done=True)
    hand.drop(hand.finished())

    assert (before, full, still, list(hand.full)) == ([], [P0], [P0], [])


def test_however_many_are_stuck_there_is_room_for_another() -> None:
    """A partition that has sent nothing yet must be heard."""
    hand = in_hand(limit=1_000)
    for number in range(20):
        at = Partition(topic="payments", number=number)
        while at not in hand.full:
            assert hand.room() > 0
            hand.take(deliveries(hand.room(), at))

    assert hand.room() > 0


def test_what_is_done_and_not_acknowledged_counts() -> None:
    """Behind one message that waits for an hour a whole topic could pile up, done and still in memory."""
    hand = in_hand(limit=10)
    works = hand.take(deliveries(10, P0))
    for work in works[1:]:
        hand.finish(work, done=True)
    hand.drop(hand.finished())

    assert (hand.unfinished, hand.room()) == (1, 0)


def test_bodies_are_counted_by_size() -> None:
    """A thousand messages may be a megabyte or ten gigabytes."""
    hand = in_hand(limit=1_000, size_limit=10_000)
    hand.take(deliveries(4, P0, size=2_000))
    room = hand.room()
    hand.take(deliveries(1, P1, size=2_500))

    assert (room, hand.room()) == (1, 0)
    assert P0 in hand.full


def test_at_least_one_message_comes_in_however_large_it_is() -> None:
    """A body larger than all that is allowed must be parked, and for that it has to come in."""
    hand = in_hand(limit=10, size_limit=10)
    before = hand.room()
    (work,) = hand.take(deliveries(1, P0, size=1_000))
    full = hand.room()
    hand.finish(work, done=True)
    hand.drop(hand.finished())

    assert (before, full, hand.room()) == (2, 0, 1)


def test_what_comes_late_from_a_partition_that_is_gone_is_left_out() -> None:
    """It belongs to somebody else; acknowledging it here could pass what they have in hand."""
    hand = in_hand()
    hand.take(deliveries(3, P0))
    hand.forget([P0])

    assert hand.take(deliveries(1, P0, first=3)) == []
    assert len(hand.take(deliveries(1, Partition(topic="payments", number=0, epoch=1)))) == 1


async def test_a_stuck_key_pauses_its_partition_and_no_other() -> None:
    """Retries of an hour hold up every acknowledgement of their partition: the others must not feel it."""
    sales, moments = Registry("sales"), Moments()
    seen: list[str] = []

    @sales.event_handler(retry=HOURS)
    async def book(event: Paid) -> None:
        if event.order == sick:
            raise LookupError
        seen.append(event.order)

    orders = [str(number) for number in range(2_000)]
    sick = next(order for order in orders if lane_of("payments", order, "", 2) == 0)
    mine = [order for order in orders if lane_of("payments", order, "", 2) == 0 and order != sick]
    others = [order for order in orders if lane_of("payments", order, "", 2) == 1]
    async with shop_with(
        sales, broker=MemoryBroker(partitions=2), settings=Settings(worker_prefetch=60), observers=[moments]
    ) as shop:
        await shop.broker.publish([paid(sick), *(paid(order) for order in mine)])
        await shop.until_waiting(timedelta(hours=1))
        await eventually(lambda: len(seen) > 5)
        shop.clock.advance(timedelta(seconds=2))
        await shop.broker.publish([paid(order) for order in others])
        await eventually(lambda: set(others) <= set(seen))
        await eventually(lambda: shop.worker.paused == 1)
        taken = len(seen) - len(others)
        while sick not in seen:
            seen_before, sick_before = len(seen), sick
            sick = ""
            shop.clock.advance(timedelta(hours=1))
            await eventually(lambda before=sick_before: before in seen)
            assert len(seen) >= seen_before
            sick = sick_before
        await shop.settled()

    assert taken < 60
    assert len(seen) == 2_000
    assert [each.paused for each in moments.of(PartitionsPaused)] == [1, 0]


async def test_a_busy_partition_is_not_told_of_as_paused() -> None:
    """It is full all the time, and gets on: no reason to page anybody."""
    sales, moments = Registry("sales"), Moments()

    @sales.event_handler
    async def book(event: Paid) -> None:
        await asyncio.sleep(0)

    settings = Settings(worker_prefetch=20)
    async with shop_with(sales, broker=MemoryBroker(partitions=1), settings=settings, observers=[moments]) as shop:
        await shop.receive(*(paid(str(number)) for number in range(1_000)))

        assert shop.worker.handled == 1_000
    assert moments.of(PartitionsPaused) == []
