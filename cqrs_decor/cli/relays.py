"""Whether relays do their work, as the database sees it: who takes part, what waits, clocks, and wake-ups."""

from collections.abc import Iterator, Sequence
from datetime import timedelta

import anyio

from cqrs_decor._ids import new_id
from cqrs_decor._text import counted
from cqrs_decor.clock import Clock
from cqrs_decor.errors import StoreUnavailableError
from cqrs_decor.findings import Finding
from cqrs_decor.outbox import Backlog, Holders, OutboxStore, WakeUps
from cqrs_decor.settings import Settings

_BEHIND = timedelta(minutes=1)
"""Records of healthy keys are on the broker within a second; one that is rescheduled may take longer."""

_SKEW = timedelta(seconds=5)

_HEARD_WITHIN_S = 3.0


async def relay_findings(outbox: OutboxStore, settings: Settings, clock: Clock) -> Sequence[Finding]:
    """
    Raises:
        StoreUnavailableError: The database is away.
    """
    asked_at = clock.now()
    holders = await outbox.holders()
    middle = asked_at + (clock.now() - asked_at) / 2
    return [
        *_relays(holders, await outbox.backlog()),
        *_lanes(holders, settings),
        *_clocks(holders.now - middle),
        *await _wake_ups(outbox.wake_ups, settings),
    ]


def _relays(holders: Holders, backlog: Backlog) -> Iterator[Finding]:
    waiting = f"{counted(backlog.pending, 'record')} waiting" + (
        "" if backlog.oldest is None else f", the oldest for {_brief(backlog.oldest)}"
    )
    late = backlog.oldest is not None and backlog.oldest > _BEHIND
    if not holders.relays:
        yield Finding(
            code="CD716",
            severity="error" if late else "warning",
            problem=f"No relay takes part; {waiting}.",
            fix="start one: cqrs-decor run relay",
        )
    elif late:
        yield Finding(
            code="CD717",
            severity="warning",
            problem=f"Relays are behind: {waiting}; {counted(len(holders.relays), 'relay')} at it.",
            fix="see what the records wait for: cqrs-decor outbox list --older-than 1m",
        )
    else:
        yield Finding.ok(f"{counted(len(holders.relays), 'relay')} at it, {waiting}")
    if backlog.parked:
        yield Finding(
            code="CD721",
            severity="warning",
            problem=f"{counted(backlog.parked, 'record')} parked, and with each the later ones of its key.",
            fix="look at them: cqrs-decor outbox list --state parked",
        )


def _lanes(holders: Holders, settings: Settings) -> Iterator[Finding]:
    """Whoever takes part takes over what is free, or has ended, at its next renewal: a quarter of a lease."""
    ended = holders.longest_ended or timedelta(0)
    if holders.relays and (holders.free or ended > settings.lease):
        without = holders.free + holders.ended
        since = f", one of them for {_brief(ended)}" if ended else ""
        yield Finding(
            code="CD718",
            severity="warning",
            problem=f"{counted(without, 'lane')} without an owner{since}, though relays take part.",
            fix="run doctor again in a few seconds; if they stay, look at the log of the relays for what they wait for",
        )
    elif holders.relays:
        yield Finding.ok(f"{counted(holders.held, 'lane')} held")


def _clocks(skew: timedelta) -> Iterator[Finding]:
    """Leases go by the database's clock alone; the times in envelopes and logs do not."""
    if abs(skew) <= _SKEW:
        yield Finding.ok("the clocks of this machine and of the database agree")
        return
    side = "ahead of" if skew > timedelta(0) else "behind"
    yield Finding(
        code="CD719",
        severity="warning",
        problem=f"The clock of the database is {_brief(abs(skew))} {side} this machine's.",
        fix="let both follow a time server: the times of events and logs cannot be compared otherwise",
    )


async def _wake_ups(wake_ups: WakeUps | None, settings: Settings) -> list[Finding]:
    """Heard from another connection than the one that listens: through some poolers only one's own arrives."""
    if wake_ups is None:
        return [Finding.ok(f"no wake-ups by this database: relays look every {settings.poll_interval_s:g} s")]
    if await _is_heard(wake_ups):
        return [Finding.ok("a wake-up from one connection is heard on another")]
    return [
        Finding(
            code="CD720",
            severity="warning",
            problem=f"Wake-ups do not arrive; relays look for work every {settings.poll_interval_s:g} s instead.",
            fix="let the library reach the database past a pooler in transaction mode, or give it one in session mode",
        )
    ]


async def _is_heard(wake_ups: WakeUps) -> bool:
    with anyio.move_on_after(_HEARD_WITHIN_S):
        try:
            async with wake_ups.listen(f"doctor-{new_id()}") as ear:
                await wake_ups.send()
                while await ear.hear() != "work":
                    pass  # somebody else's sound
                return True
        except StoreUnavailableError:
            return False
    return False


def _brief(age: timedelta) -> str:
    seconds = age.total_seconds()
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
