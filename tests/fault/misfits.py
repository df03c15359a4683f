"""Parts of a victim that misbehave as the world does: brokers that refuse, clocks that are wrong, standing still."""

import asyncio
import os
import random
import signal
from datetime import datetime, timedelta
from typing import Any

import anyio

from cqrs_decor.clock import SystemClock
from cqrs_decor.errors import RecordRejectedError
from tests.fault.witnesses import say


class RefusesSome:
    """A broker that refuses some keys of the first so many batches, as one does whose partition has no leader."""

    def __init__(self, broker: Any, batches: int) -> None:
        self._broker = broker
        self._left = batches
        self._chance = random.Random(batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._broker, name)

    async def publish(self, envelopes: Any) -> Any:
        refused: set[str] = set()
        if self._left:
            self._left -= 1
            refused = {key for key in {envelope.key for envelope in envelopes} if self._chance.random() < 0.5}
        taken = [envelope for envelope in envelopes if envelope.key not in refused]
        outcomes = iter(await self._broker.publish(taken) if taken else [])
        no = RecordRejectedError("refusing", envelopes[0].topic, "not today")
        return [no if envelope.key in refused else next(outcomes) for envelope in envelopes]


class FreezesWhilePublishing:
    """Stands still (SIGSTOP) in the middle of a batch: `steps` turns of the loop after the publish has begun, without
    hearing of its outcome.
    """

    def __init__(self, broker: Any, batch: int, steps: int) -> None:
        self._broker = broker
        self._left = batch
        self._steps = steps

    def __getattr__(self, name: str) -> Any:
        return getattr(self._broker, name)

    async def publish(self, envelopes: Any) -> Any:
        self._left -= 1
        if self._left:
            return await self._broker.publish(envelopes)
        publishing = asyncio.create_task(self._broker.publish(envelopes))
        try:
            for _ in range(self._steps):
                await anyio.lowlevel.checkpoint()
        finally:  # also where that took so long that the relay calls it away
            say(publishing=len(envelopes), arrived=publishing.done())
            os.kill(os.getpid(), signal.SIGSTOP)
        return await publishing


def freezing(when: str | None, broker: Any) -> Any:
    if when is None:
        return broker
    batch, steps = when.split(":")
    return FreezesWhilePublishing(broker, int(batch), int(steps))


class WrongClock(SystemClock):
    """A wall clock that is off, and after a second jumps by so much more. What has elapsed it measures right."""

    def __init__(self, off_s: float, jump_s: float) -> None:
        self._off = timedelta(seconds=off_s)
        self._jump = timedelta(seconds=jump_s)
        self._jumps_at = self.elapsed() + 1

    def now(self) -> datetime:
        jumped = self._jump if self.elapsed() >= self._jumps_at else timedelta(0)
        return super().now() + self._off + jumped
