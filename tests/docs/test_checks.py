"""Codes and features: what the code has and what the pages say are the same."""

import ast
import re
from pathlib import Path

from tests.docs.pages import ROOT

_SOURCES = [*ROOT.glob("cqrs_decor/**/*.py"), *ROOT.glob("plugins/*/cqrs_decor_*/**/*.py")]
_TESTS = [*ROOT.glob("tests/**/*.py"), *ROOT.glob("plugins/*/tests/**/*.py")]


def test_every_code_has_a_paragraph() -> None:
    """Whoever is shown a code looks it up; one that is not there is worse than none."""
    used = {code for source in _SOURCES for code in re.findall(r'"(CD\d{3})"', source.read_text())} - {"CD000"}
    documented = set(re.findall(r"\*\*(CD\d{3})\*\*", (ROOT / "docs/checks.md").read_text()))

    assert used - documented == set()
    assert documented - used == set()


def test_every_feature_listed_is_shown_by_a_test() -> None:
    """A row counts only when something can fail; a mark without a row is a promise that nobody made."""
    listed = set(re.findall(r"^\| ([MOBSU]\d+) \|", (ROOT / "docs/reference/features.md").read_text(), re.MULTILINE))
    marked = {feature for test in _TESTS for feature in _features(test)}

    assert listed - marked == set()
    assert marked - listed == set()


def _features(test: Path) -> set[str]:
    """The arguments of `pytest.mark.feature(...)` in a file."""
    calls = [node for node in ast.walk(ast.parse(test.read_text())) if isinstance(node, ast.Call)]
    return {
        argument.value
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "feature"
        for argument in call.args
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
    }
