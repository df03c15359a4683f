"""Handlers, plugins, topics and tables."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import typer

from cqrs_decor import App
from tests.unit.cli import sample
from tests.unit.cli.conftest import Cli

pytestmark = pytest.mark.feature("U2")

# --- handlers ---------------------------------------------------------------------------------------------------------


def test_handlers_are_listed_with_what_they_handle(cli: Cli) -> None:
    """Which function runs for this message, and where is it?"""
    handlers = {each["handler"]: each for each in cli("handlers", "--json").document["handlers"]}

    invoice = handlers["write_invoice"]
    assert invoice["kind"] == "integration event"
    assert invoice["message"] == "sample.order-placed"
    assert invoice["topic"] == "sample-orders"
    assert invoice["consumer"] == "sample.write_invoice"
    assert invoice["stages"] == ["transaction", "inbox"]
    assert "sample.py:" in invoice["place"]
    assert handlers["place_order"]["consumer"] is None
    assert "source" not in invoice


def test_the_compiled_call_is_shown_on_request(cli: Cli) -> None:
    """It is what runs, so it is what is read when something runs otherwise than expected."""
    outcome = cli("handlers", "--source")

    assert outcome.code == 0
    assert "async def call(message, context):" in outcome.out


def test_handlers_with_faults_are_listed_and_fail(cli: Cli, app_with: Callable[..., App]) -> None:
    """The list is where the fault is looked for."""
    app_with(registry=sample.faulty)

    outcome = cli("handlers")

    assert outcome.code == 1
    assert "place_order_late" in outcome.out
    assert "CD104" in outcome.out


def test_the_source_of_faulty_handlers_is_a_numbered_page_of_errors(cli: Cli, app_with: Callable[..., App]) -> None:
    """They cannot be compiled."""
    app_with(registry=sample.faulty)

    outcome = cli("handlers", "--source")

    assert outcome.code == 2
    assert outcome.err.startswith("The app cannot start: 2 problems.\n\n1.  CD102")
    assert "\n2.  CD104" in outcome.err


# --- plugins ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Named:
    name: str = "cqrs-decor-acme"
    version: str = "1.2"


@dataclass(frozen=True)
class Point:
    """An entry point that gives what it is told, or raises it."""

    name: str
    group: str
    gives: Any = None
    value: str = "acme:Thing"
    dist: Named | None = Named()

    @property
    def module(self) -> str:
        return "acme"

    def load(self) -> Any:
        if isinstance(self.gives, Exception):
            raise self.gives
        return self.gives


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[Point]:
    """What is installed, for the command line."""
    points: list[Point] = []

    def find(group: str) -> list[Point]:
        return [point for point in points if point.group == group]

    monkeypatch.setattr("cqrs_decor.cli.plugins.installed", find)
    monkeypatch.setattr("cqrs_decor.cli.program.installed", find)
    monkeypatch.setattr("cqrs_decor.cli.program.load_plugin", lambda group, name: find(group)[0].load())
    return points


def test_installed_plugins_are_listed_and_tried(cli: Cli) -> None:
    """Those that come with the library are there in any case."""
    plugins = cli("plugins", "--json").document["plugins"]

    memory = next(each for each in plugins if (each["kind"], each["name"]) == ("store", "memory"))
    assert memory["state"] == "loads"
    assert memory["distribution"] == "cqrs-decor"


def test_a_broken_plugin_is_shown_with_its_reason(cli: Cli, installed: list[Point]) -> None:
    """It must never be skipped in silence."""
    installed += [
        Point("kafka", "cqrs_decor.brokers"),
        Point("acme", "cqrs_decor.observers", ImportError("no acme here")),
    ]

    outcome = cli("plugins")

    assert outcome.code == 1
    assert "broken" in outcome.out
    assert "ImportError: no acme here" in outcome.out
    assert "kafka" in outcome.out


def test_two_plugins_of_one_name_are_in_conflict(cli: Cli, installed: list[Point]) -> None:
    """The loader refuses to choose, so the list says so beforehand."""
    installed += [
        Point("kafka", "cqrs_decor.brokers"),
        Point("kafka", "cqrs_decor.brokers", dist=Named("cqrs-decor-other")),
    ]

    assert [each["state"] for each in cli("plugins", "--json").document["plugins"]] == ["conflict", "conflict"]


def test_a_plugin_may_bring_a_verb(cli: Cli, installed: list[Point]) -> None:
    """A function is enough; a `typer.Typer` has verbs of its own."""
    group = typer.Typer()

    @group.command("one")
    def one() -> int:
        return 5

    @group.command("two")
    def two() -> None:
        """Nothing."""

    def greet(name: str) -> None:
        """Say hello."""
        print(f"hello {name}")

    installed += [Point("greet", "cqrs_decor.commands", greet)]
    assert cli("greet", "ada").out == "hello ada\n"
    assert "Say hello." in cli("--help").out

    installed[:] = [Point("acme", "cqrs_decor.commands", group)]
    assert cli("acme", "one").code == 5


def test_a_verb_that_cannot_be_loaded_spoils_no_other(
    cli: Cli, installed: list[Point], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The help must stay readable, and the verb itself must say what is wrong."""
    from cqrs_decor.discovery import load_plugin

    installed += [Point("acme", "cqrs_decor.commands", ImportError("no acme here"))]
    monkeypatch.setattr(
        "cqrs_decor.cli.program.load_plugin", lambda group, name: load_plugin(group, name, lambda _: installed)
    )

    assert cli("handlers").code == 0
    assert cli("--help").code == 0
    outcome = cli("acme")
    assert outcome.code == 2
    assert "CD702" in outcome.err
    assert "no acme here" in outcome.err


# --- topics -----------------------------------------------------------------------------------------------------------


def test_the_plan_says_which_topics_are_missing_and_what_for(cli: Cli, app_with: Callable[..., App]) -> None:
    """Read ones stop a start-up, written ones do not."""
    broker = sample.StrictBroker()
    app_with(broker=broker)
    broker.made.append("sample-payments")

    outcome = cli("topics", "plan", "--topic", "sample-orders", "--topic", "sample-payments", "--json")

    assert outcome.document["topics"] == [
        {"topic": "sample-orders", "state": "missing", "use": "read", "compacted": "no"},
        {"topic": "sample-payments", "state": "there", "use": "written", "compacted": "no"},
    ]
    assert broker.made == ["sample-payments"]


def test_create_makes_what_is_missing_and_only_that(cli: Cli, app_with: Callable[..., App]) -> None:
    """It runs in every deployment, mostly with nothing to do."""
    broker = sample.StrictBroker()
    app_with(broker=broker)

    first = cli("topics", "create", "--topic", "sample-orders")
    second = cli("topics", "create", "--topic", "sample-orders")

    assert first.out == "Created sample-orders; 0 topics there before.\n"
    assert second.out == "Created none; 1 topic there before.\n"
    assert broker.made == ["sample-orders"]


def test_an_unknown_topic_is_refused_with_a_suggestion(cli: Cli) -> None:
    """A misspelt topic would be created and never read."""
    outcome = cli("topics", "create", "--topic", "sample-order")

    assert outcome.code == 2
    assert "Did you mean 'sample-orders'?" in outcome.err


def test_topics_of_a_faulty_app_are_not_guessed(cli: Cli, app_with: Callable[..., App]) -> None:
    """Half the topics would look like all of them."""
    app_with(registry=sample.faulty)

    assert cli("topics", "plan").code == 2


# --- tables -----------------------------------------------------------------------------------------------------------


def test_the_plan_prints_sql_and_nothing_else(cli: Cli, app_with: Callable[..., App]) -> None:
    """It is piped into a migration."""
    app_with(database=sample.StoreWithTables())

    outcome = cli("db", "plan")

    assert outcome.code == 0
    assert outcome.out == "CREATE TABLE outbox (id INTEGER);\n\n"
    assert outcome.err == ""


def test_check_upgrade_and_check_again(cli: Cli, app_with: Callable[..., App]) -> None:
    """The exit code of the check is what a deployment waits for."""
    app_with(database=sample.StoreWithTables())

    before, upgrade, after, nothing = cli("db", "check"), cli("db", "upgrade"), cli("db", "check"), cli("db", "plan")

    assert (before.code, upgrade.code, after.code) == (1, 0, 0)
    assert "CD403" in before.out
    assert upgrade.out == "1 statement run in memory://.\n"
    assert nothing.out == ""
    assert "Nothing to do" in nothing.err


def test_tables_are_mended_although_handlers_are_faulty(cli: Cli, app_with: Callable[..., App]) -> None:
    """A migration does not depend on them."""
    app_with(database=sample.StoreWithTables(), registry=sample.faulty)

    assert cli("db", "upgrade").code == 0


def test_a_store_without_tables_says_so(cli: Cli) -> None:
    """Nothing would look like success."""
    outcome = cli("db", "upgrade")

    assert outcome.code == 2
    assert "CD706" in outcome.err
