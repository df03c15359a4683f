"""Crash points and what can be made to happen at them. The victims are real processes."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cqrs_decor import crash_points
from cqrs_decor.crash_points import CRASH_POINTS, reach
from cqrs_decor.errors import SettingError
from cqrs_decor.testing import faults

VICTIM = """
from cqrs_decor.crash_points import reach
for n in range(1, 6):
    print(n, flush=True)
    reach("relay.published")
    reach("relay.settled")
print("alive", flush=True)
"""


@pytest.fixture(autouse=True)
def nothing_installed() -> Iterator[None]:
    yield
    crash_points.install(None)


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    (tmp_path / "victim.py").write_text(VICTIM)
    return tmp_path


def run_victim(folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cqrs_decor.testing.faults", "victim", "an argument"],
        env={**os.environ, "PYTHONPATH": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_a_process_is_killed_when_it_reaches_the_point_for_the_given_time(victim: Path) -> None:
    """A kill is SIGKILL of a real process: nothing may clean up behind it, or the test proves nothing."""
    ended = run_victim(victim, faults.crash_environment("relay.published", after=3))

    assert ended.returncode == -signal.SIGKILL
    assert ended.stdout.split() == ["1", "2", "3"]


def test_without_a_count_the_first_time_is_meant(victim: Path) -> None:
    """The short form is what is typed by hand."""
    ended = run_victim(victim, {"CQRS_DECOR_CRASH_AT": "relay.settled"})

    assert (ended.returncode, ended.stdout.split()) == (-signal.SIGKILL, ["1"])


def test_a_process_that_is_told_nothing_runs_to_its_end(victim: Path) -> None:
    """The negative control: the same victim without the fault."""
    ended = run_victim(victim, {})

    assert (ended.returncode, ended.stdout.split()[-1]) == (0, "alive")


def test_the_environment_alone_kills_nothing(victim: Path) -> None:
    """The library never reads the variable: nobody can end a service in production with it."""
    ended = subprocess.run(
        [sys.executable, "-m", "victim"],
        env={**os.environ, "PYTHONPATH": str(victim), **faults.crash_environment("relay.published")},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )

    assert (ended.returncode, ended.stdout.split()[-1]) == (0, "alive")


def test_a_process_is_frozen_until_it_is_let_go_on(victim: Path) -> None:
    """A relay that stands still for two leases and wakes up is the hardest witness against a missing fence."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cqrs_decor.testing.faults", "victim"],
        env={**os.environ, "PYTHONPATH": str(victim), **faults.freeze_environment("relay.published", after=2)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        stopped = os.WIFSTOPPED(status)
        process.send_signal(signal.SIGCONT)
        output, _ = process.communicate(timeout=30)

    assert stopped
    assert output.split() == ["1", "2", "3", "4", "5", "alive"]


def test_arguments_and_name_are_the_victims_own(tmp_path: Path) -> None:
    """Any command line of a service can be made a victim without changing it."""
    (tmp_path / "victim.py").write_text("import sys\nprint(__name__, sys.argv[1:])")

    assert run_victim(tmp_path, {}).stdout.strip() == "__main__ ['an argument']"


def test_a_misspelt_point_is_refused_before_anything_runs(victim: Path) -> None:
    """A fault that never happens makes a test that never fails."""
    ended = run_victim(victim, {"CQRS_DECOR_CRASH_AT": "relay.publish"})

    assert ended.returncode == 1
    assert "'relay.publish' is no crash point. Did you mean 'relay.published'?" in ended.stderr
    assert "1" not in ended.stdout


def test_a_count_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text says how it is written."""
    monkeypatch.setenv("CQRS_DECOR_CRASH_AT", "relay.published:often")

    with pytest.raises(SettingError, match=r"'often' is no number of times\.\nFix: write it like relay\.published:3"):
        faults.enable()


def test_a_victim_without_a_module_is_told_the_usage() -> None:
    """Somebody tries it by hand first."""
    ended = subprocess.run(
        [sys.executable, "-m", "cqrs_decor.testing.faults"], capture_output=True, text=True, timeout=30, check=False
    )

    assert ended.returncode == 1
    assert "usage:" in ended.stderr


def test_an_error_can_be_raised_at_a_point_some_times() -> None:
    """Faults that a process survives are tested within it."""
    outcomes: list[str] = []

    with faults.failing_at("relay.claimed", OSError("cut"), after=2, times=2):
        for _ in range(4):
            reach("relay.settled")
            try:
                reach("relay.claimed")
                outcomes.append("passed")
            except OSError:
                outcomes.append("failed")
    reach("relay.claimed")

    assert outcomes == ["passed", "failed", "failed", "passed"]


def test_the_points_that_are_reached_can_be_recorded() -> None:
    """A test shows by it that its victim passes the point at which it is to be killed."""
    with faults.recording() as points:
        reach("relay.claimed")
        reach("relay.published")
    reach("relay.settled")

    assert points == ["relay.claimed", "relay.published"]


def test_the_names_of_the_crash_points_are_kept() -> None:
    """Fault tests of plugins are written against them."""
    assert CRASH_POINTS == (
        "uow.before_commit",
        "outbox.rows_written",
        "uow.after_commit",
        "relay.claimed",
        "relay.published",
        "relay.settled",
        "worker.received",
        "worker.committed",
        "worker.before_ack",
        "worker.acked",
    )
