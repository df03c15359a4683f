"""The kits against the implementation in memory, which is what they were written beside."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import timedelta

from cqrs_decor.broker import Broker
from cqrs_decor.codec import Codec, JsonCodec
from cqrs_decor.envelope import Envelope
from cqrs_decor.memory import MemoryBroker, MemoryStore
from cqrs_decor.store import Store
from cqrs_decor.testing.clock import FakeClock
from cqrs_decor.testing.conformance import (
    BrokerConformance,
    CodecConformance,
    IdempotencyStoreConformance,
    InboxStoreConformance,
    OutboxStoreConformance,
)
from cqrs_decor.testing.conformance.kit import sample


class TestMemoryBroker(BrokerConformance):
    @asynccontextmanager
    async def open_broker(self) -> AsyncGenerator[Broker]:
        yield MemoryBroker(max_bytes=2_000_000)

    def oversized_envelope(self, topic: str, key: str) -> Envelope | None:
        return sample(topic, key, data=b"x" * 2_000_001)


class TestMemoryOutbox(OutboxStoreConformance):
    clock: FakeClock

    @asynccontextmanager
    async def open_store(self) -> AsyncGenerator[Store]:
        self.clock = FakeClock()
        yield MemoryStore(clock=self.clock)

    async def advance(self, delay: timedelta) -> None:
        self.clock.advance(delay)


class TestMemoryInbox(InboxStoreConformance):
    @asynccontextmanager
    async def open_store(self) -> AsyncGenerator[Store]:
        yield MemoryStore()


class TestMemoryIdempotency(IdempotencyStoreConformance):
    @asynccontextmanager
    async def open_store(self) -> AsyncGenerator[Store]:
        yield MemoryStore()


class TestJsonCodec(CodecConformance):
    def make_codec(self) -> Codec:
        return JsonCodec()
