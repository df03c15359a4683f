"""Faults on purpose: kill, freeze or fail a process at a named crash point.

A fault test runs the victim in a process of its own and tells it by the environment where to die:

    python -m cqrs_decor.testing.faults cqrs_decor run all

runs the module `cqrs_decor` with the arguments `run all`; with CQRS_DECOR_CRASH_AT=relay.published:3 in its environment
it kills itself (SIGKILL) when it reaches that point for the third time. A victim that is a script of its own calls
`enable()` instead. Nothing of this is read or installed by the library itself.
"""

import os
import runpy
import signal
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager

from cqrs_decor import crash_points
from cqrs_decor._text import did_you_mean, listed
from cqrs_decor.crash_points import CRASH_POINTS, CrashPoint
from cqrs_decor.errors import SettingError

CRASH_AT = "CQRS_DECOR_CRASH_AT"
"""Environment variable: `point` or `point:times`."""
FREEZE_AT = "CQRS_DECOR_FREEZE_AT"
"""As `CRASH_AT`, for SIGSTOP: the process stands still until somebody sends it SIGCONT."""


def crash_at(point: CrashPoint, *, after: int = 1) -> None:
    """Have this process kill itself (SIGKILL: no clean-up) when it reaches `point` for the `after`th time."""
    _at_time(point, after, lambda: os.kill(os.getpid(), signal.SIGKILL))


def freeze_at(point: CrashPoint, *, after: int = 1) -> None:
    """Have this process stop itself (SIGSTOP) when it reaches `point` for the `after`th time; SIGCONT lets it go on."""
    _at_time(point, after, lambda: os.kill(os.getpid(), signal.SIGSTOP))


@contextmanager
def failing_at(point: CrashPoint, error: Exception, *, after: int = 1, times: int = 1) -> Generator[None]:
    """Raise `error` at `point`, within this block: from the `after`th time on, `times` times."""
    reached = 0

    def fail(here: CrashPoint) -> None:
        nonlocal reached
        reached += here == point
        if here == point and after <= reached < after + times:
            raise error

    crash_points.install(fail)
    try:
        yield
    finally:
        crash_points.install(None)


@contextmanager
def recording() -> Generator[list[CrashPoint]]:
    """The crash points that are reached within this block, in order."""
    reached: list[CrashPoint] = []
    crash_points.install(reached.append)
    try:
        yield reached
    finally:
        crash_points.install(None)


def crash_environment(point: CrashPoint, *, after: int = 1) -> dict[str, str]:
    """What to add to the environment of a process that is to be killed at `point`."""
    return {CRASH_AT: f"{point}:{after}"}


def freeze_environment(point: CrashPoint, *, after: int = 1) -> dict[str, str]:
    """What to add to the environment of a process that is to stand still at `point`."""
    return {FREEZE_AT: f"{point}:{after}"}


def enable() -> None:
    """Do what the environment of this process says; nothing if it says nothing.

    Raises:
        SettingError: It says something that is no crash point.
    """
    for variable, install in ((CRASH_AT, crash_at), (FREEZE_AT, freeze_at)):
        if text := os.environ.get(variable):
            point, after = _read(variable, text)
            install(point, after=after)


def _read(variable: str, text: str) -> tuple[CrashPoint, int]:
    point, _, times = text.partition(":")
    if point not in CRASH_POINTS:
        raise SettingError(
            variable,
            f"{point!r} is no crash point.{did_you_mean(point, CRASH_POINTS)}".rstrip("."),
            f"name one of {listed(CRASH_POINTS)}",
        )
    if not (times or "1").isdecimal():
        raise SettingError(variable, f"{times!r} is no number of times", "write it like relay.published:3")
    return point, int(times or 1)


def _at_time(point: CrashPoint, after: int, act: Callable[[], None]) -> None:
    left = after

    def count_down(here: CrashPoint) -> None:
        nonlocal left
        if here != point:
            return
        left -= 1
        if left == 0:
            act()

    crash_points.install(count_down)


def main() -> None:
    """Run a module as `python -m` does, with the faults that the environment asks for."""
    if len(sys.argv) < 2:
        sys.exit("usage: python -m cqrs_decor.testing.faults MODULE [ARGUMENT ...]")
    enable()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
