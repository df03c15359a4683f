"""Store, broker and settings of a victim: those of the library, with short leases, since a test waits for their end."""

import json
from datetime import timedelta
from typing import Any

from sqlalchemy.ext.asyncio import create_async_engine

from cqrs_decor_kafka import KafkaBroker
from cqrs_decor_sqlalchemy import LogSettings, LogTableBroker, SqlAlchemyStore, StoreSettings

LEASE_S = 1.5
SESSION_S = 3
BATCH = 20
PREFETCH = 40
CONCURRENCY = 4

IN_FLIGHT = 5 * BATCH
"""What one process has in hand at most: so much is in a relay between claim and settlement. Of an `all`, three of the
five batches can have reached the broker; what its worker has received and not acknowledged makes up for the others.
"""

assert 3 * BATCH + PREFETCH <= IN_FLIGHT

SETTINGS: dict[str, Any] = {
    "lease_s": LEASE_S,
    "publish_timeout_s": LEASE_S * 0.6,
    "relay_batch": BATCH,
    "worker_prefetch": PREFETCH,
    "worker_concurrency": CONCURRENCY,
}

CALM_LEASE_S = 8
CALM = ("--set", json.dumps({"lease_s": CALM_LEASE_S, "publish_timeout_s": 5}))
"""For scenarios in which nothing may come twice. On a busy machine a renewal may be late. With the short lease a relay
then calls away the batch that flies, since its lanes are not surely its own any more; nobody knows whether it has
arrived, so it goes once more, in order: repeats without a fault, as many as were called away.
"""


def store_at(url: str, *, pooled: bool) -> SqlAlchemyStore:
    settings = StoreSettings(timeout=timedelta(seconds=4), idle_limit=timedelta(seconds=1))
    if not pooled:
        return SqlAlchemyStore.from_url(url, settings=settings)
    asyncpg = {"statement_cache_size": 0, "prepared_statement_cache_size": 0}
    arguments = asyncpg if "+asyncpg" in url else {"prepare_threshold": None}
    return SqlAlchemyStore(create_async_engine(url, connect_args=arguments), settings=settings)


def broker_at(where: str, store: SqlAlchemyStore) -> Any:
    """`log` for the store's own log table, or the URL of Kafka."""
    if where == "log":
        settings = LogSettings(lease=timedelta(seconds=LEASE_S), beat=timedelta(seconds=LEASE_S / 4))
        return LogTableBroker.over(store.database, settings=settings)
    url = f"{where}?session_timeout_s={SESSION_S}&heartbeat_interval_s={SESSION_S / 6}&metadata_max_age_s=5"
    return KafkaBroker.from_url(f"{url}&publish_timeout_s=4&commit_timeout_s=4&connect_timeout_s=4")
