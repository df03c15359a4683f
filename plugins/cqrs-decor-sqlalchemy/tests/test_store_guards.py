"""What a handler may not do to its transaction, and what a connection must not be."""

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from cqrs_decor.errors import AutocommitRefusedError, TransactionControlError
from cqrs_decor.testing.conformance.kit import sample
from cqrs_decor_sqlalchemy import SqlAlchemyStore


class Base(DeclarativeBase):
    """The user's models."""


class Order(Base):
    __tablename__ = "shop_order"

    id: Mapped[int] = mapped_column(primary_key=True)
    sku: Mapped[str]


async def _begin(session):
    async with session.begin():
        """Never reached."""


WAYS = {
    "session.commit": lambda session: session.commit(),
    "session.rollback": lambda session: session.rollback(),
    "session.close": lambda session: session.close(),
    "session.reset": lambda session: session.reset(),
    "session.begin": _begin,
    "sync session.commit": lambda session: session.run_sync(lambda sync: sync.commit()),
    "sync session.rollback": lambda session: session.run_sync(lambda sync: sync.rollback()),
    "session transaction.commit": lambda session: session.run_sync(lambda sync: sync.get_transaction().commit()),
    "session transaction.rollback": lambda session: session.run_sync(lambda sync: sync.get_transaction().rollback()),
    "connection.commit": lambda session: _on_connection(session, "commit"),
    "connection.rollback": lambda session: _on_connection(session, "rollback"),
    "connection.close": lambda session: _on_connection(session, "close"),
}


async def _on_connection(session, action):
    await getattr(await session.connection(), action)()


@pytest.mark.parametrize("way", WAYS)
async def test_a_handler_cannot_end_its_transaction(store, stored, orders, way):
    """Half of a command committed before it fails cannot be undone; the error comes before anything is committed."""
    transaction = await store.begin()
    transaction.add([sample("orders")])
    transaction.session.add(Order(sku="tea"))
    await transaction.session.flush()

    with pytest.raises(TransactionControlError):
        await WAYS[way](transaction.session)
    await transaction.rollback()

    assert (await stored(store), await orders(store)) == ([], [])


@pytest.mark.parametrize("way", WAYS)
async def test_a_handler_that_swallows_the_refusal_still_commits_nothing(store, stored, orders, way):
    """`except Exception: pass` around a commit is how the rule would be lost in silence."""
    transaction = await store.begin()
    transaction.add([sample("orders")])
    transaction.session.add(Order(sku="tea"))
    await transaction.session.flush()
    with pytest.raises(TransactionControlError):
        await WAYS[way](transaction.session)

    with pytest.raises(TransactionControlError):
        await transaction.commit()

    assert (await stored(store), await orders(store)) == ([], [])
    later = await store.begin()
    later.session.add(Order(sku="later"))
    await later.commit()
    assert await orders(store) == ["later"], "no lock and no half of a transaction is left behind"


async def test_a_commit_by_the_connection_is_refused_a_second_time_too(store, orders):
    """After the refusal SQLAlchemy begins anew on the same connection: the guard must still stand over it."""
    transaction = await store.begin()
    connection = await transaction.session.connection()
    with pytest.raises(TransactionControlError):
        await connection.rollback()
    await connection.execute(text("INSERT INTO shop_order (id, sku) VALUES (1, 'smuggled')"))
    with pytest.raises(TransactionControlError):
        await connection.commit()
    await transaction.rollback()

    assert await orders(store) == []


async def test_savepoints_are_welcome(store, stored, orders):
    """A part that may fail belongs into one, by session or by connection."""
    transaction = await store.begin()
    async with transaction.session.begin_nested():
        transaction.session.add(Order(sku="tea"))
    connection = await transaction.session.connection()
    async with connection.begin_nested():
        await connection.execute(text("UPDATE shop_order SET sku = 'coffee'"))
    await transaction.commit()

    assert await orders(store) == ["coffee"]


async def test_a_flush_that_fails_shows_its_own_error(store, orders):
    """SQLAlchemy rolls back by itself then: that is no handler's doing, and must not hide the reason."""
    transaction = await store.begin()
    transaction.session.add_all([Order(id=1, sku="tea"), Order(id=2, sku="tea")])
    with pytest.raises(IntegrityError):
        await transaction.session.flush()
    await transaction.rollback()

    assert await orders(store) == []


async def test_a_commit_that_fails_in_its_flush_rolls_everything_back(store, stored, orders):
    """No row may outlive it, and the connection must be usable by the next one."""
    transaction = await store.begin()
    transaction.add([sample("orders")])
    transaction.session.add_all([Order(id=1, sku="tea"), Order(id=2, sku="tea")])
    with pytest.raises(IntegrityError):
        await transaction.commit()
    await transaction.rollback()

    assert (await stored(store), await orders(store)) == ([], [])


async def test_an_outbox_row_that_cannot_be_written_takes_the_business_rows_with_it(server_store, orders):
    """Guarantee 1: one transaction. The caller's connection must come out of it clean as well."""
    async with server_store.database.engine.begin() as connection:
        await connection.execute(text("DROP TABLE cqrs_outbox"))
    async with server_store.database.engine.connect() as connection:
        await connection.begin()
        async with AsyncSession(connection) as session:
            session.add(Order(sku="lost"))
            await session.flush()
            server_store.add(session, [sample("orders")])
            await session.commit()
        with pytest.raises(SQLAlchemyError):
            await connection.commit()
        await connection.rollback()
        await connection.execute(text("INSERT INTO shop_order (id, sku) VALUES (7, 'kept')"))
        await connection.commit()

    assert await orders(server_store) == ["kept"]


async def test_a_query_cannot_write(store, orders):
    """Read-only by the database itself: raw SQL and functions with side effects are refused as well."""
    transaction = await store.begin(read_only=True)
    with pytest.raises(SQLAlchemyError, match=r"(?i)read.?only"):
        await transaction.session.execute(text("INSERT INTO shop_order (id, sku) VALUES (1, 'tea')"))
    await transaction.rollback()

    assert await orders(store) == []
    writing = await store.begin()
    writing.session.add(Order(sku="tea"))
    await writing.commit()
    reading = await store.begin(read_only=True)
    assert (await reading.session.execute(text("SELECT sku FROM shop_order"))).scalars().all() == ["tea"]
    await reading.commit()
    assert await orders(store) == ["tea"]


async def test_the_session_is_what_handlers_ask_for(store):
    """By `AsyncSession`, or by `Session` in plain code; anything else was never offered."""
    transaction = await store.begin()

    assert transaction.resource(AsyncSession) is transaction.session
    assert transaction.resource(Session) is transaction.session.sync_session
    with pytest.raises(TypeError, match="not a dict"):
        transaction.resource(dict)
    await transaction.rollback()
    assert (store.resources[AsyncSession], store.resources[Session]) == (False, True)


async def test_the_session_class_and_options_of_a_sessionmaker_stay_the_users(database_url):
    """Many have a class of their own, and know why they set `expire_on_commit`."""

    class ShopSession(AsyncSession):
        """As SQLModel's."""

    class ShopSyncSession(Session):
        """Underneath."""

    first = SqlAlchemyStore.from_url(database_url)
    await first.schema.upgrade()
    sessions = async_sessionmaker(
        first.database.engine,
        class_=ShopSession,
        sync_session_class=ShopSyncSession,
        expire_on_commit=True,
        info={"shop": 1},
    )
    store = SqlAlchemyStore.from_object(sessions)
    assert store is not None
    await store.open()
    transaction = await store.begin()

    assert isinstance(transaction.resource(ShopSession), ShopSession)
    assert isinstance(transaction.resource(ShopSyncSession), ShopSyncSession)
    assert (transaction.session.sync_session.expire_on_commit, transaction.session.info) == (True, {"shop": 1})
    assert store.resources[ShopSession] is False
    assert store.resources[ShopSyncSession] is True
    await transaction.rollback()
    await store.close()
    await first.close()


async def test_only_engines_and_sessionmakers_are_taken():
    """The core tries each installed store with what `database=` was given."""
    assert SqlAlchemyStore.from_object("postgresql://") is None
    assert SqlAlchemyStore.from_object(None) is None
    with pytest.raises(Exception, match="not bound to an engine"):
        SqlAlchemyStore.from_object(async_sessionmaker())


async def test_an_engine_in_autocommit_is_refused(server_url):
    """Each statement would be a transaction of its own: the row of an event could stay without its cause."""
    by_argument = create_async_engine(server_url, isolation_level="AUTOCOMMIT")
    by_option = create_async_engine(server_url).execution_options(isolation_level="AUTOCOMMIT")
    for engine in (by_argument, by_option):
        store = SqlAlchemyStore(engine)
        with pytest.raises(AutocommitRefusedError):
            await store.open()
        assert [finding.code for finding in await store.check()] == ["CD305"]
        await engine.dispose()


async def test_a_callers_session_in_autocommit_is_refused(server_store, stored):
    """Set for one connection only, it is easily overlooked; before and after the first statement."""
    for with_work in (True, False):
        async with AsyncSession(
            server_store.database.engine.execution_options(isolation_level="AUTOCOMMIT")
        ) as session:
            if with_work:
                await session.connection()
                with pytest.raises(AutocommitRefusedError):
                    server_store.add(session, [sample("orders")])
            else:
                server_store.add(session, [sample("orders")])
                with pytest.raises(AutocommitRefusedError):
                    await session.commit()

    assert await stored(server_store) == []
