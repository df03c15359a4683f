"""pytest fixtures for real servers: started on first use, shared by the whole run, ended with it.

A server that is not installed fails the test with the sentence that says what to install. It never skips.
"""

import itertools
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services.kafka import KafkaServer
from tests.services.mariadb import MariaDbServer
from tests.services.postgres import PostgresServer
from tests.services.shared import SERVERS, running

_run = secrets.token_hex(3)
_numbers = itertools.count(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses a server with `service(name)`, so that `-m "not service"` is what needs none."""
    for item in items:
        for name in SERVERS:
            if f"{name}_server" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.service(name))


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """The PostgreSQL of this run. A test that kills it starts it again."""
    with running(PostgresServer) as server:
        yield server


@pytest.fixture(scope="session")
def mariadb_server() -> Iterator[MariaDbServer]:
    """The MariaDB of this run. A test that kills it starts it again."""
    with running(MariaDbServer) as server:
        yield server


@pytest.fixture(scope="session")
def kafka_server() -> Iterator[KafkaServer]:
    """The Kafka of this run, plain listener only. A test that kills it starts it again."""
    with running(KafkaServer) as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """An empty PostgreSQL database of this test's own, for asyncpg."""
    name = fresh_name()
    postgres_server.start().create_database(name)
    yield postgres_server.url(driver="asyncpg", database=name)
    postgres_server.start().drop_database(name)


@pytest.fixture
def mariadb_url(mariadb_server: MariaDbServer) -> Iterator[str]:
    """An empty MariaDB database of this test's own, for asyncmy."""
    name = fresh_name()
    mariadb_server.start().create_database(name)
    yield mariadb_server.url(driver="asyncmy", database=name)
    mariadb_server.start().drop_database(name)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """An SQLite file of this test's own, for aiosqlite. It does not exist yet."""
    return f"sqlite+aiosqlite:///{tmp_path / 'test.db'}"


@pytest.fixture
def kafka_bootstrap(kafka_server: KafkaServer) -> str:
    """`host:port` of the Kafka of this run. Topics and groups are shared: take names from `fresh_name()`."""
    return kafka_server.start().bootstrap


def fresh_name() -> str:
    """A name nobody has used before, for a database, a topic or a group; letters, digits and underscores."""
    return f"t_{_run}_{next(_numbers)}"
