"""A real `cqrs-decor` process, watched by what it writes."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_DEADLINE_S = 60


class RunningCli:
    """One process; its lines are read while it runs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        self._process = process
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._error_lines: queue.Queue[str | None] = queue.Queue()
        self.errors: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, args=(process.stdout, self._lines, [])),
            threading.Thread(target=self._read, args=(process.stderr, self._error_lines, self.errors)),
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: IO[str], lines: "queue.Queue[str | None]", every: list[str]) -> None:
        with stream:
            for line in stream:
                every.append(line)
                lines.put(line)
        lines.put(None)

    def next_line(self) -> str:
        line = self._lines.get(timeout=_DEADLINE_S)
        assert line is not None, "".join(self.errors)
        return line

    def until_error(self, text: str) -> None:
        """Wait for a line on standard error that holds this text."""
        line: str | None = ""
        while text not in line:
            line = self._error_lines.get(timeout=_DEADLINE_S)
            assert line is not None, "".join(self.errors)

    def until(self, status: str) -> dict[str, Any]:
        """The first JSON line with this status."""
        while True:
            document = json.loads(self.next_line())
            if document["status"] == status:
                return document

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ended(self) -> int:
        """The exit code, and then `errors` is whole."""
        code = self._process.wait(timeout=_DEADLINE_S)
        for reader in self._readers:
            reader.join(_DEADLINE_S)
        return code

    def kill(self) -> None:
        if self.alive:
            self._process.kill()
        self.ended()


@contextmanager
def running_cli(*arguments: str, directory: Path, **environment: str) -> Iterator[RunningCli]:
    """`cqrs-decor` in that directory, killed at the end of the block if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cqrs_decor", *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    running = RunningCli(process)
    try:
        yield running
    finally:
        running.kill()
