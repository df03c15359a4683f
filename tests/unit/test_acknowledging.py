"""What is finished is acknowledged in one go, without keeping anything from getting on."""

from collections.abc import Sequence

import anyio
import pytest

from cqrs_decor import Registry, Settings
from cqrs_decor.broker import Delivery
from cqrs_decor.memory import MemoryBroker
from cqrs_decor.memory.broker import MemorySubscription
from tests.unit.shop import Paid, paid, shop_with

pytestmark = pytest.mark.feature("B6")


async def acknowledged(monkeypatch: pytest.MonkeyPatch, messages: int, *, every_s: float, prefetch: int) -> list[int]:
    """How many each acknowledgement was for, of a worker whose handler takes so long."""
    counts: list[int] = []
    ack = MemorySubscription.ack

    async def counting(self: MemorySubscription, deliveries: Sequence[Delivery]) -> None:
        counts.append(len(deliveries))
        await ack(self, deliveries)

    monkeypatch.setattr(MemorySubscription, "ack", counting)
    sales = Registry("sales")

    @sales.event_handler
    async def book(event: Paid) -> None:
        await anyio.sleep(every_s)

    settings = Settings(worker_prefetch=prefetch, worker_concurrency=1)
    async with shop_with(sales, broker=MemoryBroker(partitions=4), settings=settings) as shop:
        await shop.receive(*(paid(str(number)) for number in range(messages)))
    assert sum(counts) == messages
    return counts


async def test_many_are_acknowledged_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request to the broker for each message is a twentieth of the throughput."""
    counts = await acknowledged(monkeypatch, 300, every_s=0.001, prefetch=1_000)

    assert len(counts) < 300 / 4
