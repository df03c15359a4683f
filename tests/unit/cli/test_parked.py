"""Changing what an operator selects: by every filter, in parts, to be gone on with, and never in a circle."""

import json
import os
import signal
from collections.abc import Callable
from datetime import timedelta

import pytest

from cqrs_decor import App
from cqrs_decor.cli import parked
from cqrs_decor.cli.ages import parsed_age
from cqrs_decor.cli.errors import CommandLineError
from cqrs_decor.clock import SystemClock
from cqrs_decor.store import Retention
from tests.unit.cli.conftest import Cli
from tests.unit.cli.desk import Desk, message, record

pytestmark = pytest.mark.feature("B5")


@pytest.fixture
def desk(app_with: Callable[..., App]) -> Desk:
    desk = Desk()
    app_with(database=desk)
    return desk


@pytest.mark.parametrize(
    ("filters", "ids"),
    [
        (("--all",), [1, 2, 3, 4]),
        (("--topic", "payments"), [2]),
        (("--key", "7"), [3]),
        (("--error", "TooLarge"), [1, 2, 3]),
        (("--error", "refused"), [4]),
        (("--older-than", "90m"), [2, 3]),
        (("--all", "--after", "2"), [3, 4]),
        (("--topic", "orders", "--older-than", "90m"), [3]),
    ],
    ids=str,
)
def test_every_filter_narrows_a_retry(cli: Cli, desk: Desk, filters: tuple[str, ...], ids: list[int]) -> None:
    """What failed for one reason is retried when that reason is gone, and nothing else is touched."""
    old = timedelta(hours=2)
    desk.desk_outbox.records = [
        record(1),
        record(2, topic="payments", age=old),
        record(3, key="7", age=old),
        record(4, error="RecordRejectedError: refused"),
        record(5, "pending"),
        record(6, "rescheduled"),
    ]

    outcome = cli("outbox", "retry", *filters, "--yes", "--who", "ada", "--json")

    assert outcome.code == 0
    assert outcome.document["changed"] == len(ids)
    assert desk.desk_outbox.calls == [("retry", tuple(ids), "ada")]


@pytest.mark.parametrize("verb", ["retry", "replay"])
def test_the_inbox_is_retried_oldest_first_without_what_is_held_or_asked_for(cli: Cli, desk: Desk, verb: str) -> None:
    """Held ones follow by themselves: retried on their own they would overtake the one that they wait for."""
    desk.desk_inbox.messages = [
        message(1),
        message(2, held=True),
        message(3, retry_requested=True),
        message(4, consumer="sample.ship"),
        message(5),
    ]

    outcome = cli("inbox", verb, "--consumer", "sample.bill", "--yes", "--json")

    assert outcome.document["action"] == f"inbox {verb}"
    assert [call[1] for call in desk.desk_inbox.calls] == [(1, 5)]


@pytest.mark.parametrize(
    ("state", "ids"), [("parked", [1]), ("held", [2]), ("retry-requested", [3, 4]), (None, [1, 2, 3, 4])]
)
def test_the_inbox_is_listed_by_state(cli: Cli, desk: Desk, state: str | None, ids: list[int]) -> None:
    """What failed is what somebody has to look at; what is held only waits for it."""
    desk.desk_inbox.messages = [
        message(1),
        message(2, held=True),
        message(3, retry_requested=True),
        message(4, held=True, retry_requested=True),
    ]

    document = cli("inbox", "list", *(("--state", state) if state else ()), "--json").document

    assert [each["id"] for each in document["messages"]] == ids


def test_a_change_goes_in_parts(cli: Cli, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """One transaction over a million rows would hold their locks for minutes."""
    monkeypatch.setattr(parked, "PART", 2)
    desk.desk_outbox.records = [record(number) for number in range(1, 6)]

    cli("outbox", "retry", "--all", "--yes")

    assert [call[1] for call in desk.desk_outbox.calls] == [(1, 2), (3, 4), (5,)]


def test_what_failed_again_too_often_is_left_alone_and_named(cli: Cli, desk: Desk) -> None:
    """A script that retries every hour would else run poison for ever. Who names an id wants it all the same."""
    desk.desk_outbox.records = [record(1, retries=2), record(2, retries=3), record(3, retries=9), record(4)]

    outcome = cli("outbox", "retry", "--all", "--yes")

    assert outcome.out.splitlines()[1] == "Left alone 2, failed again although it was retried 3 times: 2, 3."
    assert desk.desk_outbox.calls[0][1] == (1, 4)
    assert cli("outbox", "retry", "--all", "--yes", "--max-retries", "5").out.startswith("Retried 1 record ")
    assert cli("outbox", "retry", "3").code == 0


def test_replay_publishes_the_history_once_and_not_what_it_wrote_itself(
    cli: Cli, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is replayed is delivered and comes to the end of the history while it is being read."""
    monkeypatch.setattr(parked, "PART", 2)
    desk.desk_outbox.records = [record(number, "delivered") for number in range(1, 6)]

    outcome = cli("outbox", "replay", "--topic", "orders", "--yes", "--json")

    assert outcome.document["changed"] == 5
    assert [call[1] for call in desk.desk_outbox.calls] == [(1, 2), (3, 4), (5,)]


class StoppedClock(SystemClock):
    def elapsed(self) -> float:
        return 0.0


def test_without_the_bound_of_age_a_replay_would_go_in_a_circle(
    cli: Cli, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: with a clock that stands still, what it wrote itself is as old as what it looks for."""
    monkeypatch.setattr(parked, "PART", 2)
    monkeypatch.setattr(parked, "SystemClock", StoppedClock)
    desk.desk_outbox.records = [record(number, "delivered") for number in range(1, 6)]
    replay = desk.desk_outbox.replay

    async def stopped_in_the_end(ids: list[int], *, who: str) -> int:
        if max(ids) > 20:
            os.kill(os.getpid(), signal.SIGINT)
        return await replay(ids, who=who)

    monkeypatch.setattr(desk.desk_outbox, "replay", stopped_in_the_end)

    assert cli("outbox", "replay", "--topic", "orders", "--yes").code == 130


def test_an_interrupted_change_says_where_to_go_on(cli: Cli, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replay is not idempotent: beginning again from the start would publish the first ones twice."""
    monkeypatch.setattr(parked, "PART", 2)
    desk.desk_outbox.records = [record(number, "delivered") for number in range(1, 6)]
    replay = desk.desk_outbox.replay

    async def interrupted(ids: list[int], *, who: str) -> int:
        done = await replay(ids, who=who)
        if 3 in ids:
            os.kill(os.getpid(), signal.SIGINT)
        return done

    monkeypatch.setattr(desk.desk_outbox, "replay", interrupted)

    stopped = cli("outbox", "replay", "--topic", "orders", "--yes")
    assert stopped.code == 130
    assert stopped.out.startswith("Replayed 4 records")
    assert "Go on from there with --after 4." in stopped.err

    rest = cli("outbox", "replay", "--topic", "orders", "--older-than", "1m", "--after", "4", "--yes")
    assert rest.out.startswith("Replayed 1 record ")


@pytest.mark.parametrize(
    ("arguments", "would"),
    [
        (("outbox", "retry", "--all"), "Would retry 2 records. Nothing was changed."),
        (("outbox", "discard", "--all"), "Would discard 2 records. Nothing was changed."),
        (("outbox", "replay", "--all"), "Would replay 1 record. Nothing was changed."),
        (("inbox", "discard", "1", "9"), "Would discard 1 message. Nothing was changed."),
    ],
    ids=str,
)
def test_a_dry_run_changes_nothing_and_asks_nobody(
    cli: Cli, desk: Desk, arguments: tuple[str, ...], would: str
) -> None:
    """The number is seen before anything has happened, in a script as well."""
    desk.desk_outbox.records = [record(1), record(2), record(3, "delivered"), record(4, "pending")]
    desk.desk_inbox.messages = [message(1)]

    outcome = cli(*arguments, "--dry-run")

    assert outcome.code == 0
    assert outcome.out.splitlines()[0] == would
    assert desk.desk_outbox.calls == desk.desk_inbox.calls == []


@pytest.mark.parametrize("verb", ["retry", "discard"])
@pytest.mark.parametrize("kind", ["outbox", "inbox"])
def test_many_are_not_changed_unasked(cli: Cli, desk: Desk, kind: str, verb: str) -> None:
    """A filter may match more than somebody thinks, so it says how many; here nobody can answer."""
    desk.desk_outbox.records = [record(1), record(2)]
    desk.desk_inbox.messages = [message(1), message(2)]

    outcome = cli(kind, verb, "--topic", "orders")

    assert outcome.code == 2
    assert f"{verb.capitalize()} 2 " in outcome.err
    assert "add --yes" in outcome.err
    assert desk.desk_outbox.calls == desk.desk_inbox.calls == []


def test_a_discard_by_filter_means_parked_ones_unless_a_state_is_named(cli: Cli, desk: Desk) -> None:
    """What is rescheduled may yet go through by itself."""
    desk.desk_outbox.records = [record(1), record(2, "rescheduled"), record(3, "pending")]

    assert cli("outbox", "discard", "--all", "--yes", "--json").document["changed"] == 1
    assert cli("outbox", "discard", "--state", "rescheduled", "--yes", "--json").document["changed"] == 1
    refused = cli("outbox", "discard", "--state", "pending", "--yes")

    assert refused.code == 2
    assert "A record that is pending cannot be discarded" in refused.err
    assert [each.id for each in desk.desk_outbox.records] == [3]


def test_a_list_says_where_it_goes_on(cli: Cli, desk: Desk) -> None:
    """Nobody reads a million lines at once."""
    desk.desk_outbox.records = [record(number) for number in range(1, 6)]

    first = cli("outbox", "list", "--limit", "2", "--json").document
    second = cli("outbox", "list", "--limit", "2", "--after", str(first["after"]), "--json").document

    assert [each["id"] for each in first["records"]] == [1, 2]
    assert [each["id"] for each in second["records"]] == [3, 4]
    assert "--after 2" in cli("outbox", "list", "--limit", "2").err


def test_purge_deletes_the_history_in_parts(cli: Cli, desk: Desk) -> None:
    """As the store's own clean-up does, so that it can run beside everything else."""
    desk.kept = 2_500

    outcome = cli("outbox", "purge", "--older-than", "7d", "--yes", "--json")

    assert outcome.document["changed"] == 2_500
    assert desk.cleaned == [Retention(history=timedelta(days=7))] * 4


def test_the_inbox_never_forgets_what_may_come_again(cli: Cli, desk: Desk) -> None:
    """Its effects would happen a second time."""
    for arguments in (("--older-than", "14d"), ("--all",)):
        outcome = cli("inbox", "purge", *arguments, "--yes")
        assert outcome.code == 2
        assert "effects twice" in " ".join(outcome.err.split())
    assert desk.cleaned == []

    assert cli("inbox", "purge", "--older-than", "15d", "--yes").code == 0
    assert desk.cleaned == [Retention(inbox=timedelta(days=15))]


def test_purge_asks_first(cli: Cli, desk: Desk) -> None:
    """It cannot be undone."""
    outcome = cli("outbox", "purge", "--all")

    assert outcome.code == 2
    assert "Delete every delivered record of memory:// from more than 0 hours ago?" in " ".join(outcome.err.split())
    assert cli("outbox", "purge", "--all", "--dry-run").code == 0
    assert desk.cleaned == []


@pytest.mark.parametrize(
    ("text", "age"),
    [
        ("90s", timedelta(seconds=90)),
        ("1h30m", timedelta(minutes=90)),
        (" 7D ", timedelta(days=7)),
        ("1.5h", timedelta(minutes=90)),
        ("2w", timedelta(days=14)),
    ],
)
def test_ages_are_written_as_people_say_them(text: str, age: timedelta) -> None:
    """Nobody counts the seconds of a week."""
    assert parsed_age(text) == age


@pytest.mark.parametrize("text", ["", "2", "h", "2 hours", "-1h", "1h-", "9" * 400 + "w"])
def test_what_is_no_age_is_refused(text: str) -> None:
    """A purge of everything because of a slip of the hand would be the worst way to read it."""
    with pytest.raises(CommandLineError, match=r"age|longer"):
        parsed_age(text)


def test_a_document_has_every_number(cli: Cli, desk: Desk) -> None:
    """What a script decides by."""
    desk.desk_outbox.records = [record(1), record(2, retries=5)]

    outcome = cli("outbox", "retry", "--all", "--yes", "--who", "ada", "--json")

    assert json.loads(outcome.out) == {
        "action": "outbox retry",
        "who": "ada",
        "dry_run": False,
        "matched": 1,
        "changed": 1,
        "skipped": [{"reason": "failed again although it was retried 3 times", "count": 1, "ids": [2]}],
        "interrupted": False,
        "after": 2,
    }
