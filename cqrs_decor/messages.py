"""Commands, queries and events, and what their class arguments say about them."""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar, ForwardRef, Generic, Literal, TypeVar, Unpack, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict

from cqrs_decor._text import qualified_name
from cqrs_decor.errors import MessageDefinitionError

R = TypeVar("R")
T = TypeVar("T")
C = TypeVar("C", bound=type[Any])

Kind = Literal["command", "query", "stream query", "domain event", "integration event", "message"]


class _NotSaid:
    """Marks a result type that a message leaves open."""

    def __repr__(self) -> str:
        return "NOT_SAID"


NOT_SAID = _NotSaid()


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageSpec:
    """What is known of a message class.

    Attributes:
        type: The class itself.
        kind: `message` for a dataclass whose kind follows from the decorator of its handler.
        name: Wire name, owned by the producer.
        version: Schema version on the wire.
        topic: Where the broker carries it; None for what stays in process.
        key: Field whose value is the partition key; None for no order.
        compacted: Whether the topic may keep only the newest event of a key (event-carried state transfer).
        result: Type argument of `Command[R]`, `Query[R]`, `Returns[R]`, or NOT_SAID.
    """

    type: type[Any]
    kind: Kind
    name: str
    version: int = 1
    topic: str | None = None
    key: str | None = None
    compacted: bool = False
    result: Any = NOT_SAID

    @property
    def leaves_the_process(self) -> bool:
        return self.kind == "integration event"


# The classes below are checked while this very module defines them, so what checks them stands first.


def _is_dataclass(thing: object) -> bool:
    """Says the same as `dataclasses.is_dataclass`, without narrowing the type of what it is asked about."""
    return is_dataclass(thing)


def _refuse_unknown_arguments(cls: type[Any], unknown: Any) -> None:
    if unknown:
        raise MessageDefinitionError(
            qualified_name(cls),
            f"unknown class argument {', '.join(map(repr, unknown))}",
            "use topic=, key=, name= or version= (or one of pydantic's own)",
        )


def _refuse_copy(cls: type[Any]) -> None:
    """A decorator that replaces the class (`@dataclass(slots=True)`) has it made again without its class arguments: the
    copy would have another wire name than the class that its producers know, and its handlers would never be called.
    """
    if "__cqrs_message__" in vars(cls):
        raise MessageDefinitionError(
            qualified_name(cls),
            "a decorator makes a second class of it, which loses name=, version= and the validation of its fields",
            "leave the decorator out, since it is a frozen pydantic model already; or derive it from nothing and put "
            "@message(topic=..., name=...) above @dataclass(frozen=True, slots=True)",
        )


def _checked(spec: MessageSpec, known_fields: Any) -> MessageSpec:
    owner = qualified_name(spec.type)
    if spec.key is not None and spec.key not in known_fields:
        raise MessageDefinitionError(
            owner,
            f"key={spec.key!r} is none of its fields",
            f"name one of {', '.join(known_fields) or '(it has no fields)'}",
        )
    if spec.version < 1:
        raise MessageDefinitionError(owner, f"version={spec.version} is less than 1", "count versions from 1")
    if spec.topic is not None and spec.kind not in ("integration event", "message"):
        raise MessageDefinitionError(
            owner, f"a {spec.kind} has no topic", "derive it from IntegrationEvent, or leave topic= out"
        )
    return spec


def _pydantic_result(cls: type[BaseModel]) -> Any:
    for base in cls.__mro__:
        generic = base.__dict__.get("__pydantic_generic_metadata__")
        if generic and generic["args"]:
            argument = generic["args"][0]
            return NOT_SAID if isinstance(argument, TypeVar) else argument
    return NOT_SAID


def _generic_result(cls: type[Any]) -> Any:
    for base in cls.__mro__:
        for parent in vars(base).get("__orig_bases__", ()):
            if get_origin(parent) is Returns:
                return _resolved(get_args(parent)[0], base)
    return NOT_SAID


def _resolved(argument: Any, owner: type[Any]) -> Any:
    if isinstance(argument, ForwardRef):
        argument = argument.__forward_arg__
    if not isinstance(argument, str):
        return NOT_SAID if isinstance(argument, TypeVar) else argument
    holder = type("holder", (), {"__annotations__": {"it": argument}, "__module__": owner.__module__})
    return get_type_hints(holder)["it"]


class Returns(Generic[R]):
    """Gives a message class of any make a typed result: `class Ping(Returns[int])`."""

    __slots__ = ()


class Message(BaseModel):
    """Base of pydantic messages: frozen, extra fields ignored; `topic`, `key`, `name`, `version` by class argument."""

    model_config = ConfigDict(frozen=True, extra="ignore", arbitrary_types_allowed=False)

    __cqrs_kind__: ClassVar[Kind] = "message"
    __cqrs_compacted__: ClassVar[bool] = False
    __cqrs_message__: ClassVar[MessageSpec]

    def __init_subclass__(
        cls,
        *,
        topic: str | None = None,
        key: str | None = None,
        name: str | None = None,
        version: int | None = None,
        **config: Unpack[ConfigDict],
    ) -> None:
        """Pydantic takes its own class arguments before this sees them: what is left in `config` is misspelt."""
        super().__init_subclass__()
        _refuse_unknown_arguments(cls, config)

    @classmethod
    def __pydantic_init_subclass__(
        cls,
        *,
        topic: str | None = None,
        key: str | None = None,
        name: str | None = None,
        version: int | None = None,
        **config: Any,
    ) -> None:
        _refuse_copy(cls)
        inherited: MessageSpec | None = getattr(cls, "__cqrs_message__", None)
        cls.__cqrs_message__ = _checked(
            MessageSpec(
                type=cls,
                kind=cls.__cqrs_kind__,
                name=name or cls.__name__,
                version=1 if version is None else version,
                topic=topic or (inherited.topic if inherited else None),
                key=key or (inherited.key if inherited else None),
                compacted=cls.__cqrs_compacted__,
                result=_pydantic_result(cls),
            ),
            cls.model_fields,
        )


class Command(Message, Returns[R], Generic[R]):
    """Asks for a change; has exactly one handler. The type argument is what `send()` returns."""

    __cqrs_kind__ = "command"


class Query(Message, Returns[R], Generic[R]):
    """Asks for an answer and changes nothing; has exactly one handler. The type argument is what `ask()` returns."""

    __cqrs_kind__ = "query"


class StreamQuery(Message, Generic[T]):
    """Asks for many answers, one after another. The type argument is what `stream()` yields."""

    __cqrs_kind__ = "stream query"


class DomainEvent(Message):
    """Happened inside a command, handled in the same transaction by any number of handlers of this process."""

    __cqrs_kind__ = "domain event"


class IntegrationEvent(Message):
    """Happened, and other services are told: through the outbox and a broker. Needs a `topic`."""

    __cqrs_kind__ = "integration event"


class NotificationEvent(IntegrationEvent):
    """A thin integration event: says that something happened to which thing; readers ask for the rest."""


class ECSTEvent(IntegrationEvent):
    """Event-carried state transfer: the whole new state of `key`, so that a compacted topic keeps the newest only."""

    __cqrs_compacted__ = True


def message(
    *,
    topic: str | None = None,
    key: str | None = None,
    name: str | None = None,
    version: int = 1,
    compacted: bool = False,
) -> Callable[[C], C]:
    """Make a message of a dataclass. With a `topic` it is an integration event; else its handler says what it is."""

    def declare(cls: C) -> C:
        if not _is_dataclass(cls):
            raise MessageDefinitionError(
                qualified_name(cls), "@message is for dataclasses", "put @dataclass(frozen=True) below @message"
            )
        spec = MessageSpec(
            type=cls,
            kind="integration event" if topic else "message",
            name=name or cls.__name__,
            version=version,
            topic=topic,
            key=key,
            compacted=compacted,
            result=_generic_result(cls),
        )
        cls.__cqrs_message__ = _checked(spec, {field.name: field for field in fields(cls)})
        return cls

    return declare


def message_spec(cls: type[Any]) -> MessageSpec:
    """What is known of a message class; a class that declares nothing gets what its name and bases say."""
    spec = cls.__dict__.get("__cqrs_message__")
    if isinstance(spec, MessageSpec):
        return spec
    return MessageSpec(type=cls, kind="message", name=cls.__name__, result=_generic_result(cls))


def is_message_type(annotation: Any) -> bool:
    """Whether a handler's first parameter may have this type."""
    return isinstance(annotation, type) and _declares_a_message(annotation)


def _declares_a_message(cls: type[Any]) -> bool:
    return issubclass(cls, (Message, Returns)) or is_dataclass(cls) or "__cqrs_message__" in vars(cls)


def integration_event_types() -> list[type[IntegrationEvent]]:
    """Every integration event class with a topic that is defined in this process, handled or not."""
    found: list[type[IntegrationEvent]] = []
    waiting: list[type[IntegrationEvent]] = [IntegrationEvent]
    while waiting:
        below = waiting.pop().__subclasses__()
        waiting.extend(below)
        found.extend(cls for cls in below if cls.__cqrs_message__.topic)
    return found
