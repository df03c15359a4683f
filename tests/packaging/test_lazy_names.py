"""Packages whose names are loaded lazily say the same to type checkers and at run time."""

import ast
import importlib
from pathlib import Path

import pytest

import cqrs_decor

_ROOT = Path(cqrs_decor.__file__).parent


def _stub(package: str) -> dict[str, str]:
    """The public names in a package's stub, with the module each is imported from."""
    stub = _ROOT / package.removeprefix("cqrs_decor").strip(".") / "__init__.pyi"
    imports = [node for node in ast.parse(stub.read_text()).body if isinstance(node, ast.ImportFrom)]
    return {alias.name: node.module or "" for node in imports for alias in node.names}


@pytest.mark.parametrize("package", ["cqrs_decor", "cqrs_decor.testing"])
def test_a_stub_and_its_package_name_the_same_things(package: str) -> None:
    """A name that only one of them has would pass the type checker and fail at run time, or the other way round."""
    module = importlib.import_module(package)

    assert set(module.__all__) - {"__version__"} == set(_stub(package))


@pytest.mark.parametrize("package", ["cqrs_decor", "cqrs_decor.testing"])
def test_each_name_is_what_the_stub_says(package: str) -> None:
    """Reading the stub must tell where a name comes from."""
    module = importlib.import_module(package)

    for name, home in _stub(package).items():
        assert getattr(module, name) is getattr(importlib.import_module(home), name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    """`hasattr` and typos must work as with any module."""
    with pytest.raises(AttributeError, match="no attribute 'comand_handler'"):
        _ = cqrs_decor.comand_handler  # type: ignore[attr-defined]
