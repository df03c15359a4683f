"""PgBouncer in transaction mode: a pooler in front of a PostgreSQL, as many hosts have one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psycopg

from tests.services.postgres import PostgresServer
from tests.services.server import MissingServerError, Server, find_binary


class PgBouncerServer(Server):
    """A pooler that gives a client a server connection for one transaction at a time.

    What belongs to a session (prepared statements, LISTEN, advisory locks, SET) is not kept for a client.

    Args:
        postgres: What it pools for; clients become its user `postgres`.
        pool_size: Server connections per database.
    """

    name = "pgbouncer"
    install_hint = "apt-get install pgbouncer"
    account = "postgres"

    def __init__(self, postgres: PostgresServer, *, pool_size: int = 20, **common: Any) -> None:
        super().__init__(**common)
        self._postgres = postgres
        self._pool_size = pool_size

    @classmethod
    def check_installed(cls) -> None:
        _binary()

    def url(self, *, driver: str | None = "psycopg", database: str = "postgres") -> str:
        """The address for SQLAlchemy, or with None for the driver itself."""
        scheme = f"postgresql+{driver}" if driver else "postgresql"
        return f"{scheme}://postgres@127.0.0.1:{self.port}/{database}"

    def _prepare(self) -> None:
        self._settings_file.write_text(
            "[databases]\n"
            f"* = host=127.0.0.1 port={self._postgres.port} user=postgres\n"
            "[pgbouncer]\n"
            "listen_addr = 127.0.0.1\n"
            f"listen_port = {self.port}\n"
            "unix_socket_dir =\n"
            "auth_type = any\n"
            "pool_mode = transaction\n"
            f"default_pool_size = {self._pool_size}\n"
            "max_client_conn = 400\n"
            "server_login_retry = 1\n"
        )

    def _command(self) -> Sequence[str]:
        return [str(_binary()), str(self._settings_file)]

    def _answers(self) -> bool:
        try:
            with psycopg.connect(self.url(driver=None), connect_timeout=5, prepare_threshold=None) as connection:
                return connection.execute("SELECT 1").fetchone() == (1,)
        except psycopg.OperationalError:
            return False

    @property
    def _settings_file(self) -> Path:
        return self.directory / "pgbouncer.ini"


def _binary() -> Path:
    found = find_binary("pgbouncer", "/usr/sbin", "/usr/bin")
    if found is None:
        raise MissingServerError(
            f"PgBouncer is not installed: no 'pgbouncer' on PATH. Install it with: {PgBouncerServer.install_hint}"
        )
    return found
