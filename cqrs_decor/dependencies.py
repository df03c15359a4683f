"""The dependency graph of each handler, drawn and checked at start-up, and the app-scoped objects in it."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from cqrs_decor._text import type_name
from cqrs_decor.container import Container, Provider
from cqrs_decor.context import MessageContext
from cqrs_decor.errors import (
    CqrsDecorError,
    DependencyCycleError,
    MissingDependencyError,
    MissingResourceError,
    ScopeMismatchError,
)
from cqrs_decor.handlers import Parameter

# The resources of the usual stores, so that an app without a database can say what is missing instead of "nobody
# provides AsyncSession".
_KNOWN_RESOURCES = ("sqlalchemy.", "sqlmodel.")


@dataclass(frozen=True, slots=True)
class FromContext:
    """The MessageContext itself."""


@dataclass(frozen=True, slots=True)
class FromTransaction:
    """A resource of the open transaction."""

    kind: type[Any]


@dataclass(frozen=True, slots=True)
class FromProvider:
    """Made by a factory, whose own arguments are further nodes."""

    provider: Provider
    arguments: "tuple[tuple[Parameter, Node], ...]" = ()


Node = FromContext | FromTransaction | FromProvider


@dataclass(slots=True)
class Graph:
    """What one callable needs: a node per parameter; those left to their defaults are absent."""

    arguments: tuple[tuple[Parameter, Node], ...]
    faults: list[CqrsDecorError] = field(default_factory=list[CqrsDecorError])

    def nodes(self) -> Iterable[Node]:
        """Every node below, dependencies before what depends on them."""
        return _walk(self.arguments)

    @property
    def resources(self) -> set[type[Any]]:
        return {node.kind for node in self.nodes() if isinstance(node, FromTransaction)}


def _walk(arguments: Sequence[tuple[Parameter, Node]]) -> Iterable[Node]:
    for _, node in arguments:
        if isinstance(node, FromProvider):
            yield from _walk(node.arguments)
        yield node


class GraphBuilder:
    """Draws graphs over one container and one store's resources."""

    def __init__(self, container: Container, resources: Mapping[type[Any], bool]) -> None:
        self._container = container
        self._resources = resources

    def draw(self, parameters: Iterable[Parameter], where: str, *, app_scope: bool = False) -> Graph:
        """The graph of what `parameters` ask for; what is wrong with it is in its `faults`.

        Args:
            parameters: Of a handler, a constructor or a hook.
            where: Whose they are.
            app_scope: They live as long as the app, so nothing below may live for one message only.
        """
        graph = Graph(())
        holder = where if app_scope else None
        graph.arguments = self._arguments(parameters, where, (), holder, graph.faults)
        return graph

    def _arguments(
        self,
        parameters: Iterable[Parameter],
        where: str,
        path: tuple[Any, ...],
        holder: str | None,
        faults: list[CqrsDecorError],
    ) -> tuple[tuple[Parameter, Node], ...]:
        drawn = ((parameter, self._node(parameter, where, path, holder, faults)) for parameter in parameters)
        return tuple((parameter, node) for parameter, node in drawn if node is not None)

    def _node(
        self,
        parameter: Parameter,
        where: str,
        path: tuple[Any, ...],
        holder: str | None,
        faults: list[CqrsDecorError],
    ) -> Node | None:
        key = parameter.annotation
        if key is MessageContext or key in self._resources:
            if holder:
                faults.append(ScopeMismatchError(where, holder, type_name(key)))
            return FromContext() if key is MessageContext else FromTransaction(key)
        provider = self._provider(key, faults)
        if provider is None:
            if parameter.required:
                faults.append(self._missing(parameter, where))
            return None
        if key in path:
            cycle = [type_name(step) for step in (*path[path.index(key) :], key)]
            faults.append(DependencyCycleError(where, cycle))
            return None
        if holder and provider.lifetime != "app":
            faults.append(ScopeMismatchError(provider.where, holder, type_name(key)))
        below = type_name(key) if provider.lifetime == "app" else holder
        return FromProvider(provider, self._arguments(provider.parameters, provider.where, (*path, key), below, faults))

    def _provider(self, key: Any, faults: list[CqrsDecorError]) -> Provider | None:
        try:
            return self._container.provider(key)
        except ExceptionGroup as group:
            faults.extend(error for error in group.exceptions if isinstance(error, CqrsDecorError))
            return None

    def _missing(self, parameter: Parameter, where: str) -> CqrsDecorError:
        wanted = parameter.annotation
        module = getattr(wanted, "__module__", "")
        if module.startswith(_KNOWN_RESOURCES) and not self._resources:
            return MissingResourceError(where, parameter.name, type_name(wanted))
        known = [*map(type_name, self._container.registered()), *map(type_name, self._resources)]
        return MissingDependencyError(where, parameter.name, type_name(wanted), known)


class AppValues:
    """The app-scoped objects: each made once, at start-up, in the order of need, and closed with the app."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self._values: dict[Any, Any] = {}

    async def prepare(self, graph: Graph) -> None:
        """Make every app-scoped object of a graph that is not there yet."""
        for node in graph.nodes():
            if isinstance(node, FromProvider) and node.provider.lifetime == "app":
                await self._made(node)

    def value(self, node: FromProvider) -> Any:
        """An object made by `prepare`."""
        return self._values[node.provider.key]

    async def call(self, function: Any, graph: Graph) -> Any:
        """Call a hook or constructor that asks for app-scoped objects only."""
        await self.prepare(graph)
        result = function(**self._keywords(graph.arguments))
        return await result if hasattr(result, "__await__") else result

    async def _made(self, node: FromProvider) -> None:
        if node.provider.key in self._values:
            return
        made = call_factory(node.provider)(**self._keywords(node.arguments), **node.provider.fixed)
        self._values[node.provider.key] = await self._entered(node.provider, made)

    async def _entered(self, provider: Provider, made: Any) -> Any:
        if provider.style == "async":
            return await made
        if provider.style == "async generator":
            return await self._stack.enter_async_context(made)
        if provider.style == "generator":
            return self._stack.enter_context(made)
        return made

    def _keywords(self, arguments: Sequence[tuple[Parameter, Node]]) -> dict[str, Any]:
        return {
            parameter.name: self._values[node.provider.key]
            for parameter, node in arguments
            if isinstance(node, FromProvider)
        }


def call_factory(provider: Provider) -> Any:
    """The factory; a generator becomes the context manager that it is written as."""
    if provider.style == "async generator":
        return asynccontextmanager(provider.factory)
    if provider.style == "generator":
        return contextmanager(provider.factory)
    return provider.factory
