"""PostgreSQL, with its safety on: fsync and synchronous_commit as a production server has them."""

import shutil
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from tests.services.server import MissingServerError, Server, find_binary


class PostgresServer(Server):
    """A PostgreSQL server; user `postgres`, no password.

    Args:
        options: Settings over those given here, such as `{"wal_level": "logical"}`.
    """

    name = "postgres"
    install_hint = "apt-get install postgresql"
    stop_signal = signal.SIGINT  # "fast": open transactions are rolled back
    quick_signal = signal.SIGQUIT  # "immediate": as a crash, but shared memory is given back
    account = "postgres"

    def __init__(self, *, options: Mapping[str, str] | None = None, **common: Any) -> None:
        super().__init__(**common)
        self._options = {**_SETTINGS, **(options or {})}

    @classmethod
    def check_installed(cls) -> None:
        _binary("initdb")
        _binary("postgres")

    def url(self, *, driver: str | None = "asyncpg", database: str = "postgres") -> str:
        """The address, for SQLAlchemy with a driver, for psql and the drivers themselves with None."""
        scheme = f"postgresql+{driver}" if driver else "postgresql"
        return f"{scheme}://postgres@127.0.0.1:{self.port}/{database}"

    def create_database(self, name: str, *, on: Path | None = None) -> None:
        """With its files in the directory `on`, where one is given; it must be empty, and becomes the server's."""
        if on is None:
            self.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
            return
        if user := self._user():
            shutil.chown(on, user)
        values = {"name": sql.Identifier(name), "on": sql.Literal(str(on))}
        self.execute(sql.SQL("CREATE TABLESPACE {name} LOCATION {on}").format(**values))
        self.execute(sql.SQL("CREATE DATABASE {name} TABLESPACE {name}").format(**values))

    def drop_database(self, name: str) -> None:
        """Drop it and end whatever is still connected to it; with the directory that was given for it."""
        self.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))
        self.execute(sql.SQL("DROP TABLESPACE IF EXISTS {}").format(sql.Identifier(name)))

    def execute(self, statement: sql.Composed | sql.SQL, *, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Run one statement in autocommit and return its rows, if it has any."""
        with psycopg.connect(
            self.url(driver=None, database=database), autocommit=True, connect_timeout=5
        ) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def _prepare(self) -> None:
        if self._data.exists():
            return
        self._run(
            str(_binary("initdb")),
            *("--pgdata", str(self._data), "--username", "postgres", "--auth", "trust"),
            *("--encoding", "UTF8", "--locale", "C.UTF-8", "--no-sync", "--no-instructions"),
        )

    def _command(self) -> Sequence[str]:
        settings = [f"--{name}={value}" for name, value in self._options.items()]
        return [str(_binary("postgres")), "-D", str(self._data), "-p", str(self.port), *settings]

    def _answers(self) -> bool:
        try:
            return self.execute(sql.SQL("SELECT 1")) == [(1,)]
        except psycopg.OperationalError:
            return False

    @property
    def _data(self) -> Path:
        return self.directory / "data"


_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "200",
    "fsync": "on",
    "synchronous_commit": "on",
    "timezone": "UTC",
    "log_timezone": "UTC",
}


def _binary(name: str) -> Path:
    found = find_binary(name, "/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin")
    if found is None:
        raise MissingServerError(
            f"PostgreSQL is not installed: no {name!r} under /usr/lib/postgresql or on PATH. "
            f"Install it with: {PostgresServer.install_hint}"
        )
    return found
