"""`run --processes`: starts several processes of the same kind, and starts again whichever ends."""

import asyncio
import os
import signal
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio

from cqrs_decor.cli import exits
from cqrs_decor.cli.health_server import asked
from cqrs_decor.cli.membership import Membership
from cqrs_decor.cli.signals import StopSignals
from cqrs_decor.clock import Clock
from cqrs_decor.health import Verdict

_RESTART_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_STEADY_AFTER_S = 60.0
"""Whoever ran for so long did not fail at its start: the waits begin from the first again."""

_SPARE_S = 10.0
"""Beyond the drain limit: for hooks, and for giving lanes and connections back."""

_ANSWER_WITHIN_S = 4.0

Tell = Callable[..., None]


class Group:
    """Processes under one supervisor, which does nothing else: no message passes through it.

    Args:
        command: The command line of a member, without what says that it is one.
        count: How many.
        sockets: A directory of ours, for sockets at which members answer health checks.
        drain_limit_s: A member that was told to stop has so long, and a little more; then it is killed.
        clock: Time.
        tell: Where what happens is told.
    """

    def __init__(
        self, command: Sequence[str], count: int, *, sockets: Path, drain_limit_s: float, clock: Clock, tell: Tell
    ) -> None:
        self._command = command
        self._sockets = sockets
        self._numbers = range(1, count + 1)
        self._drain_limit_s = drain_limit_s
        self._clock = clock
        self._tell = tell
        self._running: dict[int, asyncio.subprocess.Process] = {}
        self._codes: dict[int, int] = {}
        self._stop = anyio.Event()
        self._stopped_by: int = signal.SIGTERM

    async def run(self, signals: StopSignals) -> int:
        """Keep them running until a signal comes, or one of them says that it is configured wrongly; the exit code."""
        with _pipe_to_members() as pipe:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._stop_at_signal, signals)
                async with anyio.create_task_group() as members:
                    for number in self._numbers:
                        members.start_soon(self._keep_running, number, pipe)
                tasks.cancel_scope.cancel()
        return next((code for code in self._codes.values() if code), exits.OK)

    def kill(self) -> None:
        """Every one of them, now: what was in flight is done again by whoever comes next."""
        for process in self._running.values():
            self._send(process, signal.SIGKILL)

    async def live(self) -> Verdict:
        """Whether nobody is stuck; whoever is being started is not."""
        answers = await self._answers("/live")
        bad = [number for number, (status, _) in answers.items() if status not in (200, None)]
        return Verdict(good=not bad, document=_document("stuck" if bad else "live", answers))

    async def ready(self) -> Verdict:
        """Whether all are."""
        answers = await self._answers("/ready")
        good = all(status == 200 for status, _ in answers.values()) and not self._stop.is_set()
        return Verdict(good=good, document=_document("ready" if good else "degraded", answers))

    # --- members ----------------------------------------------------------------------------------------------------

    async def _keep_running(self, number: int, pipe: int) -> None:
        failures = 0
        while not self._stop.is_set():
            began = self._clock.elapsed()
            code = await self._run_once(number, pipe)
            if self._stop.is_set():
                self._codes[number] = self._judged(code)
                return
            if code == exits.USAGE:
                self._codes[number] = code
                self._tell("process_refused", process=number, code=code)
                self._begin_to_stop(signal.SIGTERM)
                return
            failures = 0 if self._clock.elapsed() - began > _STEADY_AFTER_S else failures
            wait_s = _RESTART_S[min(failures, len(_RESTART_S) - 1)]
            failures += 1
            self._tell("process_ended", process=number, code=code, again_in_s=wait_s)
            with anyio.move_on_after(wait_s):
                await self._stop.wait()

    async def _run_once(self, number: int, pipe: int) -> int:
        member = Membership(member=number, parent_pipe=pipe, health_socket=self._socket(number))
        process = await asyncio.create_subprocess_exec(
            *self._command,
            *member.arguments(),
            stdin=asyncio.subprocess.DEVNULL,
            pass_fds=(pipe,),
            process_group=0,  # else a Ctrl-C would reach them twice, by the terminal and by us
        )
        self._running[number] = process
        if self._stop.is_set():  # it came while this one was being started
            self._send(process, self._stopped_by)
        self._tell("process_started", process=number, pid=process.pid)
        try:
            return await self._end_of(process)
        finally:
            del self._running[number]

    async def _end_of(self, process: asyncio.subprocess.Process) -> int:
        """The code with which it ends. Once the group stops it has a limit."""
        waiting = asyncio.ensure_future(process.wait())
        stopping = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait([waiting, stopping], return_when=asyncio.FIRST_COMPLETED)
            _, late = await asyncio.wait([waiting], timeout=self._drain_limit_s + _SPARE_S)
            if late:
                self._tell("process_killed", pid=process.pid, drain_limit_s=self._drain_limit_s)
                self._send(process, signal.SIGKILL)
            return await waiting
        finally:
            stopping.cancel()

    def _judged(self, code: int) -> int:
        """Whoever was told to stop before it could listen ended by the signal itself: that is in order."""
        if code == -self._stopped_by:
            return exits.OK
        return exits.of_signal(-code) if code < 0 else code

    # --- stop -------------------------------------------------------------------------------------------------------

    async def _stop_at_signal(self, signals: StopSignals) -> None:
        await signals.stop.wait()
        self._begin_to_stop(signals.received or signal.SIGTERM)

    def _begin_to_stop(self, number: int) -> None:
        if self._stop.is_set():
            return
        self._stopped_by = number
        self._stop.set()
        self._tell("stopping", drain_limit_s=self._drain_limit_s)
        for process in self._running.values():
            self._send(process, number)

    def _send(self, process: asyncio.subprocess.Process, number: int) -> None:
        try:
            process.send_signal(number)
        except ProcessLookupError:
            pass  # it has just ended

    # --- health -----------------------------------------------------------------------------------------------------

    def _socket(self, number: int) -> Path:
        return self._sockets / str(number)

    async def _answers(self, question: str) -> dict[int, tuple[int | None, Mapping[str, Any]]]:
        answers: dict[int, tuple[int | None, Mapping[str, Any]]] = {}

        async def ask(number: int) -> None:
            answers[number] = await self._answer(number, question)

        async with anyio.create_task_group() as tasks:
            for number in self._numbers:
                tasks.start_soon(ask, number)
        return dict(sorted(answers.items()))

    async def _answer(self, number: int, question: str) -> tuple[int | None, Mapping[str, Any]]:
        """None for a member that is not there yet, or again."""
        try:
            with anyio.fail_after(_ANSWER_WITHIN_S):
                return await asked(self._socket(number), question)
        except TimeoutError:
            return 503, {"status": "does not answer"}
        except (OSError, ValueError, IndexError):
            return None, {"status": "starting"}


@contextmanager
def _pipe_to_members() -> Generator[int, None, None]:
    """The end that members read. Nothing is ever written: it ends for them when this process is gone."""
    read, held = os.pipe()
    try:
        yield read
    finally:
        os.close(read)
        os.close(held)


def _document(status: str, answers: Mapping[int, tuple[int | None, Mapping[str, Any]]]) -> dict[str, Any]:
    return {"status": status, "processes": {str(number): document for number, (_, document) in answers.items()}}
