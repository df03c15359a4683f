"""Victims as the harness sees them: operating-system processes that are frozen, looked at, and killed."""

import json
import os
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import anyio
import psutil
from anyio import to_thread

from tests.fault.nursery import Birth, nursery
from tests.services.server import freeze, stands_still, wait_until

LOOK_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What a process takes up: open files and sockets, and bytes of memory."""

    files: int
    memory: int


class Victim:
    """One process. It writes to files, so that nothing waits for somebody to read.

    Args:
        name: What it is called in texts and files.
        arguments: For `tests.fault.victim`.
        environment: Over this process's own.
        folder: Where its output goes.
        group: The process group to join; 0 for one of its own.
    """

    def __init__(
        self, name: str, arguments: Sequence[str], environment: Mapping[str, str], folder: Path, group: int = 0
    ) -> None:
        self.name = name
        self._output, self._errors = folder / f"{name}.out", folder / f"{name}.err"
        for file in (self._output, self._errors):
            file.touch()
        self.pid = nursery().start(
            Birth(
                arguments=arguments,
                environment=environment,
                output=str(self._output),
                errors=str(self._errors),
                group=group,
            )
        )

    @property
    def is_alive(self) -> bool:
        return self._exit_code() is None

    def said(self, fact: str) -> list[Any]:
        """What it has said of `fact`, in order."""
        whole_lines = self._output.read_bytes().rpartition(b"\n")[0]
        told = [json.loads(line) for line in whole_lines.splitlines()]
        return [facts[fact] for facts in told if fact in facts]

    def moments(self, moment: str, **facts: Any) -> list[dict[str, Any]]:
        """What an observer in it was told of this moment, where the facts are as given (I9: the fault is visible)."""
        told = [each for each in self.said("moment") if each["name"] == moment]
        return [each for each in told if all(each[name] == value for name, value in facts.items())]

    async def asks_ready(self) -> dict[str, Any]:
        """What it answers to `GET /ready` (start it with `--health`)."""
        return await to_thread.run_sync(_answer, f"http://{self.said('health')[0]}/ready")

    async def notices(self, moment: str, *, times: int = 1, limit_s: float = 30, **facts: Any) -> None:
        """Wait until an observer in it was told of this moment."""
        what = f"it noticed {moment} with {facts}"
        await self._until(lambda: len(self.moments(moment, **facts)) >= times, what, limit_s)

    def logged(self, action: str) -> int:
        """How many lines of its log have this action."""
        return self._errors.read_text(errors="replace").count(f" action={action}\n")

    def leases_lost(self) -> int:
        """How often others took over what it had in hand, because it was late: each time that may come again."""
        taken = [moment for moment in self.moments("LanesChanged") if moment["lost"]]
        return len(taken) + self.logged("fence_rejected") + self.logged("log_lanes_lost")

    def called_away(self) -> int:
        """Records that were on their way when their lanes were no longer surely its own, or the broker took too long:
        nobody knows whether they have arrived, so they go once more, in order.
        """
        return sum(self.said("called_away"))

    def footprint(self) -> Footprint:
        process = psutil.Process(self.pid)
        return Footprint(files=process.num_fds(), memory=process.memory_info().rss)

    def pause(self) -> None:
        """SIGSTOP: it stands still, with its connections open and its leases running out."""
        self._must_live()
        freeze(self.pid)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    async def says(self, fact: str, *, times: int = 1, limit_s: float = 30) -> None:
        await self._until(lambda: len(self.said(fact)) >= times, f"it said {fact!r} {times} times", limit_s)

    async def freezes(self, limit_s: float = 30) -> None:
        """Wait until it stands still at the place where it was told to."""
        await self._until(self._is_frozen, "it stood still", limit_s)

    async def ends(self, limit_s: float = 60) -> int:
        """Wait for its end; returns its exit code."""
        await until(lambda: not self.is_alive, f"{self.name} ended", limit_s, self.log)
        code = self._exit_code()
        assert code is not None
        return code

    async def ends_well(self, limit_s: float = 60) -> None:
        code = await self.ends(limit_s)
        assert code == 0, f"{self.name} ended with {code}\n{self.log()}"

    def kill(self) -> None:
        """SIGKILL: nothing is flushed, closed or given back. It must have been alive."""
        self._must_live()
        os.kill(self.pid, signal.SIGKILL)
        assert self._last_code() == -signal.SIGKILL

    def terminate(self) -> None:
        self._must_live()
        os.kill(self.pid, signal.SIGTERM)

    def clear_away(self) -> None:
        if self.is_alive:
            os.kill(self.pid, signal.SIGKILL)
        self._last_code()

    def log(self) -> str:
        """The end of its log, for a test that fails."""
        return f"--- {self.name}\n" + "\n".join(self._errors.read_text(errors="replace").splitlines()[-40:])

    def _must_live(self) -> None:
        assert self.is_alive, f"{self.name} had ended by itself\n{self.log()}"

    def _exit_code(self) -> int | None:
        return nursery().poll(self.pid)

    def _last_code(self) -> int | None:
        """Its exit code; a process that was killed is gone within moments."""
        wait_until(lambda: not self.is_alive, limit_s=10, what=f"{self.name} is gone")
        return self._exit_code()

    def _is_frozen(self) -> bool:
        return self.is_alive and stands_still(self.pid)

    async def _until(self, holds: Callable[[], bool], what: str, limit_s: float) -> None:
        def holds_or_ended() -> bool:
            if holds():
                return True
            assert self.is_alive, f"{self.name} ended before {what}\n{self.log()}"
            return False

        await until(holds_or_ended, f"{self.name}: {what}", limit_s, self.log)


def _answer(url: str) -> dict[str, Any]:
    try:
        with urlopen(url, timeout=10) as answer:
            return json.load(answer)
    except HTTPError as refusal:  # 503, with the reasons in its body
        return json.load(refusal)


async def until(
    holds: Callable[[], bool | Awaitable[bool]], what: str, limit_s: float, log: Callable[[], str] = str
) -> None:
    """Look until the condition holds: the other side is a process or a server, which raises no event here.

    Raises:
        TimeoutError: It did not within the limit; the text says what was waited for.
    """
    try:
        with anyio.fail_after(limit_s):
            while not await _value(holds()):  # noqa: ASYNC110  # see above
                await anyio.sleep(LOOK_S)
    except TimeoutError:
        raise TimeoutError(f"Waited {limit_s:g} s in vain until {what}.\n{log()}") from None


async def _value(found: bool | Awaitable[bool]) -> bool:
    return found if isinstance(found, bool) else await found
