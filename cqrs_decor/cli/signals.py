"""SIGTERM and SIGINT: the first asks to stop, the second leaves at once."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

import anyio

from cqrs_decor.cli.exits import of_signal

_WATCHED = (signal.SIGTERM, signal.SIGINT)
_SHOW_CURSOR = "\x1b[?25h"


class StopSignals:
    """Watches for them from entering to leaving; entered in a running asyncio loop, in the main thread. `received` is
    the number of the first.

    The handlers are Python's own rather than the loop's, so that the second signal works although user code blocks the
    loop.

    Args:
        before_leaving: Called when the second one came, in a signal handler.
    """

    def __init__(self, before_leaving: Callable[[], None] | None = None) -> None:
        self._before_leaving = before_leaving
        self.stop = anyio.Event()
        self.received: int | None = None
        self._starting: anyio.CancelScope | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        for number in _WATCHED:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def give_up_by(self, scope: anyio.CancelScope | None) -> None:
        """The first signal also cancels this scope: for as long as there is nothing to drain."""
        self._starting = scope

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if self._before_leaving is not None:
                self._before_leaving()
            _leave(number)
        self.received = number
        self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        self.stop.set()
        if self._starting is not None:
            self._starting.cancel()


def _leave(number: int) -> None:
    """Without a clean-up of any kind: what was in flight is done again by whoever comes next, as after a kill."""
    text = f"{_SHOW_CURSOR if sys.stderr.isatty() else ''}left at once after a second signal\n"
    os.write(sys.stderr.fileno(), text.encode())
    os._exit(of_signal(number))
