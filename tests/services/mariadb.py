"""MariaDB, which also stands for MySQL: the same protocol and the same drivers."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.services.server import MissingServerError, Server, find_binary


class MariaDbServer(Server):
    """A MariaDB server; user and password `cqrs`, who may do everything."""

    name = "mariadb"
    install_hint = "apt-get install mariadb-server"
    account = "mysql"

    @classmethod
    def check_installed(cls) -> None:
        for name in ("mariadb-install-db", "mariadbd", "mariadb"):
            _binary(name)

    def url(self, *, driver: str | None = "asyncmy", database: str = "mysql", dialect: str = "mysql") -> str:
        """The address for SQLAlchemy; the dialect may be `mariadb` as well."""
        scheme = f"{dialect}+{driver}" if driver else dialect
        return f"{scheme}://cqrs:cqrs@127.0.0.1:{self.port}/{database}"

    def create_database(self, name: str) -> None:
        self.execute(f"CREATE DATABASE `{name}`")

    def drop_database(self, name: str) -> None:
        self.execute(f"DROP DATABASE IF EXISTS `{name}`")

    def execute(self, statement: str, *, database: str = "mysql") -> list[list[str]]:
        """Run statements as root through the server's socket; rows come back as text."""
        done = self._client(statement, database=database)
        if done.returncode != 0:
            raise RuntimeError(f"MariaDB refused {statement!r}: {done.stderr.strip()}")
        return [line.split("\t") for line in done.stdout.splitlines()]

    def _prepare(self) -> None:
        if self._data.exists():
            return
        self._run(
            str(_binary("mariadb-install-db")),
            *("--no-defaults", f"--datadir={self._data}", "--auth-root-authentication-method=normal", "--skip-test-db"),
        )
        self._init_file.write_text(_ACCOUNT)

    def _command(self) -> Sequence[str]:
        return [
            str(_binary("mariadbd")),
            "--no-defaults",
            f"--datadir={self._data}",
            f"--port={self.port}",
            f"--socket={self._socket}",
            f"--pid-file={self.directory / 'mariadb.pid'}",
            f"--init-file={self._init_file}",
            *_SETTINGS,
        ]

    def _answers(self) -> bool:
        return self._client("SELECT 1", database="mysql").stdout.strip() == "1"

    def _client(self, statement: str, *, database: str) -> subprocess.CompletedProcess[str]:
        connect = ["--no-defaults", f"--socket={self._socket}", "--user=root", "--connect-timeout=5"]
        return subprocess.run(
            [str(_binary("mariadb")), *connect, "--batch", "--skip-column-names", database, "--execute", statement],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    @property
    def _socket(self) -> Path:
        return self.directory / "mariadb.sock"

    @property
    def _init_file(self) -> Path:
        return self.directory / "init.sql"


_ACCOUNT = """\
CREATE USER IF NOT EXISTS 'cqrs'@'%' IDENTIFIED BY 'cqrs';
GRANT ALL PRIVILEGES ON *.* TO 'cqrs'@'%' WITH GRANT OPTION;
"""

_SETTINGS = (
    "--bind-address=127.0.0.1",
    "--skip-name-resolve",
    "--max-connections=200",
    "--innodb-flush-log-at-trx-commit=1",
    "--character-set-server=utf8mb4",
    "--default-time-zone=+00:00",
)


def _binary(name: str) -> Path:
    found = find_binary(name, "/usr/sbin", "/usr/bin", "/usr/local/sbin")
    if found is None:
        raise MissingServerError(
            f"MariaDB is not installed: no {name!r} on PATH. Install it with: {MariaDbServer.install_hint}"
        )
    return found
