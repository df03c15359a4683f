"""Wording shared by error messages: near misses and lists."""

import difflib
from collections.abc import Iterable
from typing import Any


def listed(names: Iterable[str], *, empty: str = "none", limit: int = 12) -> str:
    """Join names for a sentence, sorted, cut after `limit` with a count of the rest."""
    ordered = sorted(set(names))
    if not ordered:
        return empty
    shown = ", ".join(ordered[:limit])
    rest = len(ordered) - limit
    return f"{shown} and {rest} more" if rest > 0 else shown


def counted(number: int, noun: str) -> str:
    """`1 problem`, `2 problems`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def near_misses(name: str, known: Iterable[str]) -> list[str]:
    """The known names that look most like a misspelling of `name`, best first."""
    return difflib.get_close_matches(name, [other for other in known if other != name], n=3, cutoff=0.6)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that suggests the nearest known name, or nothing."""
    close = near_misses(name, known)
    return f" Did you mean {close[0]!r}?" if close else ""


def qualified_name(thing: Any) -> str:
    """`module.qualname` of a class or function, as a user would import it."""
    name = getattr(thing, "__qualname__", None) or repr(thing)
    module = getattr(thing, "__module__", None)
    if module in (None, "builtins"):
        return name
    return f"{module}.{name}"


def type_name(annotation: Any) -> str:
    """A type as it stands in source: the short name of a class, the text of anything else."""
    if isinstance(annotation, type) and not hasattr(annotation, "__args__"):
        return annotation.__qualname__
    return str(annotation).replace("typing.", "")
