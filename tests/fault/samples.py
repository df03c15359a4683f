"""What is on the way at each moment of a run, looked at from outside four times a second."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio

from tests.fault.oracle import Ledger, Sink

EVERY_S = 0.25
YOUNG_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One look.

    Attributes:
        at: Seconds of the monotonic clock.
        pending: Records in the outbox; None while the database could not be asked.
        oldest_s: At least so long the oldest of them has been there; 0 when there is none.
        delivered: Deliveries at the sink so far.
    """

    at: float
    pending: int | None
    oldest_s: float | None
    delivered: int


class Sampler:
    """Takes samples until it is cancelled. The age of a record is counted from the first look that could see it, so
    that no clock of a database is needed.
    """

    def __init__(self, ledger: Ledger, sink: Path) -> None:
        self.samples: list[Sample] = []
        self._ledger = ledger
        self._sink = sink
        self._newest: list[tuple[int, float]] = []

    async def run(self) -> None:
        while True:
            await self.look()
            await anyio.sleep(EVERY_S)

    async def look(self) -> None:
        self.samples.append(await self._sample())

    def recovery_s(self, since: float) -> float | None:
        """How long after that moment the oldest pending record became young and stayed so; None if it never did."""
        recovered_at: float | None = None
        for sample in self.samples:
            if sample.at < since:
                continue
            if sample.oldest_s is None or sample.oldest_s >= YOUNG_S:
                recovered_at = None
            elif recovered_at is None:
                recovered_at = sample.at
        return None if recovered_at is None else recovered_at - since

    async def _sample(self) -> Sample:
        delivered = Sink.delivery_count(self._sink)
        try:
            with anyio.fail_after(2):
                newest, oldest, pending = await self._ledger.newest_and_oldest_pending()
        except Exception:  # the database may be away in every way that its driver knows: that is what is sampled
            return Sample(at=time.monotonic(), pending=None, oldest_s=None, delivered=delivered)
        now = time.monotonic()
        if newest is not None and (not self._newest or newest > self._newest[-1][0]):
            self._newest.append((newest, now))
        oldest_s = 0.0 if oldest is None else now - _seen_at(self._newest, oldest)
        return Sample(at=now, pending=pending, oldest_s=oldest_s, delivered=delivered)


def _seen_at(newest: Sequence[tuple[int, float]], wanted: int) -> float:
    return next(at for record_id, at in newest if record_id >= wanted)
