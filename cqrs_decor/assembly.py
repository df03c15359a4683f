"""From a configuration to parts: everything is imported, loaded and examined, nothing is connected."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

from cqrs_decor.broker import Broker
from cqrs_decor.checks import Examined, examine, service_fault, setting_faults
from cqrs_decor.clock import Clock
from cqrs_decor.container import Container, DeclaredProviders, FixedValues, Layered, as_container
from cqrs_decor.dependencies import GraphBuilder
from cqrs_decor.discovery import OBSERVERS, import_handlers, load_all
from cqrs_decor.errors import CqrsDecorError
from cqrs_decor.handlers import read_signature, source_place
from cqrs_decor.housekeeping import retention_of
from cqrs_decor.observers import Observer, Observers
from cqrs_decor.parts import open_broker, open_store
from cqrs_decor.registry import Registry, Snapshot, merged
from cqrs_decor.settings import Settings
from cqrs_decor.store import Store

Run = Literal["relay", "worker", "all", "none"]
Hook = Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """What `bootstrap` was told, and what the environment says where it was told nothing."""

    modules: tuple[str | ModuleType, ...]
    registries: tuple[Registry, ...]
    discover: bool | tuple[str, ...]
    broker: Any
    database: Any
    service: str | None
    run: Run | None
    container: Any
    middlewares: tuple[Any, ...]
    settings: Settings
    on_startup: tuple[Hook, ...]
    on_shutdown: tuple[Hook, ...]
    observers: tuple[Observer, ...]
    clock: Clock


@dataclass(slots=True)
class Parts:
    """What an app is made of, examined and not yet connected."""

    snapshot: Snapshot
    store: Store
    broker: Broker
    examined: Examined
    graphs: GraphBuilder
    observers: Observers
    faults: list[CqrsDecorError]


def assemble(configuration: Configuration, given: Mapping[Any, Any]) -> Parts:
    """Import, load and examine; what is wrong is in the `faults`.

    Args:
        configuration: What the app was told.
        given: Ready-made dependencies by type, before all others.
    """
    faults = import_handlers(configuration.modules, configuration.discover)
    snapshot = merged(configuration.registries)
    store = _part(faults, lambda: open_store(configuration.database)) or open_store(None)
    broker = _part(faults, lambda: open_broker(configuration.broker, store)) or open_broker(None, open_store(None))
    if configuration.broker is not None or store.card.durable:
        faults.extend(
            service_fault(configuration.service, broker.name, durable=_keeps_positions(configuration, broker))
        )
    faults.extend(setting_faults(configuration.settings, store, configuration.run))
    found = _part(faults, lambda: _container(configuration, snapshot, given)) or FixedValues({})
    graphs = GraphBuilder(found, store.resources)
    examined = examine(snapshot.handlers, graphs, store.resources)
    for target in _made_or_called_at_startup(configuration, snapshot):
        faults.extend(_faults_of_call(target, graphs))
    observers = _part(faults, lambda: _observers(configuration)) or Observers()
    examined.routes.remembered = retention_of(configuration.settings).inbox
    return Parts(
        snapshot=snapshot,
        store=store,
        broker=broker,
        examined=examined,
        graphs=graphs,
        observers=observers,
        faults=[*faults, *examined.faults],
    )


def _made_or_called_at_startup(configuration: Configuration, snapshot: Snapshot) -> Sequence[Any]:
    """Hooks, and the classes among the middlewares: what asks for app-scoped dependencies besides handlers."""
    middlewares = (*configuration.middlewares, *snapshot.middlewares)
    return (
        *(middleware for middleware in middlewares if isinstance(middleware, type)),
        *(*snapshot.on_startup, *configuration.on_startup, *configuration.on_shutdown, *snapshot.on_shutdown),
    )


_CONSTRUCTOR = "__init__"


def signed(target: Any) -> Any:
    """Whose signature says what `target` needs when it is called: a class is called through its constructor."""
    return getattr(target, _CONSTRUCTOR) if isinstance(target, type) else target


def _faults_of_call(target: Any, graphs: GraphBuilder) -> list[CqrsDecorError]:
    made = isinstance(target, type)
    where = source_place(target)
    try:
        parameters, _ = read_signature(signed(target), where, skip_self=made)
    except ExceptionGroup as group:
        return [error for error in group.exceptions if isinstance(error, CqrsDecorError)]
    return graphs.draw(parameters, where, app_scope=True).faults


def _part(faults: list[CqrsDecorError], make: Callable[[], Any]) -> Any:
    try:
        return make()
    except CqrsDecorError as error:
        faults.append(error)
    except ExceptionGroup as group:
        faults.extend(error for error in group.exceptions if isinstance(error, CqrsDecorError))
    return None


def _observers(configuration: Configuration) -> Observers:
    return Observers((*configuration.observers, *(made() for made in load_all(OBSERVERS).values())))


def _keeps_positions(configuration: Configuration, broker: Broker) -> bool:
    """A broker of its own, that outlives this process, needs the service's name; a database of one service does not."""
    return configuration.broker is not None and broker.capabilities.durable


def _container(configuration: Configuration, snapshot: Snapshot, given: Mapping[Any, Any]) -> Container:
    return Layered(
        FixedValues(given),
        DeclaredProviders(snapshot.providers),
        as_container(configuration.container),
    )
