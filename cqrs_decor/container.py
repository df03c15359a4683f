"""Where dependencies come from: the seam for containers, and punq behind it.

Containers are asked at start-up only. punq is the API in which users register; what it would build per call is built by
compiled plans (dependencies.py), since its own `resolve` costs over 100 us and may hand out another message's instance.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast

import punq

from cqrs_decor._text import qualified_name
from cqrs_decor.handlers import CallStyle, Parameter, call_style, provided_type, read_signature
from cqrs_decor.registry import ProviderRecord

Lifetime = Literal["app", "message", "injection"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """How one dependency is made.

    Attributes:
        key: What is asked for, usually a type.
        factory: Makes it.
        lifetime: `app`: one for all; `message`: one for each handler that runs; `injection`: a new one for each use.
        where: The place of the registration.
        parameters: What the factory asks for.
        fixed: Arguments given at registration.
        style: How the factory is called.
    """

    key: Any
    factory: Callable[..., Any]
    lifetime: Lifetime
    where: str
    parameters: tuple[Parameter, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict[str, Any])
    style: CallStyle = "sync"


class Container(Protocol):
    """A source of dependencies; asked at start-up only. Plugins adapt other containers to it."""

    def provider(self, key: Any) -> Provider | None:
        """How to make `key`, or None when this container does not know it.

        Raises:
            ExceptionGroup: Of DefinitionError, when the registration cannot be read.
        """
        ...

    def registered(self) -> Iterable[Any]:
        """Everything that is registered, for error messages and `doctor`."""
        ...


class PunqContainer:
    """Reads the registrations of a `punq.Container`. The last registration of a key wins, as in punq."""

    def __init__(self, container: punq.Container) -> None:
        self.container = container

    def provider(self, key: Any) -> Provider | None:
        registrations = self.container.registrations.build_context(key).all_registrations(key)
        if not registrations:
            return None
        registration = registrations[-1]
        builder = cast(Any, registration.builder)
        where = f"punq registration of {qualified_name(key)}"
        parameters, _ = read_signature(
            builder.__init__ if inspect.isclass(builder) else builder, where, skip_self=inspect.isclass(builder)
        )
        return Provider(
            key=key,
            factory=builder,
            lifetime=_punq_lifetime(registration),
            where=where,
            parameters=tuple(parameter for parameter in parameters if parameter.name not in registration.args),
            fixed=registration.args,
            style=call_style(builder) if not inspect.isclass(builder) else "sync",
        )

    def registered(self) -> Iterable[Any]:
        registry = cast(Any, self.container.registrations)
        return list(registry._Registry__registrations.entries)


def _punq_lifetime(registration: Any) -> Lifetime:
    """punq's transient object is one per `resolve`, which is one per handler that runs; `cache=False` one per use."""
    if registration.scope is punq.Scope.singleton:
        return "app"
    return "message" if getattr(registration, "cache", True) else "injection"


class DeclaredProviders:
    """What `@provider` functions provide."""

    def __init__(self, records: Iterable[ProviderRecord]) -> None:
        self._providers = {provider.key: provider for provider in map(_declared, records)}

    def provider(self, key: Any) -> Provider | None:
        return self._providers.get(key)

    def registered(self) -> Iterable[Any]:
        return list(self._providers)


def _declared(record: ProviderRecord) -> Provider:
    parameters, _ = read_signature(record.target, record.where)
    return Provider(
        key=provided_type(record.target, record.where),
        factory=record.target,
        lifetime=record.scope,
        where=record.where,
        parameters=parameters,
        style=call_style(record.target),
    )


class FixedValues:
    """Ready-made objects by key, e.g. the overrides of a test."""

    def __init__(self, values: Mapping[Any, Any], where: str = "given value") -> None:
        self._values = dict(values)
        self._where = where

    def provider(self, key: Any) -> Provider | None:
        if key not in self._values:
            return None
        value = self._values[key]
        return Provider(key=key, factory=lambda: value, lifetime="app", where=self._where)

    def registered(self) -> Iterable[Any]:
        return list(self._values)


class Layered:
    """Several containers as one; the first that knows a key answers."""

    def __init__(self, *layers: Container) -> None:
        self._layers = layers

    def provider(self, key: Any) -> Provider | None:
        for layer in self._layers:
            found = layer.provider(key)
            if found is not None:
                return found
        return None

    def registered(self) -> Iterable[Any]:
        return [key for layer in self._layers for key in layer.registered()]


def new_container() -> punq.Container:
    """An empty container to register in."""
    return punq.Container()


def as_container(container: Any) -> Container:
    """A `punq.Container` through its adapter; anything else is taken to be a `Container` already."""
    return PunqContainer(container) if isinstance(container, punq.Container) else cast(Container, container)
