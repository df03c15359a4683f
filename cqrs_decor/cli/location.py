"""From `module:attribute` to the app: what `--app` and CQRS_DECOR_APP name."""

import importlib
import os
import pkgutil
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from cqrs_decor._text import did_you_mean, type_name
from cqrs_decor.app import App
from cqrs_decor.cli.errors import (
    APP_VARIABLE,
    AppAttributeError,
    AppModuleError,
    AppNotNamedError,
    NotAnAppError,
)
from cqrs_decor.errors import CqrsDecorError, validation_faults


def find_app(location: str | None) -> App:
    """The app that `location`, or else the environment, names; modules in the current directory can be named as well.

    Raises:
        AppNotNamedError: Neither names one.
        AppModuleError, AppAttributeError, NotAnAppError: What is named cannot be used.
        CqrsDecorError: Of the module's own making, e.g. a `SettingError` in its `bootstrap()`.
    """
    named = (location or os.environ.get(APP_VARIABLE) or "").strip()
    module_name, colon, attribute = named.partition(":")
    if not colon or not module_name or not attribute:
        raise AppNotNamedError(named or None)
    module = _imported(module_name)
    found = _attribute(module, attribute)
    if not isinstance(found, App):
        raise NotAnAppError(named, _described(found), _apps_in(module), _file_of(module))
    return found


def _imported(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except (CqrsDecorError, ExceptionGroup):
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise _no_such_module(name, error.name) from error
        raise _broken(name, error) from error
    except (
        Exception,
        SystemExit,
    ) as error:  # a module may raise anything while it is imported; the cause stays chained
        raise _broken(name, error) from error


def _no_such_module(name: str, missing: str) -> AppModuleError:
    parent, _, last = missing.rpartition(".")
    path = list(getattr(sys.modules.get(parent), "__path__", ())) if parent else [str(Path.cwd())]
    near = did_you_mean(last, [module.name for module in pkgutil.iter_modules(path)])
    return AppModuleError(
        name,
        f"there is no module {missing!r}{near.rstrip('?').replace(' Did', '; did')}",
        "run it in the directory that holds the package, or install the package",
        where=f"looked in {parent or 'the current directory and the installed packages'}",
    )


def _broken(name: str, error: BaseException) -> AppModuleError:
    return AppModuleError(
        name,
        _reason(error),
        f"mend it until `python -c 'import {name}'` passes",
        where=_place(error),
    )


def _reason(error: BaseException) -> str:
    """Type and text; of a validation error without the values, which may be secrets."""
    if isinstance(error, ValidationError):
        faults = validation_faults(error.errors(include_url=False, include_input=False))
        return f"ValidationError of {error.title}: " + "; ".join(f"{path}: {text}" for path, text in faults)
    return f"{type(error).__name__}: {error}".rstrip(". ")


def _place(error: BaseException) -> str:
    """The innermost line of the user's own code, i.e. of what is not installed."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{_short(error.filename)}:{error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_own(frame.filename)]
    return f"{_short(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""


def _is_own(filename: str) -> bool:
    ours = str(Path(__file__).parents[1])
    return not filename.startswith(("<", sys.base_prefix, ours)) and "site-packages" not in filename


def _short(filename: str) -> str:
    path = Path(filename)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else filename


def _attribute(module: ModuleType, attribute: str) -> Any:
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [name for name in vars(module) if not name.startswith("__")]
            raise AppAttributeError(module.__name__, attribute, names, _apps_in(module), _file_of(module))
        found = getattr(found, part)
    return found


def _apps_in(module: ModuleType) -> list[str]:
    return [name for name, value in vars(module).items() if isinstance(value, App)]


def _file_of(module: ModuleType) -> str:
    return _short(module.__file__) if module.__file__ else module.__name__


def _described(found: Any) -> str:
    if isinstance(found, type):
        return f"the class {found.__qualname__}"
    if isinstance(found, ModuleType):
        return "a module"
    if callable(found) and hasattr(found, "__name__"):
        return f"the function {found.__name__}"
    return f"an object of {type_name(type(found))}"
