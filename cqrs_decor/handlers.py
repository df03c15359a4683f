"""A handler's signature, read once: which messages it takes, what it asks for, how it is called."""

import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from cqrs_decor._text import qualified_name, type_name
from cqrs_decor.errors import (
    CqrsDecorError,
    HandlerDefinitionError,
    InvalidOptionError,
    ReturnTypeMismatchError,
    UnreadableAnnotationError,
)
from cqrs_decor.messages import NOT_SAID, is_message_type, message_spec
from cqrs_decor.retry import Retry

HandlerKind = Literal["command", "query", "event"]
CallStyle = Literal["async", "sync", "async generator", "generator"]

REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True, slots=True, kw_only=True)
class HandlerOptions:
    """What a decorator was told.

    Attributes:
        name: The handler's stable name; for a consumer, inbox rows are kept by it.
        messages: The message types, where the annotation does not say them.
        retry: Try again after failures; None for the default of its kind.
        timeout: One attempt may take this long.
        concurrency: At most so many run at a time in this process.
        isolated: A domain event handler that runs after the commit, in its own transaction, cannot fail the command.
        optimistic: A consumer that has no effects outside the database and may be rerun: many messages in one
            transaction.
    """

    name: str | None = None
    messages: tuple[type[Any], ...] = ()
    retry: Retry | None = None
    timeout: timedelta | None = None
    concurrency: int | None = None
    isolated: bool = False
    optimistic: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """Something that a handler, a factory or a constructor asks for; `place` counts from 0, a message left out."""

    name: str
    annotation: Any
    place: int
    default: Any = REQUIRED
    keyword_only: bool = False

    @property
    def required(self) -> bool:
        return self.default is REQUIRED


@dataclass(frozen=True, slots=True, kw_only=True)
class HandlerSpec:
    """A handler as the build sees it.

    Attributes:
        kind: Which decorator recorded it.
        name: Its stable name.
        target: The function or class.
        where: `file:line`, for messages to its author.
        message_types: What it handles.
        parameters: What `handle` or the function asks for after the message.
        constructor: What the class asks for when it is made; None for a function.
        style: How it is called.
        offers_events: The class has an `events` property whose events are taken after `handle`.
        options: What the decorator was told.
    """

    kind: HandlerKind
    name: str
    target: Any
    where: str
    message_types: tuple[type[Any], ...]
    parameters: tuple[Parameter, ...]
    constructor: tuple[Parameter, ...] | None
    style: CallStyle
    offers_events: bool = False
    options: HandlerOptions = field(default_factory=HandlerOptions)


def read_handler(
    kind: HandlerKind, target: Any, options: HandlerOptions, where: str
) -> tuple[HandlerSpec, list[CqrsDecorError]]:
    """Read a handler's signature.

    Returns:
        The handler, and what is wrong with it that does not keep the rest of it from being looked at.

    Raises:
        ExceptionGroup: Of DefinitionError: it cannot be read at all.
    """
    function: Any = getattr(target, "handle", target) if inspect.isclass(target) else target
    _refuse_what_is_no_handler(target, function, where)
    parameters, returned = read_signature(function, where, skip_self=inspect.isclass(target))
    message_types = options.messages or _message_types(parameters, where)
    spec = HandlerSpec(
        kind=kind,
        name=options.name or target.__qualname__.replace("<locals>.", ""),
        target=target,
        where=where,
        message_types=message_types,
        parameters=tuple(replace(parameter, place=parameter.place - 1) for parameter in parameters[1:]),
        constructor=read_signature(target.__init__, where, skip_self=True)[0] if inspect.isclass(target) else None,
        style=call_style(function),
        offers_events=inspect.isclass(target) and hasattr(target, "events"),
        options=options,
    )
    return spec, [*_kind_faults(spec), *_option_faults(spec), *_result_faults(spec, returned)]


def read_signature(
    function: Callable[..., Any], where: str, *, skip_self: bool = False
) -> tuple[tuple[Parameter, ...], Any]:
    """The parameters of a callable with their resolved annotations, and its return annotation (REQUIRED for none).

    Raises:
        ExceptionGroup: Of UnreadableAnnotationError, one for each parameter that cannot be read.
    """
    if function is object.__init__:
        return (), REQUIRED
    hints = _hints(function, where)
    read: list[Parameter] = []
    faults: list[CqrsDecorError] = []
    for parameter in list(inspect.signature(function).parameters.values())[1 if skip_self else 0 :]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.name not in hints and parameter.default is REQUIRED and not (read == [] and not skip_self):
            faults.append(UnreadableAnnotationError(where, parameter.name, "it has none"))
        read.append(
            Parameter(
                name=parameter.name,
                annotation=hints.get(parameter.name, REQUIRED),
                place=len(read),
                default=parameter.default,
                keyword_only=parameter.kind is parameter.KEYWORD_ONLY,
            )
        )
    if faults:
        raise ExceptionGroup(where, faults)
    return tuple(read), hints.get("return", REQUIRED)


def call_style(function: Any) -> CallStyle:
    if inspect.isasyncgenfunction(function):
        return "async generator"
    if inspect.isgeneratorfunction(function):
        return "generator"
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None)):  # noqa: B004
        return "async"
    return "sync"


def provided_type(function: Callable[..., Any], where: str) -> Any:
    """What a provider function provides: its return annotation, or what its iterator yields."""
    _, returned = read_signature(function, where)
    if returned is REQUIRED:
        raise HandlerDefinitionError(
            where, "A provider does not say what it provides.", "annotate what it returns, e.g. `-> Clock`"
        )
    if call_style(function) in ("async generator", "generator"):
        return get_args(returned)[0]
    return returned


def source_place(target: Any) -> str:
    """`file:line` of a function or class, relative where that is shorter to read."""
    unwrapped = inspect.unwrap(target) if callable(target) else target
    try:
        path = inspect.getsourcefile(unwrapped) or "<unknown>"
        code = getattr(unwrapped, "__code__", None)
        line = code.co_firstlineno if code else inspect.getsourcelines(unwrapped)[1]
    except (OSError, TypeError):
        return qualified_name(target)
    return f"{qualified_name(target)} ({path.rsplit('/', 1)[-1]}:{line})"


def _hints(function: Callable[..., Any], where: str) -> Mapping[str, Any]:
    try:
        return get_type_hints(function)
    except Exception as error:  # an annotation may run any code of the user's: whatever it raises is the finding
        raise ExceptionGroup(where, _unreadable(function, where, error)) from error


def _unreadable(function: Callable[..., Any], where: str, error: Exception) -> list[CqrsDecorError]:
    name = getattr(error, "name", None)
    annotations: Mapping[str, Any] = getattr(function, "__annotations__", {})
    guilty = [
        parameter
        for parameter, annotation in annotations.items()
        if isinstance(annotation, str) and name is not None and name in annotation
    ]
    reason = f"{type(error).__name__}: {error}"
    return [UnreadableAnnotationError(where, parameter, reason) for parameter in guilty or ["(unknown)"]]


def _refuse_what_is_no_handler(target: Any, function: Any, where: str) -> None:
    if inspect.isclass(target) and function is target:
        raise ExceptionGroup(
            where,
            [
                HandlerDefinitionError(
                    where,
                    f"Class {type_name(target)} has no method `handle`.",
                    "give it `async def handle(self, message: ...)`",
                )
            ],
        )


def _message_types(parameters: tuple[Parameter, ...], where: str) -> tuple[type[Any], ...]:
    if not parameters or parameters[0].annotation is REQUIRED:
        raise ExceptionGroup(
            where,
            [
                HandlerDefinitionError(
                    where,
                    "A handler does not say which message it handles.",
                    "annotate its first parameter with the message class",
                )
            ],
        )
    annotation = parameters[0].annotation
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    strange = [member for member in members if not is_message_type(member)]
    if strange:
        raise ExceptionGroup(
            where,
            [
                HandlerDefinitionError(
                    where,
                    f"{type_name(member)} is no message class.",
                    "derive it from Command, Query, DomainEvent or IntegrationEvent, or make it a dataclass",
                )
                for member in strange
            ],
        )
    return members


_FITTING = {
    "command": ("command", "message"),
    "query": ("query", "message"),
    "event": ("domain event", "integration event", "message"),
}


def _kind_faults(spec: HandlerSpec) -> list[CqrsDecorError]:
    faults: list[CqrsDecorError] = []
    if spec.style in ("async generator", "generator"):
        faults.append(
            HandlerDefinitionError(
                spec.where, "A handler must not be a generator.", "return the result instead of yielding"
            )
        )
    for message_type in spec.message_types:
        kind = message_spec(message_type).kind
        if kind not in _FITTING[spec.kind]:
            faults.append(
                HandlerDefinitionError(
                    spec.where,
                    f"@{spec.kind}_handler cannot handle {type_name(message_type)}, which is a {kind}.",
                    f"decorate it with @{kind.split()[-1]}_handler",
                )
            )
    return faults


def _option_faults(spec: HandlerSpec) -> list[CqrsDecorError]:
    options = spec.options
    faults: list[CqrsDecorError] = []
    if options.isolated and (
        spec.kind != "event" or any(message_spec(kind).leaves_the_process for kind in spec.message_types)
    ):
        faults.append(
            InvalidOptionError(
                spec.where,
                "isolated",
                "only a handler of domain events shares its command's transaction",
                "leave it out: every consumer of an integration event has its own transaction already",
            )
        )
    if options.isolated is False and options.retry and spec.kind == "event" and _only_domain_events(spec):
        faults.append(
            InvalidOptionError(
                spec.where,
                "retry",
                "a domain event handler runs inside its command's transaction, which is retried as a whole",
                "put retry= on the command handler, or add isolated=True",
            )
        )
    if options.optimistic and not (
        spec.kind == "event" and all(message_spec(kind).leaves_the_process for kind in spec.message_types)
    ):
        faults.append(
            InvalidOptionError(
                spec.where,
                "optimistic",
                "only a worker, which runs handlers of integration events, has messages to put into one transaction",
                "leave it out",
            )
        )
    if options.optimistic and options.concurrency is not None:
        faults.append(
            InvalidOptionError(
                spec.where,
                "concurrency",
                "an optimistic handler runs in batches, as many at a time as the worker has places",
                "leave one of the two out",
            )
        )
    if options.timeout is not None and options.timeout <= timedelta(0):
        faults.append(InvalidOptionError(spec.where, "timeout", "it is not positive", "give a positive timedelta"))
    if options.concurrency is not None and options.concurrency < 1:
        faults.append(InvalidOptionError(spec.where, "concurrency", "it is less than 1", "give at least 1"))
    return faults


def _only_domain_events(spec: HandlerSpec) -> bool:
    return all(message_spec(kind).kind == "domain event" for kind in spec.message_types)


def _result_faults(spec: HandlerSpec, returned: Any) -> list[CqrsDecorError]:
    if spec.kind == "event" or returned in (REQUIRED, Any):
        return []
    return [
        ReturnTypeMismatchError(spec.where, type_name(kind), type_name(promised), type_name(returned))
        for kind in spec.message_types
        if (promised := message_spec(kind).result) is not NOT_SAID and not _fits(returned, promised)
    ]


def _fits(returned: Any, promised: Any) -> bool:
    """Whether a return annotation keeps a promise, as far as that can be told without a type checker; in doubt, yes."""
    if promised is None:
        promised = type(None)
    if returned is None:
        returned = type(None)
    if promised is Any or returned == promised:
        return True
    if get_origin(returned) in (Union, types.UnionType):
        return all(_fits(member, promised) for member in get_args(returned))
    if get_origin(promised) in (Union, types.UnionType):
        return any(_fits(returned, member) for member in get_args(promised))
    ours, theirs = get_origin(returned) or returned, get_origin(promised) or promised
    if isinstance(ours, type) and isinstance(theirs, type):
        return issubclass(ours, theirs) or (theirs is float and ours is int)
    return True
