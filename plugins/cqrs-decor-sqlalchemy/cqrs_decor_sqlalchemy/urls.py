"""Database URLs: which driver a plain one gets, and how a URL is shown without its secrets."""

import re
from importlib.util import find_spec

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from cqrs_decor.errors import BadUrlError, UnsupportedError

EXAMPLE = "postgresql+asyncpg://user@host/database"

_DRIVERS = {
    "postgresql": ("asyncpg", "psycopg"),
    "mysql": ("asyncmy",),
    "mariadb": ("asyncmy",),
    "sqlite": ("aiosqlite",),
}
_EXTRAS = {"asyncpg": "postgresql", "psycopg": "psycopg", "asyncmy": "mysql", "aiosqlite": "sqlite"}


def read_url(text: str) -> URL:
    """The URL with an async driver in it: the one it names, else the first of ours that is installed.

    Raises:
        BadUrlError: It is no database URL, or names a database that is not supported.
        UnsupportedError: Its driver is not installed, or cannot be used from async code.
    """
    try:
        url = make_url(text)
    except ArgumentError:
        raise BadUrlError("database", masked(text), "it does not look like a database URL", EXAMPLE) from None
    backend, _, driver = url.drivername.partition("+")
    if backend not in _DRIVERS:
        raise BadUrlError("database", masked(text), f"{backend!r} is none of {', '.join(_DRIVERS)}", EXAMPLE)
    return url.set(drivername=f"{backend}+{_installed_driver(backend, driver)}")


def shown(url: URL) -> str:
    """The URL as texts may show it: the password masked, options left out, since they may hold secrets as well."""
    return url.set(query={}).render_as_string(hide_password=True)


def masked(text: str) -> str:
    """What can be shown of something that could not even be read as a URL."""
    return re.sub(r"^([\w+]*:/*)?.*@", r"\1***@", text, flags=re.DOTALL).partition("?")[0]


def same_database(one: URL, other: URL) -> bool:
    """Whether two URLs lead to one database, whatever the driver, user and options. Databases in memory never do."""
    return _place(one) == _place(other) and not is_memory(one)


def is_memory(url: URL) -> bool:
    """Whether this is an SQLite database in memory."""
    if url.get_backend_name() != "sqlite":
        return False
    database = url.database or ""
    return database in ("", ":memory:") or database.startswith("file::memory:") or url.query.get("mode") == "memory"


def _place(url: URL) -> tuple[object, ...]:
    backend = {"mariadb": "mysql"}.get(url.get_backend_name(), url.get_backend_name())
    return (backend, url.host, url.port or _PORTS.get(backend), url.database)


_PORTS = {"postgresql": 5432, "mysql": 3306}


def _installed_driver(backend: str, driver: str) -> str:
    usable = _DRIVERS[backend]
    if driver and driver not in usable:
        fix = f"write {backend}+{usable[0]}://"
        raise UnsupportedError(f"The driver {driver!r}", f"be used here; {' or '.join(usable)} can", fix)
    for candidate in (driver,) if driver else usable:
        if find_spec(candidate) is not None:
            return candidate
    wanted = driver or usable[0]
    raise UnsupportedError(
        f"{backend} with {wanted}",
        "be used: the driver is not installed",
        f"pip install 'cqrs-decor-sqlalchemy[{_EXTRAS[wanted]}]'",
    )
