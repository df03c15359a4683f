"""So many keys are served at a time, each in order; one that waits for its next attempt keeps nobody from going."""

import anyio
import pytest

from cqrs_decor.broker import Delivery, Partition
from cqrs_decor.in_hand import Work
from cqrs_decor.queues import Queues
from cqrs_decor.testing import FakeClock
from tests.unit.apps import eventually
from tests.unit.shop import paid

pytestmark = pytest.mark.feature("B6")


def work(key: str, position: int) -> Work:
    envelope = paid(key)
    partition = Partition(topic="payments", number=0)
    return Work(Delivery(partition=partition, position=position, content=envelope, raw=envelope.data, key=key))


class Served:
    """Works on what it is given until it is let go."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.doors: dict[int, anyio.Event] = {}

    async def __call__(self, given: Work) -> None:
        self.begun.append(given.delivery.position)
        self.doors[given.delivery.position] = anyio.Event()
        await self.doors[given.delivery.position].wait()


async def test_keys_are_served_in_the_order_in_which_they_came_and_no_more_than_agreed() -> None:
    """The rest waits without a task of its own."""
    served = Served()
    queues = Queues(2, served)
    async with anyio.create_task_group() as tasks:
        firsts = [queues.add(work(key, position)) for position, key in enumerate("abcab")]
        queues.serve_in(tasks)
        assert firsts == [True, True, True, False, False]
        for begun in ([0, 1], [0, 1, 3], [0, 1, 3, 4], [0, 1, 3, 4, 2]):
            await eventually(lambda begun=begun: served.begun == begun)
            served.doors[min(served.doors)].set()
            del served.doors[min(served.doors)]
        for door in served.doors.values():
            door.set()

    assert [key in queues for key in "abc"] == [False] * 3


async def test_one_that_waits_lets_another_key_go() -> None:
    """Ten keys that are tried again in an hour would else stop the worker for an hour."""
    clock, begun = FakeClock(), list[int]()

    async def serve(given: Work) -> None:
        begun.append(given.delivery.position)
        if given.delivery.position < 3:
            await given.nap(clock, 3600)

    queues = Queues(1, serve)
    async with anyio.create_task_group() as tasks:
        queues.serve_in(tasks)
        works = [work(str(position), position) for position in range(5)]
        for each in works:
            queues.add(each)
        await eventually(lambda: begun == [0, 1, 2, 3, 4])
        for each in works:
            each.give_up()
