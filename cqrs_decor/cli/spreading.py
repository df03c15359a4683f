"""Options that belong together, declared once as a dataclass and taken by any verb as one parameter."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Any

from cqrs_decor.cli.answers import Answer


def spread(verb: Callable[..., Answer]) -> Callable[..., Answer]:
    """The verb with each parameter that is annotated with a dataclass replaced by the options that are its fields."""
    parameters = inspect.signature(verb).parameters
    options = [option for parameter in parameters.values() for option in _options(parameter)]

    @wraps(verb)
    def call(**given: Any) -> Answer:
        return verb(**{name: _gathered(parameter, given) for name, parameter in parameters.items()})

    call.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]  # what typer reads
    call.__annotations__ = {option.name: option.annotation for option in options}
    return call


def _options(parameter: inspect.Parameter) -> Iterator[inspect.Parameter]:
    if not is_dataclass(parameter.annotation):
        yield parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        return
    for field in fields(parameter.annotation):
        yield inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type
        )


def _gathered(parameter: inspect.Parameter, given: dict[str, Any]) -> Any:
    if not is_dataclass(parameter.annotation):
        return given[parameter.name]
    return parameter.annotation(**{field.name: given[field.name] for field in fields(parameter.annotation)})  # type: ignore[operator]  # a class
