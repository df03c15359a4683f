"""`run` as a real process: what it tells, and how it leaves."""

import json
import signal
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.unit.cli.processes import running_cli

_APP = """
import logging
from cqrs_decor import Registry, bootstrap
cqrs = bootstrap(registry=Registry("shop"), discover=False, service="shop")
"""
_LOUD = """
logging.basicConfig(format="own %(message)s", level=logging.INFO)
"""
_STARTS_FOR_EVER = """
import sys
import anyio
from cqrs_decor import Registry, bootstrap
async def wait():
    print("waiting", file=sys.stdout, flush=True)
    await anyio.sleep_forever()
cqrs = bootstrap(registry=Registry("shop"), discover=False, on_startup=[wait])
"""
_BLOCKS_FOR_EVER = """
import threading
from cqrs_decor import Registry, bootstrap
async def block():
    print("blocking", flush=True)
    threading.Event().wait()
cqrs = bootstrap(registry=Registry("shop"), discover=False, on_startup=[block])
"""
_HOOK_FAILS = """
from cqrs_decor import Registry, bootstrap
async def connect():
    raise ConnectionError("the cache is away")
cqrs = bootstrap(registry=Registry("shop"), discover=False, on_startup=[connect])
"""


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    (tmp_path / "shop.py").write_text(_APP)
    return tmp_path


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("loops", ["relay", "worker", "all"])
def test_the_first_signal_ends_it_with_success(shop: Path, loops: str, number: signal.Signals) -> None:
    """Supervisors take anything else for a crash."""
    with running_cli("run", loops, "--app", "shop:cqrs", "--json", directory=shop) as process:
        started = process.until("started")
        process.send(number)
        process.until("stopping")
        process.until("stopped")

        assert process.ended() == 0

    assert started["loops"] == loops
    assert started["service"] == "shop"


def test_the_status_is_told_in_json_lines(shop: Path) -> None:
    """What a program watches has numbers."""
    with running_cli(
        "run", "all", "--app", "shop:cqrs", "--json", "--status-every-s", "0.1", directory=shop
    ) as process:
        while process.until("running")["lanes_held"] != 32:
            pass
        status = process.until("running")

    assert status["lanes"] == 32
    assert {"published", "handled", "published_per_s", "handled_per_s", "pending", "parked", "lag_s"} <= status.keys()


@pytest.mark.parametrize("named", ["option", "variable"])
def test_health_is_answered_over_http(shop: Path, named: str) -> None:
    """From the option, or from the environment as everything else; the address that was had is told."""
    arguments = ("--health-port", "0") if named == "option" else ()
    environment = {} if named == "option" else {"CQRS_DECOR_HEALTH_PORT": "0"}
    with running_cli(
        "run", "all", "--app", "shop:cqrs", "--json", *arguments, directory=shop, **environment
    ) as process:
        address = process.until("started")["health"]
        with urllib.request.urlopen(f"http://{address}/live", timeout=30) as answer:
            live = json.load(answer)
        while not is_ready(address):
            pass
        process.send(signal.SIGTERM)

        assert process.ended() == 0

    assert live["status"] == "live"
    assert live["service"] == "shop"


def is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/ready", timeout=30) as answer:
            return answer.status == 200
    except urllib.error.HTTPError:
        return False


def test_log_lines_can_be_json(shop: Path) -> None:
    """Log collectors want an object a line; standard output stays empty for them."""
    with running_cli("run", "all", "--app", "shop:cqrs", "--log-format", "json", directory=shop) as process:
        process.until_error('"action":"run_started"')
        process.send(signal.SIGTERM)

        assert process.ended() == 0

    documents = [json.loads(line) for line in process.errors]
    assert [d["action"] for d in documents if d["action"].startswith("run_")] == [
        "run_started",
        "run_stopping",
        "run_stopped",
    ]
    assert documents[0]["level"] == "info"


def test_the_log_level_is_followed(shop: Path) -> None:
    """At `error` a quiet start says nothing."""
    with running_cli("run", "all", "--app", "shop:cqrs", "--log-level", "error", "--json", directory=shop) as process:
        process.until("started")
        process.send(signal.SIGTERM)

        assert process.ended() == 0

    assert process.errors == []


def test_logging_that_the_app_has_set_up_stays(shop: Path) -> None:
    """Its own module knows best where its logs go."""
    (shop / "shop.py").write_text(_APP + _LOUD)
    with running_cli("run", "all", "--app", "shop:cqrs", directory=shop) as process:
        process.until_error("own running")
        process.send(signal.SIGTERM)

        assert process.ended() == 0


def test_a_signal_while_it_starts_ends_it_too(shop: Path) -> None:
    """A broker that does not answer must not make a deployment wait."""
    (shop / "shop.py").write_text(_STARTS_FOR_EVER)
    with running_cli("run", "all", "--app", "shop:cqrs", directory=shop) as process:
        assert process.next_line() == "waiting\n"
        process.send(signal.SIGTERM)

        assert process.ended() == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_second_signal_leaves_at_once_though_the_loop_is_blocked(
    shop: Path, number: signal.Signals, code: int
) -> None:
    """That is when somebody sends a second one."""
    (shop / "shop.py").write_text(_BLOCKS_FOR_EVER)
    with running_cli("run", "all", "--app", "shop:cqrs", directory=shop) as process:
        assert process.next_line() == "blocking\n"
        process.send(number)
        assert process.alive
        while process.alive:
            process.send(number)

        assert process.ended() == code

    assert "left at once after a second signal" in "".join(process.errors)


def test_what_a_hook_raises_is_shown_whole_and_ends_it_with_70(shop: Path) -> None:
    """It is the user's own code, so its lines are what helps."""
    (shop / "shop.py").write_text(_HOOK_FAILS)
    with running_cli("run", "all", "--app", "shop:cqrs", directory=shop) as process:
        assert process.ended() == 70

    shown = "".join(process.errors)
    assert "ConnectionError: the cache is away" in shown
    assert "shop.py" in shown
    assert "typer" not in shown
