"""Wake-ups by LISTEN and NOTIFY, where the database is PostgreSQL."""

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NoReturn, Protocol

import anyio
from sqlalchemy import Connection, Text, bindparam, func, select

from cqrs_decor.errors import StoreUnavailableError
from cqrs_decor.outbox import Ear, Heard, WakeUps
from cqrs_decor_sqlalchemy.database import Database
from cqrs_decor_sqlalchemy.errors import reason_of
from cqrs_decor_sqlalchemy.wake_up_channel import WORK, channel_of, echo_of

_SILENCE_S = 7.5
"""Whoever heard nothing for so long asks the server whether the connection still stands, and waits as long for an
answer: a half-open one says nothing at all. Echoes of renewals come more often: while these do, nothing is asked."""

_NOTIFY = select(func.pg_notify(bindparam("channel", type_=Text()), bindparam("payload", type_=Text())))


def wake_ups_of(database: Database) -> WakeUps | None:
    """Those of this database; None where it has nothing of the kind."""
    return SqlAlchemyWakeUps(database) if database.dialect == "postgresql" else None


class SqlAlchemyWakeUps:
    """Notifications on a channel that belongs to these tables. Used concurrently."""

    def __init__(self, database: Database, *, silence_s: float = _SILENCE_S) -> None:
        self._database = database
        self._channel = channel_of(database.tables)
        self._silence_s = silence_s

    async def send(self) -> None:
        """In a transaction of its own: PostgreSQL tells of it when that commits, behind a pooler as well."""
        await self._database.run(_NOTIFY, {"channel": self._channel, "payload": WORK})

    @asynccontextmanager
    async def listen(self, owner: str) -> AsyncGenerator[Ear]:
        """On a connection that the pool has made and given away: set up as the others, and not counted with them."""
        async with AsyncExitStack() as stack:
            try:
                with anyio.fail_after(self._database.settings.timeout.total_seconds()):
                    line = await self._connected_line(stack)
            except Exception as error:  # drivers raise classes of their own while they connect
                self._database.raise_translated(error)
            yield _LineEar(line, owner, self._database.name, self._silence_s)

    async def _connected_line(self, stack: AsyncExitStack) -> "_Line":
        connection = await stack.enter_async_context(self._database.engine.connect())
        driver: Any = (await connection.get_raw_connection()).driver_connection
        await connection.run_sync(Connection.detach)
        line = _LINES[connection.dialect.driver](driver)
        stack.push_async_callback(line.cut)
        await line.listen(self._channel)
        return line


class _LineEar:
    """What one listener has heard and not yet been told: of each sound at most one."""

    def __init__(self, line: "_Line", owner: str, store: str, silence_s: float) -> None:
        self._line = line
        self._sounds: dict[str, Heard] = {WORK: "work", echo_of(owner): "echo"}
        self._store = store
        self._silence_s = silence_s
        self._heard: list[Heard] = []

    async def hear(self) -> Heard:
        while not self._heard:
            payloads = await self._next()
            self._heard = _each_once(self._sounds[payload] for payload in payloads if payload in self._sounds)
        return self._heard.pop(0)

    async def _next(self) -> Sequence[str]:
        """What came. Nothing where the line was silent, and answers."""
        try:
            payloads = await self._line.next(self._silence_s)
            if not payloads:
                with anyio.fail_after(self._silence_s):
                    await self._line.ask()
        except Exception as error:  # whatever its driver says, nothing is heard on this connection any more
            self._lose(error)
        return payloads

    def _lose(self, error: Exception) -> NoReturn:
        raise StoreUnavailableError(self._store, f"listening has ended: {reason_of(error)}") from error


def _each_once(sounds: Iterable[Heard]) -> list[Heard]:
    """In the order in which each came first."""
    first: dict[Heard, None] = dict.fromkeys(sounds)
    return list(first)


class _Line(Protocol):
    """A driver's own connection, on which somebody listens."""

    async def listen(self, channel: str) -> None: ...

    async def next(self, within_s: float) -> Sequence[str]:
        """What was said since the last time; waits so long for the first. Cancelled, it loses nothing."""
        ...

    async def ask(self) -> None:
        """Returns when the server has answered."""
        ...

    async def cut(self) -> None:
        """End the connection without waiting for the server, which may be unreachable."""
        ...


class _AsyncpgLine:
    """asyncpg calls back for what it reads by itself."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._payloads: list[str] = []
        self._news = anyio.Event()

    async def listen(self, channel: str) -> None:
        self._connection.add_termination_listener(self._end)
        await self._connection.add_listener(channel, self._take)

    async def next(self, within_s: float) -> Sequence[str]:
        with anyio.move_on_after(within_s):
            await self._news.wait()
        if self._connection.is_closed():
            raise ConnectionError("the server closed the connection")
        payloads, self._payloads = self._payloads, []
        self._news = anyio.Event()
        return payloads

    async def ask(self) -> None:
        await self._connection.execute("SELECT 1")

    async def cut(self) -> None:
        self._connection.terminate()

    def _take(self, connection: object, pid: int, channel: str, payload: str) -> None:
        self._payloads.append(payload)
        self._news.set()

    def _end(self, connection: object) -> None:
        self._news.set()


class _PsycopgLine:
    """psycopg reads while somebody waits; what comes at other times it keeps for then."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    async def listen(self, channel: str) -> None:
        await self._connection.set_autocommit(True)
        name = channel.replace('"', '""')
        await self._connection.execute(f'LISTEN "{name}"')

    async def next(self, within_s: float) -> Sequence[str]:
        notifies = self._connection.notifies(timeout=within_s, stop_after=1)
        return [notification.payload async for notification in notifies]

    async def ask(self) -> None:
        await self._connection.execute("SELECT 1")

    async def cut(self) -> None:
        await self._connection.close()


_LINES: dict[str, type[_AsyncpgLine] | type[_PsycopgLine]] = {"asyncpg": _AsyncpgLine, "psycopg": _PsycopgLine}
