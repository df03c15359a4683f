"""Wake-ups between apps that share a store in memory."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import anyio

from cqrs_decor.outbox import Ear, Heard


class MemoryEar:
    """What one relay hears: of each sound at most one waits for it."""

    def __init__(self) -> None:
        self._heard: list[Heard] = []
        self._sound = anyio.Event()

    async def hear(self) -> Heard:
        await self._sound.wait()
        heard = self._heard.pop(0)
        if not self._heard:
            self._sound = anyio.Event()
        return heard

    def sound(self, heard: Heard) -> None:
        if heard not in self._heard:
            self._heard.append(heard)
        self._sound.set()


class MemoryWakeUps:
    """Reaches every relay of one event loop that listens to the same store."""

    def __init__(self) -> None:
        self._ears: list[tuple[str, MemoryEar]] = []

    async def send(self) -> None:
        for _, ear in self._ears:
            ear.sound("work")

    @asynccontextmanager
    async def listen(self, owner: str) -> AsyncGenerator[Ear, None]:
        entry = (owner, MemoryEar())
        self._ears.append(entry)
        try:
            yield entry[1]
        finally:
            self._ears.remove(entry)

    def echo(self, owner: str) -> None:
        """Let the owner hear that it has renewed."""
        for listener, ear in self._ears:
            if listener == owner:
                ear.sound("echo")
