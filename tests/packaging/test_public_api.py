"""The public names and their signatures, as a file that shows every change of them.

After a change that is meant: python -m tests.packaging.test_public_api
"""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cqrs_decor
import cqrs_decor.testing
import cqrs_decor.testing.conformance

SNAPSHOT = Path(__file__).with_name("public_api.txt")
MODULES = (cqrs_decor, cqrs_decor.testing, cqrs_decor.testing.conformance)


def test_the_public_api_is_what_the_snapshot_says() -> None:
    """Users build on it: a name that goes or a parameter that moves must be seen in review."""
    assert "\n".join(described()) + "\n" == SNAPSHOT.read_text()


def test_every_public_name_is_there_and_sorted() -> None:
    """`from cqrs_decor import *` works, and a reader finds a name."""
    for module in MODULES:
        assert sorted(module.__all__) == list(module.__all__)
        assert [name for name in module.__all__ if not hasattr(module, name)] == []


def described() -> Iterator[str]:
    """One line for each name, and one for each public member of a class of ours."""
    for module in MODULES:
        for name in module.__all__:
            if name != "__version__":
                yield from _of(f"{module.__name__}.{name}", getattr(module, name))


def _of(path: str, thing: Any) -> Iterator[str]:
    if not inspect.isclass(thing):
        yield f"{path}{_signature(thing)}" if inspect.isroutine(thing) else path
        return
    yield f"class {path}"
    for name, member in sorted(_members(thing).items()):
        kind = "async " if inspect.iscoroutinefunction(member) else ""
        yield f"    {kind}{name}{_signature(member)}"


def _members(cls: type[Any]) -> dict[str, Any]:
    """Public ones that are defined by this library, constructor included, tests of kits left out."""
    members: dict[str, Any] = {}
    for owner in reversed(cls.__mro__):
        if owner.__module__.startswith("cqrs_decor"):
            members.update(vars(owner))
    pydantic = {"model_config", "model_fields", "model_computed_fields", "model_post_init"}
    return {
        name: member
        for name, member in members.items()
        if (name == "__init__" or not name.startswith(("_", "test_"))) and name not in pydantic
    }


def _signature(member: Any) -> str:
    if isinstance(member, property):
        return ": property"
    member = getattr(member, "__func__", member)
    if not inspect.isroutine(member):
        return ""
    parameters = [re.sub(r" at 0x[0-9a-f]+", "", _parameter(each)) for each in _parameters(member)]
    return f"({', '.join(parameters)})"


def _parameters(function: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def _parameter(parameter: inspect.Parameter) -> str:
    """Name, kind and default: annotations read differently on each Python, and type checkers hold them."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    keyword = "(keyword) " if parameter.kind is parameter.KEYWORD_ONLY else ""
    default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
    return f"{keyword}{stars}{parameter.name}{default}"


if __name__ == "__main__":
    SNAPSHOT.write_text("\n".join(described()) + "\n")
