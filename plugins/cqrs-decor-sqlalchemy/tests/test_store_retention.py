"""Retention: what is done with goes, oldest first and bit by bit; what may still be needed stays."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
import pytest
from sqlalchemy import Table, insert, select, text, update

from cqrs_decor.inbox import ParkedMessage
from cqrs_decor.store import Retention
from cqrs_decor.testing.conformance.kit import sample
from cqrs_decor_sqlalchemy import SqlAlchemyStore, retention

pytestmark = pytest.mark.feature("O8")

DAY = timedelta(days=1)
_LOCK_ONE = """
    SELECT * FROM cqrs_inbox
    WHERE consumer = 'shop.bill' AND source = 'kit' AND message_id = 'locked'
    FOR UPDATE
"""
NOW = datetime.now(UTC)


async def test_inbox_rows_go_oldest_first_and_the_young_ones_stay(store: SqlAlchemyStore) -> None:
    """A consumer that forgets too early would handle a repeat; one that never forgets fills the disk."""
    await had(store, {"c": 3, "a": 5, "b": 4, "young": 1})

    deleted = [await store.clean_up(Retention(inbox=2 * DAY), 2)]
    left = await ids_in_inbox(store)
    deleted += [await store.clean_up(Retention(inbox=2 * DAY), 2) for _ in range(2)]

    assert left == ["c", "young"]
    assert deleted == [2, 1, 0]
    assert await ids_in_inbox(store) == ["young"]


async def test_what_is_still_parked_is_not_forgotten(store: SqlAlchemyStore) -> None:
    """An operator retries it after a month: until then a redelivery of it must not run beside the parked one."""
    parked = sample("orders")
    await store.inbox.park(
        ParkedMessage(consumer="shop.bill", envelope=parked, error="No", attempts=3, parked_at=datetime.now(UTC))
    )
    async with store.database.engine.begin() as connection:
        await connection.execute(store.database.tables.inbox.delete())
    await had(store, {parked.id: 9, "done": 9})

    assert await store.clean_up(Retention(inbox=DAY), 10) == 1
    assert await ids_in_inbox(store) == [parked.id]


async def test_kept_results_of_commands_go(store: SqlAlchemyStore) -> None:
    """After a week nobody sends the same command again."""
    table = store.database.tables.idempotency
    rows = [{"key": key, "fingerprint": "f", "created_at": NOW - days * DAY} for key, days in (("old", 9), ("new", 1))]
    await write(store, table, rows)

    assert await store.clean_up(Retention(idempotency=7 * DAY), 10) == 1
    async with store.database.engine.connect() as connection:
        assert (await connection.scalars(select(table.c.key))).all() == ["new"]


async def test_nothing_is_deleted_unless_retention_says_so(store: SqlAlchemyStore) -> None:
    """None is for ever."""
    await had(store, {"old": 999})

    assert await store.clean_up(Retention(), 10) == 0
    assert await ids_in_inbox(store) == ["old"]


async def test_a_large_chunk_is_split_into_short_transactions(
    store: SqlAlchemyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for one of the rows waits for some milliseconds, whatever the limit."""
    monkeypatch.setattr(retention, "CHUNK", 2)
    await had(store, {f"m{n}": 5 for n in range(5)})

    assert await store.clean_up(Retention(inbox=DAY), 100) == 5


async def test_one_process_cleans_for_all(server_url: str) -> None:
    """Twenty workers that all delete would do nothing else at the full minute."""
    cleaner, other = SqlAlchemyStore.from_url(server_url), SqlAlchemyStore.from_url(server_url)
    await cleaner.schema.upgrade()
    await had(cleaner, {f"m{n}": 5 for n in range(4)})
    weekly = Retention(inbox=DAY)

    assert [await cleaner.clean_up(weekly, 1), await other.clean_up(weekly, 1)] == [1, 0]
    assert [await cleaner.clean_up(weekly, 1), await other.clean_up(weekly, 1)] == [1, 0]
    await end_lease(cleaner)  # it was killed a while ago
    assert [await other.clean_up(weekly, 1), await cleaner.clean_up(weekly, 1)] == [1, 0]
    await cleaner.close()
    await other.close()


async def test_a_process_that_is_done_is_in_nobodys_way(server_url: str) -> None:
    """Workers sweep each minute. An operator's purge that found their lease would delete nothing, and say so as if
    there were nothing.
    """
    worker, operator = SqlAlchemyStore.from_url(server_url), SqlAlchemyStore.from_url(server_url)
    await worker.schema.upgrade()
    await had(worker, {"m1": 5, "m2": 3})

    assert await worker.clean_up(Retention(inbox=30 * DAY), 10) == 0
    assert await operator.clean_up(Retention(inbox=4 * DAY), 10) == 1
    assert await worker.clean_up(Retention(inbox=2 * DAY), 10) == 1
    await worker.close()
    await operator.close()


async def test_many_that_begin_at_once_agree_on_one(server_url: str) -> None:
    """All instances start together after a deployment, on a database that no cleaner has been at."""
    stores = [SqlAlchemyStore.from_url(server_url) for _ in range(5)]
    await stores[0].schema.upgrade()
    await had(stores[0], {f"m{n}": 5 for n in range(50)})
    deleted: list[int] = []

    async def clean(store: SqlAlchemyStore) -> None:
        deleted.append(await store.clean_up(Retention(inbox=DAY), 5))

    async with anyio.create_task_group() as tasks:
        for store in stores:
            tasks.start_soon(clean, store)

    assert sorted(deleted) == [0, 0, 0, 0, 5]
    for store in stores:
        await store.close()


async def test_rows_that_somebody_has_locked_are_left_for_later(server_store: SqlAlchemyStore) -> None:
    """A cleaner that waits for a worker, which waits for the cleaner, is a deadlock."""
    store = server_store
    await had(store, {"locked": 5, "free": 4})
    async with store.database.engine.connect() as worker:
        await worker.execute(text(_LOCK_ONE))
        with anyio.fail_after(10):
            assert await store.clean_up(Retention(inbox=DAY), 10) == 1
        await worker.rollback()

    assert await ids_in_inbox(store) == ["locked"]
    assert await store.clean_up(Retention(inbox=DAY), 10) == 1


async def test_workers_go_on_while_it_cleans(store: SqlAlchemyStore) -> None:
    """Every message writes to the table that is cleaned: none of them may fail for it, or be forgotten."""
    await had(store, {f"old{n}": 5 for n in range(300)})
    envelopes = [sample("orders") for _ in range(60)]

    async def handle() -> None:
        for envelope in envelopes:
            transaction = await store.begin()
            await store.inbox.record(transaction, "shop.bill", envelope)
            await transaction.commit()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(handle)
        while await store.clean_up(Retention(inbox=DAY), 20):
            pass

    assert await ids_in_inbox(store) == sorted(envelope.id for envelope in envelopes)


async def test_old_rows_are_found_by_the_index(postgres_url: str) -> None:
    """Else all of the inbox would be read each minute, to find that nothing is old: PostgreSQL's clock is volatile, and
    a bare comparison with it cannot use the index.
    """
    store = SqlAlchemyStore.from_url(postgres_url)
    await store.schema.upgrade()
    await had(store, {f"m{n}": 1 for n in range(5_000)})
    statements: list[str] = []
    async with store.database.engine.connect() as connection:
        await connection.execute(text("ANALYZE cqrs_inbox"))
        for bound in ("clock_timestamp() - interval '2 days'", "(SELECT clock_timestamp() - interval '2 days')"):
            rows = await connection.execute(
                text(f"EXPLAIN SELECT 1 FROM cqrs_inbox WHERE handled_at < {bound} ORDER BY handled_at LIMIT 9")
            )
            statements.append("\n".join(rows.scalars()))
    await store.close()

    assert ["Index Cond" in plan for plan in statements] == [False, True]


async def had(store: SqlAlchemyStore, messages: dict[str, int]) -> None:
    """A consumer has had these messages, so many days ago."""
    rows = [
        {"consumer": "shop.bill", "source": "kit", "message_id": name, "handled_at": NOW - days * DAY}
        for name, days in messages.items()
    ]
    await write(store, store.database.tables.inbox, rows)


async def write(store: SqlAlchemyStore, table: Table, rows: Sequence[dict[str, Any]]) -> None:
    async with store.database.engine.begin() as connection:
        await connection.execute(insert(table), rows)


async def ids_in_inbox(store: SqlAlchemyStore) -> list[str]:
    inbox = store.database.tables.inbox.c
    async with store.database.engine.connect() as connection:
        return sorted((await connection.scalars(select(inbox.message_id))).all())


async def end_lease(store: SqlAlchemyStore) -> None:
    members = store.database.tables.members
    async with store.database.engine.begin() as connection:
        await connection.execute(update(members).values(seen_until=NOW - DAY))
