"""Whether a running app is live and ready, as whoever restarts processes and routes to them asks it.

Live: its loops make progress. An outage of the database or the broker is not un-live, since a restart would not end it.
Ready: started, everything reachable, subscribed, and not about to stop.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, runtime_checkable

import anyio

from cqrs_decor.app import App
from cqrs_decor.clock import Clock
from cqrs_decor.counters import Counters
from cqrs_decor.errors import BrokerUnavailableError, StoreUnavailableError

_ANSWER_WITHIN_S = 2.0
_ASK_AGAIN_AFTER_S = 1.0
"""Probes may come often, and from anybody: the database is asked no more often."""


@runtime_checkable
class Progressing(Protocol):
    """A loop that says when it last got anywhere, by `Clock.elapsed`: an empty look for work counts. None: not yet."""

    @property
    def progress_at(self) -> float | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """An answer to a probe.

    Attributes:
        good: Whether it is yes.
        document: Why; numbers and names only, no secret.
    """

    good: bool
    document: dict[str, Any]


class Health:
    """The health of one process.

    Args:
        app: Its app.
        clock: Time.
        counters: Among the observers of the app.
    """

    def __init__(self, app: App, clock: Clock, counters: Counters) -> None:
        self._app = app
        self._clock = clock
        self._counters = counters
        self._began = clock.elapsed()
        self._started = self._began
        self._state = "starting"
        self._last_away = self._began
        self._waiting: dict[str, Any] = {}
        self._asked: float | None = None
        self._asking = anyio.Lock()

    @property
    def silence_limit_s(self) -> float:
        """A loop that says nothing for longer, while everything is reachable, is stuck."""
        settings = self._app.settings
        return max(settings.health_silence_s, 2 * settings.lease_s)

    def note_started(self) -> None:
        self._started = self._clock.elapsed()
        self._state = "running"

    def note_stopping(self) -> None:
        """Live still: what is in flight is being finished. The app may be gone from now on."""
        self._state = "stopping"

    async def live(self) -> Verdict:
        """Whether every loop makes progress; while it starts or stops there is nothing to say against it."""
        stuck = self._stuck()
        status = "stuck" if stuck else "live"
        return Verdict(good=not stuck, document={"status": status, "stuck": stuck, **self._facts()})

    async def ready(self) -> Verdict:
        """Whether work that comes now is done now."""
        waiting = await self._ask() if self._state == "running" else {}
        reasons = self._reasons(waiting)
        document = {
            "status": "degraded" if reasons and self._state == "running" else "ready" if not reasons else self._state,
            "reasons": reasons,
            **self._facts(),
            **waiting,
            "counts": self._counters.document(),
        }
        return Verdict(good=not reasons, document=document)

    def _reasons(self, waiting: dict[str, Any]) -> list[str]:
        if self._state != "running":
            return [self._state]
        worker = self._app.worker
        away = {f"{part} is away" for part in self._counters.away}
        if not waiting and not away:
            away.add("the database or the broker does not answer")
        subscribed = [] if worker is None or worker.subscribed else ["the worker is not subscribed"]
        return [*sorted(away), *subscribed, *(f"the {loop} is stuck" for loop in self._stuck())]

    def _stuck(self) -> list[str]:
        """Silence is counted from the end of the last outage that was seen: a loop that waits one out is not stuck."""
        now = self._clock.elapsed()
        if self._counters.away:
            self._last_away = now
        return [name for name, at in self._progress().items() if now - max(at, self._last_away) > self.silence_limit_s]

    def _progress(self) -> dict[str, float]:
        if self._state != "running":
            return {}
        loops: dict[str, object] = {"relay": self._app.relay, "worker": self._app.worker}
        return {
            name: self._started if loop.progress_at is None else loop.progress_at
            for name, loop in loops.items()
            if isinstance(loop, Progressing)
        }

    def _facts(self) -> dict[str, Any]:
        now = self._clock.elapsed()
        facts: dict[str, Any] = {
            "uptime_s": round(now - self._began, 1),
            "service": self._app.service,
            "away": sorted(self._counters.away),
            "silent_s": {name: round(now - at, 1) for name, at in self._progress().items()},
        }
        if self._state != "running":
            return facts
        relay, worker = self._app.relay, self._app.worker
        if relay is not None:
            facts["relay"] = {
                "lanes_held": relay.lanes_held,
                "lanes": self._app.store.outbox.lane_count,
                "published": relay.published,
                "wake_ups_work": self._counters.wake_ups_work,
            }
        if worker is not None:
            facts["worker"] = {
                "subscribed": worker.subscribed,
                "handled": worker.handled,
                "paused_partitions": self._counters.paused,
            }
        return facts

    async def _ask(self) -> dict[str, Any]:
        """What the parts say; nothing where one does not answer."""
        async with self._asking:
            now = self._clock.elapsed()
            if self._asked is None or now - self._asked >= _ASK_AGAIN_AFTER_S:
                self._waiting, self._asked = await self._answers(), now
            return self._waiting

    async def _answers(self) -> dict[str, Any]:
        store, worker = self._app.store, self._app.worker
        with anyio.move_on_after(_ANSWER_WITHIN_S):
            try:
                backlog = await store.outbox.backlog()
                parked = await store.inbox.parked_count()
                to_consume = None if worker is None else await worker.backlog()
            except (StoreUnavailableError, BrokerUnavailableError):
                return {}  # the reasons say it
            return {
                "pending": backlog.pending,
                "lag_s": round((backlog.oldest or timedelta(0)).total_seconds(), 3),
                "parked": {"outbox": backlog.parked, "inbox": parked},
                "to_consume": to_consume,
            }
        return {}
