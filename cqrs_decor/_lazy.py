"""Package names that are loaded when they are first used, so that importing a package costs nothing (PEP 562)."""

from collections.abc import Callable, Mapping
from importlib import import_module

GetAttribute = Callable[[str], object]


def lazily(package: str, homes: Mapping[str, tuple[str, ...]], *own: str) -> tuple[GetAttribute, list[str]]:
    """A package's `__getattr__` and its `__all__`.

    Type checkers read the package's `.pyi` beside it; a test holds the two together.

    Args:
        package: `__name__` of the package.
        homes: Module -> the names that it gives.
        own: Public names that the package defines itself.
    """
    home_of = {name: module for module, names in homes.items() for name in names}

    def get_attribute(name: str) -> object:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(home_of[name]), name)

    return get_attribute, sorted([*home_of, *own])
