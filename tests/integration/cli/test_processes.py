"""`run --processes`: real processes that are killed, and a supervisor that is killed."""

import json
import os
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.unit.cli.processes import RunningCli, running_cli

_APP = """
import os, threading
from pathlib import Path
import anyio
from sqlalchemy.ext.asyncio import AsyncSession
from cqrs_decor import Command, IntegrationEvent, Registry, Settings, bootstrap, emit

registry = Registry("shop")

class OrderPlaced(IntegrationEvent, topic="orders", key="sku", name="shop.order-placed"):
    sku: str

@registry.event_handler
async def write_invoice(event: OrderPlaced, session: AsyncSession) -> None: ...

async def start_late():
    if Path("blocks").exists():
        Path(f"blocked-{os.getpid()}").touch()
        threading.Event().wait()

cqrs = bootstrap(
    registry=registry, discover=False, database="sqlite+aiosqlite:///shop.db", service="shop",
    settings=Settings(drain_limit_s=1), on_startup=[start_late],
)
"""


class Group:
    """A supervisor and what it says of its members."""

    def __init__(self, process: RunningCli) -> None:
        self.process = process
        self.pids: dict[int, int] = {}
        self.address = ""

    def until(self, status: str, **facts: object) -> dict[str, Any]:
        """The first line with this status and these facts; pids are noted on the way."""
        while True:
            line = json.loads(self.process.next_line())
            if line["status"] == "process_started":
                self.pids[line["process"]] = line["pid"]
            if line["status"] == "supervising":
                self.address = line["health"] or ""
            if line["status"] == status and facts.items() <= line.items():
                return line

    def asked(self, path: str) -> tuple[int, dict[str, Any]]:
        try:
            with urllib.request.urlopen(f"http://{self.address}{path}", timeout=30) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "shop.py").write_text(_APP)
    return tmp_path


@pytest.fixture
def group(directory: Path) -> Iterator[Group]:
    """Two processes, both started."""
    arguments = ("run", "all", "--app", "shop:cqrs", "--json", "--processes", "2", "--health-port", "0")
    with running_cli(*arguments, directory=directory) as process:
        group = Group(process)
        group.until("started")
        group.until("started")
        yield group
        leave_nobody(group)


def leave_nobody(group: Group) -> None:
    for pid in group.pids.values():
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGKILL)


@contextmanager
def held_pipe(group: Group) -> Iterator[None]:
    """Hold the supervisor's end of the pipe to its members as well."""
    command = psutil.Process(group.pids[1]).cmdline()
    read = int(command[command.index("--parent-pipe") + 1])
    of_supervisor = Path(f"/proc/{group.process.pid}/fd")
    pipe = (of_supervisor / str(read)).readlink()
    (written,) = [each for each in of_supervisor.iterdir() if each.readlink() == pipe and each.name != str(read)]
    held = os.open(written, os.O_WRONLY)
    try:
        yield
    finally:
        os.close(held)


def wait_until_blocked(group: Group, directory: Path) -> None:
    """Both members listen to signals by then, and user code keeps the loop from doing anything about them."""
    group.until("process_started", process=1)
    group.until("process_started", process=2)
    while not all((directory / f"blocked-{pid}").exists() for pid in group.pids.values()):
        os.sched_yield()


def wait_until_gone(pid: int) -> None:
    """The test's own time limit ends it."""
    try:
        psutil.Process(pid).wait(timeout=60)
    except psutil.NoSuchProcess:
        pass


def test_a_member_that_is_killed_comes_back(group: Group) -> None:
    """Nobody is paged for one process."""
    killed = group.pids[1]
    os.kill(killed, signal.SIGKILL)

    ended = group.until("process_ended", process=1)
    group.until("started", process=1)

    assert ended["code"] == -signal.SIGKILL
    assert group.pids[1] != killed
    assert psutil.pid_exists(group.pids[2])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_member_and_all_end_in_order(group: Group, number: signal.Signals) -> None:
    """A deployment stops one process and means all."""
    group.process.send(number)

    assert group.process.ended() == 0
    assert not any(psutil.pid_exists(pid) for pid in group.pids.values())


def test_members_leave_when_their_supervisor_is_killed(group: Group) -> None:
    """Nobody would be there to stop them: they would run an old version for ever."""
    members = list(group.pids.values())
    assert all(psutil.pid_exists(pid) for pid in members)

    group.process.send(signal.SIGKILL)

    for pid in members:
        wait_until_gone(pid)


def test_it_is_the_end_of_the_pipe_that_members_leave_at(group: Group) -> None:
    """The negative control: while somebody else holds the other end, they do not notice that nobody supervises them."""
    members = list(group.pids.values())
    with held_pipe(group):
        group.process.send(signal.SIGKILL)
        with pytest.raises(psutil.TimeoutExpired):
            psutil.Process(members[0]).wait(timeout=3)

    for pid in members:
        wait_until_gone(pid)


def test_a_blocked_member_leaves_as_well_when_its_supervisor_is_killed(directory: Path) -> None:
    """User code that blocks the loop must not make an orphan that lives for ever."""
    (directory / "blocks").touch()
    with running_cli("run", "all", "--app", "shop:cqrs", "--json", "--processes", "2", directory=directory) as process:
        group = Group(process)
        wait_until_blocked(group, directory)

        process.send(signal.SIGKILL)

        for pid in group.pids.values():
            wait_until_gone(pid)


def test_a_second_signal_leaves_at_once_with_every_member(directory: Path) -> None:
    """Somebody is in a hurry, and what was in flight is done again anyway."""
    (directory / "blocks").touch()
    with running_cli("run", "all", "--app", "shop:cqrs", "--json", "--processes", "2", directory=directory) as process:
        group = Group(process)
        wait_until_blocked(group, directory)
        process.send(signal.SIGTERM)
        group.until("stopping")
        process.send(signal.SIGTERM)

        assert process.ended() == 143
        for pid in group.pids.values():
            wait_until_gone(pid)


def test_a_member_that_does_not_stop_is_killed_after_the_limit(directory: Path) -> None:
    """A supervisor that waits for ever is killed itself, and leaves orphans."""
    (directory / "blocks").touch()
    with running_cli("run", "all", "--app", "shop:cqrs", "--json", "--processes", "2", directory=directory) as process:
        group = Group(process)
        wait_until_blocked(group, directory)
        process.send(signal.SIGTERM)
        group.until("process_killed")

        assert process.ended() == 137


@pytest.mark.parametrize("arguments", [(), ("--log-format", "json")], ids=["text", "json"])
def test_what_happens_to_processes_stands_in_the_log(directory: Path, arguments: tuple[str, ...]) -> None:
    """As it is run in production: without `--json`, its output not a terminal."""
    with running_cli(
        "run", "all", "--app", "shop:cqrs", "--processes", "2", *arguments, directory=directory
    ) as process:
        process.until_error("run_process_started")
        process.until_error("run_started")
        process.send(signal.SIGTERM)

        assert process.ended() == 0
    [first, second] = [line for line in process.errors if "run_process_started" in line]
    assert "process_number" in first
    assert "process_number" in second
    assert "Traceback" not in "".join(process.errors)


def test_health_is_answered_for_all(group: Group) -> None:
    """A probe knows one address."""
    status, live = group.asked("/live")
    assert (status, live["status"], set(live["processes"])) == (200, "live", {"1", "2"})
    while group.asked("/ready")[0] != 200:
        pass
    os.kill(group.pids[2], signal.SIGKILL)
    group.until("process_ended", process=2)

    assert group.asked("/ready")[0] == 503
    assert group.asked("/live")[0] == 200


def test_a_member_that_is_configured_wrongly_stops_the_group(directory: Path) -> None:
    """Starting it again cannot help."""
    arguments = ("run", "all", "--app", "shop:cqrs", "--json", "--processes", "2")
    with running_cli(*arguments, directory=directory, CQRS_DECOR_REPLAY_HORIZON_DAYS="90") as process:
        while "process_refused" not in process.next_line():
            pass  # the members' own documents, which say what is wrong

        assert process.ended() == 2


def test_processes_that_could_share_nothing_are_refused(directory: Path) -> None:
    """Each would have an outbox of its own in memory."""
    app = directory / "shop.py"
    app.write_text(
        app.read_text().replace('database="sqlite+aiosqlite:///shop.db", ', "").replace("session: AsyncSession", "")
    )
    with running_cli("run", "all", "--app", "shop:cqrs", "--processes", "2", directory=directory) as process:
        assert process.ended() == 2

    assert "cannot share memory://" in "".join(process.errors)
