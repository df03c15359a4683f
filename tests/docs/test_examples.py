"""The examples run as they are, and say what they prove."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"

HANDLERS_OF = """
from {service}.main import cqrs
parts = cqrs.parts()
assert not parts.faults, parts.faults
print(*sorted(spec.name for spec in parts.examined.specs()))
"""


def test_the_quickstart_shows_what_it_says() -> None:
    """It is the first thing that a reader runs."""
    assert _run(str(EXAMPLES / "quickstart.py")).splitlines() == [
        "send() returned 102; Drained(published=1, handled=1, parked=[])",
        "refused by the domain event's handler: only 9 x tea are left; Drained(published=0, handled=0, parked=[])",
        "delivered twice, handled once: ['tea']; Drained(published=0, handled=0, parked=[])",
    ]


def test_the_quickstart_stays_short() -> None:
    """What does not fit on a screen is not quick."""
    lines = (EXAMPLES / "quickstart.py").read_text().splitlines()

    assert sum(bool(line.strip()) for line in lines) <= 60


def test_each_service_of_the_shop_finds_its_own_handlers_by_entry_point(tmp_path: Path) -> None:
    """Both are in one distribution: `discover=` keeps the handlers of one out of the processes of the other."""
    _install(EXAMPLES / "shop", tmp_path)

    assert _handlers("shop", tmp_path) == ["cancel_order", "get_order", "move_stock", "note_billed", "place_order"]
    assert _handlers("billing", tmp_path) == ["issue_invoice", "void_invoice"]


def _handlers(service: str, packages: Path) -> list[str]:
    """What the app has found, without connecting to anything."""
    environment = {
        "PYTHONPATH": str(packages),
        "CQRS_DECOR_DATABASE": f"postgresql+asyncpg://localhost/{service}",
        "CQRS_DECOR_BROKER": "kafka://localhost:9092",
    }
    return _run("-c", HANDLERS_OF.format(service=service), **environment).split()


def _install(project: Path, target: Path) -> None:
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    _run("-m", "pip", "install", *options, "--target", str(target), str(project))


def _run(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
