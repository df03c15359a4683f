"""`cqrs-decor run`: relay, worker or both, until a signal says stop."""

import logging
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import anyio
import typer

from cqrs_decor.app import App
from cqrs_decor.assembly import Run
from cqrs_decor.cli import logs, status
from cqrs_decor.cli.answers import Answer
from cqrs_decor.cli.errors import CommandLineError
from cqrs_decor.cli.group import Group, Tell
from cqrs_decor.cli.health_server import Probed, served, served_at
from cqrs_decor.cli.location import find_app
from cqrs_decor.cli.membership import Membership, leave_with_parent
from cqrs_decor.cli.options import AppOption, JsonOption
from cqrs_decor.cli.screen import Screen, write_line
from cqrs_decor.cli.signals import StopSignals
from cqrs_decor.cli.spreading import spread
from cqrs_decor.clock import SystemClock
from cqrs_decor.counters import Counters
from cqrs_decor.health import Health
from cqrs_decor.parts import open_store

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


@spread
def run(
    loops: Annotated[Loops, typer.Argument(metavar="relay|worker|all", help="What to run in this process.")],
    membership: Membership,
    app: AppOption = None,
    json: JsonOption = False,
    processes: Annotated[
        int,
        typer.Option("--processes", min=1, metavar="NUMBER", help="Run so many processes, and start those that end."),
    ] = 1,
    health_port: Annotated[
        int | None,
        typer.Option(
            "--health-port",
            min=0,
            max=65_535,
            help="Answer GET /live and /ready there; CQRS_DECOR_HEALTH_PORT otherwise.",
        ),
    ] = None,
    health_host: Annotated[
        str | None,
        typer.Option(
            "--health-host", metavar="ADDRESS", help="Where to listen for them; CQRS_DECOR_HEALTH_HOST otherwise."
        ),
    ] = None,
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
    tell = partial(_tell_in_json, membership.member) if json else partial(_tell_in_log, membership.member)
    door = Door(
        host=health_host or found.settings.health_host,
        port=found.settings.health_port if health_port is None else health_port,
        socket=membership.health_socket,
    )
    if processes > 1:
        options = {
            "--app": app,
            "--log-level": log_level,
            "--log-format": log_format,
            "--status-every-s": status_every_s,
        }
        arguments = [*_written(loops, options), *(["--json"] if json else [])]
        return Answer(exit_code=anyio.run(_supervise, found, processes, arguments, door, tell))
    if membership.parent_pipe is not None:
        leave_with_parent(membership.parent_pipe, found.settings.drain_limit_s)
    shown = _way_to_show(screen, log_format, status_every_s, alone=membership.member is None)
    anyio.run(_run, found, loops, shown, door, tell)
    return Answer()


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """Where probes are answered: at an address, or for a member of a group at a socket in the file system."""

    host: str
    port: int | None
    socket: Path | None

    @asynccontextmanager
    async def open(self, probed: Probed) -> AsyncGenerator[str | None, None]:
        if self.socket is not None:
            async with served_at(probed, self.socket):
                yield None
        else:
            async with served(probed, host=self.host, port=self.port) as address:
                yield address


def _way_to_show(
    screen: Screen, log_format: logs.LogFormat | None, every_s: float | None, *, alone: bool
) -> ShowStatus:
    """Several processes have one terminal: none of them has a line of its own at the bottom."""
    if screen.json:
        return partial(status.show_lines, every_s=every_s or _EVERY_S["json"])
    if screen.err.is_terminal and log_format is None and alone:
        shown_s, asked_s = every_s or _EVERY_S["terminal"], every_s or _ASK_EVERY_S
        return partial(status.show_live, console=screen.err, every_s=shown_s, ask_every_s=asked_s)
    return partial(status.log_lines, every_s=every_s or _EVERY_S["log"])


def _written(loops: Loops, options: Mapping[str, object]) -> list[str]:
    """A command line; options that were not given are left out."""
    given = [text for name, value in options.items() if value is not None for text in (name, str(value))]
    return [loops.value, *given]


async def _supervise(app: App, processes: int, arguments: Sequence[str], door: Door, tell: Tell) -> int:
    """The exit code of a group of processes with these arguments of `run`.

    Raises:
        CommandLineError: They would have nothing in common.
    """
    store = open_store(app.configuration.database)
    if not store.card.shared:
        raise CommandLineError(
            f"{processes} processes cannot share {store.name}: it lives in one.",
            fix="name a database, or leave --processes out",
        )
    with tempfile.TemporaryDirectory(prefix="cqrs-decor-") as sockets:
        group = Group(
            [sys.executable, "-m", "cqrs_decor", "run", *arguments],
            processes,
            sockets=Path(sockets),
            drain_limit_s=app.settings.drain_limit_s,
            clock=SystemClock(),
            tell=tell,
        )
        with StopSignals(group.kill) as signals:
            async with door.open(group) as address:
                tell("supervising", processes=processes, health=address)
                code = await group.run(signals)
        tell("stopped", code=code)
        return code


async def _run(app: App, loops: Loops, show_status: ShowStatus, door: Door, tell: Tell) -> None:
    counters = Counters()
    health = Health(app, SystemClock(), counters)
    with StopSignals() as signals:
        async with door.open(health) as address, AsyncExitStack() as stack:
            if not await _start(app, loops, counters, signals, stack):
                return
            health.note_started()
            stack.callback(health.note_stopping)
            tell("started", **_facts(app, loops), **({} if address is None else {"health": address}))
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(show_status, app)
                await signals.stop.wait()
                tasks.cancel_scope.cancel()
            tell("stopping", drain_limit_s=app.settings.drain_limit_s)
        tell("stopped")


async def _start(app: App, loops: Loops, counters: Counters, signals: StopSignals, stack: AsyncExitStack) -> bool:
    """Whether the app runs, for as long as the stack; not when the signal came before."""
    observers = (*app.configuration.observers, counters)
    with anyio.CancelScope() as scope:
        signals.give_up_by(scope)
        await stack.enter_async_context(app.running_as(run=_RUNS[loops], observers=observers))
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


def _tell_in_json(member: int | None, what: str, **facts: object) -> None:
    write_line({"status": what, **({} if member is None else {"process": member}), **facts})


def _tell_in_log(member: int | None, what: str, **facts: object) -> None:
    known = {"process": member, **facts}
    shown = {
        _IN_A_LOG.get(name, name): ",".join(value) if isinstance(value, list) else value  # pyright: ignore[reportUnknownArgumentType,reportUnknownVariableType]
        for name, value in known.items()
        if value is not None
    }
    level = logging.WARNING if what in _BAD else logging.INFO
    _logger.log(level, _SENTENCES[what], extra={"action": f"run_{what}", **shown})


_IN_A_LOG = {"process": "process_number"}
"""A log record has a `process` of its own, the id that the system gave it, and refuses another."""

_SENTENCES = {
    "started": "running",
    "stopping": "draining, a second signal leaves at once",
    "stopped": "stopped",
    "supervising": "starting processes",
    "process_started": "a process was started",
    "process_ended": "a process ended and is started again",
    "process_refused": "a process says that it cannot work like this; the others are stopped",
    "process_killed": "a process did not stop in time and was killed",
}
_BAD = {"process_ended", "process_refused", "process_killed"}
