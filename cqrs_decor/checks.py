"""What start-up looks at before anything runs: every handler, its messages and its dependencies, all faults at once."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cqrs_decor._text import qualified_name, type_name
from cqrs_decor.dependencies import GraphBuilder
from cqrs_decor.dispatch import HandlerGraphs
from cqrs_decor.errors import (
    CqrsDecorError,
    DuplicateConsumerError,
    DuplicateHandlerError,
    HandlerDefinitionError,
    MissingServiceNameError,
    SyncHandlerWithAsyncResourceError,
    UnknownTopicError,
)
from cqrs_decor.handlers import HandlerSpec, read_handler
from cqrs_decor.messages import integration_event_types, message_spec
from cqrs_decor.registry import HandlerRecord
from cqrs_decor.routing import Routes


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
