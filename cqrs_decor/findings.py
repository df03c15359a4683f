"""What a check found, as data: drawn by the CLI, raised by start-up."""

from dataclasses import dataclass
from typing import Literal

from cqrs_decor.errors import CqrsDecorError

Severity = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One result of a check. `error` findings stop a start-up, `warning` findings do not."""

    code: str
    severity: Severity
    problem: str
    where: str = ""
    fix: str = ""

    @classmethod
    def from_error(cls, error: CqrsDecorError) -> "Finding":
        return cls(code=error.code, severity="error", problem=error.problem, where=error.where, fix=error.fix)

    @classmethod
    def ok(cls, problem: str) -> "Finding":
        return cls(code="", severity="ok", problem=problem)
