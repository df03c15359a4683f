"""Where victims come from: a process that has imported everything once, and forks one for each that is asked for.

Starting Python and importing the drivers takes longer than most of a run. What is forked is a process like any other:
it is killed and frozen by its pid. When the test run ends, however it ends, the nursery's input ends with it, and then
it kills every child it still has.

One JSON object a line, each answered by one: `{"start": {...}}` by its pid, `{"poll": pid}` by its exit code or null.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

PRELOADED = (
    "aiokafka",
    "aiosqlite",
    "asyncmy",
    "asyncpg",
    "cqrs_decor.cli.health_server",
    "cqrs_decor.environment",
    "cqrs_decor.health",
    "cqrs_decor.running",
    "cqrs_decor.testing.faults",
    "cqrs_decor_kafka",
    "cqrs_decor_sqlalchemy",
    "psycopg",
    "sqlalchemy.dialects.mysql.asyncmy",
    "sqlalchemy.dialects.postgresql.asyncpg",
    "sqlalchemy.dialects.postgresql.psycopg",
    "sqlalchemy.dialects.sqlite.aiosqlite",
    "sqlalchemy.ext.asyncio",
    "tests.fault.misfits",
    "tests.fault.parts",
    "tests.fault.unsafe",
    "tests.fault.witnesses",
)
"""Everything but the victim and its application: what that defines depends on its environment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Birth:
    """A process to be.

    Attributes:
        arguments: For `tests.fault.victim`.
        environment: Over the nursery's own.
        output: Where its standard output goes.
        errors: Where its standard error goes.
        group: The process group to join; 0 for one of its own.
    """

    arguments: Sequence[str]
    environment: Mapping[str, str]
    output: str
    errors: str
    group: int


class Nursery:
    """The nursery as the test run sees it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fault.nursery"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, birth: Birth) -> int:
        return int(self._ask({"start": asdict(birth)}))

    def poll(self, pid: int) -> int | None:
        """The exit code of a child, negative for the signal that ended it; None while it lives."""
        code = self._ask({"poll": pid})
        return None if code is None else int(code)

    def close(self) -> None:
        """End it, and with it every victim that is left."""
        self._process.communicate(timeout=10)

    def _ask(self, request: Mapping[str, Any]) -> Any:
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        requests.write(json.dumps(request) + "\n")
        requests.flush()
        return json.loads(answers.readline())


@cache
def nursery() -> Nursery:
    """The one of this test run, made when the first victim is."""
    return Nursery()


def main() -> None:
    for module in PRELOADED:
        importlib.import_module(module)
    gc.freeze()  # else the first collection in each child copies every page of what was imported
    children: dict[int, int | None] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            pid = _fork(Birth(**request["start"]))
            children[pid] = None
            answer: int | None = pid
        else:
            answer = children[request["poll"]] = _code_of(request["poll"], children[request["poll"]])
        print(json.dumps(answer), flush=True)
    for pid, code in children.items():
        if _code_of(pid, code) is None:
            os.kill(pid, signal.SIGKILL)


def _code_of(pid: int, known: int | None) -> int | None:
    if known is not None:
        return known
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _fork(birth: Birth) -> int:
    pid = os.fork()
    if pid:
        os.setpgid(pid, birth.group or pid)  # here and in the child: whoever asks next finds it done
        return pid
    code = 1
    try:
        code = _live(birth)
    finally:
        os._exit(code)


def _live(birth: Birth) -> int:
    """Be the victim; returns its exit code."""
    os.setpgid(0, birth.group)  # 0 makes a group of its own
    os.environ.update(birth.environment)
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, birth.output, os.O_WRONLY | os.O_APPEND),
        (2, birth.errors, os.O_WRONLY | os.O_APPEND),
    ):
        os.dup2(os.open(path, flags), number)
    sys.argv = ["victim", *birth.arguments]
    try:
        runpy.run_module("tests.fault.victim", run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # as the interpreter does at the top: a child must not return into the nursery
        traceback.print_exc()
        sys.stderr.flush()
        return 1
    return 0


if __name__ == "__main__":
    main()
