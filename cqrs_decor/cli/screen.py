"""The one place that draws: answers and errors, for people and for programs.

Answers go to standard output, errors and notes to standard error; with `--json` both go to standard output, since a
program reads one document and the exit code. Colours are for terminals, and NO_COLOR is honoured.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

import orjson
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cqrs_decor.cli.answers import Answer, finding_document
from cqrs_decor.cli.listing import STYLES
from cqrs_decor.findings import Finding

_UNCUT = 1_000
"""Columns where nobody looks: what is piped into another program is not wrapped."""


class Screen:
    """Where a verb's outcome is shown.

    Args:
        json: Show documents instead of pages.
    """

    def __init__(self, *, json: bool) -> None:
        self.json = json
        self.out = _console(stderr=False)
        self.err = _console(stderr=True)

    def show(self, answer: Answer) -> None:
        if self.json:
            if answer.document is not None:
                write_document(answer.document)
            return
        if isinstance(answer.page, str):
            sys.stdout.write(answer.page)
        elif answer.page is not None:
            _print(self.out, answer.page)
        if answer.note:
            _print(self.err, Text(answer.note, style="dim"))

    def show_errors(self, findings: Sequence[Finding], *, title: str = "") -> None:
        """One error, or everything that was found at once, numbered under a title."""
        if self.json:
            write_document({"errors": [finding_document(finding) for finding in findings]})
        elif title:
            _print(self.err, Group(Text(title, style="bold"), Text(""), numbered(findings)))
        else:
            _print(self.err, listed(findings))


def _print(console: Console, page: RenderableType) -> None:
    """What is not for a terminal has no blanks at the ends of its lines."""
    if console.is_terminal:
        console.print(page)
        return
    with console.capture() as capture:
        console.print(page)
    console.file.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))


def write_document(document: Any) -> None:
    """One JSON document, readable."""
    sys.stdout.write(orjson.dumps(document, option=orjson.OPT_INDENT_2, default=str).decode() + "\n")


def write_line(document: Any) -> None:
    """One JSON document in one line, at once."""
    sys.stdout.write(orjson.dumps(document, default=str).decode() + "\n")
    sys.stdout.flush()


def listed(findings: Sequence[Finding]) -> Table:
    """Findings with their severity."""
    grid = _grid()
    for finding in findings:
        grid.add_row(Text(finding.severity, style=STYLES[finding.severity]), finding.code, explained(finding))
    return grid


def numbered(findings: Sequence[Finding]) -> Table:
    """Findings that are all errors."""
    grid = _grid()
    for number, finding in enumerate(findings, start=1):
        text = explained(finding)
        grid.add_row(f"{number}.", Text(finding.code, style=STYLES["error"]), Padding(text, (0, 0, 1, 0)))
    return grid


def explained(finding: Finding) -> Group:
    """What, where and what to do, a paragraph each."""
    parts: list[Text | Table] = [Text(finding.problem)]
    labelled = Table.grid(padding=(0, 1, 0, 0))
    labelled.add_column(style="dim", no_wrap=True)
    labelled.add_column(overflow="fold")
    for label, text in (("at:", finding.where), ("fix:", finding.fix)):
        if text:
            labelled.add_row(label, Text(text))
    return Group(*parts, *([labelled] if labelled.rows else []))


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    return grid


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _UNCUT
    return console
