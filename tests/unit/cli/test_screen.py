"""Answers and errors as they are drawn: for people, for programs, wide and narrow, with and without colours."""

import os
import subprocess
import sys

import pytest

from cqrs_decor.memory import MemoryStore
from tests.unit.cli.conftest import APP, Cli

_EVERY_VERB = [
    ("doctor",),
    ("handlers",),
    ("handlers", "--source"),
    ("plugins",),
    ("topics", "plan"),
    ("topics", "create"),
    ("outbox", "list"),
    ("outbox", "show", "1"),
    ("outbox", "retry", "1"),
    ("outbox", "discard", "1", "--yes"),
    ("inbox", "list"),
    ("inbox", "show", "1"),
    ("inbox", "retry", "1"),
    ("inbox", "discard", "1", "--yes"),
]


@pytest.mark.parametrize("arguments", _EVERY_VERB, ids=" ".join)
def test_every_verb_answers_with_one_json_document(cli: Cli, store: MemoryStore, arguments: tuple[str, ...]) -> None:
    """Scripts read standard output whole; a note in between would break them."""
    outcome = cli(*arguments, "--json")

    assert outcome.code == 0
    assert isinstance(outcome.document, dict)
    assert outcome.err == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ("doctor", "--app", "nowhere:cqrs"),
        ("run", "sideways"),
        ("outbox", "list", "--limit", "0"),
        ("outbox", "show", "99"),
        ("db", "plan"),
        ("no-such-verb",),
    ],
    ids=" ".join,
)
def test_errors_are_documents_as_well(cli: Cli, store: MemoryStore, arguments: tuple[str, ...]) -> None:
    """A program that asked for JSON gets JSON, whatever happens."""
    outcome = cli(*arguments, "--json")

    assert outcome.code in (1, 2)
    [error] = outcome.document["errors"]
    assert error["code"].startswith("CD")
    assert error["problem"]
    assert error["fix"]


def test_a_wrong_command_line_says_where_the_right_one_is_described(cli: Cli) -> None:
    """The parser's own texts are one of the ways in."""
    outcome = cli("run")

    assert outcome.code == 2
    assert "fix: see `cqrs-decor run --help`" in outcome.err


@pytest.mark.parametrize("columns", ["80", "140"])
def test_no_line_is_wider_than_the_terminal(
    cli: Cli, store: MemoryStore, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    """A terminal would break it in the middle of a word."""
    monkeypatch.setenv("COLUMNS", columns)

    lines = [line for arguments in _EVERY_VERB[:8] for line in cli(*arguments).out.splitlines()]

    assert max(len(line) for line in lines) <= int(columns)


def test_a_narrow_listing_shows_a_block_for_each_row(
    cli: Cli, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table that is squeezed would cut ids and names."""
    monkeypatch.setenv("COLUMNS", "60")

    lines = cli("outbox", "list", "--id", "1").out.splitlines()

    assert lines == [
        "1  parked",
        "  topic          sample-orders",
        "  key            1",
        "  type           sample.order-placed",
        "  attempts       1",
        lines[5],
        "  error          RecordTooLargeError: it has 9 bytes",
    ]


def test_what_is_piped_is_not_wrapped(cli: Cli, store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cqrs-decor outbox list | grep parked` needs a line per record."""
    monkeypatch.delenv("COLUMNS")

    assert len(cli("outbox", "list").out.splitlines()) == 5


def test_colours_are_for_terminals_and_can_be_switched_off() -> None:
    """NO_COLOR is honoured everywhere else, so it is here."""
    assert "\x1b[" not in _plugins()
    assert "\x1b[32m" in _plugins(FORCE_COLOR="1")
    assert "\x1b[32m" not in _plugins(FORCE_COLOR="1", NO_COLOR="1")


def _plugins(**environment: str) -> str:
    command = [sys.executable, "-m", "cqrs_decor", "plugins"]
    clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    clean |= {"TERM": "xterm", **environment}
    return subprocess.run(command, env=clean, capture_output=True, text=True, check=True).stdout


def test_a_reader_that_leaves_early_is_no_error() -> None:
    """`cqrs-decor handlers | head -1` must not end in a traceback."""
    command = [sys.executable, "-m", "cqrs_decor", "handlers", "--app", APP]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, complaint = process.communicate(timeout=60)

    assert complaint == b""


def test_the_version_is_shown(cli: Cli) -> None:
    """It is the first question of every bug report."""
    outcome = cli("--version")

    assert outcome.code == 0
    assert outcome.out.startswith("cqrs-decor ")


def test_without_arguments_the_help_is_shown(cli: Cli) -> None:
    """Nothing was asked, so everything is offered."""
    outcome = cli()

    assert outcome.code == 0
    assert "doctor" in outcome.out


@pytest.mark.parametrize("absent", ["typer", "rich"])
def test_without_the_extra_the_command_to_install_it_is_printed(absent: str) -> None:
    """The entry script is there also where what it needs is not."""
    code = f"import sys; sys.modules['{absent}'] = None; from cqrs_decor.cli import main; sys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert "pip install 'cqrs-decor[cli]'" in done.stderr


def test_importing_the_library_imports_nothing_of_the_command_line() -> None:
    """A service that never uses it should not pay for it."""
    code = "import sys, cqrs_decor; print({'typer', 'rich', 'cqrs_decor.cli'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "set()"
