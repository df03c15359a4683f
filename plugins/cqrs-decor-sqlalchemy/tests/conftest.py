"""An empty database of each kind, and by each driver, for every test that asks for one."""

import pytest

DRIVERS = ("postgresql-asyncpg", "postgresql-psycopg", "mariadb-asyncmy", "sqlite-aiosqlite")


@pytest.fixture(params=DRIVERS)
def database_url(request: pytest.FixtureRequest) -> str:
    """A URL for SQLAlchemy; the server is started only for the tests that need it."""
    return url_of(request, request.param)


@pytest.fixture(params=DRIVERS[:3])
def server_url(request: pytest.FixtureRequest) -> str:
    """As `database_url`, for databases with more than one writer."""
    return url_of(request, request.param)


def url_of(request: pytest.FixtureRequest, driver: str) -> str:
    kind, _, name = driver.partition("-")
    fixture = {"postgresql": "postgres_url", "mariadb": "mariadb_url", "sqlite": "sqlite_url"}[kind]
    url: str = request.getfixturevalue(fixture)
    return url.replace("+asyncpg", f"+{name}") if kind == "postgresql" else url
