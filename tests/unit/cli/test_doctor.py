"""What the doctor looks at, and how it says it."""

from collections.abc import Callable
from typing import Any

import anyio
import pytest

from cqrs_decor import App, Finding, Settings
from cqrs_decor.memory import MemoryStore
from tests.unit.cli import sample
from tests.unit.cli.conftest import Cli, Outcome


def findings(outcome: Outcome, subject: str) -> list[dict[str, Any]]:
    return [finding for finding in outcome.document["findings"] if finding["subject"] == subject]


def test_a_sound_app_is_found_sound(cli: Cli) -> None:
    """Warnings alone are no failure: a first app is in memory."""
    outcome = cli("doctor")

    assert outcome.code == 0
    assert "4 handlers, everything they ask for is there" in outcome.out
    assert "0 errors, 2 warnings" in outcome.out


def test_every_fault_of_the_handlers_is_listed(cli: Cli, app_with: Callable[..., App]) -> None:
    """One at a time would take as many runs as there are faults."""
    app_with(registry=sample.faulty)

    outcome = cli("doctor", "--json")

    assert outcome.code == 1
    assert {finding["code"] for finding in findings(outcome, "handlers")} == {"CD102", "CD104"}
    assert outcome.document["summary"]["error"] == 2


def test_settings_say_where_they_come_from(
    cli: Cli, app_with: Callable[..., App], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The usual mistake is a variable in the wrong deployment."""
    monkeypatch.setenv("CQRS_DECOR_RELAY_BATCH", "50")
    app_with(settings=Settings(lease_s=30))

    settings = {setting["name"]: setting for setting in cli("doctor", "--json").document["settings"]}

    assert settings["relay_batch"] == {"name": "relay_batch", "value": "50", "source": "CQRS_DECOR_RELAY_BATCH"}
    assert settings["lease_s"]["source"] == "given"
    assert settings["service"] == {"name": "service", "value": "sample", "source": "given"}
    assert settings["drain_limit_s"]["source"] == "default"
    assert settings["database"] == {"name": "database", "value": "memory://", "source": "default"}


@pytest.mark.parametrize("url", ["nosuch://user:hunter2@host/shop", "nosuch://user:hun/ter2?x@host", "hunter2"])
@pytest.mark.parametrize("part", ["database", "broker"])
def test_a_url_that_cannot_be_used_is_not_shown(cli: Cli, app_with: Callable[..., App], part: str, url: str) -> None:
    """Nobody knows which part of it is the password."""
    app_with(**{part: url})

    for outcome in (cli("doctor"), cli("doctor", "--json"), cli("run", "all"), cli("outbox", "list")):
        assert "hun" not in outcome.out + outcome.err
    assert "(cannot be used; not shown)" in cli("doctor").out


def test_missing_tables_are_an_error_and_said_once(cli: Cli, app_with: Callable[..., App]) -> None:
    """The store's own check may have found the same."""
    app_with(database=sample.StoreWithTables())

    outcome = cli("doctor", "--json")

    assert outcome.code == 1
    assert [finding["code"] for finding in findings(outcome, "database")].count("CD403") == 1


def test_a_missing_topic_is_an_error_only_where_it_is_read(cli: Cli, app_with: Callable[..., App]) -> None:
    """The app does not start without what it reads; what it may write can be another deployment's to make."""
    app_with(broker=sample.StrictBroker())

    outcome = cli("doctor", "--json")

    topics = {f["problem"]: f["severity"] for f in findings(outcome, "broker") if f["code"] == "CD503"}
    assert topics["Topic sample-orders is missing."] == "error"
    assert topics["Topic sample-payments is missing."] == "warning"


def test_a_part_that_does_not_answer_is_reported(cli: Cli, app_with: Callable[..., App]) -> None:
    """A firewall that drops packets would keep the doctor waiting for ever."""

    class Silent(MemoryStore):
        async def check(self) -> list[Finding]:
            await anyio.sleep_forever()
            return []

    app_with(database=Silent())

    outcome = cli("doctor", "--timeout-s", "0.1", "--json")

    assert outcome.code == 1
    assert "did not answer within 0.1 s" in findings(outcome, "database")[0]["problem"]


def test_what_a_crash_may_lose_is_read_from_the_cards(cli: Cli, app_with: Callable[..., App]) -> None:
    """Lossy parts are fine for a first start, and must be seen before production."""
    app_with(broker=sample.StrictBroker())

    outcome = cli("doctor")

    assert "memory:// keeps nothing over the end of the process" in outcome.out
    assert "a crash may repeat: what was not acknowledged" in outcome.out


def test_settings_that_contradict_each_other_are_listed(cli: Cli, app_with: Callable[..., App]) -> None:
    """Before a start that would be refused for them."""
    app_with(settings=Settings(replay_horizon_days=60, lease_s=5, publish_timeout_s=20))

    outcome = cli("doctor", "--json")

    assert outcome.code == 1
    assert [finding["severity"] for finding in findings(outcome, "settings")] == ["error", "error"]


def test_a_pool_that_is_too_small_for_the_loops_is_a_warning_where_they_do_not_run(
    cli: Cli, app_with: Callable[..., App]
) -> None:
    """The web process that the doctor is asked about may need no more; the worker with the same settings does."""

    class Pooled(MemoryStore):
        connections = 8

    app_with(database=Pooled(), run="none")

    [finding] = findings(cli("doctor", "--json"), "settings")

    assert finding["severity"] == "warning"
    assert "want 10 connections, and memory:// has 8 at most" in finding["problem"]
