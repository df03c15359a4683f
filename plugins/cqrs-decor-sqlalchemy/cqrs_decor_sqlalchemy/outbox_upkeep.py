"""What a relay does now and then for the lanes that it holds, apart from the way of its records."""

import time
from collections.abc import Sequence

from sqlalchemy.ext.asyncio import AsyncConnection

from cqrs_decor.lanes import HeldLane
from cqrs_decor_sqlalchemy.database import Database
from cqrs_decor_sqlalchemy.lower_bound import LowerBound
from cqrs_decor_sqlalchemy.outbox_lanes import OutboxLanes
from cqrs_decor_sqlalchemy.outbox_parking import OutboxParking

_EVERY_S = 5.0
_SOONER_S = 0.5
_MANY = 5_000
"""After so many settled records the next time comes sooner: under an old snapshot each claim passes over them all. It
does so as well while there are more than one look can pass."""


class OutboxUpkeep:
    """Moves the lower bound, and puts records behind the parked ones of their keys. An idle relay does neither."""

    def __init__(self, database: Database, lanes: OutboxLanes, bound: LowerBound, parking: OutboxParking) -> None:
        self._database = database
        self._lanes = lanes
        self._bound = bound
        self._parking = parking
        self._settled = self._rounds = 0
        self._running = self._is_behind = False
        self._ended = -_EVERY_S

    def note(self, settled: int = 0) -> None:
        """There are records, or so many left the table. The bound needs two rounds to pass them."""
        self._settled += settled
        self._rounds = 2

    async def run_if_due(self, lanes: Sequence[HeldLane]) -> None:
        """
        Raises:
            LaneLostError: Another relay holds one of the lanes.
        """
        wait = _SOONER_S if self._settled >= _MANY or self._is_behind else _EVERY_S
        if self._rounds <= 0 or self._running or time.monotonic() - self._ended < wait:
            return
        await self.run(lanes)

    async def run(self, lanes: Sequence[HeldLane]) -> None:
        """One at a time: what a look found must not be taken for what another did.

        Raises:
            LaneLostError: Another relay holds one of the lanes.
        """
        self._running = True
        self._settled, self._rounds = 0, self._rounds - 1
        try:
            self._is_behind = not await self._run(lanes)
        finally:
            self._running = False
            self._ended = time.monotonic()
        if self._is_behind:
            self._rounds = max(self._rounds, 1)

    async def _run(self, lanes: Sequence[HeldLane]) -> bool:
        """Whether the bound got as far as it may. The look keeps nobody waiting; what follows locks the lanes."""
        look = await self._database.read(
            lambda connection: self._bound.look(connection, [lane.number for lane in lanes])
        )

        async def work(connection: AsyncConnection) -> None:
            rows = await self._lanes.lock(connection, lanes)
            if look is not None:
                await self._bound.move(connection, look, rows)
            await self._parking.sweep(connection, [row.lane for row in rows])

        await self._database.write(work)
        return look is None or look.is_complete
