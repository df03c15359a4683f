"""What the tests of the Kafka plugin share: an open broker on the real server, topics of their own, waiting."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from datetime import timedelta

import anyio
import pytest

from cqrs_decor.broker import Delivery, Subscription, TopicPlan
from cqrs_decor.envelope import Envelope
from cqrs_decor_kafka import KafkaBroker
from tests.services.fixtures import fresh_name

PATIENCE_S = 40

Eventually = Callable[[Callable[[], bool], str], Awaitable[None]]
ReadUntil = Callable[[Subscription, Collection[str]], Awaitable[list[Envelope]]]
Read = Callable[[Subscription, int], Awaitable[list[Delivery]]]


@pytest.fixture
def kafka_url(kafka_bootstrap: str) -> str:
    return f"kafka://{kafka_bootstrap}?topic_partitions=4&session_timeout_s=6&heartbeat_interval_s=0.5"


@pytest.fixture
async def broker(kafka_url: str) -> AsyncGenerator[KafkaBroker]:
    broker = KafkaBroker.from_url(kafka_url)
    await broker.open()
    yield broker
    await broker.close()


@pytest.fixture
async def topic(broker: KafkaBroker) -> str:
    """A topic of this test's own."""
    name = fresh_name()
    await broker.create_topics([TopicPlan(name=name)])
    return name


@pytest.fixture
def group() -> str:
    return fresh_name()


@pytest.fixture
def eventually() -> Eventually:
    """Wait until a condition holds; fail with its name when patience is at its end."""

    async def wait(holds: Callable[[], bool], what: str) -> None:
        with anyio.move_on_after(PATIENCE_S):
            while True:
                if holds():
                    return
                await anyio.sleep(0.01)
        pytest.fail(f"not within {PATIENCE_S} s: {what}")

    return wait


@pytest.fixture
def read_until() -> ReadUntil:
    """Receive until all of these ids have come, repeats and all."""

    async def read_until(subscription: Subscription, ids: Collection[str]) -> list[Envelope]:
        arrived: list[Envelope] = []
        missing = set(ids)
        with anyio.move_on_after(PATIENCE_S):
            while missing:
                fresh = [d.content for d in await subscription.receive(500, timedelta(milliseconds=200))]
                missing.difference_update(envelope.id for envelope in fresh)
                arrived += fresh
        assert not missing
        return arrived

    return read_until


@pytest.fixture
def read() -> Read:
    """Receive until so many have come."""

    async def read(subscription: Subscription, count: int) -> list[Delivery]:
        deliveries: list[Delivery] = []
        with anyio.move_on_after(PATIENCE_S):
            while len(deliveries) < count:
                deliveries += await subscription.receive(count - len(deliveries), timedelta(milliseconds=200))
        assert len(deliveries) == count
        return deliveries

    return read
