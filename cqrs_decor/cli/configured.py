"""What an app is configured with, and where each value comes from; never a secret."""

import os
from dataclasses import dataclass
from typing import Any

from cqrs_decor.app import App
from cqrs_decor.assembly import Parts
from cqrs_decor.environment import completed
from cqrs_decor.settings import PREFIX, Settings

_URLS = ("broker", "database")


@dataclass(frozen=True, slots=True, kw_only=True)
class Configured:
    """One setting. `source` is given, default, or the name of an environment variable."""

    name: str
    value: str
    source: str


def configured(app: App, parts: Parts) -> list[Configured]:
    """Every setting of the app; URLs as their part shows itself, or hidden where no part could be made of them."""
    shown: dict[str, str] = {
        "broker": parts.broker.name if _was_made(app.configuration.broker, parts.broker.name) else _HIDDEN,
        "database": parts.store.name if _was_made(app.configuration.database, parts.store.name) else _HIDDEN,
        "service": app.service,
    }
    return [
        Configured(
            name=name,
            value=shown.get(name) or _plain(getattr(app.settings, name)),
            source=_source(name, app),
        )
        for name in Settings.model_fields
        if name != "app"
    ]


_HIDDEN = "(cannot be used; not shown)"


def _was_made(wanted: Any, name: str) -> bool:
    """Whether a part was made of what was wanted: where it could not be, one in memory stands in for it."""
    return wanted is None or not isinstance(wanted, str) or wanted.startswith("memory:") or name != "memory://"


def _source(name: str, app: App) -> str:
    configuration, settings = app.configuration, app.settings
    if name in (*_URLS, "service"):
        wanted = getattr(configuration, name)
        if wanted is None:
            return "default"
        if wanted is not getattr(settings, name) and wanted != getattr(settings, name):
            return "given"
    if name not in settings.model_fields_set:
        return "default"
    return _variable(name) if _is_from_environment(name, settings) else "given"


def _variable(name: str) -> str:
    return f"{PREFIX}{name}".upper()


def _is_from_environment(name: str, settings: Settings) -> bool:
    """A value that was given stands before one in the environment: they are told apart by comparing."""
    if _variable(name) not in {variable.upper() for variable in os.environ}:
        return False
    return bool(getattr(completed(None), name) == getattr(settings, name))


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(str(part) for part in value)  # pyright: ignore[reportUnknownVariableType,reportUnknownArgumentType]
    return "" if value is None else str(value)
