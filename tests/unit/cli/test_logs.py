"""How a log record looks in each format, and on a terminal."""

import io
import json
import logging
import sys

import pytest
from rich.console import Console

from cqrs_decor.cli.logs import ConsoleHandler, JsonLines, LogFormat, LogLevel, TextLines, set_up


def record(**extra: object) -> logging.LogRecord:
    made = logging.makeLogRecord(
        {
            "name": "cqrs_decor.relay",
            "levelname": "WARNING",
            "levelno": 30,
            "msg": "relay holds %d lanes",
            "args": (32,),
        }
    )
    made.created = 1_769_860_800.5
    vars(made).update(extra)
    return made


def with_error() -> logging.LogRecord:
    made = record()
    try:
        raise ValueError("broken")
    except ValueError:
        made.exc_info = sys.exc_info()
    return made


def test_a_text_line_has_time_level_sentence_and_facts() -> None:
    """The action comes first: it is what is searched for."""
    line = TextLines().format(record(held=32, action="lanes_changed", reason="a b"))

    assert line == ('2026-01-31 12:00:00.500Z WARNING relay holds 32 lanes  action=lanes_changed held=32 reason="a b"')


def test_a_json_line_carries_every_fact() -> None:
    """Collectors index by field."""
    assert json.loads(JsonLines().format(record(action="lanes_changed", held=32))) == {
        "time": "2026-01-31T12:00:00.500000Z",
        "level": "warning",
        "logger": "cqrs_decor.relay",
        "message": "relay holds 32 lanes",
        "action": "lanes_changed",
        "held": 32,
    }


def test_both_show_tracebacks() -> None:
    """A loop that failed is logged whole."""
    assert "ValueError: broken" in TextLines().format(with_error())
    assert "ValueError: broken" in json.loads(JsonLines().format(with_error()))["exception"]


def test_a_terminal_wraps_at_words_and_never_within_one() -> None:
    """An id that is broken in two cannot be copied."""
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    facts = {"consumer": "shop.write_invoice", "message_id": "01a20c55-d53b-724a-aa18-a73ffa7362c2"}
    ConsoleHandler(console).emit(record(action="message_parked", **facts))

    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert len(lines) > 1
    assert max(map(len, lines)) <= 80
    assert any("message_id=01a20c55-d53b-724a-aa18-a73ffa7362c2" in line for line in lines)


def test_what_the_app_has_set_up_stays_unless_an_option_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """An option is typed by somebody who wants it now."""
    root, own = logging.getLogger(), logging.NullHandler()
    monkeypatch.setattr(root, "handlers", [own])
    monkeypatch.setattr(root, "level", root.level)

    set_up(None, None, Console())
    assert root.handlers == [own]

    set_up(LogLevel.DEBUG, LogFormat.JSON, Console())
    [after] = root.handlers
    assert isinstance(after.formatter, JsonLines)
    assert root.level == logging.DEBUG
