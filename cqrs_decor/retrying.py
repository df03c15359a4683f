"""Runs again what operators asked for, and what stood behind it, in the order of each key."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import anyio

from cqrs_decor.clock import Clock
from cqrs_decor.consuming import Consuming
from cqrs_decor.errors import WireError
from cqrs_decor.in_hand import Turn
from cqrs_decor.inbox import ParkedMessage
from cqrs_decor.parking import Parking
from cqrs_decor.patience import Patience
from cqrs_decor.pipeline import Plan
from cqrs_decor.reading import Reader
from cqrs_decor.store import Store

_LOOK_EVERY_S = 2.0
_AT_ONCE = 50
_CUT_OFF = "a worker that tried it again did not come back; before that: "

_Key = tuple[str, str, str | int]


class Retrying:
    """Retries for the consumers of one worker. Any worker of the service may do it: whoever takes a message out of the
    parked ones in his transaction has it.

    Args:
        service: What nobody could read is parked under its name.
        plans: The consumers, by name.
        store: Where the messages are parked.
        reader: Reads them.
        consuming: Runs their consumers.
        parking: Takes those back that fail again.
        patience: Asks the store until it answers.
        clock: Time.
    """

    def __init__(
        self,
        service: str,
        plans: Mapping[str, Plan],
        store: Store,
        reader: Reader,
        consuming: Consuming,
        parking: Parking,
        patience: Patience,
        clock: Clock,
    ) -> None:
        self._names = (*plans, service)
        self._plans = plans
        self._store = store
        self._reader = reader
        self._consuming = consuming
        self._parking = parking
        self._patience = patience
        self._clock = clock
        self._turns: dict[_Key, Turn] = {}
        self._finishing = False
        self._ended = anyio.Event()

    async def run(self) -> None:
        """Look every two seconds; different keys are retried side by side."""
        async with anyio.create_task_group() as tasks:
            while True:
                await self._clock.sleep(_LOOK_EVERY_S)
                for parked in await self._wanted(self._names):
                    if _key(parked) not in self._turns and not self._finishing:
                        self._turns[_key(parked)] = Turn()
                        tasks.start_soon(self._retry_key, parked)

    async def finish(self) -> None:
        """Begin nothing more, and wait for what runs; what does not come to its end is asked for again."""
        self._finishing = True
        for turn in self._turns.values():
            turn.give_up()
        while self._turns:
            self._ended = anyio.Event()
            await self._ended.wait()

    async def _wanted(self, consumers: Sequence[str]) -> Sequence[ParkedMessage]:
        """What is asked for of these consumers."""
        wanted = await self._patience.until_answered(
            lambda: self._store.inbox.retries(consumers, _AT_ONCE), lambda: self._finishing
        )
        return wanted or ()

    async def _retry_key(self, first: ParkedMessage) -> None:
        """Retry a message, then those that stood behind it, until one fails or none is left."""
        turn = self._turns[_key(first)]
        parked: ParkedMessage | None = first
        try:
            while parked is not None and not turn.given_up:
                parked = await self._next(parked) if await self._retry(turn, parked) else None
        finally:
            del self._turns[_key(first)]
            self._ended.set()

    async def _next(self, parked: ParkedMessage) -> ParkedMessage | None:
        if parked.envelope.key is None:
            return None
        wanted = await self._wanted([parked.consumer])
        return next((each for each in wanted if _key(each) == _key(parked)), None)

    async def _retry(self, turn: Turn, parked: ParkedMessage) -> bool:
        """Whether the message has its outcome, so that the next one may follow.

        The wish is taken back first: a message that kills the process would otherwise do so for ever.
        """
        error = parked.error.removeprefix(_CUT_OFF)
        if not await self._park(turn, replace(parked, error=_CUT_OFF + error)):
            return not turn.given_up  # somebody else was faster
        through = await self._run(turn, parked)
        if not through:
            await self._park(turn, replace(parked, error=error))
            await self._patience.until_answered(
                lambda: self._store.inbox.retry([parked.id], who="a worker that was stopped"), lambda: turn.given_up
            )
        return through

    async def _park(self, turn: Turn, parked: ParkedMessage) -> bool:
        kept = await self._patience.until_answered(lambda: self._store.inbox.park(parked), lambda: turn.given_up)
        return kept or False

    async def _run(self, turn: Turn, parked: ParkedMessage) -> bool:
        """Bring it to an outcome; False if it was given up first."""
        try:
            read = self._reader.read(parked.envelope)
        except WireError as error:
            return await self._parking.park(turn, parked.consumer, parked.envelope, error, parked.attempts)
        plan = self._plans.get(parked.consumer)
        if plan is None or plan not in read.plans:  # the service's own, or by now it is not for this consumer
            return await self._consuming.by_all(turn, read) and await self._take_out(turn, parked)
        if not parked.attempts:  # nobody could read it then: those who are new have not had it
            for other in read.plans:
                if other is not plan and not await self._consuming.by_one(turn, other, read):
                    return False
        return await self._consuming.by_one(turn, plan, read, parked.id)

    async def _take_out(self, turn: Turn, parked: ParkedMessage) -> bool:
        async def take_out() -> bool:
            transaction = await self._store.begin()
            try:
                await self._store.inbox.unpark(transaction, parked.id)
                await transaction.commit()
            finally:
                await transaction.rollback()
            return True

        return await self._patience.until_answered(take_out, lambda: turn.given_up) or False


def _key(parked: ParkedMessage) -> _Key:
    """Messages of a key wait for each other; one without a key for nobody."""
    envelope = parked.envelope
    return (parked.consumer, envelope.topic, parked.id if envelope.key is None else envelope.key)
