"""Entry points: modules with handlers to import, and plugins to load by the name that the configuration asks for."""

import importlib
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, Protocol, cast

from cqrs_decor.errors import (
    BrokenPluginError,
    ConflictingPluginsError,
    CqrsDecorError,
    HandlerImportError,
    UnknownPluginError,
)

HANDLERS = "cqrs_decor.handlers"
BROKERS = "cqrs_decor.brokers"
STORES = "cqrs_decor.stores"
OBSERVERS = "cqrs_decor.observers"
COMMANDS = "cqrs_decor.commands"

_PACKAGES = {
    (BROKERS, "kafka"): "cqrs-decor-kafka",
    (STORES, "sqlite"): "cqrs-decor-sqlalchemy",
    (STORES, "postgresql"): "cqrs-decor-sqlalchemy[postgresql]",
    (STORES, "mysql"): "cqrs-decor-sqlalchemy[mysql]",
    (STORES, "mariadb"): "cqrs-decor-sqlalchemy[mysql]",
    (BROKERS, "sqlite"): "cqrs-decor-sqlalchemy",
    (BROKERS, "postgresql"): "cqrs-decor-sqlalchemy[postgresql]",
    (BROKERS, "mysql"): "cqrs-decor-sqlalchemy[mysql]",
    (BROKERS, "mariadb"): "cqrs-decor-sqlalchemy[mysql]",
}
_NOUNS = {BROKERS: "broker", STORES: "store", OBSERVERS: "observer", COMMANDS: "command"}


class Distribution(Protocol):
    """What an entry point says of the distribution that brings it."""

    name: str
    version: str


class EntryPoint(Protocol):
    """An entry point as importlib-metadata describes it."""

    name: str
    value: str
    group: str
    module: str
    dist: Distribution | None

    def load(self) -> Any: ...


FindEntryPoints = Callable[[str], Iterable[EntryPoint]]


def installed(group: str) -> list[EntryPoint]:
    """The entry points of a group, each once: an editable install may list its own twice."""
    import importlib_metadata  # slow to import, and needed only when an app starts

    points = cast(Iterable[EntryPoint], cast(Any, importlib_metadata).entry_points(group=group))
    unique = {(point.name, point.value, _distribution(point)): point for point in points}
    return list(unique.values())


def load_plugin(group: str, name: str, find: FindEntryPoints = installed) -> Any:
    """Load the plugin of that name.

    Raises:
        UnknownPluginError: Nothing of that name is installed; says what is, and which package to install.
        ConflictingPluginsError: Two distributions claim the name.
        BrokenPluginError: It cannot be imported; the cause is chained.
    """
    points = list(find(group))
    named = [point for point in points if point.name == name]
    if not named:
        raise UnknownPluginError(
            _NOUNS.get(group, "plugin"), name, {point.name for point in points}, _PACKAGES.get((group, name))
        )
    if len(named) > 1:
        raise ConflictingPluginsError(_NOUNS.get(group, "plugin"), name, [_distribution(point) for point in named])
    return _loaded(named[0])


def load_all(group: str, find: FindEntryPoints = installed) -> dict[str, Any]:
    """Load every plugin of a group, by name; one that is broken raises BrokenPluginError."""
    return {point.name: _loaded(point) for point in find(group)}


def import_handlers(
    modules: Iterable[str | ModuleType], discover: bool | Iterable[str], find: FindEntryPoints = installed
) -> list[CqrsDecorError]:
    """Import modules so that their decorators run; returns what could not be imported.

    Args:
        modules: Named by the user.
        discover: True for all entry points of `cqrs_decor.handlers`, False for none, or the names of those wanted.
        find: Where entry points come from.
    """
    faults: list[CqrsDecorError] = []
    for module in modules:
        if isinstance(module, str):
            _import(module, "named in bootstrap() or CQRS_DECOR_HANDLERS", faults)
    wanted = None if isinstance(discover, bool) else set(discover)
    points = [] if discover is False else list(find(HANDLERS))
    for point in points:
        if wanted is None or point.name in wanted:
            _import(point.module, f"entry point {point.name!r} of {_distribution(point)}", faults)
    absent = sorted((wanted or set()) - {point.name for point in points})
    faults.extend(UnknownPluginError("handlers", name, {point.name for point in points}, None) for name in absent)
    return faults


def _import(module: str, origin: str, faults: list[CqrsDecorError]) -> None:
    try:
        importlib.import_module(module)
    except Exception as error:  # a module may raise anything while it is imported; the cause stays chained
        fault = HandlerImportError(module, origin, f"{type(error).__name__}: {error}")
        fault.__cause__ = error
        faults.append(fault)


def _loaded(point: EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as error:  # a plugin may raise anything while it is imported; the cause stays chained
        distribution = point.dist
        raise BrokenPluginError(
            point.name,
            _distribution(point),
            distribution.version if distribution else "?",
            f"{point.group}: {point.name} = {point.value}",
            f"{type(error).__name__}: {error}",
        ) from error


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist else "an unknown distribution"
