"""Outbox and inbox as an operator works on them."""

import io
from collections.abc import Callable

import anyio
import pytest

from cqrs_decor import App
from cqrs_decor.inbox import InboxFilter
from cqrs_decor.memory import MemoryStore
from cqrs_decor.outbox import OutboxFilter
from tests.unit.cli.conftest import Cli


def outbox_ids(store: MemoryStore, state: str | None = None) -> list[int]:
    async def find() -> list[int]:
        return [record.id for record in await store.outbox.find(OutboxFilter(state=state))]

    return anyio.run(find)


def inbox_ids(store: MemoryStore) -> list[int]:
    async def find() -> list[int]:
        return [parked.id for parked in await store.inbox.find(InboxFilter())]

    return anyio.run(find)


@pytest.mark.parametrize(
    ("filters", "ids"),
    [
        ((), [1, 2, 3, 4]),
        (("--state", "parked"), [1, 3]),
        (("--state", "rescheduled"), [2]),
        (("--state", "held"), [4]),
        (("--topic", "other"), [3]),
        (("--key", "2"), [2, 4]),
        (("--id", "4", "--id", "1"), [1, 4]),
        (("--limit", "2"), [1, 2]),
        (("--state", "parked", "--topic", "other"), [3]),
    ],
    ids=str,
)
def test_filters_narrow_the_outbox(cli: Cli, store: MemoryStore, filters: tuple[str, ...], ids: list[int]) -> None:
    """With millions of records nobody reads a list of all."""
    document = cli("outbox", "list", *filters, "--json").document

    assert [record["id"] for record in document["records"]] == ids
    assert document["more"] is (filters == ("--limit", "2"))


@pytest.mark.parametrize(
    ("filters", "ids"),
    [
        ((), [1, 2]),
        (("--consumer", "sample.count"), [2]),
        (("--topic", "nothing"), []),
        (("--key", "1"), [1, 2]),
        (("--id", "2"), [2]),
        (("--limit", "1"), [1]),
        (("--state", "parked"), [1, 2]),
        (("--state", "retry-requested"), []),
    ],
    ids=str,
)
def test_filters_narrow_the_inbox(cli: Cli, store: MemoryStore, filters: tuple[str, ...], ids: list[int]) -> None:
    """One consumer that fails must not hide the others."""
    document = cli("inbox", "list", *filters, "--json").document

    assert [message["id"] for message in document["messages"]] == ids


@pytest.mark.parametrize("kind", ["outbox", "inbox"])
def test_a_body_is_shown_only_when_it_is_asked_for(cli: Cli, store: MemoryStore, kind: str) -> None:
    """Bodies hold personal data, and terminals are recorded."""
    assert '"a"' not in cli(kind, "show", "1").out
    assert '"a": 1' in cli(kind, "show", "1", "--body").out

    [shown] = cli(kind, "show", "1", "--body", "--json").document.popitem()[1]
    assert shown["body"] == {"a": 1}


@pytest.mark.parametrize("kind", ["outbox", "inbox"])
def test_showing_what_is_not_there_is_an_error_of_its_own(cli: Cli, store: MemoryStore, kind: str) -> None:
    """Somebody else may have retried it in between."""
    outcome = cli(kind, "show", "1", "99")

    assert outcome.code == 1
    assert "CD407" in outcome.err
    assert "99" in outcome.err


def test_retry_puts_parked_records_back_and_says_how_many(cli: Cli, store: MemoryStore) -> None:
    """What was not parked is named, not counted."""
    outcome = cli("outbox", "retry", "1", "2", "99", "--who", "ada")

    assert outcome.code == 0
    assert outcome.out.splitlines() == [
        "Retried 1 record as ada.",
        "Left alone 1, rescheduled, not parked: 2.",
        "Left alone 1, not there: 99.",
    ]
    assert outbox_ids(store, "parked") == [3]


def test_retry_by_filter_takes_all_that_matches(cli: Cli, store: MemoryStore) -> None:
    """After an outage hundreds are parked for one reason."""
    outcome = cli("outbox", "retry", "--all", "--yes", "--json")

    assert outcome.document["changed"] == 2
    assert outbox_ids(store, "parked") == []


def test_discard_takes_parked_and_rescheduled_records(cli: Cli, store: MemoryStore) -> None:
    """Both hold their key back; those that only wait are left alone."""
    outcome = cli("outbox", "discard", "1", "2", "4", "--yes")

    assert outcome.code == 0
    assert outcome.out.startswith("Discarded 2 records")
    assert "held, not parked or rescheduled: 4" in outcome.out
    assert outbox_ids(store) == [3, 4]


@pytest.mark.parametrize("kind", ["outbox", "inbox"])
@pytest.mark.parametrize("verb", ["retry", "discard"])
@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((), "Nothing was named."),
        (("--topic", "sample-orders"), "Nobody can be asked here."),
        (("1", "--all", "--topic", "x"), "Ids and a filter were both given."),
    ],
    ids=str,
)
def test_a_change_must_say_what_it_means(
    cli: Cli, store: MemoryStore, kind: str, verb: str, arguments: tuple[str, ...], problem: str
) -> None:
    """Everything must never be meant by accident."""
    outcome = cli(kind, verb, *arguments)

    assert outcome.code == 2
    assert problem in outcome.err
    assert outbox_ids(store) == [1, 2, 3, 4]
    assert inbox_ids(store) == [1, 2]


@pytest.mark.parametrize("kind", ["outbox", "inbox"])
def test_discard_is_refused_where_nobody_can_be_asked(cli: Cli, store: MemoryStore, kind: str) -> None:
    """A script that forgot --yes must not wait for an answer for ever."""
    outcome = cli(kind, "discard", "1")

    assert outcome.code == 2
    assert "add --yes" in outcome.err
    assert 1 in outbox_ids(store)
    assert 1 in inbox_ids(store)


class _Keyboard(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("answer", "code", "left"), [("n\n", 1, [1, 2]), ("y\n", 0, [2])])
def test_discard_asks_first(
    cli: Cli, store: MemoryStore, monkeypatch: pytest.MonkeyPatch, answer: str, code: int, left: list[int]
) -> None:
    """It cannot be undone."""
    monkeypatch.setattr("sys.stdin", _Keyboard(answer))

    outcome = cli("inbox", "discard", "1")

    assert outcome.code == code
    assert "Discard 1 message of memory:// for good?" in outcome.err
    assert inbox_ids(store) == left


def test_retry_of_the_inbox_is_a_request_and_made_once(cli: Cli, store: MemoryStore) -> None:
    """The worker of that consumer carries it out, perhaps on another machine."""
    assert cli("inbox", "retry", "1").out.startswith("Asked to retry 1 message")

    again = cli("inbox", "retry", "1")

    assert again.code == 1
    assert "asked to be retried already, not parked: 1." in again.out
    assert [m["state"] for m in cli("inbox", "list", "--json").document["messages"]] == ["retry-requested", "parked"]


def test_nothing_that_matches_is_not_success(cli: Cli, store: MemoryStore) -> None:
    """As with grep: a script can tell."""
    outcome = cli("inbox", "retry", "--consumer", "nobody")

    assert outcome.code == 1
    assert outcome.out == "There is nothing to retry.\n"


def test_the_user_of_the_system_is_recorded_unless_somebody_is_named(
    cli: Cli, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who discarded it is what is asked later."""
    monkeypatch.setattr("getpass.getuser", lambda: "grace")
    monkeypatch.setattr("socket.gethostname", lambda: "bastion")

    assert cli("outbox", "retry", "1", "--json").document["who"] == "grace@bastion"
    assert cli("outbox", "retry", "3", "--who", "ada", "--json").document["who"] == "ada"


def test_a_store_in_memory_says_that_it_sees_only_itself(cli: Cli, app_with: Callable[..., App]) -> None:
    """An empty list would be taken for good news."""
    app_with(database=MemoryStore())

    outcome = cli("outbox", "list")

    assert outcome.code == 0
    assert outcome.out == "No record matches.\n"
    assert "what another one keeps is not seen here" in outcome.err
