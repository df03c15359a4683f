"""One transaction around a handler and everything that joins it."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import anyio
import pytest

from cqrs_decor.envelope import Envelope
from cqrs_decor.errors import JoinedDispatchFailedError, UnitOfWorkClosedError
from cqrs_decor.testing.conformance.kit import sample
from cqrs_decor.unit_of_work import Transaction, UnitOfWork, nothing_to_begin

T = TypeVar("T")


class Noted:
    """A transaction that notes what is done to it; `undone` holds the marks of savepoints that were rolled back."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.envelopes: list[Envelope] = []
        self.savepoint = "root"
        self.undone: set[object] = set()

    def resource(self, kind: type[T]) -> T:
        return kind()

    def add(self, envelopes: Sequence[Envelope]) -> None:
        self.envelopes.extend(envelopes)

    def mark(self) -> object:
        return self.savepoint

    def holds(self, mark: object) -> bool:
        return mark not in self.undone

    async def run_sync(self, function: Callable[[], T]) -> T:
        return function()

    async def commit(self) -> None:
        self.steps.append(f"commit {len(self.envelopes)}")

    async def rollback(self) -> None:
        await anyio.sleep(0.001)
        self.steps.append("rollback")


class Begun:
    """A store that counts what it begins."""

    def __init__(self) -> None:
        self.transactions: list[Noted] = []

    async def __call__(self) -> Transaction:
        await anyio.sleep(0.001)
        self.transactions.append(Noted())
        return self.transactions[-1]


async def test_a_transaction_is_begun_when_it_is_first_needed() -> None:
    """A command that touches no database takes no connection from the pool."""
    begin = Begun()
    work = UnitOfWork(begin)

    await work.commit()

    assert begin.transactions == []


async def test_everybody_who_asks_gets_the_same_transaction() -> None:
    """Tasks of one handler that ask at the same moment must not begin two."""
    begin = Begun()
    work = UnitOfWork(begin)
    found: list[Transaction] = []

    async def ask() -> None:
        found.append(await work.open())

    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(ask)

    assert len(begin.transactions) == 1
    assert found == begin.transactions * 5


async def test_a_handler_that_only_emits_gets_its_transaction_at_commit() -> None:
    """Its events must be stored all the same, and nothing is held open while it runs."""
    begin = Begun()
    work = UnitOfWork(begin)
    envelopes = [sample("orders"), sample("orders")]

    for envelope in envelopes:
        work.add(envelope)
    before = list(begin.transactions)
    await work.commit()

    assert before == []
    assert begin.transactions[0].envelopes == envelopes
    assert begin.transactions[0].steps == ["commit 2"]


async def test_events_go_into_the_transaction_that_is_open() -> None:
    """They belong to the savepoint in which they are emitted."""
    begin = Begun()
    work = UnitOfWork(begin)
    await work.open()

    work.add(envelope := sample("orders"))

    assert begin.transactions[0].envelopes == [envelope]


async def test_the_first_event_is_told_from_the_later_ones() -> None:
    """The relay is woken once for a transaction, however many events it has."""
    work = UnitOfWork(Begun())

    assert [work.add(sample("orders")) for _ in range(3)] == [True, False, False]


async def test_a_rollback_undoes_and_ends() -> None:
    """Nothing may be added to what has ended."""
    begin = Begun()
    work = UnitOfWork(begin)
    await work.open()

    await work.rollback()

    assert begin.transactions[0].steps == ["rollback"]
    with pytest.raises(UnitOfWorkClosedError, match="A place for an event was asked"):
        work.add(sample("orders"))
    with pytest.raises(UnitOfWorkClosedError, match="A transaction was asked"):
        await work.open()
    with pytest.raises(UnitOfWorkClosedError, match="dict was asked"):
        work.resource(dict)


async def test_a_rollback_without_transaction_touches_nothing() -> None:
    """Pending events are gone with it."""
    begin = Begun()
    work = UnitOfWork(begin)
    work.add(sample("orders"))

    await work.rollback()

    assert begin.transactions == []


async def test_cancellation_does_not_interrupt_a_rollback() -> None:
    """A connection that is left in the middle of something would go back to the pool like that."""
    begin = Begun()
    work = UnitOfWork(begin)
    await work.open()

    with anyio.CancelScope() as scope:
        scope.cancel()
        await work.rollback()

    assert begin.transactions[0].steps == ["rollback"]


async def test_after_a_commit_nothing_can_be_added() -> None:
    """A task that outlives its handler must learn that it is too late."""
    work = UnitOfWork(Begun())
    await work.open()
    await work.commit()

    with pytest.raises(UnitOfWorkClosedError):
        work.add(sample("orders"))


async def test_resources_come_from_the_open_transaction() -> None:
    """`uow.resource(AsyncSession)` is typed and never begins anything by itself."""
    work = UnitOfWork(Begun())

    with pytest.raises(UnitOfWorkClosedError):
        work.resource(dict)
    await work.open()

    assert work.resource(dict) == {}


async def test_what_waits_for_the_commit_runs_after_it_in_order() -> None:
    """Waking the relay before the rows are there would wake it for nothing."""
    begin = Begun()
    work = UnitOfWork(begin)
    transaction: Any = await work.open()

    async def note(text: str) -> None:
        transaction.steps.append(text)

    work.after_commit(lambda: note("first"))
    work.after_commit(lambda: note("second"))
    await work.commit()

    assert transaction.steps == ["commit 0", "first", "second"]


async def test_what_waits_for_the_commit_never_runs_after_a_rollback() -> None:
    """It would tell of what did not happen."""
    work = UnitOfWork(Begun())
    ran: list[str] = []

    async def note() -> None:
        ran.append("ran")

    work.after_commit(note)
    await work.open()
    await work.rollback()

    assert ran == []


async def test_a_transaction_of_the_callers_is_left_to_them() -> None:
    """`send(command, session=session)`: they began it, they end it."""
    transaction = Noted()
    for end in (UnitOfWork.commit, UnitOfWork.rollback):
        work = UnitOfWork(nothing_to_begin, transaction, joined=True)
        work.add(sample("orders"))
        await end(work)

    assert transaction.steps == []
    assert len(transaction.envelopes) == 2


async def test_a_second_transaction_is_never_begun_for_a_caller_who_brought_one() -> None:
    """Half of the work would be outside of what they roll back."""
    with pytest.raises(UnitOfWorkClosedError, match="A second transaction"):
        await nothing_to_begin()


async def test_a_joined_dispatch_that_failed_dooms_the_commit() -> None:
    """Its error was swallowed, and its half-done work is in the transaction: nothing of that may be committed."""
    begin = Begun()
    work = UnitOfWork(begin)
    await work.open()
    work.doom(work.mark(), "PlaceOrder")

    with pytest.raises(JoinedDispatchFailedError, match="'PlaceOrder'"):
        await work.commit()

    assert begin.transactions[0].steps == []


async def test_a_failed_dispatch_that_a_savepoint_undid_does_no_harm() -> None:
    """`async with session.begin_nested():` is how a part may fail."""
    begin = Begun()
    work = UnitOfWork(begin)
    await work.open()
    begin.transactions[0].savepoint = "inner"
    work.doom(work.mark(), "PlaceOrder")
    begin.transactions[0].undone.add("inner")

    await work.commit()

    assert begin.transactions[0].steps == ["commit 0"]


async def test_a_dispatch_that_failed_before_there_was_a_transaction_dooms_it_too() -> None:
    """There was no savepoint that could have undone it."""
    begin = Begun()
    work = UnitOfWork(begin)
    work.doom(work.mark(), "PlaceOrder")
    await work.open()
    begin.transactions[0].undone.add("root")

    with pytest.raises(JoinedDispatchFailedError):
        await work.commit()


async def test_work_done_at_a_mark_is_held_until_its_savepoint_is_undone() -> None:
    """It is by this that a savepoint takes its domain events along."""
    begin = Begun()
    work = UnitOfWork(begin)
    before = work.mark()
    await work.open()
    begin.transactions[0].savepoint = "inner"
    inside = work.mark()

    held = (work.holds(before), work.holds(inside))
    begin.transactions[0].undone.add("inner")

    assert held == (True, True)
    assert (work.holds(before), work.holds(inside)) == (True, False)


async def test_events_are_stored_in_the_order_in_which_they_were_emitted() -> None:
    """A handler emits, then something opens the transaction, then another event follows: of one key, perhaps."""
    begin = Begun()
    work = UnitOfWork(begin)
    envelopes = [sample("orders"), sample("orders")]

    work.add(envelopes[0])
    await work.open()
    work.add(envelopes[1])
    await work.commit()

    assert begin.transactions[0].envelopes == envelopes
