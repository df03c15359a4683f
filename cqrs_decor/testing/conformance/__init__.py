"""Conformance kits: passing one is what it means to be a broker, a store or a codec of cqrs_decor.

A plugin subclasses a kit in its own tests and says how its part is opened:

    class TestKafka(BrokerConformance):
        url: str

        @pytest.fixture(autouse=True)
        def use_server(self, kafka_url: str) -> None:
            self.url = kafka_url

        @asynccontextmanager
        async def open_broker(self) -> AsyncGenerator[Broker]:
            broker = KafkaBroker.from_url(self.url)
            await broker.open()
            try:
                yield broker
            finally:
                await broker.close()

Every test of a kit is a plain function that runs its own event loop, so no plugin of pytest for asynchronous tests is
needed and none is in the way. What a part does not claim on its class (its card) is skipped under that name; nothing
else is, and a test of a kit cannot be overridden.
"""

import pytest

pytest.register_assert_rewrite(
    "cqrs_decor.testing.conformance.broker",
    "cqrs_decor.testing.conformance.codec",
    "cqrs_decor.testing.conformance.idempotency",
    "cqrs_decor.testing.conformance.inbox",
    "cqrs_decor.testing.conformance.kit",
    "cqrs_decor.testing.conformance.outbox",
)

# The assertions of what is imported below are rewritten only if that was asked for before.
from cqrs_decor.testing.conformance.broker import BrokerConformance  # noqa: E402
from cqrs_decor.testing.conformance.codec import CodecConformance  # noqa: E402
from cqrs_decor.testing.conformance.idempotency import IdempotencyStoreConformance  # noqa: E402
from cqrs_decor.testing.conformance.inbox import InboxStoreConformance  # noqa: E402
from cqrs_decor.testing.conformance.outbox import OutboxStoreConformance  # noqa: E402

__all__ = [
    "BrokerConformance",
    "CodecConformance",
    "IdempotencyStoreConformance",
    "InboxStoreConformance",
    "OutboxStoreConformance",
]
