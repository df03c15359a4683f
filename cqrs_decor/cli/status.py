"""What a running relay and worker are doing, every second on a terminal, as log or JSON lines otherwise."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta

from rich.console import Console
from rich.live import Live
from rich.text import Text

from cqrs_decor.app import App
from cqrs_decor.cli.screen import write_line
from cqrs_decor.clock import Clock, SystemClock
from cqrs_decor.errors import BrokerUnavailableError, StoreUnavailableError

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """What the database and the broker say; None where they did not answer or nothing here asks them."""

    pending: int | None = None
    parked: int | None = None
    lag_s: float | None = None
    to_consume: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One look.

    Attributes:
        published: Since this process started.
        handled: Since this process started.
        published_per_s: Since the last look.
        handled_per_s: Since the last look.
        lanes_held: Of `lanes`; None without a relay.
        waiting: Outbox records and parked messages; `lag_s` is the age of the oldest record that waits.
    """

    published: int
    handled: int
    published_per_s: float
    handled_per_s: float
    lanes_held: int | None
    lanes: int
    waiting: Waiting

    def document(self) -> dict[str, object]:
        facts = asdict(self)
        waiting = facts.pop("waiting")
        return {**facts, **waiting}

    def line(self) -> str:
        lanes = "-" if self.lanes_held is None else f"{self.lanes_held}/{self.lanes}"
        lag = "-" if self.waiting.lag_s is None else _brief(self.waiting.lag_s)
        return (
            f"published {_number(self.published_per_s)}/s  handled {_number(self.handled_per_s)}/s  "
            f"pending {_number(self.waiting.pending)}  parked {_number(self.waiting.parked)}  "
            f"lanes {lanes}  lag {lag}"
        )


class Watch:
    """Takes readings of a running app.

    Args:
        app: It runs.
        clock: Time.
        ask_every_s: What costs a query is asked no more often; the counters of this process cost nothing.
    """

    def __init__(self, app: App, clock: Clock, ask_every_s: float) -> None:
        self._app = app
        self._clock = clock
        self._ask_every_s = ask_every_s
        self._looked = clock.elapsed()
        self._asked: float | None = None
        self._published = 0
        self._handled = 0
        self._waiting = Waiting()

    async def read(self) -> Reading:
        relay, worker = self._app.relay, self._app.worker
        published = self._published if relay is None else relay.published
        handled = self._handled if worker is None else worker.handled
        now = self._clock.elapsed()
        seconds = max(now - self._looked, 1e-6)
        if self._asked is None or now - self._asked >= self._ask_every_s:
            self._waiting, self._asked = await self._ask(), now
        reading = Reading(
            published=published,
            handled=handled,
            published_per_s=round((published - self._published) / seconds, 1),
            handled_per_s=round((handled - self._handled) / seconds, 1),
            lanes_held=None if relay is None else relay.lanes_held,
            lanes=self._app.store.outbox.lane_count,
            waiting=self._waiting,
        )
        self._looked, self._published, self._handled = now, published, handled
        return reading

    async def _ask(self) -> Waiting:
        try:
            backlog = await self._app.store.outbox.backlog()
            parked = backlog.parked + await self._app.store.inbox.parked_count()
            to_consume = None if self._app.worker is None else await self._app.worker.backlog()
        except (StoreUnavailableError, BrokerUnavailableError):
            return Waiting()  # the loops say so themselves
        lag = (backlog.oldest or timedelta(0)).total_seconds()
        return Waiting(pending=backlog.pending, parked=parked, lag_s=round(lag, 3), to_consume=to_consume)


async def show_live(app: App, console: Console, every_s: float, ask_every_s: float) -> None:
    """Keep one line at the bottom of the terminal up to date, until cancelled."""
    watch = Watch(app, SystemClock(), ask_every_s)
    with Live(Text("starting"), console=console, auto_refresh=False, transient=True) as live:
        await _repeat(watch, every_s, lambda reading: live.update(_on_terminal(reading, console), refresh=True))


async def show_lines(app: App, every_s: float) -> None:
    """Write a JSON line now and then, until cancelled."""
    watch = Watch(app, SystemClock(), ask_every_s=0)
    await _repeat(watch, every_s, lambda reading: write_line({"status": "running", **reading.document()}))


async def log_lines(app: App, every_s: float) -> None:
    """Log now and then, until cancelled."""
    watch = Watch(app, SystemClock(), ask_every_s=0)
    await _repeat(
        watch, every_s, lambda reading: _logger.info("running", extra={"action": "status", **reading.document()})
    )


async def _repeat(watch: Watch, every_s: float, show: Callable[[Reading], None]) -> None:
    clock = SystemClock()
    while True:
        try:
            show(await watch.read())
        except Exception:  # looking at the loops must not end them
            _logger.exception("the status cannot be read", extra={"action": "status_failed"})
        await clock.sleep(every_s)


def _on_terminal(reading: Reading, console: Console) -> Text:
    text = Text(reading.line(), style="reverse" if reading.waiting.parked else "dim", no_wrap=True, overflow="ellipsis")
    text.truncate(console.width)
    return text


def _number(value: float | None) -> str:
    if value is None:
        return "?"
    if value < 1_000:
        return f"{value:.0f}"
    for size, letter in ((1_000, "k"), (1_000_000, "M")):
        if value < 1_000 * size:
            return f"{value / size:.1f}{letter}" if value < 10 * size else f"{value / size:.0f}{letter}"
    return f"{value / 1_000_000_000:.0f}G"


def _brief(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f}s"
    if seconds < 3600:
        return f"{seconds / 60:.0f}m"
    return f"{seconds / 3600:.1f}h"
