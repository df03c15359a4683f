"""Log output of `run`: the command line is the application here, so it may set logging up. The library never does."""

import logging
import sys
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table
from rich.text import Text

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_STYLES = {"DEBUG": "dim", "WARNING": "yellow", "ERROR": "red", "CRITICAL": "bold red"}


class LogFormat(StrEnum):
    TEXT = "text"
    JSON = "json"


class LogLevel(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def set_up(level: LogLevel | None, form: LogFormat | None, console: Console) -> None:
    """Send log records to standard error; what the app's module has set up stays unless an option is given.

    Args:
        level: INFO by default.
        form: Text by default.
        console: Where a terminal shows them, above the status line.
    """
    root = logging.getLogger()
    if root.handlers and level is None and form is None:
        return
    shown_live = console.is_terminal and form is None
    handler: logging.Handler = ConsoleHandler(console) if shown_live else logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form is LogFormat.JSON else TextLines())
    root.handlers[:] = [handler]
    root.setLevel((level or LogLevel.INFO).upper())


class ConsoleHandler(logging.Handler):
    """For a terminal: coloured by level, wrapped at words, above the live status line."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._console.print(_row(record, "\n".join([_sentence(record), *_trace(record)])))
        except Exception:  # as every handler of the standard library does
            self.handleError(record)


class TextLines(logging.Formatter):
    """`2026-01-31 12:00:00.123Z INFO    relay holds 32 lanes  action=lanes_changed held=32`."""

    def format(self, record: logging.LogRecord) -> str:
        moment = _time(record).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
        return "\n".join([f"{moment}Z {record.levelname:<7} {_sentence(record)}", *_trace(record)])


class JsonLines(logging.Formatter):
    """One object a line: time, level, logger, message, and whatever the record carries besides."""

    def format(self, record: logging.LogRecord) -> str:
        document: dict[str, Any] = {
            "time": _time(record).isoformat().replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_facts(record),
        }
        trace = _trace(record)
        if trace:
            document["exception"] = "\n".join(trace)
        return orjson.dumps(document, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


def _time(record: logging.LogRecord) -> datetime:
    return datetime.fromtimestamp(record.created, UTC)


def _facts(record: logging.LogRecord) -> dict[str, Any]:
    """What was given as `extra=`, the action first."""
    facts = {name: value for name, value in vars(record).items() if name not in _STANDARD}
    return {"action": facts.pop("action"), **facts} if "action" in facts else facts


def _plain(value: Any) -> str:
    text = str(value)
    return f'"{text}"' if " " in text or not text else text


def _sentence(record: logging.LogRecord) -> str:
    facts = " ".join(f"{name}={_plain(value)}" for name, value in _facts(record).items())
    return f"{record.getMessage()}  {facts}".rstrip()


def _row(record: logging.LogRecord, text: str) -> Table:
    style = _STYLES.get(record.levelname, "")
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(no_wrap=True, style=style)
    grid.add_column(overflow="fold", style=style)
    grid.add_row(f"{datetime.fromtimestamp(record.created):%H:%M:%S}", f"{record.levelname:<7}", Text(text))
    return grid


def _trace(record: logging.LogRecord) -> list[str]:
    return [logging.Formatter().formatException(record.exc_info)] if record.exc_info else []
