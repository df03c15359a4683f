"""Wake-ups between processes: across connections, over lost ones, and over those that nobody noticed are lost."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
import pytest_asyncio
from sqlalchemy import make_url, text
from sqlalchemy.pool import AsyncAdaptedQueuePool

from cqrs_decor.errors import StoreUnavailableError
from cqrs_decor.outbox import Ear, WakeUps
from cqrs_decor_sqlalchemy import SqlAlchemyStore, StoreSettings, Tables
from cqrs_decor_sqlalchemy.wake_up_channel import channel_of
from cqrs_decor_sqlalchemy.wake_ups import SqlAlchemyWakeUps

pytestmark = pytest.mark.feature("O6")

PATIENCE_S = 10.0


@pytest.fixture(params=["asyncpg", "psycopg"])
def url(request: pytest.FixtureRequest, postgres_url: str) -> str:
    return postgres_url.replace("+asyncpg", f"+{request.param}")


@pytest_asyncio.fixture
async def stores(url: str) -> AsyncIterator[tuple[SqlAlchemyStore, SqlAlchemyStore]]:
    """Two processes on one database, as far as the database can tell."""
    one, other = SqlAlchemyStore.from_url(url), SqlAlchemyStore.from_url(url)
    yield one, other
    await one.close()
    await other.close()


async def test_a_process_wakes_another(stores: tuple[SqlAlchemyStore, SqlAlchemyStore]) -> None:
    """The one that committed has no relay; the one with the relay must hear of it at once."""
    sender, listener = stores
    async with wake_ups_of(listener).listen("relay") as ear:
        await wake_ups_of(sender).send()

        assert await heard(ear) == "work"


async def test_only_who_listens_to_the_same_tables_is_woken(url: str) -> None:
    """Services share a database, each with tables of its own."""
    shop, billing = (SqlAlchemyStore.from_url(url, tables=Tables(prefix=prefix)) for prefix in ("shop_", "billing_"))
    async with wake_ups_of(shop).listen("relay") as ear:
        await wake_ups_of(billing).send()
        with anyio.move_on_after(0.2) as silence:
            await ear.hear()

        assert silence.cancelled_caught
        await wake_ups_of(shop).send()
        assert await heard(ear) == "work"
    await shop.close()
    await billing.close()


async def test_a_listener_that_was_cancelled_has_missed_nothing(
    stores: tuple[SqlAlchemyStore, SqlAlchemyStore],
) -> None:
    """A relay waits for several things at once, and breaks off the others when one has come."""
    sender, listener = stores
    async with wake_ups_of(listener).listen("relay") as ear:
        for _ in range(5):
            with anyio.move_on_after(0.02):
                await ear.hear()
            await wake_ups_of(sender).send()

            assert await heard(ear) == "work"


async def test_a_killed_connection_is_an_error_and_listening_again_works(
    stores: tuple[SqlAlchemyStore, SqlAlchemyStore],
) -> None:
    """The database was restarted: a listener that waits on for ever would leave its relay deaf."""
    sender, listener = stores
    async with wake_ups_of(listener).listen("relay") as ear:
        await kill_listeners(sender)

        with pytest.raises(StoreUnavailableError, match="listening has ended"):
            await heard(ear)

    async with wake_ups_of(listener).listen("relay") as ear:
        await wake_ups_of(sender).send()

        assert await heard(ear) == "work"


async def test_a_connection_without_an_answer_is_an_error(url: str) -> None:
    """A firewall forgets a silent connection and tells neither end: nothing comes any more, no error either."""
    async with Proxy(url) as proxy:
        store = SqlAlchemyStore.from_url(proxy.url)
        wake_ups = SqlAlchemyWakeUps(store.database, silence_s=0.5)
        async with wake_ups.listen("relay") as ear:
            with anyio.move_on_after(1.2) as healthy:
                await ear.hear()
            proxy.swallow()

            with pytest.raises(StoreUnavailableError), anyio.fail_after(PATIENCE_S):
                await ear.hear()
    await store.close()

    assert healthy.cancelled_caught, "a silent connection that answers is no error"


async def test_listening_takes_no_connection_of_the_pool(url: str) -> None:
    """A pool of one must serve commands while a relay listens, and get its place back after each loss."""
    store = SqlAlchemyStore.from_url(url, settings=StoreSettings(pool_size=1, pool_overflow=0))
    for _ in range(3):
        async with wake_ups_of(store).listen("relay") as ear:
            await wake_ups_of(store).send()

            assert await heard(ear) == "work"
            pool = store.database.engine.pool
            assert isinstance(pool, AsyncAdaptedQueuePool)
            assert pool.checkedout() == 0
    assert await count_listeners(store) == 0
    await store.close()


async def test_an_unreachable_database_cannot_be_listened_to() -> None:
    """The relay starts during an outage: it tries again, and polls meanwhile."""
    store = SqlAlchemyStore.from_url("postgresql+asyncpg://nobody@127.0.0.1:1/none")

    with pytest.raises(StoreUnavailableError):
        async with wake_ups_of(store).listen("relay"):
            pass
    with pytest.raises(StoreUnavailableError):
        await wake_ups_of(store).send()


@pytest.mark.parametrize("prefix", ["cqrs_", 'Odd."', "p" * 80])
async def test_any_name_of_tables_makes_a_channel(url: str, prefix: str) -> None:
    """PostgreSQL cuts names after 63 bytes, folds capitals and splits at dots where they are not quoted."""
    store = SqlAlchemyStore.from_url(url, tables=Tables(prefix=prefix))
    async with wake_ups_of(store).listen("relay") as ear:
        await wake_ups_of(store).send()

        assert await heard(ear) == "work"
    assert len(channel_of(store.database.tables).encode()) <= 63
    await store.close()


async def test_other_databases_have_no_wake_ups(sqlite_url: str) -> None:
    """Relays look for work at intervals there."""
    store = SqlAlchemyStore.from_url(sqlite_url)

    assert store.outbox.wake_ups is None
    await store.close()


def wake_ups_of(store: SqlAlchemyStore) -> WakeUps:
    assert store.outbox.wake_ups is not None
    return store.outbox.wake_ups


async def heard(ear: Ear) -> str:
    with anyio.fail_after(PATIENCE_S):
        return await ear.hear()


async def kill_listeners(store: SqlAlchemyStore) -> None:
    async with store.database.engine.connect() as connection:
        await connection.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND query LIKE 'LISTEN%'"
            )
        )


async def count_listeners(store: SqlAlchemyStore) -> int:
    """After a moment, since the server notices by itself that a connection was cut."""
    left = -1
    with anyio.fail_after(PATIENCE_S):
        while left:
            async with store.database.engine.connect() as connection:
                left = await connection.scalar(
                    text(
                        "SELECT count(*) FROM pg_stat_activity"
                        " WHERE datname = current_database() AND query LIKE 'LISTEN%'"
                    )
                )
            await anyio.sleep(0.01)
    return left


class Proxy:
    """Stands between a store and its server, and can fall silent without a word."""

    def __init__(self, url: str) -> None:
        self._url = make_url(url)
        self._silent = False
        self._writers: list[asyncio.StreamWriter] = []
        self._pumps: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Proxy":
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.url = self._url.set(host="127.0.0.1", port=port).render_as_string(hide_password=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.gather(*self._pumps)
        await asyncio.gather(*(writer.wait_closed() for writer in self._writers), return_exceptions=True)

    def swallow(self) -> None:
        self._silent = True

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_server: Any = await asyncio.open_connection(self._url.host, self._url.port)
        self._writers += [writer, to_server[1]]
        self._pumps += [
            asyncio.create_task(self._pump(reader, to_server[1])),
            asyncio.create_task(self._pump(to_server[0], writer)),
        ]

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                if not self._silent:
                    writer.write(data)
        except ConnectionError:
            pass  # the other end was aborted
        writer.close()
