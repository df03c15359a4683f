"""From what the configuration says to a store and a broker: a URL, an object of a plugin's, an engine of the user's."""

from typing import Any, Protocol, cast

from cqrs_decor.broker import Broker
from cqrs_decor.discovery import BROKERS, STORES, FindEntryPoints, installed, load_all, load_plugin
from cqrs_decor.errors import BadUrlError, SettingError
from cqrs_decor.memory import MemoryBroker, MemoryStore
from cqrs_decor.store import Store

_EXAMPLES = {
    "database": "postgresql+asyncpg://localhost/shop or sqlite+aiosqlite:///shop.db",
    "broker": "kafka://localhost:9092",
}


class FromUrl(Protocol):
    """What the entry points of brokers and stores name: a class that is made from a URL of its scheme."""

    def from_url(self, url: str) -> Any:
        """
        Raises:
            BadUrlError: The URL cannot be read.
            SettingError: An option in it, or an environment variable of the plugin's, does not fit.
        """
        ...


def open_store(database: Any, find: FindEntryPoints = installed) -> Store:
    """The store that `database` names.

    Raises:
        UnknownPluginError, BrokenPluginError, ConflictingPluginsError: No plugin for it.
        BadUrlError, SettingError: It cannot be read.
    """
    if database is None:
        return MemoryStore()
    if isinstance(database, str):
        plugin = cast(FromUrl, load_plugin(STORES, _scheme("database", database), find))
        return cast(Store, plugin.from_url(database))
    if hasattr(database, "outbox") and hasattr(database, "inbox"):
        return cast(Store, database)
    for plugin in set(load_all(STORES, find).values()):
        made = plugin.from_object(database) if hasattr(plugin, "from_object") else None
        if made is not None:
            return cast(Store, made)
    raise SettingError(
        "database",
        f"no installed store plugin can use a {type(database).__name__}",
        "give a URL, an AsyncEngine or an async_sessionmaker (with pip install cqrs-decor-sqlalchemy), or a store",
    )


def open_broker(broker: Any, store: Store, find: FindEntryPoints = installed) -> Broker:
    """The broker that `broker` names; without one, the store's own log, or memory where it has none.

    Raises:
        UnknownPluginError, BrokenPluginError, ConflictingPluginsError: No plugin for it.
        BadUrlError, SettingError: It cannot be read.
    """
    if broker is None:
        return store.log_broker() or MemoryBroker()
    if isinstance(broker, str):
        plugin = cast(FromUrl, load_plugin(BROKERS, _scheme("broker", broker), find))
        return cast(Broker, plugin.from_url(broker))
    if hasattr(broker, "publish") and hasattr(broker, "subscribe"):
        return cast(Broker, broker)
    raise SettingError(
        "broker", f"a {type(broker).__name__} is no broker", "give a URL or an object of a broker plugin's"
    )


def _scheme(what: str, url: str) -> str:
    """`postgresql` of `postgresql+asyncpg://...`; a URL may hold a password, so that errors show none of it."""
    scheme, separator, _ = url.partition("://")
    if not separator or not scheme:
        raise BadUrlError(what, "(not shown)", "it does not begin with a scheme and ://", _EXAMPLES[what])
    return scheme.partition("+")[0].lower()
