"""Wake-ups between the readers and writers of one log in one process; between processes there is polling."""

import asyncio
from collections.abc import Hashable
from weakref import WeakKeyDictionary

import anyio


class Pulse:
    """Wakes everyone who waits, and is ready for the next ones."""

    def __init__(self) -> None:
        self._next = anyio.Event()

    def next(self) -> anyio.Event:
        """Set at the next beat. Take it before looking at what the beat is about, and none can be missed."""
        return self._next

    def beat(self) -> None:
        beaten, self._next = self._next, anyio.Event()
        beaten.set()


class LogSignals:
    """What happens to one log: records were written, readers came or went."""

    def __init__(self) -> None:
        self.written = Pulse()
        self.shared = Pulse()


_signals: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Hashable, LogSignals]] = WeakKeyDictionary()


def signals_of(log: Hashable) -> LogSignals:
    """Those of this log, shared by everything on the running event loop that asks with an equal key."""
    return _signals.setdefault(asyncio.get_running_loop(), {}).setdefault(log, LogSignals())
