"""`cqrs-decor run`: relay, worker or both, until a signal says stop."""

import logging
from collections.abc import Callable, Coroutine
from enum import StrEnum
from functools import partial
from typing import Annotated, Any

import anyio
import typer

from cqrs_decor.app import App
from cqrs_decor.assembly import Run
from cqrs_decor.cli import logs, status
from cqrs_decor.cli.answers import Answer
from cqrs_decor.cli.location import find_app
from cqrs_decor.cli.options import AppOption, JsonOption
from cqrs_decor.cli.screen import Screen, write_line
from cqrs_decor.cli.signals import StopSignals

_logger = logging.getLogger(__name__)

_EVERY_S = {"terminal": 1.0, "json": 10.0, "log": 60.0}
_ASK_EVERY_S = 5.0
"""The line on a terminal asks the database less often than it is drawn."""

ShowStatus = Callable[[App], Coroutine[Any, Any, None]]


class Loops(StrEnum):
    RELAY = "relay"
    WORKER = "worker"
    ALL = "all"


_RUNS: dict[Loops, Run] = {Loops.RELAY: "relay", Loops.WORKER: "worker", Loops.ALL: "all"}


def run(
    loops: Annotated[Loops, typer.Argument(metavar="relay|worker|all", help="What to run in this process.")],
    app: AppOption = None,
    json: JsonOption = False,
    log_level: Annotated[logs.LogLevel | None, typer.Option("--log-level", help="Least level that is shown.")] = None,
    log_format: Annotated[logs.LogFormat | None, typer.Option("--log-format", help="How log lines look.")] = None,
    status_every_s: Annotated[
        float | None,
        typer.Option(
            "--status-every-s",
            min=0.1,
            metavar="SECONDS",
            help="How often to show the status: 1 on a terminal, 10 with --json, 60 as a log line unless given.",
        ),
    ] = None,
) -> Answer:
    """Run the relay, the worker or both, until SIGTERM or SIGINT.

    The first signal drains what is in flight, within the drain limit, and ends with 0. A second one leaves at once,
    with 143 or 130: what was in flight is done again by the next process. Log lines go to standard error.
    """
    found = find_app(app)
    screen = Screen(json=json)
    logs.set_up(log_level, log_format, screen.err)
    anyio.run(_run, found, loops, _way_to_show(screen, log_format, status_every_s), json)
    return Answer()


def _way_to_show(screen: Screen, log_format: logs.LogFormat | None, every_s: float | None) -> ShowStatus:
    if screen.json:
        return partial(status.show_lines, every_s=every_s or _EVERY_S["json"])
    if screen.err.is_terminal and log_format is None:
        shown_s, asked_s = every_s or _EVERY_S["terminal"], every_s or _ASK_EVERY_S
        return partial(status.show_live, console=screen.err, every_s=shown_s, ask_every_s=asked_s)
    return partial(status.log_lines, every_s=every_s or _EVERY_S["log"])


async def _run(app: App, loops: Loops, show_status: ShowStatus, json: bool) -> None:
    tell = _tell_in_json if json else _tell_in_log
    with StopSignals() as signals:
        if not await _start(app, loops, signals):
            return
        try:
            tell("started", **_facts(app, loops))
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(show_status, app)
                await signals.stop.wait()
                tasks.cancel_scope.cancel()
            tell("stopping", drain_limit_s=app.settings.drain_limit_s)
        finally:
            await app.stop()
        tell("stopped")


async def _start(app: App, loops: Loops, signals: StopSignals) -> bool:
    """Whether the app runs; not when the signal came before."""
    with anyio.CancelScope() as scope:
        signals.give_up_by(scope)
        await app.start(run=_RUNS[loops])
        signals.give_up_by(None)
        return True
    return False


def _facts(app: App, loops: Loops) -> dict[str, object]:
    topics = list(app.worker.topics) if app.worker is not None else []
    return {
        "loops": loops,
        "service": app.service,
        "database": app.store.name,
        "broker": app.broker.name,
        "topics": topics,
    }


def _tell_in_json(what: str, **facts: object) -> None:
    write_line({"status": what, **facts})


def _tell_in_log(what: str, **facts: object) -> None:
    shown = {name: ",".join(value) if isinstance(value, list) else value for name, value in facts.items()}  # pyright: ignore[reportUnknownArgumentType,reportUnknownVariableType]
    _logger.info(_SENTENCES[what], extra={"action": f"run_{what}", **shown})


_SENTENCES = {
    "started": "running",
    "stopping": "draining, a second signal leaves at once",
    "stopped": "stopped",
}
