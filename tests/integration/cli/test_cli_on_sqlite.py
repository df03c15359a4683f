"""The command line on an app with a database file: other processes, real signals, real rows."""

import json
import os
import pty
import re
import select
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.cli.processes import running_cli

_APP = """
from pathlib import Path

import anyio
from sqlalchemy.ext.asyncio import AsyncSession
from cqrs_decor import Command, IntegrationEvent, Park, Registry, bootstrap, emit

registry = Registry("shop")

class PlaceOrder(Command[None]):
    sku: str

class OrderPlaced(IntegrationEvent, topic="orders", key="sku", name="shop.order-placed"):
    sku: str

@registry.command_handler
async def place_order(command: PlaceOrder, session: AsyncSession) -> None:
    emit(OrderPlaced(sku=command.sku))

@registry.event_handler
async def write_invoice(event: OrderPlaced, session: AsyncSession) -> None:
    if event.sku == "bad":
        raise Park("no such article")
    if event.sku == "slow":
        Path("began").touch()
        while not Path("release").exists():
            await anyio.sleep(0.02)
    with Path("invoices").open("a") as file:
        file.write(event.sku + "\\n")

cqrs = bootstrap(registry=registry, discover=False, database="sqlite+aiosqlite:///shop.db", service="shop")
"""
_PLACE = """
import sys
import anyio
import shop
async def place():
    async with shop.cqrs:
        for sku in sys.argv[1:]:
            await shop.cqrs.send(shop.PlaceOrder(sku=sku))
anyio.run(place)
"""


class Shop:
    """A directory with the app in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "shop.py").write_text(_APP)

    def place(self, *skus: str) -> None:
        """Send commands in a process that has no loops."""
        subprocess.run([sys.executable, "-c", _PLACE, *skus], cwd=self.directory, check=True)

    def cli(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "cqrs_decor", *arguments],
            cwd=self.directory,
            env={**os.environ, "CQRS_DECOR_APP": "shop:cqrs", **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def asks(self, *arguments: str) -> Any:
        return json.loads(self.cli(*arguments, "--json").stdout)

    def invoices(self) -> list[str]:
        path = self.directory / "invoices"
        return path.read_text().split() if path.exists() else []


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def run_until(shop: Shop, **status: int) -> None:
    """Relay and work until the status has these numbers, then stop."""
    arguments = ("run", "all", "--app", "shop:cqrs", "--json", "--status-every-s", "0.1")
    with running_cli(*arguments, directory=shop.directory) as process:
        while not status.items() <= process.until("running").items():
            pass
        process.send(signal.SIGTERM)
        assert process.ended() == 0


def test_what_one_process_emits_another_one_handles(shop: Shop) -> None:
    """The loops need not run where commands are sent."""
    shop.place("tea", "milk")
    assert shop.asks("outbox", "list")["pending"] == 2

    run_until(shop, handled=2)

    assert sorted(shop.invoices()) == ["milk", "tea"]
    assert shop.asks("outbox", "list")["pending"] == 0


def test_sigterm_lets_a_running_handler_finish(shop: Shop) -> None:
    """Nothing is cut off, nothing is parked, and what was done is on record."""
    shop.place("slow")
    with running_cli("run", "all", "--app", "shop:cqrs", "--json", directory=shop.directory) as process:
        process.until("started")
        wait_for(shop.directory / "began")
        process.send(signal.SIGTERM)
        process.until("stopping")
        assert process.alive
        (shop.directory / "release").touch()
        process.until("stopped")

        assert process.ended() == 0

    assert shop.invoices() == ["slow"]
    assert shop.asks("inbox", "list")["parked"] == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_leaves_a_running_handler_to_the_next_process(
    shop: Shop, number: signal.Signals, code: int
) -> None:
    """As after a kill: not acknowledged, so it is done again, and once."""
    shop.place("slow")
    with running_cli("run", "all", "--app", "shop:cqrs", "--json", directory=shop.directory) as process:
        wait_for(shop.directory / "began")
        process.send(number)
        process.until("stopping")
        process.send(number)

        assert process.ended() == code

    assert shop.invoices() == []
    (shop.directory / "release").touch()
    run_until(shop, handled=1)
    assert shop.invoices() == ["slow"]


def wait_for(path: Path) -> None:
    """Until a file is there; the test's own time limit ends it."""
    while not path.exists():
        os.sched_yield()


def test_a_parked_message_is_found_shown_and_discarded_from_outside(shop: Shop) -> None:
    """Without the loops, and with a record of who did it."""
    shop.place("bad", "tea")
    run_until(shop, parked=1, handled=1)

    [parked] = shop.asks("inbox", "list", "--consumer", "shop.write_invoice")["messages"]
    assert "no such article" in parked["error"]
    assert "body" not in parked
    [shown] = shop.asks("inbox", "show", str(parked["id"]), "--body")["messages"]
    assert shown["body"] == {"sku": "bad"}
    discarded = shop.asks("inbox", "discard", "--topic", "orders", "--yes", "--who", "ada")
    assert discarded["changed"] == 1
    assert shop.asks("inbox", "list")["parked"] == 0
    assert _operator_log(shop) == [("ada", "discard", "inbox", parked["id"])]


def _operator_log(shop: Shop) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(shop.directory / "shop.db")
    try:
        return connection.execute("SELECT who, action, kind, record_id FROM cqrs_operator_log").fetchall()
    finally:
        connection.close()


def test_the_worker_carries_out_a_retry(shop: Shop) -> None:
    """The request is a row: the worker may be on another machine."""
    shop.place("bad")
    run_until(shop, parked=1)
    app = shop.directory / "shop.py"
    app.write_text(app.read_text().replace('if event.sku == "bad"', "if False"))

    assert shop.asks("inbox", "retry", "--all", "--yes")["changed"] == 1
    run_until(shop, handled=1, parked=0)

    assert shop.invoices() == ["bad"]


def test_the_plan_makes_the_tables_that_the_check_wants(shop: Shop) -> None:
    """It is what teams put into their own migrations."""
    assert shop.cli("db", "check").returncode == 1
    sql = shop.cli("db", "plan").stdout
    connection = sqlite3.connect(shop.directory / "shop.db")
    connection.executescript(sql)
    connection.close()

    assert shop.cli("db", "check").returncode == 0
    assert shop.cli("db", "plan").stdout == ""
    assert shop.cli("doctor").returncode == 0


@pytest.mark.parametrize(
    "arguments",
    [("run", "all"), ("outbox", "list"), ("inbox", "list"), ("db", "plan"), ("db", "upgrade"), ("topics", "plan")],
    ids=" ".join,
)
def test_an_unreachable_database_is_told_apart_and_its_password_kept(shop: Shop, arguments: tuple[str, ...]) -> None:
    """3: starting again may help. And logs are read by many."""
    app = shop.directory / "shop.py"
    url = "postgresql+asyncpg://ada:hunter2@127.0.0.1:9/shop?password=hunter3"
    app.write_text(app.read_text().replace("sqlite+aiosqlite:///shop.db", url))

    for form in ((), ("--json",)):
        done = shop.cli(*arguments, *form)

        assert done.returncode == 3, done.stderr
        assert "cannot be reached" in done.stdout + done.stderr
        assert "hunter" not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


def test_the_doctor_finds_an_unreachable_database(shop: Shop) -> None:
    """That is an answer to what it was asked, so it is a finding."""
    url = "postgresql+asyncpg://ada:hunter2@127.0.0.1:9/shop"
    app = shop.directory / "shop.py"
    app.write_text(app.read_text().replace("sqlite+aiosqlite:///shop.db", url))

    done = shop.cli("doctor")

    assert done.returncode == 1
    assert "CD401" in done.stdout
    assert "hunter2" not in done.stdout + done.stderr


def test_the_doctor_sees_whether_a_relay_is_at_work(shop: Shop) -> None:
    """Everything is wired and reachable, and no event leaves."""
    shop.place("tea")
    assert ("relays", "CD716") in complaints(shop)

    with running_cli(
        "run", "relay", "--app", "shop:cqrs", "--json", "--status-every-s", "0.1", directory=shop.directory
    ) as process:
        while process.until("running")["lanes_held"] != 32:
            pass

        assert not any(subject == "relays" for subject, _ in complaints(shop))


def complaints(shop: Shop) -> set[tuple[str, str]]:
    findings = shop.asks("doctor")["findings"]
    return {(finding["subject"], finding["code"]) for finding in findings if finding["severity"] != "ok"}


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Both ends of a pseudo-terminal."""
    ours, theirs = pty.openpty()
    yield ours, theirs
    os.close(ours)


def test_a_terminal_has_a_status_line_below_the_log(shop: Shop, terminal: tuple[int, int]) -> None:
    """Somebody is looking: what happens is seen as it happens."""
    ours, theirs = terminal
    process = subprocess.Popen(
        [sys.executable, "-m", "cqrs_decor", "run", "all", "--app", "shop:cqrs"],
        cwd=shop.directory,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    try:
        seen = _read_until(ours, r"lanes 32/32")
        process.send_signal(signal.SIGINT)
        seen += _read_until(ours, r"stopped")

        assert process.wait(timeout=60) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()

    assert re.search(r"published \d+/s  handled \d+/s  pending 0  parked 0", seen)
    assert "\x1b[?25h" in seen, "the cursor is shown again"


def _read_until(terminal: int, pattern: str) -> str:
    seen = ""
    while not re.search(pattern, seen):
        ready, _, _ = select.select([terminal], [], [], 60)
        assert ready, seen
        seen += os.read(terminal, 65536).decode(errors="replace")
    return seen
