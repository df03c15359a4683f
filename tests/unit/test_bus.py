"""Where and when messages may be sent, and what is said otherwise."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest

from cqrs_decor import App, Command, DomainEvent, IntegrationEvent, MessageContext, Query, Registry, emit
from cqrs_decor.app import AppStartedTwiceError
from cqrs_decor.context import NoMessageError
from cqrs_decor.errors import (
    AppNotStartedError,
    AppStoppedError,
    CqrsDecorError,
    EmitAfterDispatchError,
    EmitInQueryError,
    EmitOutsideHandlerError,
    SendInQueryError,
    UnitOfWorkClosedError,
    WrongLoopError,
    WrongMessageKindError,
)
from cqrs_decor.outbox import OutboxFilter
from tests.unit.apps import app_of


class Ship(Command[int]):
    pass


class HowMany(Query[int]):
    pass


class Noted(DomainEvent):
    pass


class Shipped(IntegrationEvent, topic="shipping", name="bus.shipped"):
    pass


def shop() -> App:
    sales = Registry("sales")

    @sales.command_handler
    async def ship(command: Ship) -> int:
        return 1

    @sales.query_handler
    async def count(query: HowMany) -> int:
        return 2

    return app_of(sales)


async def published_by(app: App) -> list[str]:
    return [record.envelope.type for record in await app.store.outbox.find(OutboxFilter())]


ACTIONS: dict[str, Callable[[App], Awaitable[Any]]] = {
    "send()": lambda app: app.send(Ship()),
    "ask()": lambda app: app.ask(HowMany()),
    "publish()": lambda app: app.publish(Shipped()),
    "unit_of_work()": lambda app: app.unit_of_work().__aenter__(),
    "drain()": lambda app: app.drain(),
}


@pytest.mark.parametrize("action", ACTIONS)
async def test_nothing_can_be_done_before_the_start(action: str) -> None:
    """A web application that forgot the lifespan must hear exactly that."""
    with pytest.raises(AppNotStartedError) as caught:
        await ACTIONS[action](shop())

    assert caught.value.code == "CD201"
    assert caught.value.problem == f"{action} was called before the app was started."
    assert "lifespan" in caught.value.fix


@pytest.mark.parametrize("action", ACTIONS)
async def test_nothing_can_be_done_after_the_stop(action: str) -> None:
    """A late task must not find a half-closed app."""
    app = shop()
    async with app:
        pass

    with pytest.raises(AppStoppedError) as caught:
        await ACTIONS[action](app)

    assert caught.value.code == "CD202"
    assert caught.value.problem == f"{action} was called after the app was stopped."


@pytest.mark.parametrize("action", ["send()", "ask()", "publish()", "unit_of_work()"])
async def test_another_loop_is_refused(action: str) -> None:
    """Locks and connections belong to the loop that made them: used from another one they hang."""
    app = shop()

    def on_a_loop_of_its_own() -> CqrsDecorError:
        async def act() -> None:
            await ACTIONS[action](app)

        with pytest.raises(WrongLoopError) as caught:
            asyncio.run(act())
        return caught.value

    async with app:
        error = await anyio.to_thread.run_sync(on_a_loop_of_its_own)

    assert error.code == "CD203"
    assert action in error.problem


async def test_a_thread_sends_through_the_loop_of_the_app() -> None:
    """The fix that the error above names works."""
    app = shop()
    async with app:
        result = await anyio.to_thread.run_sync(lambda: anyio.from_thread.run(app.send, Ship()))

    assert result == 1


async def test_a_coroutine_that_is_driven_by_a_bare_thread_is_refused() -> None:
    """Without any loop of its own the thread would run the handler itself, beside the loop."""
    app = shop()
    caught: list[BaseException] = []

    def drive() -> None:
        try:
            app.send(Ship()).send(None)
        except BaseException as error:
            caught.append(error)

    async with app:
        thread = threading.Thread(target=drive)
        thread.start()
        await anyio.to_thread.run_sync(thread.join)

    assert [type(error) for error in caught] == [WrongLoopError]


@pytest.mark.parametrize(
    ("wrong", "fix"),
    [
        (lambda app: app.send(HowMany()), r"ask it with app.ask\(\)"),
        (lambda app: app.send(Noted()), r"emit it in a handler with emit\(\)"),
        (lambda app: app.send(Shipped()), r"or app.publish\(\) it"),
        (lambda app: app.ask(Ship()), r"send it with app.send\(\)"),
        (lambda app: app.ask(Shipped()), r"or app.publish\(\) it"),
    ],
)
async def test_a_message_of_the_wrong_kind_is_told_where_it_belongs(
    wrong: Callable[[App], Awaitable[Any]], fix: str
) -> None:
    """The verbs look alike: the text names the right one."""
    async with shop() as app:
        with pytest.raises(WrongMessageKindError, match=fix) as caught:
            await wrong(app)

    assert caught.value.code == "CD205"


async def test_emitting_a_command_is_refused() -> None:
    """It would never be handled."""
    async with shop() as app, app.unit_of_work():
        with pytest.raises(WrongMessageKindError, match=r"send a command with app\.send"):
            emit(Ship())


async def test_emit_outside_a_handler_names_the_event_and_two_ways() -> None:
    """There is no transaction that it could be part of."""
    async with shop():
        with pytest.raises(EmitOutsideHandlerError) as caught:
            emit(Shipped())

    assert (caught.value.code, caught.value.event) == ("CD301", "Shipped")
    assert "app.unit_of_work()" in caught.value.fix
    assert "app.outbox.add(session, event)" in caught.value.fix


async def test_emit_in_a_task_that_outlives_its_handler_is_refused() -> None:
    """Its transaction has ended: the event would be lost, or belong to nothing."""
    sales = Registry("sales")
    go_on = asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    @sales.command_handler
    async def ship(command: Ship) -> int:
        async def later() -> None:
            await go_on.wait()
            emit(Shipped())

        tasks.append(asyncio.create_task(later()))
        return 1

    async with app_of(sales) as app:
        await app.send(Ship())
        go_on.set()
        with pytest.raises(EmitAfterDispatchError) as caught:
            await tasks[0]
        stored = await published_by(app)

    assert (caught.value.code, caught.value.event, caught.value.message) == ("CD302", "Shipped", "Ship")
    assert stored == []


async def test_emit_in_tasks_that_the_handler_awaits_works() -> None:
    """Handlers fetch things side by side; what those tasks emit belongs to the handler's transaction."""
    sales = Registry("sales")

    @sales.command_handler
    async def ship(command: Ship) -> int:
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(emit_one)
        return 1

    async def emit_one() -> None:
        emit(Shipped())

    async with app_of(sales) as app:
        await app.send(Ship())

        assert await published_by(app) == ["bus.shipped"] * 3


@pytest.mark.feature("M2")
async def test_a_query_that_emits_is_refused_when_it_does() -> None:
    """A query changes nothing."""
    sales = Registry("sales")

    @sales.query_handler
    async def count(query: HowMany) -> int:
        emit(Shipped())
        return 2

    async with app_of(sales) as app:
        with pytest.raises(EmitInQueryError) as caught:
            await app.ask(HowMany())

        assert await published_by(app) == []
    assert (caught.value.code, caught.value.query) == ("CD303", "HowMany")


@pytest.mark.feature("M2")
async def test_a_query_that_publishes_is_refused_too() -> None:
    """publish inside a handler is emit."""
    sales = Registry("sales")
    apps: list[App] = []

    @sales.query_handler
    async def count(query: HowMany) -> int:
        await apps[0].publish(Shipped())
        return 2

    async with app_of(sales) as app:
        apps.append(app)
        with pytest.raises(EmitInQueryError):
            await app.ask(HowMany())


@pytest.mark.feature("M2")
async def test_a_query_that_sends_is_refused() -> None:
    """It would change something by another hand."""
    sales = Registry("sales")

    @sales.command_handler
    async def ship(command: Ship) -> int:
        return 1

    @sales.query_handler
    async def count(query: HowMany, app: App) -> int:
        return await app.send(Ship())

    async with app_of(sales) as app:
        with pytest.raises(SendInQueryError) as caught:
            await app.ask(HowMany())

    assert (caught.value.code, caught.value.command, caught.value.query) == ("CD208", "Ship", "HowMany")


@pytest.mark.feature("M2")
async def test_a_query_inside_a_command_may_not_send_either() -> None:
    """The rule holds however the query was asked."""
    sales = Registry("sales")

    class Outer(Command[int]):
        pass

    @sales.command_handler
    async def outer(command: Outer, app: App) -> int:
        return await app.ask(HowMany())

    @sales.command_handler
    async def ship(command: Ship) -> int:
        return 1

    @sales.query_handler
    async def count(query: HowMany, app: App) -> int:
        return await app.send(Ship())

    async with app_of(sales) as app:
        with pytest.raises(SendInQueryError):
            await app.send(Outer())


async def test_an_app_that_runs_cannot_be_entered() -> None:
    """Two runs of one object would share their connections."""
    async with shop() as app:
        with pytest.raises(AppStartedTwiceError) as caught:
            await app.start()

        assert await app.send(Ship()) == 1
    assert caught.value.code == "CD210"


async def test_an_app_can_be_entered_again() -> None:
    """Tests and reloading servers do that."""
    app = shop()
    for _ in range(2):
        async with app:
            assert await app.send(Ship()) == 1


async def test_stopping_twice_is_harmless() -> None:
    """Servers call their shutdown hooks more than once."""
    app = shop()
    await app.start()
    await app.stop()
    await app.stop()


async def test_there_is_no_current_message_outside_a_handler() -> None:
    """Code that is called from both sides must be able to tell."""
    assert MessageContext.peek() is None
    with pytest.raises(NoMessageError, match="outside a handler"):
        MessageContext.current()


async def test_publish_stores_the_event_before_it_returns() -> None:
    """When publish returns, a crash can no longer lose the event."""
    async with shop() as app:
        await app.publish(Shipped())

        assert await published_by(app) == ["bus.shipped"]


async def test_a_unit_of_work_commits_its_events_at_the_end_of_the_block() -> None:
    """Scripts and background jobs emit without a handler."""
    async with shop() as app:
        async with app.unit_of_work():
            emit(Shipped())
            before = await published_by(app)
        after = await published_by(app)

    assert (before, after) == ([], ["bus.shipped"])


async def test_a_unit_of_work_that_raises_leaves_nothing() -> None:
    """As with a handler: no commit, no event."""
    async with shop() as app:
        with pytest.raises(LookupError):
            await emit_and_fail(app)

        assert await published_by(app) == []


async def emit_and_fail(app: App) -> None:
    async with app.unit_of_work():
        emit(Shipped())
        raise LookupError


async def test_a_unit_of_work_handles_its_domain_events() -> None:
    """A block is to events what a handler is."""
    sales = Registry("sales")
    seen: list[str] = []

    @sales.event_handler
    async def note(event: Noted) -> None:
        seen.append("noted")

    async with app_of(sales) as app, app.unit_of_work():
        emit(Noted())
        assert seen == []

    assert seen == ["noted"]


async def test_a_unit_of_work_inside_a_handler_is_the_handlers() -> None:
    """Library code that opens a block must not commit half of its caller's work."""
    sales = Registry("sales")

    @sales.command_handler
    async def ship(command: Ship, app: App) -> int:
        async with app.unit_of_work():
            emit(Shipped())
        raise LookupError

    async with app_of(sales) as app:
        with pytest.raises(LookupError):
            await app.send(Ship())

        assert await published_by(app) == []


async def test_a_unit_of_work_that_has_ended_gives_no_resources() -> None:
    """A reference that outlives the block would use a closed transaction."""
    async with shop() as app:
        async with app.unit_of_work() as unit_of_work:
            pass

        with pytest.raises(UnitOfWorkClosedError) as caught:
            unit_of_work.resource(object)
    assert caught.value.code == "CD308"


async def test_a_handler_of_another_app_is_not_joined() -> None:
    """Two apps have two databases: a send across is a dispatch of its own."""
    sales, stock = Registry("sales"), Registry("stock")

    class Reserve(Command[int]):
        pass

    others: list[App] = []

    @sales.command_handler
    async def ship(command: Ship) -> int:
        await others[0].send(Reserve())
        raise LookupError

    @stock.command_handler
    async def reserve(command: Reserve) -> int:
        emit(Shipped())
        return 1

    async with app_of(sales) as one, app_of(stock) as other:
        others.append(other)
        with pytest.raises(LookupError):
            await one.send(Ship())

        assert await published_by(other) == ["bus.shipped"]
        assert await published_by(one) == []
