"""Places for handlers: so many run at a time, or one alone."""

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager

import anyio


class Places:
    """Whoever waits longest gets the next place.

    Args:
        count: How many handlers run at a time.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._alone = anyio.Lock()  # two that collect all places would each wait for the other's
        self.one = _Place(count)

    @asynccontextmanager
    async def all(self) -> AsyncGenerator[None, None]:
        """Every place: nothing else runs inside this block."""
        async with self._alone, AsyncExitStack() as taken:
            for _ in range(self._count):
                await taken.enter_async_context(self.one)
            yield


class _Place:
    """One of so many, for the time of a block. Where one is free nothing is asked of the event loop, unlike in
    `Semaphore.acquire`, which looks whether the task was cancelled.
    """

    def __init__(self, count: int) -> None:
        self._free = anyio.Semaphore(count, fast_acquire=True)

    async def __aenter__(self) -> None:
        try:
            self._free.acquire_nowait()
        except anyio.WouldBlock:
            await self._free.acquire()

    async def __aexit__(self, *_: object) -> None:
        self._free.release()
