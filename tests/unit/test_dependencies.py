"""Dependencies: made as registered, never shared by two messages that must not share, closed exactly once."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import anyio.lowlevel
import punq
import pytest

from cqrs_decor import App, Command, DomainEvent, MessageContext, Registry, Retry, StartupError, emit
from cqrs_decor.container import Provider
from cqrs_decor.errors import MissingDependencyError, ScopeMismatchError
from cqrs_decor.memory import MemoryStore
from tests.unit.apps import app_of, faults_of

pytestmark = pytest.mark.feature("M12")


class Ship(Command[Any]):
    order: int = 0


class Noted(DomainEvent):
    pass


class Thing:
    def __init__(self) -> None:
        self.closed = 0


class Left:
    def __init__(self, thing: Thing) -> None:
        self.thing = thing


class Right:
    def __init__(self, thing: Thing) -> None:
        self.thing = thing


# --- punq -------------------------------------------------------------------------------------------------------------


async def things_of_two_messages(app: App) -> list[Any]:
    return [await app.send(Ship()), await app.send(Ship())]


def handler_of_both(sales: Registry) -> None:
    @sales.command_handler
    async def ship(command: Ship, left: Left, right: Right) -> Any:
        return left.thing, right.thing


async def test_a_punq_singleton_is_one_for_all_messages() -> None:
    """Made at start-up, not at the first of many concurrent messages."""
    sales = Registry("sales")
    handler_of_both(sales)
    app = app_of(sales)
    app.container.register(Thing, scope=punq.Scope.singleton).register(Left).register(Right)

    async with app:
        (one, same), (again, _) = await things_of_two_messages(app)

    assert one is same is again


async def test_a_punq_transient_is_one_for_each_message() -> None:
    """As punq makes one per resolve: both parts of one message share it, the next message has its own."""
    sales = Registry("sales")
    handler_of_both(sales)
    app = app_of(sales)
    app.container.register(Thing).register(Left).register(Right)

    async with app:
        (one, same), (other, _) = await things_of_two_messages(app)

    assert one is same
    assert one is not other


async def test_a_punq_registration_without_cache_is_made_wherever_it_is_asked_for() -> None:
    """cache=False keeps its meaning."""
    sales = Registry("sales")
    handler_of_both(sales)
    app = app_of(sales)
    app.container.register(Thing, cache=False).register(Left).register(Right)

    async with app:
        (one, other), _ = await things_of_two_messages(app)

    assert one is not other


async def test_a_punq_instance_and_a_factory_with_arguments_are_used_as_registered() -> None:
    """Registrations mean what they mean in punq."""
    sales = Registry("sales")
    thing = Thing()

    class Greeting:
        def __init__(self, text: str) -> None:
            self.text = text

    @sales.command_handler
    async def ship(command: Ship, thing: Thing, greeting: Greeting) -> Any:
        return thing, greeting.text

    app = app_of(sales)
    app.container.register(Thing, instance=thing)
    app.container.register(Greeting, text="hello")

    async with app:
        assert await app.send(Ship()) == (thing, "hello")


async def test_a_container_of_the_users_own_is_taken() -> None:
    """bootstrap(container=...) is where existing applications come in."""
    sales = Registry("sales")
    handler_of_both(sales)
    container = punq.Container()
    container.register(Thing, scope=punq.Scope.singleton)
    container.register(Left)
    container.register(Right)

    app = app_of(sales, container=container)
    async with app:
        one, same = await app.send(Ship())

    assert app.container is container
    assert one is same


async def test_another_container_can_take_its_place() -> None:
    """The protocol has two methods; a plugin adapts any container to it."""
    sales = Registry("sales")

    class OneThing:
        def provider(self, key: Any) -> Provider | None:
            return Provider(key=Thing, factory=Thing, lifetime="message", where="here") if key is Thing else None

        def registered(self) -> list[Any]:
            return [Thing]

    @sales.command_handler
    async def ship(command: Ship, thing: Thing) -> Any:
        return thing

    async with app_of(sales, container=OneThing()) as app:
        one, other = await things_of_two_messages(app)

    assert isinstance(one, Thing)
    assert one is not other


# --- @provider --------------------------------------------------------------------------------------------------------


async def test_providers_of_every_style_provide() -> None:
    """Plain, async, generator and async generator."""
    sales = Registry("sales")
    log: list[str] = []

    class A(Thing): ...

    class B(Thing): ...

    class C(Thing): ...

    class D(Thing): ...

    @sales.provider
    def a() -> A:
        return A()

    @sales.provider
    async def b(a: A) -> B:
        return B()

    @sales.provider
    def c(b: B) -> Iterator[C]:
        log.append("open c")
        yield C()
        log.append("close c")

    @sales.provider
    async def d(c: C) -> AsyncIterator[D]:
        log.append("open d")
        yield D()
        log.append("close d")

    @sales.command_handler
    async def ship(command: Ship, d: D, a: A) -> Any:
        log.append(type(d).__name__ + type(a).__name__)

    async with app_of(sales) as app:
        await app.send(Ship())

    assert log == ["open c", "open d", "DA", "close d", "close c"]


async def test_an_app_wide_provider_is_opened_at_start_and_closed_at_the_end() -> None:
    """Pools and clients live as long as the app."""
    sales = Registry("sales")
    log: list[str] = []

    @sales.provider(scope="app")
    async def thing() -> AsyncIterator[Thing]:
        log.append("open")
        yield Thing()
        log.append("close")

    @sales.command_handler
    async def ship(command: Ship, thing: Thing) -> Any:
        log.append("handle")
        return thing

    async with app_of(sales) as app:
        one, same = await things_of_two_messages(app)

    assert log == ["open", "handle", "handle", "close"]
    assert one is same


async def test_app_wide_things_are_closed_when_a_later_one_cannot_be_made() -> None:
    """A failed start leaves nothing open."""
    sales = Registry("sales")
    log: list[str] = []

    @sales.provider(scope="app")
    async def thing() -> AsyncIterator[Thing]:
        log.append("open")
        yield Thing()
        log.append("close")

    @sales.provider(scope="app")
    async def left(thing: Thing) -> Left:
        raise ConnectionError("no server")

    @sales.command_handler
    async def ship(command: Ship, left: Left) -> Any: ...

    with pytest.raises(ConnectionError, match="no server"):
        await app_of(sales).start()

    assert log == ["open", "close"]


async def test_a_parameter_with_a_default_keeps_it_when_nobody_provides_it() -> None:
    """Optional dependencies need no ceremony."""
    sales = Registry("sales")

    @sales.command_handler
    async def ship(command: Ship, thing: Thing | None = None, times: int = 3) -> Any:
        return thing, times

    async with app_of(sales) as app:
        assert await app.send(Ship()) == (None, 3)


async def test_a_keyword_only_dependency_is_given_by_name() -> None:
    """A star in the signature is the user's choice."""
    sales = Registry("sales")

    @sales.provider
    def thing() -> Thing:
        return Thing()

    @sales.command_handler
    async def ship(command: Ship, *, thing: Thing) -> Any:
        return thing

    async with app_of(sales) as app:
        assert isinstance(await app.send(Ship()), Thing)


async def test_a_handler_class_gets_dependencies_by_constructor_and_by_handle() -> None:
    """One graph for both: they share what lives for the message."""
    sales = Registry("sales")

    @sales.provider
    def thing() -> Thing:
        return Thing()

    @sales.command_handler
    class Shipping:
        def __init__(self, thing: Thing) -> None:
            self.thing = thing

        async def handle(self, command: Ship, thing: Thing, context: MessageContext) -> Any:
            return self.thing, thing, context.message

    async with app_of(sales) as app:
        command = Ship()
        mine, same, message = await app.send(command)

    assert mine is same
    assert message is command


async def test_an_override_replaces_a_provider_before_anything_is_compiled() -> None:
    """Also where a middleware or an app-wide object holds it."""
    sales = Registry("sales")

    @sales.provider(scope="app")
    def thing() -> Thing:
        raise AssertionError("the real one was made")

    @sales.provider(scope="app")
    def left(thing: Thing) -> Left:
        return Left(thing)

    @sales.command_handler
    async def ship(command: Ship, left: Left) -> Any:
        return left.thing

    fake = Thing()
    app = app_of(sales)
    await app.start(overrides={Thing: fake})
    try:
        assert await app.send(Ship()) is fake
    finally:
        await app.stop()


async def test_a_provider_goes_before_the_container() -> None:
    """The nearer declaration wins: a module's own provider over what the application registered for all."""
    sales = Registry("sales")

    @sales.provider
    def thing() -> Thing:
        return mine

    mine = Thing()

    @sales.command_handler
    async def ship(command: Ship, thing: Thing) -> Any:
        return thing

    app = app_of(sales)
    app.container.register(Thing)
    async with app:
        assert await app.send(Ship()) is mine


async def test_an_app_wide_object_cannot_ask_for_the_message() -> None:
    """There is none when it is made."""
    sales = Registry("sales")

    @sales.provider(scope="app")
    def thing(context: MessageContext) -> Thing: ...

    @sales.command_handler
    async def ship(command: Ship, thing: Thing) -> Any: ...

    (fault,) = await faults_of(sales)

    assert isinstance(fault, ScopeMismatchError)
    assert fault.held == "MessageContext"


async def test_a_punq_singleton_cannot_hold_a_transient() -> None:
    """punq lets it, and every message would then use the first one's."""
    sales = Registry("sales")

    @sales.command_handler
    async def ship(command: Ship, left: Left) -> Any: ...

    app = app_of(sales)
    app.container.register(Thing).register(Left, scope=punq.Scope.singleton)
    with pytest.raises(StartupError) as caught:
        await app.start()

    assert [type(fault) for fault in caught.value.exceptions] == [ScopeMismatchError]


async def test_the_nearest_registered_name_is_suggested() -> None:
    """A class of the same name from another module is a classic."""
    sales = Registry("sales")

    class Things:
        pass

    @sales.provider
    def thing() -> Thing: ...

    @sales.command_handler
    async def ship(command: Ship, things: Things) -> Any: ...

    (fault,) = await faults_of(sales)

    assert isinstance(fault, MissingDependencyError)


# --- scopes under load ------------------------------------------------------------------------------------------------


def scoped_shop(made: list[Thing]) -> Registry:
    sales = Registry("sales")

    @sales.provider
    async def thing() -> AsyncIterator[Thing]:
        thing = Thing()
        made.append(thing)
        try:
            yield thing
        finally:
            thing.closed += 1

    return sales


async def test_five_thousand_concurrent_messages_never_see_each_others_thing() -> None:
    """punq's own child containers hand out another request's instance; ours must not, however many run at once."""
    made: list[Thing] = []
    sales = scoped_shop(made)
    seen: list[tuple[Thing, ...]] = []

    @sales.provider
    def left(thing: Thing) -> Left:
        return Left(thing)

    @sales.command_handler
    async def ship(command: Ship, thing: Thing, left: Left) -> None:
        await anyio.lowlevel.checkpoint()
        assert thing.closed == 0
        seen.append((thing, left.thing))

    async with app_of(sales) as app, anyio.create_task_group() as tasks:
        for _ in range(5_000):
            tasks.start_soon(app.send, Ship())

    assert all(thing is same for thing, same in seen)
    assert len({id(thing) for thing, _ in seen}) == 5_000
    assert [thing.closed for thing in made] == [1] * 5_000


async def test_a_scope_is_closed_once_after_an_error() -> None:
    """A connection that is not given back after each failure ends the service in an hour."""
    made: list[Thing] = []
    sales = scoped_shop(made)

    @sales.command_handler
    async def ship(command: Ship, thing: Thing) -> None:
        raise LookupError

    async with app_of(sales) as app:
        with pytest.raises(LookupError):
            await app.send(Ship())

    assert [thing.closed for thing in made] == [1]


async def test_a_provider_sees_the_error_of_its_handler() -> None:
    """A generator that rolls back in its except clause must get there."""
    sales = Registry("sales")
    seen: list[str] = []

    @sales.provider
    async def thing() -> AsyncIterator[Thing]:
        try:
            yield Thing()
        except LookupError:
            seen.append("rolled back")
            raise

    @sales.command_handler
    async def ship(command: Ship, thing: Thing) -> None:
        raise LookupError

    async with app_of(sales) as app:
        with pytest.raises(LookupError):
            await app.send(Ship())

    assert seen == ["rolled back"]


async def test_a_provider_that_swallows_the_error_does_not_turn_it_into_success() -> None:
    """The transaction has been rolled back: the sender must not be told that all went well."""
    sales = Registry("sales")

    @sales.provider
    async def thing() -> AsyncIterator[Thing]:
        try:
            yield Thing()
        except LookupError:
            pass

    @sales.command_handler
    async def ship(command: Ship, thing: Thing) -> None:
        raise LookupError

    async with app_of(sales) as app:
        with pytest.raises(LookupError):
            await app.send(Ship())


async def test_a_scope_is_closed_once_after_a_time_out() -> None:
    """Also where closing awaits something."""
    made: list[Thing] = []
    sales = Registry("sales")

    @sales.provider
    async def thing() -> AsyncIterator[Thing]:
        thing = Thing()
        made.append(thing)
        try:
            yield thing
        finally:
            await anyio.lowlevel.checkpoint()
            thing.closed += 1

    @sales.command_handler(timeout=0.01)
    async def ship(command: Ship, thing: Thing) -> None:
        await asyncio.Event().wait()

    async with app_of(sales) as app:
        with pytest.raises(TimeoutError):
            await app.send(Ship())

    assert [thing.closed for thing in made] == [1]


async def test_a_scope_is_closed_once_after_a_cancellation() -> None:
    """A client that hangs up cancels the request."""
    made: list[Thing] = []
    sales = Registry("sales")
    entered = asyncio.Event()

    @sales.provider
    async def thing() -> AsyncIterator[Thing]:
        thing = Thing()
        made.append(thing)
        try:
            yield thing
        finally:
            await anyio.lowlevel.checkpoint()
            thing.closed += 1

    @sales.command_handler
    async def ship(command: Ship, thing: Thing) -> None:
        entered.set()
        await asyncio.Event().wait()

    async with app_of(sales) as app:
        task = asyncio.create_task(app.send(Ship()))
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    assert [thing.closed for thing in made] == [1]


async def test_each_attempt_has_a_scope_of_its_own() -> None:
    """A thing that failed once may be broken."""
    made: list[Thing] = []
    sales = scoped_shop(made)

    @sales.command_handler(retry=Retry(max_attempts=3, first_delay=Retry().first_delay * 0))
    async def ship(command: Ship, thing: Thing) -> int:
        assert [other.closed for other in made] == [1] * (len(made) - 1) + [0]
        if len(made) < 3:
            raise LookupError
        return len(made)

    async with app_of(sales) as app:
        assert await app.send(Ship()) == 3

    assert [thing.closed for thing in made] == [1, 1, 1]


async def test_a_scope_is_closed_after_the_commit() -> None:
    """What a provider does after its yield may rely on what was committed."""
    sales = Registry("sales")
    log: list[str] = []

    @sales.provider
    def thing() -> Iterator[Thing]:
        yield Thing()
        log.append("closed")

    @sales.command_handler
    async def ship(command: Ship, thing: Thing) -> None:
        emit(Noted())
        log.append("handled")

    @sales.event_handler
    async def note(event: Noted) -> None:
        log.append("event")

    async with app_of(sales) as app:
        await app.send(Ship())

    assert log == ["handled", "event", "closed"]


async def test_a_failing_close_reaches_the_sender() -> None:
    """It is not swallowed: somebody must look at it."""
    sales = Registry("sales")

    @sales.provider
    def thing() -> Iterator[Thing]:
        yield Thing()
        raise OSError("cannot close")

    @sales.command_handler
    async def ship(command: Ship, thing: Thing) -> None: ...

    async with app_of(sales) as app:
        with pytest.raises(OSError, match="cannot close"):
            await app.send(Ship())


# --- hooks ------------------------------------------------------------------------------------------------------------


@pytest.mark.feature("M14")
async def test_hooks_run_in_order_around_the_messages() -> None:
    """Start-up: the registry's, then bootstrap's; shut-down the other way round."""
    sales = Registry("sales")
    log: list[str] = []

    @sales.provider(scope="app")
    def thing() -> Iterator[Thing]:
        log.append("thing made")
        yield Thing()
        log.append("thing closed")

    @sales.on_startup
    async def warm_up(thing: Thing, app: App) -> None:
        log.append("warm up")

    @sales.on_shutdown
    def cool_down(thing: Thing) -> None:
        log.append("cool down")

    async def outer_up() -> None:
        log.append("outer up")

    def outer_down() -> None:
        log.append("outer down")

    @sales.command_handler
    async def ship(command: Ship) -> None:
        log.append("handled")

    async with app_of(sales, on_startup=[outer_up], on_shutdown=[outer_down]) as app:
        await app.send(Ship())

    assert log == ["thing made", "warm up", "outer up", "handled", "outer down", "cool down", "thing closed"]


@pytest.mark.feature("M14")
async def test_a_failing_start_up_hook_closes_what_was_opened() -> None:
    """And the app can be started again."""
    sales = Registry("sales")
    log: list[str] = []

    @sales.provider(scope="app")
    def thing() -> Iterator[Thing]:
        log.append("open")
        yield Thing()
        log.append("close")

    @sales.on_startup
    async def warm_up(thing: Thing) -> None:
        if len(log) == 1:
            raise ConnectionError("not yet")

    app = app_of(sales)
    with pytest.raises(ConnectionError):
        await app.start()
    async with app:
        pass

    assert log == ["open", "close", "open", "close"]


@pytest.mark.feature("M13")
@pytest.mark.feature("M14")
async def test_faults_of_hooks_and_middleware_classes_come_with_all_the_others() -> None:
    """They are found before anything is connected, and not one start later."""
    sales = Registry("sales")
    opened: list[str] = []

    class Watched(MemoryStore):
        async def open(self) -> None:
            opened.append("store")

    @sales.provider
    def thing() -> Thing: ...

    @sales.on_startup
    async def warm_up(thing: Thing) -> None: ...

    @sales.on_shutdown
    async def cool_down(left: Left) -> None: ...

    @sales.middleware
    class Pricing:
        def __init__(self, right: Right) -> None: ...

    @sales.command_handler
    async def ship(command: Ship, right: Right) -> Any: ...

    faults = await faults_of(sales, database=Watched())

    assert [(type(fault), fault.where.partition(" (")[0].rsplit(".", 1)[-1]) for fault in faults] == [
        (MissingDependencyError, "Pricing"),
        (ScopeMismatchError, "thing"),
        (MissingDependencyError, "cool_down"),
        (MissingDependencyError, "ship"),
    ]
    assert opened == []
