"""Commands that were sent with an idempotency key: one run, one result, however often they are sent."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import anyio
import pytest
from pydantic import BaseModel

from cqrs_decor import App, CallNext, Command, DomainEvent, IntegrationEvent, MessageContext, Registry, Retry, emit
from cqrs_decor.errors import (
    CommitOutcomeUnknownError,
    IdempotencyKeyReusedError,
    IdempotentResultError,
    StoreUnavailableError,
)
from cqrs_decor.memory import MemoryStore
from cqrs_decor.memory.transaction import MemoryTransaction
from cqrs_decor.messages import Returns, message
from cqrs_decor.outbox import OutboxFilter
from cqrs_decor.pipeline import Handling, compose
from tests.unit.apps import app_of

pytestmark = pytest.mark.feature("M16")


class Receipt(BaseModel):
    number: int
    lines: tuple[str, ...] = ()


class Pay(Command[Receipt]):
    amount: int = 1


class Refund(Command[Receipt]):
    amount: int = 1


class Paid(IntegrationEvent, topic="payments"):
    amount: int


class Booked(DomainEvent):
    pass


class Till:
    """Counts what was really paid."""

    def __init__(self) -> None:
        self.registry = Registry("till")
        self.paid: list[int] = []
        self.fail: list[Exception] = []
        self.registry.command_handler(self.pay)

    async def pay(self, command: Pay) -> Receipt:
        self.paid.append(command.amount)
        emit(Paid(amount=command.amount))
        if self.fail:
            raise self.fail.pop()
        return Receipt(number=len(self.paid), lines=("tea",))


async def published(app: App) -> list[str]:
    return [record.envelope.data.decode() for record in await app.store.outbox.find(OutboxFilter())]


async def test_a_repeat_gets_the_first_result_and_runs_nothing() -> None:
    """The client's first request was answered into a dead connection; the second must not pay again."""
    till = Till()

    async with app_of(till.registry) as app:
        first = await app.send(Pay(amount=5), idempotency_key="order-1")
        again = await app.send(Pay(amount=5), idempotency_key="order-1")

        assert first == again == Receipt(number=1, lines=("tea",))
        assert (till.paid, await published(app)) == ([5], ['{"amount":5}'])


async def test_without_a_key_or_with_another_one_a_command_runs_each_time() -> None:
    """The control: two wishes that look the same are two wishes."""
    till = Till()

    async with app_of(till.registry) as app:
        numbers = [(await app.send(Pay(), idempotency_key=key)).number for key in (None, None, "one", "two", "one")]

    assert numbers == [1, 2, 3, 4, 3]


async def test_a_failure_is_not_kept() -> None:
    """What was rolled back left nothing, so that a repeat is a first try."""
    till = Till()
    till.fail = [ValueError("no money")]

    async with app_of(till.registry) as app:
        with pytest.raises(ValueError, match="no money"):
            await app.send(Pay(), idempotency_key="order-1")
        receipt = await app.send(Pay(), idempotency_key="order-1")

        assert receipt.number == 2
        assert len(await published(app)) == 1


async def test_of_two_at_the_same_time_the_second_waits_for_the_firsts_result() -> None:
    """A double click: both requests are under way before either has an answer."""
    sales = Registry("sales")
    running, go_on = anyio.Event(), anyio.Event()
    runs: list[int] = []
    receipts: list[Receipt] = []
    early: list[Receipt] = []

    @sales.command_handler
    async def pay(command: Pay) -> Receipt:
        runs.append(command.amount)
        running.set()
        await go_on.wait()
        return Receipt(number=len(runs))

    async with app_of(sales) as app:

        async def send() -> None:
            receipts.append(await app.send(Pay(), idempotency_key="order-1"))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send)
            await running.wait()
            tasks.start_soon(send)
            await anyio.wait_all_tasks_blocked()
            early.extend(receipts)
            go_on.set()

    assert (early, receipts, runs) == ([], [Receipt(number=1)] * 2, [1])


async def test_when_the_first_of_two_fails_the_second_runs() -> None:
    """The one that waited is then the one that counts."""
    sales = Registry("sales")
    running, go_on = anyio.Event(), anyio.Event()
    runs: list[int] = []
    outcomes: list[object] = []

    @sales.command_handler
    async def pay(command: Pay) -> Receipt:
        runs.append(command.amount)
        if len(runs) == 1:
            running.set()
            await go_on.wait()
            raise ValueError("refused")
        return Receipt(number=len(runs))

    async with app_of(sales) as app:

        async def send() -> None:
            try:
                outcomes.append(await app.send(Pay(), idempotency_key="order-1"))
            except ValueError as error:
                outcomes.append(str(error))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send)
            await running.wait()
            tasks.start_soon(send)
            await anyio.wait_all_tasks_blocked()
            go_on.set()

    assert outcomes == ["refused", Receipt(number=2)]


@pytest.mark.parametrize("other", [Pay(amount=2), Refund(amount=1)])
async def test_a_key_is_refused_for_another_command_or_other_content(other: Returns[Receipt]) -> None:
    """Giving the result of one wish to another would be a lie that nobody notices."""
    till = Till()

    @till.registry.command_handler
    async def refund(command: Refund) -> Receipt:
        raise AssertionError("not reached")

    async with app_of(till.registry) as app:
        await app.send(Pay(amount=1), idempotency_key="order-1")
        with pytest.raises(IdempotencyKeyReusedError) as caught:
            await app.send(other, idempotency_key="order-1")

    assert (caught.value.key, caught.value.command) == ("order-1", type(other).__name__)
    assert till.paid == [1]


async def test_an_empty_key_is_refused() -> None:
    """A header that was not there must not make all who lack it share one result."""
    async with app_of(Till().registry) as app:
        with pytest.raises(ValueError, match="idempotency_key is empty"):
            await app.send(Pay(), idempotency_key="")


async def test_content_is_compared_whatever_its_order() -> None:
    """Two clients may write the fields of an object in different orders."""
    sales = Registry("sales")
    runs: list[dict[str, int]] = []

    class Order(Command[None]):
        items: dict[str, int]

    @sales.command_handler
    async def order(command: Order) -> None:
        runs.append(command.items)

    async with app_of(sales) as app:
        await app.send(Order(items={"tea": 1, "salt": 2}), idempotency_key="order-1")
        await app.send(Order(items={"salt": 2, "tea": 1}), idempotency_key="order-1")

    assert runs == [{"tea": 1, "salt": 2}]


async def test_services_that_share_a_store_have_keys_of_their_own() -> None:
    """Keys come from clients of one service; those of another know nothing of them."""
    till, store = Till(), MemoryStore()

    async with app_of(till.registry, service="shop", database=store) as shop:
        await shop.send(Pay(), idempotency_key="1")
    async with app_of(till.registry, service="bar", database=store) as bar:
        await bar.send(Pay(), idempotency_key="1")
    async with app_of(till.registry, service="shop", database=store) as shop:
        receipt = await shop.send(Pay(), idempotency_key="1")

    assert (till.paid, receipt.number) == ([1, 1], 1)


# --- inside other transactions ----------------------------------------------------------------------------------------


class Checkout(Command[int]):
    fails: bool = False


async def test_a_key_inside_a_handler_is_part_of_the_outer_transaction() -> None:
    """The outer one failed: then nothing was paid, and the key is as good as new."""
    till = Till()

    @till.registry.command_handler
    async def check_out(command: Checkout, context: MessageContext, app: App) -> int:
        receipt = await app.send(Pay(), idempotency_key="order-1")
        if command.fails:
            raise ValueError("out of stock")
        return receipt.number

    async with app_of(till.registry) as app:
        with pytest.raises(ValueError, match="out of stock"):
            await app.send(Checkout(fails=True))
        after_failure = await published(app)
        numbers = [await app.send(Checkout()), await app.send(Checkout())]

        assert (after_failure, numbers) == ([], [2, 2])
        assert len(await published(app)) == 1


async def test_a_second_send_in_the_same_transaction_gets_the_result() -> None:
    """The row that the transaction itself has written counts as well."""
    till = Till()

    @till.registry.command_handler
    async def check_out(command: Checkout, app: App) -> int:
        first = await app.send(Pay(), idempotency_key="order-1")
        return first.number + (await app.send(Pay(), idempotency_key="order-1")).number

    async with app_of(till.registry) as app:
        assert await app.send(Checkout()) == 2

    assert till.paid == [1]


async def test_a_command_that_sends_itself_with_its_own_key_is_refused() -> None:
    """It would wait for a result that it has not made yet."""
    sales = Registry("sales")

    @sales.command_handler
    async def check_out(command: Checkout, app: App) -> int:
        return await app.send(Checkout(), idempotency_key="order-1")

    async with app_of(sales) as app:
        with pytest.raises(IdempotencyKeyReusedError, match="inside its own handling"):
            await app.send(Checkout(), idempotency_key="order-1")


async def test_a_key_in_a_session_of_the_callers_is_committed_by_the_caller() -> None:
    """`session=` leaves the commit to the caller; so it is with the key."""
    till, store = Till(), MemoryStore()

    async with app_of(till.registry, database=store) as app:
        for ends in ("rolled back", "committed"):
            transaction = await store.begin()
            await app.send(Pay(), session=transaction, idempotency_key="order-1")
            await (transaction.commit() if ends == "committed" else transaction.rollback())
        receipt = await app.send(Pay(), idempotency_key="order-1")

        assert (receipt.number, till.paid) == (2, [1, 1])
        assert len(await published(app)) == 1


async def test_domain_events_are_handled_once_as_well() -> None:
    """They are part of what the command did."""
    sales = Registry("sales")
    booked: list[Booked] = []

    @sales.command_handler
    async def check_out(command: Checkout) -> int:
        emit(Booked())
        return 1

    @sales.event_handler
    async def book(event: Booked) -> None:
        booked.append(event)

    async with app_of(sales) as app:
        assert [await app.send(Checkout(), idempotency_key="order-1") for _ in range(2)] == [1, 1]

    assert booked == [Booked()]


async def test_the_context_offers_the_key_to_apis_outside() -> None:
    """A first send that was rolled back may have charged a card: the second gives the card's API the same key."""
    sales = Registry("sales")
    keys: list[str] = []

    @sales.command_handler
    async def check_out(command: Checkout, context: MessageContext) -> int:
        keys.append(context.idempotency_key)
        if len(keys) == 1:
            raise ValueError("broke after the charge")
        return 1

    async with app_of(sales) as app:
        with pytest.raises(ValueError, match="broke after the charge"):
            await app.send(Checkout(), idempotency_key="order-1")
        await app.send(Checkout(), idempotency_key="order-1")
        await app.send(Checkout(), idempotency_key="order-2")
        await app.send(Checkout())

    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


async def test_middlewares_see_a_repeat_and_its_content_is_what_was_sent() -> None:
    """Whoever measures sees every send; what a middleware puts into the message is no content of the client's."""
    till = Till()
    seen: list[int] = []

    @till.registry.middleware
    async def stamp(message: Any, call_next: CallNext) -> Any:
        seen.append(message.amount)
        return await call_next(Pay(amount=message.amount + len(seen)))

    async with app_of(till.registry) as app:
        receipts = [await app.send(Pay(amount=1), idempotency_key="order-1") for _ in range(2)]

    assert (seen, till.paid, receipts[0] == receipts[1]) == ([1, 1], [2], True)


# --- results ----------------------------------------------------------------------------------------------------------


@message()
@dataclass(frozen=True)
class Count(Returns[dict[str, int]]):
    what: str


async def test_results_of_dataclasses_and_plain_types_are_kept() -> None:
    """A message need not be a pydantic model, nor its result."""
    sales = Registry("sales")
    runs: list[str] = []

    @sales.command_handler
    async def count(command: Count) -> dict[str, int]:
        runs.append(command.what)
        return {command.what: 3}

    async with app_of(sales) as app:
        results = [await app.send(Count("tea"), idempotency_key="1") for _ in range(2)]

    assert (results, runs) == ([{"tea": 3}] * 2, ["tea"])


class Unknown:
    """Nothing that pydantic has a schema for."""


class Vague(Command[Any]):
    what: str = ""


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (Receipt(number=1), "as JSON and back this Receipt is not the same"),
        ((1, 2), "as JSON and back this tuple is not the same"),
        (float("nan"), "as JSON and back this float is not the same"),
        (Unknown(), "it does not fit what the command promises"),
    ],
)
async def test_a_result_that_would_come_back_changed_is_refused_before_the_commit(result: object, reason: str) -> None:
    """A repeat must get the same; that it cannot has to show at the first send, when nothing is done yet."""
    sales = Registry("sales")

    @sales.command_handler
    async def guess(command: Vague) -> Any:
        emit(Paid(amount=1))
        return result

    async with app_of(sales) as app:
        with pytest.raises(IdempotentResultError, match=reason):
            await app.send(Vague(), idempotency_key="1")

        assert await published(app) == []


async def test_a_result_of_another_type_than_promised_is_refused() -> None:
    """The promise is what a repeat is read by."""
    sales = Registry("sales")

    @sales.command_handler
    async def pay(command: Pay) -> Any:
        return "paid"

    async with app_of(sales) as app:
        with pytest.raises(IdempotentResultError, match="it does not fit what the command promises"):
            await app.send(Pay(), idempotency_key="1")


async def test_a_promise_that_pydantic_does_not_know_is_refused_before_the_handler_runs() -> None:
    """Better than to find out after the work is done."""
    sales = Registry("sales")
    runs: list[object] = []

    @message()
    @dataclass(frozen=True)
    class Make(Returns[Unknown]):
        what: str = ""

    @sales.command_handler
    async def make(command: Make) -> Unknown:
        runs.append(command)
        return Unknown()

    async with app_of(sales) as app:
        with pytest.raises(IdempotentResultError, match="pydantic does not know its type"):
            await app.send(Make(), idempotency_key="1")

    assert runs == []


async def test_a_result_that_no_longer_fits_its_class_is_an_error_and_no_second_run() -> None:
    """The service was deployed with another result class while keys of the old one were kept."""
    sales, store = Registry("sales"), MemoryStore()

    @sales.command_handler
    async def pay(command: Pay) -> Receipt:
        return Receipt(number=1)

    async with app_of(sales, database=store) as app:
        await app.send(Pay(), idempotency_key="1")
        transaction = await store.begin()
        kept = await store.idempotency.begin(transaction, "shop/1", "")
        await transaction.rollback()
        assert kept is not None

        transaction = await store.begin()
        await store.idempotency.begin(transaction, "shop/2", kept.fingerprint)
        await store.idempotency.keep(transaction, "shop/2", b'{"sum": 1}')
        await transaction.commit()

        with pytest.raises(IdempotentResultError, match="what was kept cannot be read"):
            await app.send(Pay(), idempotency_key="2")


# --- where it stands --------------------------------------------------------------------------------------------------


async def test_the_order_of_stages_around_a_command_with_a_key_is_what_it_is() -> None:
    """Each attempt takes the key in its own transaction, and an unknown commit is repeated outside all attempts."""
    till = Till()

    async with app_of(till.registry) as app:
        running = app._run_of("stages")
        [plan] = app.plans
        stages = running._stages(())
        orders = {
            joined: compose(stages, Handling(spec=plan.spec, keyed=True, joined=joined), plan.own)[1]
            for joined in (False, True)
        }

        assert plan.order == ("transaction",)
        assert orders == {
            False: ("unknown commits", "retries", "transaction", "idempotency"),
            True: ("transaction", "idempotency"),
        }


# --- commits whose outcome is unknown ---------------------------------------------------------------------------------


class _Breaking(MemoryTransaction):
    """Its connection breaks during COMMIT."""

    store: "BreakingStore"

    async def commit(self) -> None:
        breaks = self.store.next_commit()
        if breaks == "after":
            await super().commit()
        if breaks is not None:
            await self.rollback()
            raise CommitOutcomeUnknownError("memory://")
        await super().commit()


class BreakingStore(MemoryStore):
    """A store whose connection breaks during some commits, and that is away at some begins."""

    def __init__(self, commits: Sequence[str | None], away: Sequence[bool] = ()) -> None:
        super().__init__()
        self._commits, self._away = list(commits), list(away)

    def next_commit(self) -> str | None:
        return self._commits.pop(0) if self._commits else None

    async def begin(self, *, read_only: bool = False) -> MemoryTransaction:
        if self._away and self._away.pop(0):
            raise StoreUnavailableError("memory://", "connection refused")
        transaction = _Breaking(self._outbox)
        transaction.store = self
        return transaction

    def is_unavailable(self, error: BaseException) -> bool:
        return isinstance(error, StoreUnavailableError)


@pytest.mark.parametrize(("breaks", "runs"), [("after", 1), ("before", 2)])
async def test_an_unknown_commit_is_repeated_by_itself_with_a_key(breaks: str, runs: int) -> None:
    """Whether it had been committed is what the key tells: then its result is there, else the handler runs again."""
    till, store = Till(), BreakingStore([breaks])

    async with app_of(till.registry, database=store) as app:
        receipt = await app.send(Pay(), idempotency_key="order-1")

        assert (receipt.number, len(till.paid)) == (runs, runs)
        assert len(await published(app)) == 1


async def test_an_unknown_commit_is_not_repeated_without_a_key() -> None:
    """It may have been committed: a second run would pay twice."""
    till, store = Till(), BreakingStore(["after"])

    async with app_of(till.registry, database=store) as app:
        with pytest.raises(CommitOutcomeUnknownError):
            await app.send(Pay())

        assert len(till.paid) == len(await published(app)) == 1


async def test_a_send_of_the_callers_after_an_unknown_commit_gets_the_result() -> None:
    """The repeats of ours were in vain; the client comes again with the same key."""
    till, store = Till(), BreakingStore(["after"], away=[False, True, True, True])

    async with app_of(till.registry, database=store) as app:
        with pytest.raises(CommitOutcomeUnknownError):
            await app.send(Pay(), idempotency_key="order-1")
        receipt = await app.send(Pay(), idempotency_key="order-1")

    assert (receipt.number, till.paid) == (1, [1])


async def test_an_error_of_the_handler_in_the_repeat_is_told_as_it_is() -> None:
    """The first run was not committed, the second one failed: that is a known outcome."""
    till = Till()
    till.fail = [ValueError("no money"), CommitOutcomeUnknownError("memory://")]

    async with app_of(till.registry) as app:
        with pytest.raises(ValueError, match="no money"):
            await app.send(Pay(), idempotency_key="order-1")

    assert len(till.paid) == 2


class StallingStore(BreakingStore):
    """One whose first COMMIT is never answered."""

    async def begin(self, *, read_only: bool = False) -> MemoryTransaction:
        transaction = await super().begin(read_only=read_only)
        if self.next_commit() == "stalls":
            transaction.commit = anyio.sleep_forever  # type: ignore[method-assign]
        return transaction


@pytest.mark.parametrize(("key", "runs"), [(None, 1), ("order-1", 2)])
async def test_a_time_out_during_the_commit_leaves_its_outcome_unknown(key: str | None, runs: int) -> None:
    """A policy that runs a handler again after its time-out must not do so then: the first run may be committed."""
    sales = Registry("sales")
    ran: list[int] = []

    @sales.command_handler(timeout=timedelta(milliseconds=50), retry=Retry(max_attempts=3, first_delay=timedelta(0)))
    async def pay(command: Pay) -> Receipt:
        ran.append(command.amount)
        emit(Paid(amount=1))
        return Receipt(number=len(ran))

    async with app_of(sales, database=StallingStore(["stalls"])) as app:
        if key is None:
            with pytest.raises(CommitOutcomeUnknownError, match="time-out"):
                await app.send(Pay())
        else:
            assert (await app.send(Pay(), idempotency_key=key)).number == 2

    assert len(ran) == runs


async def test_a_time_out_during_a_consumers_commit_counts_as_a_failed_attempt() -> None:
    """The inbox makes its repeat safe; taken for an outage it would be tried for ever, and never parked."""
    sales = Registry("sales")

    @sales.event_handler(timeout=timedelta(milliseconds=50), retry=Retry(max_attempts=1))
    async def note(event: Paid) -> None: ...

    async with app_of(sales, database=StallingStore([None, None, "stalls"])) as app:
        await app.publish(Paid(amount=1))
        drained = await app.drain()

    [reason] = drained.parked
    assert "HandlerTimeoutError" in reason


async def test_retries_of_the_handler_take_the_key_anew_each_time() -> None:
    """A failed attempt gave it back with its transaction."""
    sales = Registry("sales")
    runs: list[int] = []

    @sales.command_handler(retry=Retry(max_attempts=3, first_delay=timedelta(0), max_delay=timedelta(0)))
    async def pay(command: Pay, context: MessageContext) -> Receipt:
        runs.append(context.attempt)
        if context.attempt < 3:
            raise ValueError("again")
        return Receipt(number=context.attempt)

    async with app_of(sales) as app:
        receipts = [await app.send(Pay(), idempotency_key="1") for _ in range(2)]

    assert (receipts, runs) == ([Receipt(number=3)] * 2, [1, 2, 3])
