"""What the kit for inboxes cannot see: statements, snapshots, and locks taken in one order."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from sqlalchemy import bindparam, event, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine

from cqrs_decor.envelope import Envelope
from cqrs_decor.inbox import InboxFilter, Noted, ParkedMessage
from cqrs_decor.testing.conformance.kit import sample
from cqrs_decor_sqlalchemy import SqlAlchemyStore
from cqrs_decor_sqlalchemy.driver_insert import DriverInsert

pytestmark = pytest.mark.feature("B3")


def parked(envelope: Envelope) -> ParkedMessage:
    return ParkedMessage(
        consumer="mail", envelope=envelope, error="ValueError: no", attempts=1, parked_at=datetime.now(UTC)
    )


async def keys_held(store: SqlAlchemyStore) -> list[str]:
    async with store.database.engine.connect() as connection:
        return list(await connection.scalars(select(store.database.tables.inbox_holds.c.key)))


async def in_transaction(store: SqlAlchemyStore, work: Any) -> Any:
    """Run `work` and commit, again where the database says so: that is what a worker does."""
    while True:
        transaction = await store.begin()
        try:
            answer = await work(transaction)
            await transaction.commit()
        except Exception as error:
            await transaction.rollback()
            if not store.is_transient(error):
                raise
        else:
            return answer


@contextmanager
def statements(store: SqlAlchemyStore) -> Iterator[list[str]]:
    """What is sent to the database, through SQLAlchemy and past it."""
    seen: list[str] = []
    write = DriverInsert.write

    def note(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        seen.append(statement)

    def note_insert(insert: DriverInsert, connection: Any, rows: Any) -> int:
        seen.append("INSERT")
        return write(insert, connection, rows)

    event.listen(store.database.engine.sync_engine, "before_cursor_execute", note)
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(DriverInsert, "write", note_insert)
            yield seen
    finally:
        event.remove(store.database.engine.sync_engine, "before_cursor_execute", note)


# --- cost -------------------------------------------------------------------------------------------------------------


async def test_a_new_message_costs_one_statement(store):
    """It is paid for every message. MariaDB needs a second one, which looks for a hold of the key."""
    expected = 2 if store.database.dialect == "mysql" else 1
    transaction = await store.begin()
    await transaction.session.connection()

    with statements(store) as seen:
        noted = await store.inbox.record(transaction, "mail", sample("orders"))
    await transaction.rollback()

    assert (noted, len(seen)) == (Noted.NEW, expected), seen


async def test_a_batch_costs_as_much_as_one_message(store):
    """That is what batches are for: one statement on PostgreSQL, a few elsewhere, however many messages."""
    messages = [sample("orders", f"key-{number}") for number in range(150)]
    transaction = await store.begin()
    await transaction.session.connection()

    with statements(store) as seen:
        noted = await store.inbox.record_all(transaction, "mail", messages)
    await transaction.rollback()

    assert noted == [Noted.NEW] * 150
    assert len(seen) <= (1 if store.database.dialect == "postgresql" else 4), seen


async def test_a_batch_larger_than_one_statement_is_noted_whole(store):
    """What a driver writes in portions must not lose one between them, nor take a copy for new."""
    messages = [sample("orders", f"key-{number % 7}") for number in range(450)]
    await in_transaction(store, lambda each: store.inbox.record(each, "mail", messages[300]))

    noted = await in_transaction(store, lambda each: store.inbox.record_all(each, "mail", [*messages, messages[0]]))

    assert noted == [Noted.NEW] * 300 + [Noted.HAD] + [Noted.NEW] * 149 + [Noted.HAD]


async def test_a_copy_that_gets_in_between_undoes_no_other_of_the_batch(server_store):
    """Another worker notes one of them while the batch is being written: that one is had, the others are new."""
    messages = [sample("orders", f"key-{number}") for number in range(20)]
    other = await server_store.begin()
    await server_store.inbox.record(other, "mail", messages[7])
    answers: list[Sequence[Noted]] = []

    async def record_all() -> None:
        answers.append(
            await in_transaction(server_store, lambda each: server_store.inbox.record_all(each, "mail", messages))
        )

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(record_all)
        await anyio.sleep(0.3)  # it stands at the row of the other one, which no event tells
        await other.commit()

    assert answers == [[Noted.NEW] * 7 + [Noted.HAD] + [Noted.NEW] * 12]
    assert (
        await in_transaction(server_store, lambda each: server_store.inbox.record_all(each, "mail", messages))
        == [Noted.HAD] * 20
    )


# --- snapshots --------------------------------------------------------------------------------------------------------


async def retry_with_an_old_snapshot(store: SqlAlchemyStore) -> tuple[list[str], list[bool]]:
    """A message is put behind another after the retry of that has taken its snapshot: what is held, and asked for."""
    await store.inbox.park(parked(sample("orders", "a")))
    [first] = await store.inbox.find(InboxFilter())
    behind: list[bool] = []

    async def retry(transaction: Any) -> bool:
        await transaction.session.execute(text("SELECT COUNT(*) FROM cqrs_inbox_parked"))
        if not behind:
            behind.append(await store.inbox.hold_back(parked(sample("orders", "a"))))
        return await store.inbox.unpark(transaction, first.id)

    await in_transaction(store, retry)
    assert behind == [True]
    return await keys_held(store), [each.retry_requested for each in await store.inbox.find(InboxFilter())]


async def test_a_retry_with_an_old_snapshot_does_not_free_a_key_above_what_stands_behind(server_url, server_store):
    """Else that message would stay parked with nobody to ask for it, and later ones would overtake it."""
    store = SqlAlchemyStore(create_async_engine(server_url, isolation_level="REPEATABLE READ"))

    assert await retry_with_an_old_snapshot(store) == (["a"], [True])
    await store.database.engine.dispose()


async def test_holds_that_are_locked_without_a_change_would_let_it(postgres_url):
    """The negative control: PostgreSQL gives a lock to an old snapshot where nothing was changed under it."""
    store = SqlAlchemyStore(create_async_engine(postgres_url, isolation_level="REPEATABLE READ"))
    await store.schema.upgrade()
    holds = store.database.tables.inbox_holds.c
    line = (column == bindparam(f"its_{column.name}") for column in (holds.consumer, holds.topic, holds.key))
    store.inbox._queries.lock_hold = select(holds.key).where(*line).with_for_update()

    assert await retry_with_an_old_snapshot(store) == ([], [False])
    await store.database.engine.dispose()


# --- operators and workers at once ------------------------------------------------------------------------------------


async def test_operators_and_workers_do_not_wait_for_each_other_in_a_circle(server_store):
    """Whatever locks takes holds first and then messages by id: no retry has to give way to a deadlock."""
    chance = random.Random(7)
    inbox, deadlocks = server_store.inbox, list[str]()
    for number in range(24):
        envelope = sample("orders", f"key-{number % 4}")
        if not await inbox.hold_back(parked(envelope)):
            await inbox.park(parked(envelope))
    everything = [each.id for each in await inbox.find(InboxFilter(limit=1000))]

    async def operate() -> None:
        for _ in range(6):
            ids = chance.sample(everything, 8)
            await inbox.retry(ids, who="test")
            await inbox.discard(ids[:2], who="test")

    async def work() -> None:
        for _ in range(12):
            for message in await inbox.retries(["mail"], 3):
                transaction = await server_store.begin()
                try:
                    await inbox.unpark(transaction, message.id)
                    await anyio.lowlevel.checkpoint()
                    await transaction.commit()
                except Exception as error:
                    await transaction.rollback()
                    deadlocks.append(str(error))

    async with anyio.create_task_group() as tasks:
        for _ in range(2):
            tasks.start_soon(operate)
            tasks.start_soon(work)

    assert deadlocks == []
    left = await inbox.find(InboxFilter(limit=1000))
    assert sorted({each.envelope.key for each in left}) == sorted(await keys_held(server_store))


@pytest.mark.parametrize("holds_first", [True, pytest.param(False, id="negative control")])
async def test_an_operator_and_a_worker_lock_in_the_same_order(server_store, holds_first):
    """The worker comes when the operator has taken the first of its two kinds of locks: in the other order each would
    wait for the other's.
    """
    inbox, queries = server_store.inbox, server_store.inbox._queries
    await inbox.park(parked(sample("orders", "a")))
    [message] = await inbox.find(InboxFilter())
    first_lock, failed = anyio.Event(), list[Exception]()

    class Slow:
        """A connection that lets others go on after each lock."""

        def __init__(self, connection: Any) -> None:
            self.connection = connection

        async def execute(self, statement: Any, values: Any) -> Any:
            result = await self.connection.execute(statement, values)
            if statement is not queries.lines:
                first_lock.set()
                await anyio.sleep(0.2)
            return result

    async def operate() -> None:
        async with server_store.database.engine.begin() as connection:
            if holds_first:
                await inbox._locked(Slow(connection), queries.lines, queries.lock, [message.id])
            else:
                await Slow(connection).execute(queries.lock, {"ids": [message.id]})
                await Slow(connection).execute(queries.lock_holds, {"lines": [("mail", "orders", "a")]})

    async def work() -> None:
        await first_lock.wait()
        transaction = await server_store.begin()
        try:
            await inbox.unpark(transaction, message.id)
        finally:
            await transaction.rollback()

    async def noting(task: Any) -> None:
        try:
            await task()
        except DBAPIError as error:
            failed.append(error)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(noting, operate)
        tasks.start_soon(noting, work)

    assert [server_store.is_transient(error) for error in failed] == ([] if holds_first else [True])
