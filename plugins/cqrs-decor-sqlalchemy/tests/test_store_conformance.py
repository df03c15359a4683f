"""The store is held to the contracts of outbox and inbox on each database and driver."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest

from cqrs_decor.testing.conformance import (
    IdempotencyStoreConformance,
    InboxStoreConformance,
    OutboxStoreConformance,
)
from cqrs_decor_sqlalchemy import SqlAlchemyStore

pytestmark = pytest.mark.feature("O2")


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[SqlAlchemyStore]:
    store = SqlAlchemyStore.from_url(url)
    await store.schema.upgrade()
    await store.open()
    try:
        yield store
    finally:
        await store.close()


class OnAnyDatabase:
    """Each test gets an empty database of its own."""

    @pytest.fixture(autouse=True)
    def _database(self, database_url: str) -> None:
        self.url = database_url

    def open_store(self) -> AbstractAsyncContextManager[SqlAlchemyStore]:
        return opened(self.url)


class TestOutbox(OnAnyDatabase, OutboxStoreConformance):
    """Outbox."""


class TestInbox(OnAnyDatabase, InboxStoreConformance):
    """Inbox."""


class TestIdempotency(OnAnyDatabase, IdempotencyStoreConformance):
    """Idempotency keys."""
