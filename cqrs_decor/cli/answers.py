"""What a verb found, as facts for programs and as a page for people. Verbs return one; `Screen` shows it."""

from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType

from cqrs_decor.cli.exits import FINDINGS, OK
from cqrs_decor.findings import Finding


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The outcome of a verb.

    Attributes:
        document: For `--json`; made of what JSON has, dates and enums. None shows nothing.
        page: For people. A plain `str` is written as it is, not wrapped and not coloured, so that it can be piped.
        note: A sentence beside the page, on standard error; not shown with `--json`.
        exit_code: Of `exits`.
    """

    document: Any = None
    page: RenderableType | None = None
    note: str = ""
    exit_code: int = OK


def finding_document(finding: Finding) -> dict[str, str]:
    return {
        "severity": finding.severity,
        "code": finding.code,
        "problem": finding.problem,
        "where": finding.where,
        "fix": finding.fix,
    }


def exit_code_of(findings: list[Finding]) -> int:
    return FINDINGS if any(finding.severity == "error" for finding in findings) else OK
