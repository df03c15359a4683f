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
"""After so many settled records the next time comes sooner: under an old snapshot each claim passes over them all."""


class OutboxUpkeep:
    """Moves the lower bound, and puts records behind the parked ones of their keys. An idle relay does neither."""

    def __init__(self, database: Database, lanes: OutboxLanes, bound: LowerBound, parking: OutboxParking) -> None:
        self._database = database
        self._lanes = lanes
        self._bound = bound
        self._parking = parking
        self._settled = self._rounds = 0
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
        wait = _SOONER_S if self._settled >= _MANY else _EVERY_S
        if not self._rounds or time.monotonic() - self._ended < wait:
            return
        await self.run(lanes)

    async def run(self, lanes: Sequence[HeldLane]) -> None:
        async def work(connection: AsyncConnection) -> None:
            rows = await self._lanes.lock(connection, lanes)
            await self._bound.move(connection, rows)
            await self._parking.sweep(connection, [row.lane for row in rows])

        self._ended = time.monotonic()  # a second one, from another task, must not begin meanwhile
        await self._database.write(work)
        self._settled, self._rounds = 0, self._rounds - 1
        self._ended = time.monotonic()
