"""A fresh SQLite store for one test, in place of the database that an app names.

The plugin for it is loaded by its entry point, and only here: the core knows no database. So the plugin's own objects
are `Any` in this module.
"""

import sys
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

from cqrs_decor.discovery import STORES, load_plugin
from cqrs_decor.store import Store


@asynccontextmanager
async def temporary_store(like: Any, folder: Path, metadata: Any = None) -> AsyncGenerator[Store, None]:
    """An empty store in a file in `folder`, with the tables of the user's metadata.

    Args:
        like: What the app names as its database. Of a sessionmaker or a store, the session class and its options are
            kept, and of a store the metadata that its tables stand in.
        folder: Where the file is made.
        metadata: One `MetaData` or declarative base, or several; without it those of `like`, or else of all
            declarative bases there are.

    Raises:
        UnknownPluginError: The SQLAlchemy plugin is not installed; says which package to install.
    """
    plugin = load_plugin(STORES, "sqlite")
    fresh = plugin.from_url(f"sqlite+aiosqlite:///{folder / 'test.db'}")
    try:
        async with fresh.database.engine.begin() as connection:
            for each in _metadata_of(metadata, like):
                await connection.run_sync(each.create_all)
        yield cast(Store, _with_sessions_like(like, fresh, plugin))
    finally:
        await fresh.close()


def _with_sessions_like(like: Any, fresh: Any, plugin: Any) -> Any:
    """The same database, by sessions of the user's own class and options."""
    sessions = like if hasattr(like, "class_") else getattr(like, "sessions", None)
    if sessions is None:
        return fresh
    options = {**sessions.kw, "bind": fresh.database.engine}
    return plugin.from_object(type(sessions)(class_=sessions.class_, **options))


def _metadata_of(given: Any, like: Any) -> Iterable[Any]:
    if given is not None:
        several = cast(Iterable[Any], given) if isinstance(given, list | tuple) else (given,)
        return [getattr(each, "metadata", each) for each in several]
    tables = getattr(getattr(like, "database", None), "tables", None)
    return [*([tables.metadata] if tables is not None else []), *_declared_metadata()]


def _declared_metadata() -> list[Any]:
    """Of every declarative base in this process: a URL says nothing of the tables that belong to it."""
    orm: Any = sys.modules.get("sqlalchemy.orm")
    return [] if orm is None else [base.metadata for base in orm.DeclarativeBase.__subclasses__()]
