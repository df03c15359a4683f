"""A send inside a handler is part of the handler's transaction."""

import pytest

from cqrs_decor import App, Command, DomainEvent, IntegrationEvent, MessageContext, Query, Registry, Retry, emit
from cqrs_decor.errors import JoinedDispatchFailedError, UnsupportedError
from cqrs_decor.memory import MemoryStore
from cqrs_decor.outbox import OutboxFilter
from tests.unit.apps import app_of


class Outer(Command[str]):
    swallow: bool = False


class Inner(Command[str]):
    fail: bool = False


class Peek(Query[str]):
    pass


class Noted(DomainEvent):
    by: str


class Told(IntegrationEvent, topic="told", name="joining.told"):
    by: str


async def stored(app: App) -> list[str]:
    return [record.envelope.data.decode() for record in await app.store.outbox.find(OutboxFilter())]


def shop(*, fail_outer: bool = False) -> Registry:
    sales = Registry("sales")

    @sales.command_handler
    async def outer(command: Outer, app: App) -> str:
        emit(Told(by="outer"))
        try:
            await app.send(Inner(fail=command.swallow))
        except LookupError:
            return "swallowed"
        if fail_outer:
            raise LookupError
        return "done"

    @sales.command_handler(retry=Retry(max_attempts=5))
    async def inner(command: Inner) -> str:
        emit(Told(by="inner"))
        if command.fail:
            raise LookupError
        return "inner"

    return sales


async def test_a_send_inside_a_handler_is_committed_with_it() -> None:
    """One transaction from the first handler to the last."""
    async with app_of(shop()) as app:
        assert await app.send(Outer()) == "done"

        assert await stored(app) == ['{"by":"outer"}', '{"by":"inner"}']


async def test_what_the_inner_handler_did_goes_with_the_outer_one() -> None:
    """It had returned already: only one transaction makes this right."""
    async with app_of(shop(fail_outer=True)) as app:
        with pytest.raises(LookupError):
            await app.send(Outer())

        assert await stored(app) == []


async def test_a_swallowed_failure_of_a_joined_send_refuses_the_commit() -> None:
    """The inner handler left half of its work in the transaction: committing that would be corruption."""
    async with app_of(shop()) as app:
        with pytest.raises(JoinedDispatchFailedError) as caught:
            await app.send(Outer(swallow=True))

        assert await stored(app) == []
    assert (caught.value.code, caught.value.message) == ("CD307", "Inner")
    assert "begin_nested" in caught.value.fix


async def test_a_joined_send_has_no_retries_of_its_own() -> None:
    """Half a transaction cannot be tried again."""
    sales = shop()
    attempts: list[int] = []

    class Counted(Command[None]):
        pass

    @sales.command_handler(retry=Retry(max_attempts=5))
    async def counted(command: Counted) -> None:
        attempts.append(MessageContext.current().attempt)
        raise LookupError

    class Around(Command[None]):
        pass

    @sales.command_handler
    async def around(command: Around, app: App) -> None:
        await app.send(Counted())

    async with app_of(sales) as app:
        with pytest.raises(LookupError):
            await app.send(Around())

    assert attempts == [1]


async def test_domain_events_of_a_joined_send_are_handled_before_it_returns() -> None:
    """The caller goes on with everything done that the inner command stands for."""
    sales = Registry("sales")
    log: list[str] = []

    @sales.command_handler
    async def outer(command: Outer, app: App) -> str:
        emit(Noted(by="outer"))
        await app.send(Inner())
        log.append("outer goes on")
        return ""

    @sales.command_handler
    async def inner(command: Inner) -> str:
        emit(Noted(by="inner"))
        return ""

    @sales.event_handler
    async def note(event: Noted) -> None:
        log.append(f"noted {event.by}")

    async with app_of(sales) as app:
        await app.send(Outer())

    assert log == ["noted inner", "outer goes on", "noted outer"]


async def test_a_query_inside_a_handler_shares_its_unit_of_work() -> None:
    """It must see what the handler has written."""
    sales = Registry("sales")
    seen: list[bool] = []

    @sales.command_handler
    async def outer(command: Outer, app: App) -> str:
        mine = MessageContext.current().unit_of_work
        await app.ask(Peek())
        seen.append(units[0] is mine)
        return ""

    units: list[object] = []

    @sales.query_handler
    async def peek(query: Peek) -> str:
        units.append(MessageContext.current().unit_of_work)
        return ""

    async with app_of(sales) as app:
        await app.send(Outer())

    assert seen == [True]


async def test_a_send_with_a_transaction_of_the_callers_waits_for_their_commit() -> None:
    """The caller owns it: their rows, the handler's and the events are one."""
    sales = shop()
    store = MemoryStore()

    async with app_of(sales, database=store) as app:
        transaction = await store.begin()
        await app.send(Inner(), session=transaction)
        before = await stored(app)
        await transaction.commit()

        assert (before, await stored(app)) == ([], ['{"by":"inner"}'])


async def test_a_send_with_a_transaction_of_the_callers_goes_with_their_rollback() -> None:
    """Nothing is kept that the caller took back."""
    sales = shop()
    store = MemoryStore()

    async with app_of(sales, database=store) as app:
        transaction = await store.begin()
        await app.send(Inner(), session=transaction)
        await transaction.rollback()

        assert await stored(app) == []


async def test_something_that_is_no_session_is_refused() -> None:
    """Before the handler has run."""
    async with app_of(shop()) as app:
        with pytest.raises(TypeError):
            await app.send(Inner(), session="session")


async def test_a_swallowed_failure_refuses_the_send_into_the_callers_transaction() -> None:
    """The caller hears of it while they can still roll back."""
    store = MemoryStore()

    async with app_of(shop(), database=store) as app:
        transaction = await store.begin()
        with pytest.raises(JoinedDispatchFailedError):
            await app.send(Outer(swallow=True), session=transaction)


async def test_an_isolated_handler_cannot_follow_a_commit_of_the_callers() -> None:
    """Nobody tells us when that happens: better an error than a handler that never runs."""
    sales = Registry("sales")

    @sales.command_handler
    async def inner(command: Inner) -> str:
        emit(Noted(by="inner"))
        return ""

    @sales.event_handler(isolated=True)
    async def later(event: Noted) -> None: ...

    store = MemoryStore()
    async with app_of(sales, database=store) as app:
        with pytest.raises(UnsupportedError, match="send the command without session="):
            await app.send(Inner(), session=await store.begin())


async def test_the_outbox_stores_events_in_a_transaction_of_the_callers() -> None:
    """The outbox for code that has no handlers at all."""
    store = MemoryStore()

    async with app_of(Registry("sales"), database=store) as app:
        transaction = await store.begin()
        app.outbox.add(transaction, Told(by="me"), Told(by="you"))
        before = await stored(app)
        await transaction.commit()

        assert (before, await stored(app)) == ([], ['{"by":"me"}', '{"by":"you"}'])
