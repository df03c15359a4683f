"""Outbox rows belong to the savepoint in which they were added, and are written last."""
# ruff: noqa: PT012 - what raises is the block of a savepoint, with what was done in it

import pytest
from sqlalchemy import event as sa_event
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from cqrs_decor.envelope import Envelope
from cqrs_decor.errors import TransactionControlError
from cqrs_decor.testing.conformance.kit import sample
from cqrs_decor_sqlalchemy import SqlAlchemyStore
from cqrs_decor_sqlalchemy.driver_insert import DriverInsert


class Base(DeclarativeBase):
    """The user's models."""


class Order(Base):
    __tablename__ = "shop_order"

    id: Mapped[int] = mapped_column(primary_key=True)
    sku: Mapped[str]


def event(key: str) -> Envelope:
    return sample("orders", key)


class UndoError(Exception):
    """What a handler raises to undo a part."""


def watch(store: SqlAlchemyStore, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is inserted from now on, in order: by the session, and by the outbox."""
    seen: list[str] = []

    def business(connection, cursor, statement, *rest):
        if statement.startswith("INSERT"):
            seen.append(statement.split(" (")[0])

    def outbox(insert, connection, rows):
        seen.append(f"{len(rows)} rows")
        return write(insert, connection, rows)

    write = DriverInsert.write
    monkeypatch.setattr(DriverInsert, "write", outbox)
    sa_event.listen(store.database.engine.sync_engine, "before_cursor_execute", business)
    return seen


async def test_rows_are_written_after_the_last_flush(store, stored, monkeypatch):
    """Order rests on it: the business locks are held when the ids of the rows are drawn."""
    seen = watch(store, monkeypatch)
    transaction = await store.begin()
    transaction.add([event("early"), event("late")])
    transaction.session.add(Order(sku="tea"))
    await transaction.commit()

    assert seen == ["INSERT INTO shop_order", "2 rows"]
    assert await stored(store) == ["early", "late"]


async def test_an_orm_savepoint_that_rolls_back_takes_its_rows_along(store, stored, orders):
    """Nobody may be told of what was undone; what lies around it stays."""
    transaction = await store.begin()
    session = transaction.session
    transaction.add([event("before")])
    with pytest.raises(UndoError):
        async with session.begin_nested():
            session.add(Order(sku="undone"))
            transaction.add([event("undone")])
            raise UndoError
    async with session.begin_nested():
        session.add(Order(sku="kept"))
        transaction.add([event("kept")])
    transaction.add([event("after")])
    await transaction.commit()

    assert await stored(store) == ["before", "kept", "after"]
    assert await orders(store) == ["kept"]


async def test_an_orm_savepoint_without_a_statement_in_it_counts_as_well(store, stored):
    """SQLAlchemy sends the SAVEPOINT only when it is needed: the database never hears of this one."""
    transaction = await store.begin()
    with pytest.raises(UndoError):
        async with transaction.session.begin_nested():
            transaction.add([event("undone")])
            raise UndoError
    transaction.add([event("kept")])
    await transaction.commit()

    assert await stored(store) == ["kept"]


async def test_a_core_savepoint_that_rolls_back_takes_its_rows_along(store, stored):
    """It shows no event of the session, only of the connection."""
    transaction = await store.begin()
    connection = await transaction.session.connection()
    with pytest.raises(UndoError):
        async with connection.begin_nested():
            transaction.add([event("undone")])
            raise UndoError
    async with connection.begin_nested():
        transaction.add([event("kept")])
    await transaction.commit()

    assert await stored(store) == ["kept"]


async def test_what_was_kept_inside_is_undone_with_the_savepoint_around_it(store, stored):
    """A released savepoint becomes part of the one around it, mixed kinds included."""
    transaction = await store.begin()
    session = transaction.session
    with pytest.raises(UndoError):
        async with session.begin_nested():
            connection = await session.connection()
            async with connection.begin_nested(), session.begin_nested():
                transaction.add([event("released, then undone")])
            raise UndoError
    transaction.add([event("kept")])
    await transaction.commit()

    assert await stored(store) == ["kept"]


@pytest.mark.filterwarnings("ignore:nested transaction already deassociated")
async def test_an_outer_core_savepoint_that_is_rolled_back_first_takes_the_inner_one_along(store, stored):
    """ROLLBACK TO an outer savepoint ends the inner ones without a word."""
    transaction = await store.begin()
    connection = await transaction.session.connection()
    outer = await connection.begin_nested()
    await connection.begin_nested()
    transaction.add([event("undone")])
    await outer.rollback()
    transaction.add([event("kept")])
    await transaction.commit()

    assert await stored(store) == ["kept"]


async def test_a_mark_holds_until_a_savepoint_around_it_is_undone(store):
    """Domain events that the core keeps itself follow the same rule as rows."""
    transaction = await store.begin()
    at_root = transaction.mark()
    async with transaction.session.begin_nested():
        released = transaction.mark()
    with pytest.raises(UndoError):
        async with transaction.session.begin_nested():
            undone = transaction.mark()
            raise UndoError
    connection = await transaction.session.connection()
    savepoint = await connection.begin_nested()
    undone_by_core = transaction.mark()
    await savepoint.rollback()

    assert [transaction.holds(mark) for mark in (at_root, released, undone, undone_by_core)] == [
        True,
        True,
        False,
        False,
    ]
    await transaction.rollback()


async def test_a_flush_that_fails_inside_a_savepoint_undoes_the_savepoint_only(store, stored, orders):
    """The usual way to insert what may be there already."""
    transaction = await store.begin()
    session = transaction.session
    session.add(Order(sku="tea"))
    await session.flush()
    with pytest.raises(Exception, match=r"(?i)unique|duplicate"):
        async with session.begin_nested():
            transaction.add([event("undone")])
            session.add(Order(sku="tea"))
            await session.flush()
    transaction.add([event("kept")])
    await transaction.commit()

    assert (await stored(store), await orders(store)) == (["kept"], ["tea"])


async def test_many_rows_are_one_statement(store, stored, monkeypatch):
    """A command that emits fifty events must not pay for fifty round trips."""
    seen = watch(store, monkeypatch)
    transaction = await store.begin()
    for number in range(50):
        transaction.add([event(f"{number:02}")])
    await transaction.commit()

    assert seen == ["50 rows"]
    assert await stored(store) == [f"{number:02}" for number in range(50)]


async def test_rows_of_a_callers_session_come_with_its_commit(store, stored, orders):
    """`app.outbox.add(session, event)`: the caller owns the transaction."""
    async with AsyncSession(store.database.engine) as session, session.begin():
        session.add(Order(sku="tea"))
        store.add(session, [event("first")])
        await session.flush()
        store.add(session, [event("second")])

    assert (await stored(store), await orders(store)) == (["first", "second"], ["tea"])


async def test_a_session_that_touches_nothing_else_still_writes_its_rows(store, stored):
    """It has no connection until the commit, at which there is nothing to flush."""
    async with AsyncSession(store.database.engine) as session:
        store.add(session, [event("only")])
        await session.commit()

    assert await stored(store) == ["only"]


@pytest.mark.parametrize("end", ["rollback", "close"])
@pytest.mark.parametrize("with_work", [True, False])
async def test_rows_of_a_session_that_is_rolled_back_or_closed_are_gone(store, stored, end, with_work):
    """Its next transaction must start clean, whether or not the first had a connection."""
    session = AsyncSession(store.database.engine)
    if with_work:
        await session.execute(text("SELECT 1"))
    store.add(session, [event("undone")])
    await getattr(session, end)()
    store.add(session, [event("kept")])
    await session.commit()
    session.add(Order(sku="later"))
    await session.commit()
    await session.close()

    assert await stored(store) == ["kept"]


async def test_savepoints_that_were_open_before_the_first_row_are_known(store, stored):
    """A caller's session is followed from its first `add` on, which may be deep inside."""
    async with AsyncSession(store.database.engine) as session:
        with pytest.raises(UndoError):
            async with session.begin_nested():
                connection = await session.connection()
                async with connection.begin_nested():
                    store.add(session, [event("undone")])
                    raise UndoError
        with pytest.raises(UndoError):
            async with session.begin_nested():
                store.add(session, [event("undone too")])
                raise UndoError
        store.add(session, [event("kept")])
        await session.commit()

    assert await stored(store) == ["kept"]


async def test_a_session_inside_a_callers_connection_waits_for_the_connections_commit(store, stored):
    """Test suites wrap everything in a connection that is rolled back: session.commit() is only a savepoint there."""
    for end, expected in (("rollback", []), ("commit", ["kept"])):
        async with store.database.engine.connect() as connection:
            await connection.begin()
            sessions = async_sessionmaker(connection, join_transaction_mode="create_savepoint")
            async with sessions() as session:
                store.add(session, [event("undone")])
                await session.rollback()
                session.add(Order(sku=end))
                store.add(session, [event("kept")])
                await session.commit()
            await getattr(connection, end)()

        assert await stored(store) == expected


async def test_a_session_of_another_engine_for_the_same_database_is_welcome(server_store, stored):
    """Applications often have an engine of their own beside the URL that they configure."""
    engine = create_async_engine(server_store.database.engine.url)
    async with AsyncSession(engine) as session:
        connection = await session.connection()
        async with connection.begin_nested():
            server_store.add(session, [event("kept")])
        savepoint = await connection.begin_nested()
        server_store.add(session, [event("undone")])
        await savepoint.rollback()
        await session.commit()
    async with AsyncSession(engine) as session:
        server_store.add(session, [event("rolled back")])
        await session.rollback()
    await engine.dispose()

    assert await stored(server_store) == ["kept"]


async def test_a_session_of_another_database_is_refused(server_store, sqlite_url, stored):
    """Its rows would end up where no relay of this store looks for them."""
    other = SqlAlchemyStore.from_url(sqlite_url)
    await other.open()
    async with AsyncSession(other.database.engine) as session:
        with pytest.raises(TypeError, match="not to"):
            server_store.add(session, [event("lost")])
            await session.commit()
    await other.close()

    assert await stored(server_store) == []
    with pytest.raises(TypeError, match="not a session"):
        server_store.add(object(), [event("lost")])


async def test_a_joined_session_offers_itself_and_leaves_the_commit_to_its_owner(store, stored):
    """`app.send(command, session=session)` takes part; it neither commits nor rolls back."""
    async with AsyncSession(store.database.engine) as session:
        transaction = store.join(session)
        assert transaction.resource(AsyncSession) is session
        assert transaction.resource(Session) is session.sync_session
        transaction.add([event("joined")])
        with pytest.raises(TransactionControlError):
            await transaction.commit()
        assert await stored(store) == []
        await session.commit()

    assert await stored(store) == ["joined"]


async def test_plain_code_works_in_the_same_transaction(store, stored, orders):
    """A `def` handler gets the synchronous session behind the asynchronous one."""
    transaction = await store.begin()

    def handler() -> int:
        session = transaction.resource(Session)
        session.add(Order(sku="tea"))
        session.flush()
        transaction.add([event("from plain code")])
        return 42

    assert await transaction.run_sync(handler) == 42
    await transaction.commit()
    assert (await stored(store), await orders(store)) == (["from plain code"], ["tea"])
