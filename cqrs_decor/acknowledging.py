"""Tells the broker how far a worker is: what is done with everything before it done."""

from collections.abc import Callable

import anyio

from cqrs_decor._loop import Outage, Signal
from cqrs_decor.broker import Delivery, Partition, Subscription
from cqrs_decor.crash_points import reach
from cqrs_decor.errors import BrokerUnavailableError
from cqrs_decor.in_hand import InHand

_LOOK_EVERY_S = 1.0
_GATHERS_S = 0.05
"""An acknowledgement is a request to the broker: one for each message costs a twentieth of the throughput."""


class Acknowledging:
    """Acknowledges for one subscription.

    Args:
        subscription: Who is told.
        in_hand: What there is to tell.
        outage: Waits while the broker is away.
        leaving: Whether the worker was told to stop: then it is not waited for a broker that is away.
    """

    def __init__(
        self, subscription: Subscription, in_hand: InHand, outage: Outage, leaving: Callable[[], bool]
    ) -> None:
        self._subscription = subscription
        self._in_hand = in_hand
        self._outage = outage
        self._leaving = leaving
        self._one_at_a_time = anyio.Lock()

    async def run(self, finished: Signal, much: Signal) -> None:
        """Acknowledge when something has been finished, then wait a moment, unless there is much to acknowledge."""
        while True:
            await finished.wait(_LOOK_EVERY_S)
            await self.acknowledge()
            await much.wait(_GATHERS_S)

    async def acknowledge(self) -> None:
        """Acknowledge what is finished; repeated until the broker has it."""
        async with self._one_at_a_time:
            finished = self._in_hand.finished()
            if finished and await self._is_taken(finished):
                self._in_hand.drop(finished)  # only now: what a stop cuts off here is acknowledged at its end

    async def _is_taken(self, finished: dict[Partition, list[Delivery]]) -> bool:
        """Acknowledge until the broker has it; False if a stop came first."""
        deliveries = [delivery for prefix in finished.values() for delivery in prefix]
        while True:
            reach("worker.before_ack")
            try:
                await self._subscription.ack(deliveries)
            except BrokerUnavailableError as error:
                await self._outage.wait(error)
                if self._leaving():
                    return False  # the next reader is told again, and the inbox knows
                continue
            reach("worker.acked")
            return True
