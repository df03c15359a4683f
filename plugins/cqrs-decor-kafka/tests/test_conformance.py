"""Kafka held to the contract of brokers."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from cqrs_decor.broker import Broker
from cqrs_decor.envelope import Envelope
from cqrs_decor.testing.conformance import BrokerConformance
from cqrs_decor.testing.conformance.kit import sample
from cqrs_decor_kafka import KafkaBroker


@pytest.mark.feature("B1")
class TestKafka(BrokerConformance):
    @pytest.fixture(autouse=True)
    def use_server(self, kafka_bootstrap: str) -> None:
        self.url = f"kafka://{kafka_bootstrap}?topic_partitions=4"

    @asynccontextmanager
    async def open_broker(self) -> AsyncGenerator[Broker]:
        broker = KafkaBroker.from_url(self.url)
        await broker.open()
        yield broker
        await broker.close()

    def oversized_envelope(self, topic: str, key: str) -> Envelope | None:
        return sample(topic, key, data=b"x" * 2_000_000)
