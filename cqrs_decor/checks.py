"""What start-up looks at before anything runs: every handler, its messages and its dependencies, all faults at once."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from cqrs_decor._text import qualified_name, type_name
from cqrs_decor.dependencies import GraphBuilder
from cqrs_decor.dispatch import HandlerGraphs
from cqrs_decor.errors import (
    CqrsDecorError,
    DuplicateConsumerError,
    DuplicateHandlerError,
    HandlerDefinitionError,
    MissingServiceNameError,
    SettingError,
    SyncHandlerWithAsyncResourceError,
    UnknownTopicError,
)
from cqrs_decor.handlers import HandlerSpec, read_handler
from cqrs_decor.messages import integration_event_types, message_spec
from cqrs_decor.registry import HandlerRecord
from cqrs_decor.routing import Routes
from cqrs_decor.settings import PREFIX, Settings
from cqrs_decor.store import Store

TRUSTED_SHARE = 0.7
"""A relay trusts its lease for this share of it: the rest is for clocks and answers that are late."""

_RELAY_CONNECTIONS = 6
"""Claim, settle, renew, clean up, listen, and one to spare."""

_SPARE_CONNECTIONS = 3
"""Of a worker besides its handlers: marks, parking, retries."""


@dataclass(slots=True)
class Examined:
    """Handlers that were read and drawn, and everything that is wrong with them."""

    commands: dict[type[Any], HandlerSpec] = field(default_factory=dict[type[Any], HandlerSpec])
    queries: dict[type[Any], HandlerSpec] = field(default_factory=dict[type[Any], HandlerSpec])
    domain: dict[type[Any], list[HandlerSpec]] = field(default_factory=dict[type[Any], list[HandlerSpec]])
    consumers: dict[type[Any], list[HandlerSpec]] = field(default_factory=dict[type[Any], list[HandlerSpec]])
    graphs: dict[int, HandlerGraphs] = field(default_factory=dict[int, HandlerGraphs])
    routes: Routes = field(default_factory=Routes)
    faults: list[CqrsDecorError] = field(default_factory=list[CqrsDecorError])

    def specs(self) -> list[HandlerSpec]:
        """Every handler once, by place."""
        several = [spec for group in (self.domain, self.consumers) for specs in group.values() for spec in specs]
        every = [*self.commands.values(), *self.queries.values(), *several]
        return list({id(spec): spec for spec in every}.values())

    def graphs_of(self, spec: HandlerSpec) -> HandlerGraphs:
        return self.graphs[id(spec)]


def examine(records: Iterable[HandlerRecord], graphs: GraphBuilder, resources: Mapping[type[Any], bool]) -> Examined:
    """Read every handler and draw what it needs.

    Args:
        records: As they were declared.
        graphs: Draws over the app's container.
        resources: What the store offers, and whether `def` code may use it.
    """
    examined = Examined()
    specs = list(_read(records, examined.faults))
    _sort(specs, examined)
    for spec in specs:
        examined.graphs[id(spec)] = drawn = _drawn(spec, graphs)
        examined.faults.extend(fault for graph in (drawn.constructor, drawn.call) for fault in graph.faults)
        examined.faults.extend(_resource_faults(spec, drawn, resources))
    examined.faults.extend(_consumer_faults(examined))
    examined.routes = Routes(handled=examined.consumers, declared=integration_event_types())
    examined.faults.extend(examined.routes.faults)
    return examined


def service_fault(service: str | None, broker_name: str, *, durable: bool) -> Iterator[CqrsDecorError]:
    """A durable broker keeps positions by the name of the service: there must be one."""
    if durable and not service:
        yield MissingServiceNameError(broker_name)


@runtime_checkable
class LimitsConnections(Protocol):
    """A store that knows how many connections it may have open at a time; None where there is no limit."""

    connections: int | None


def setting_faults(
    settings: Settings, store: Store, run: Literal["relay", "worker", "all", "none"] | None
) -> Iterator[CqrsDecorError]:
    """Settings that are right one by one and cannot be right together.

    Args:
        settings: Completed from the environment.
        store: Its connections are to last for what runs.
        run: Which loops are meant to run here.
    """
    trusted_s = TRUSTED_SHARE * settings.lease_s
    if settings.publish_timeout_s > trusted_s:
        yield _contradiction(
            ("publish_timeout_s", "lease_s"),
            f"a batch may take {settings.publish_timeout_s:g} s, and of a lease of {settings.lease_s:g} s only "
            f"{trusted_s:g} s are surely the relay's own",
            f"make the lease at least {settings.publish_timeout_s / TRUSTED_SHARE:.1f} s, or the time-out shorter",
        )
    if settings.inbox_retention_days <= settings.replay_horizon_days:
        yield _contradiction(
            ("inbox_retention_days", "replay_horizon_days"),
            f"the inbox forgets after {settings.inbox_retention_days:g} days, and a message may come again after "
            f"{settings.replay_horizon_days:g}: its effects would happen twice",
            "keep the inbox longer than the horizon",
        )
    for name, wanted in (("worker_concurrency", settings.worker_concurrency), ("worker_batch", settings.worker_batch)):
        if wanted > max(settings.worker_prefetch, 2):
            yield _contradiction(
                (name, "worker_prefetch"),
                f"{wanted} cannot be reached with {settings.worker_prefetch} messages in memory at most",
                f"raise worker_prefetch to {wanted}, or lower {name}",
            )
    yield from _connection_faults(settings, store, run)


def fitting_concurrency(settings: Settings, store: Store, *, beside_a_relay: bool) -> int:
    """How many handlers a worker runs at a time. One that nobody set must not ask for more connections than there are;
    where only one can write at a time, handlers side by side would only wait for each other.
    """
    if "worker_concurrency" in settings.model_fields_set:
        return settings.worker_concurrency
    if not store.card.concurrent_writers:
        return 1
    limit = _limit_of(store)
    if limit is None:
        return settings.worker_concurrency
    left = limit - _SPARE_CONNECTIONS - (_RELAY_CONNECTIONS if beside_a_relay else 0)
    return max(1, min(settings.worker_concurrency, left))


def _limit_of(store: Store) -> int | None:
    return store.connections if isinstance(store, LimitsConnections) else None


def _connection_faults(
    settings: Settings, store: Store, run: Literal["relay", "worker", "all", "none"] | None
) -> Iterator[CqrsDecorError]:
    """Where there is only one writer, nobody gains by more connections, and handlers wait for each other anyway."""
    limit = _limit_of(store)
    handlers = fitting_concurrency(settings, store, beside_a_relay=run == "all") if run in ("worker", "all") else 0
    relay = _RELAY_CONNECTIONS if run in ("relay", "all") else 0
    needed = relay + (handlers + _SPARE_CONNECTIONS if handlers else 0)
    if limit is not None and store.card.concurrent_writers and limit < needed:
        yield _contradiction(
            ("worker_concurrency",),
            f"{handlers} handlers at a time and the loops want {needed} connections, and {store.name} has {limit} at "
            "most",
            "give the engine a larger pool (pool_size, max_overflow), or lower worker_concurrency",
        )


def _contradiction(names: tuple[str, ...], reason: str, fix: str) -> SettingError:
    variables = ", ".join(f"{PREFIX}{name.upper()}" for name in names)
    return SettingError(" and ".join(names), reason, fix, where=f"bootstrap(settings=...) or {variables}")


def _read(records: Iterable[HandlerRecord], faults: list[CqrsDecorError]) -> Iterator[HandlerSpec]:
    for record in records:
        try:
            spec, found = read_handler(record.kind, record.target, record.options, record.where)
        except ExceptionGroup as group:
            faults.extend(error for error in group.exceptions if isinstance(error, CqrsDecorError))
        else:
            faults.extend(found)
            yield spec


def _sort(specs: Sequence[HandlerSpec], examined: Examined) -> None:
    owned: dict[str, dict[type[Any], list[HandlerSpec]]] = {"command": defaultdict(list), "query": defaultdict(list)}
    for spec in specs:
        for message_type in spec.message_types:
            if spec.kind in owned:
                owned[spec.kind][message_type].append(spec)
            else:
                several = examined.consumers if message_spec(message_type).leaves_the_process else examined.domain
                several.setdefault(message_type, []).append(spec)
    for kind, target in (("command", examined.commands), ("query", examined.queries)):
        for message_type, handlers in owned[kind].items():
            target[message_type] = handlers[0]
            if len(handlers) > 1:
                places = [spec.where for spec in handlers]
                examined.faults.append(DuplicateHandlerError(kind, message_spec(message_type).name, places))


def _drawn(spec: HandlerSpec, graphs: GraphBuilder) -> HandlerGraphs:
    return HandlerGraphs(
        constructor=graphs.draw(spec.constructor or (), spec.where), call=graphs.draw(spec.parameters, spec.where)
    )


def _resource_faults(
    spec: HandlerSpec, drawn: HandlerGraphs, resources: Mapping[type[Any], bool]
) -> Iterator[CqrsDecorError]:
    plain = next((type_name(kind) for kind, usable in resources.items() if usable), None)
    for resource in sorted(drawn.resources, key=type_name):
        if spec.style == "sync" and not resources[resource]:
            yield SyncHandlerWithAsyncResourceError(
                spec.where, _parameter_of(resource, spec), type_name(resource), plain
            )
        if spec.style == "async" and resources[resource]:
            yield HandlerDefinitionError(
                spec.where,
                f"An `async def` handler asks for {type_name(resource)}, which would block the loop.",
                "ask for the asynchronous session, or write the handler with plain `def`",
            )


def _parameter_of(resource: type[Any], spec: HandlerSpec) -> str:
    parameters = (*spec.parameters, *(spec.constructor or ()))
    return next((parameter.name for parameter in parameters if parameter.annotation is resource), "a dependency")


def _consumer_faults(examined: Examined) -> Iterator[CqrsDecorError]:
    by_name: dict[str, dict[int, HandlerSpec]] = defaultdict(dict)
    for message_type, specs in examined.consumers.items():
        if message_spec(message_type).topic is None:
            for spec in specs:
                yield UnknownTopicError(qualified_name(message_type), spec.where)
        for spec in specs:
            by_name[spec.name][id(spec)] = spec
    for name, same in by_name.items():
        if len(same) > 1:
            yield DuplicateConsumerError(name, [spec.where for spec in same.values()])
