"""From send and ask to a handler and back: every way to write a handler, every kind of message."""

import threading
from dataclasses import dataclass

import pytest

from cqrs_decor import Command, DomainEvent, Query, Registry, Returns, emit, message
from cqrs_decor.errors import HandlerDefinitionError
from tests.unit.apps import app_of


class Double(Command[int]):
    number: int


class Triple(Command[int]):
    number: int


class HowMany(Query[int]):
    pass


class Doubled(DomainEvent):
    number: int


@dataclass(frozen=True)
class Ping(Returns[str]):
    name: str


@message(name="pong")
@dataclass(frozen=True)
class Pong:
    name: str


@pytest.mark.feature("M1")
async def test_an_async_function_handles_its_command() -> None:
    """The ordinary handler: what it returns is what send returns."""
    sales = Registry("sales")

    @sales.command_handler
    async def double(command: Double) -> int:
        return command.number * 2

    async with app_of(sales) as app:
        assert await app.send(Double(number=21)) == 42


@pytest.mark.feature("M5")
async def test_a_plain_function_runs_in_a_thread_and_not_on_the_loop() -> None:
    """Blocking code in a `def` handler must not stop every other message."""
    sales = Registry("sales")
    threads: list[int] = []

    @sales.command_handler
    def double(command: Double) -> int:
        threads.append(threading.get_ident())
        return command.number * 2

    async with app_of(sales) as app:
        result = await app.send(Double(number=21))

    assert result == 42
    assert threads != [threading.get_ident()]


@pytest.mark.feature("M5")
async def test_a_plain_function_emits_from_its_thread() -> None:
    """The context is carried over into the thread: emit there is the same as anywhere."""
    sales = Registry("sales")
    seen: list[int] = []

    @sales.command_handler
    def double(command: Double) -> int:
        emit(Doubled(number=command.number))
        return command.number * 2

    @sales.event_handler
    async def note(event: Doubled) -> None:
        seen.append(event.number)

    async with app_of(sales) as app:
        await app.send(Double(number=21))

    assert seen == [21]


@pytest.mark.feature("M5")
async def test_a_class_with_handle_is_made_for_each_message() -> None:
    """State that a handler keeps on itself must not leak into the next message."""
    sales = Registry("sales")

    @sales.command_handler
    class DoubleHandler:
        def __init__(self) -> None:
            self.calls = 0

        async def handle(self, command: Double) -> int:
            self.calls += 1
            return self.calls

    async with app_of(sales) as app:
        assert [await app.send(Double(number=1)), await app.send(Double(number=1))] == [1, 1]


@pytest.mark.feature("M5")
async def test_the_events_of_a_handler_class_are_taken_after_handle() -> None:
    """Those who come from python-cqrs have an `events` property; it means the same as emit."""
    sales = Registry("sales")
    seen: list[int] = []

    @sales.command_handler
    class DoubleHandler:
        def __init__(self) -> None:
            self._events: list[Doubled] = []

        @property
        def events(self) -> list[Doubled]:
            return self._events

        async def handle(self, command: Double) -> int:
            self._events.append(Doubled(number=command.number))
            return command.number * 2

    @sales.event_handler
    async def note(event: Doubled) -> None:
        seen.append(event.number)

    async with app_of(sales) as app:
        assert await app.send(Double(number=21)) == 42

    assert seen == [21]


@pytest.mark.feature("M5")
async def test_a_class_with_a_plain_handle_is_run_off_the_loop_too() -> None:
    """The style of `handle` decides, not that of the class."""
    sales = Registry("sales")
    threads: list[int] = []

    @sales.command_handler
    class DoubleHandler:
        def handle(self, command: Double) -> int:
            threads.append(threading.get_ident())
            return command.number * 2

    async with app_of(sales) as app:
        assert await app.send(Double(number=21)) == 42

    assert threads != [threading.get_ident()]


@pytest.mark.feature("M1")
async def test_one_handler_takes_either_of_two_commands() -> None:
    """`A | B` in the annotation registers the handler for both."""
    sales = Registry("sales")

    @sales.command_handler
    async def multiply(command: Double | Triple) -> int:
        return command.number * (2 if isinstance(command, Double) else 3)

    async with app_of(sales) as app:
        assert [await app.send(Double(number=5)), await app.send(Triple(number=5))] == [10, 15]


@pytest.mark.feature("M2")
async def test_a_query_is_answered() -> None:
    """ask is to queries what send is to commands."""
    sales = Registry("sales")

    @sales.query_handler
    async def count(query: HowMany) -> int:
        return 7

    async with app_of(sales) as app:
        assert await app.ask(HowMany()) == 7


@pytest.mark.feature("M6")
async def test_a_dataclass_with_returns_is_sent_and_asked() -> None:
    """Messages need no pydantic; the decorator says which kind a plain class is."""
    sales = Registry("sales")

    @sales.command_handler
    async def pong(command: Ping) -> str:
        return f"pong {command.name}"

    async with app_of(sales) as app:
        assert await app.send(Ping("a")) == "pong a"


@pytest.mark.feature("M6")
async def test_a_dataclass_is_emitted_as_a_domain_event() -> None:
    """A plain dataclass with an event handler stays in the process."""
    sales = Registry("sales")
    seen: list[str] = []

    @sales.command_handler
    async def ping(command: Ping) -> str:
        emit(Pong(command.name))
        return ""

    @sales.event_handler
    async def note(event: Pong) -> None:
        seen.append(event.name)

    async with app_of(sales) as app:
        await app.send(Ping("a"))

    assert seen == ["a"]


@pytest.mark.feature("M7")
async def test_a_handler_is_bound_without_a_decorator() -> None:
    """Handlers in code that must not import this library are bound from outside."""
    sales = Registry("sales")

    class DoubleHandler:
        async def handle(self, command: Double) -> int:
            return command.number * 2

    sales.bind(Double, DoubleHandler)

    async with app_of(sales) as app:
        assert await app.send(Double(number=4)) == 8


@pytest.mark.feature("M7")
async def test_binding_needs_no_annotation() -> None:
    """`bind` says which message; the function may say nothing."""
    sales = Registry("sales")

    async def double(command):  # type: ignore[no-untyped-def]
        return command.number * 2

    sales.bind((Double, Triple), double)

    async with app_of(sales) as app:
        assert await app.send(Triple(number=4)) == 8


@pytest.mark.feature("M7")
def test_binding_a_plain_dataclass_asks_for_its_kind() -> None:
    """A class that says nothing could be a command, a query or an event: guessing would be worse than asking."""
    sales = Registry("sales")

    async def handle(pong: Pong) -> None: ...

    with pytest.raises(HandlerDefinitionError, match=r"does not say whether it is a command, a query or an event"):
        sales.bind(Pong, handle)


@pytest.mark.feature("M7")
async def test_a_plain_dataclass_is_bound_with_its_kind() -> None:
    """kind= is the answer to the question above."""
    sales = Registry("sales")
    seen: list[str] = []

    async def handle(pong: Pong) -> None:
        seen.append(pong.name)

    sales.bind(Pong, handle, kind="command")

    async with app_of(sales) as app:
        await app.send(Pong("a"))  # type: ignore[arg-type]  # it promises no result

    assert seen == ["a"]


@pytest.mark.feature("M7")
async def test_an_app_is_made_of_several_registries() -> None:
    """Modules of one process keep their own registry, as they keep their own router elsewhere."""
    sales, stock = Registry("sales"), Registry("stock")

    @sales.command_handler
    async def double(command: Double) -> int:
        return command.number * 2

    @stock.command_handler
    async def triple(command: Triple) -> int:
        return command.number * 3

    async with app_of(sales, stock) as app:
        assert [await app.send(Double(number=1)), await app.send(Triple(number=1))] == [2, 3]


@pytest.mark.feature("M7")
async def test_two_apps_in_one_process_do_not_see_each_others_handlers() -> None:
    """The same command may have another handler in another app."""
    sales, stock = Registry("sales"), Registry("stock")

    @sales.command_handler
    async def double(command: Double) -> int:
        return command.number * 2

    @stock.command_handler
    async def negate(command: Double) -> int:
        return -command.number

    async with app_of(sales) as one, app_of(stock) as other:
        assert [await one.send(Double(number=1)), await other.send(Double(number=1))] == [2, -1]


async def test_a_decorator_returns_its_function_unchanged() -> None:
    """A handler can be called in a unit test as the function that it is."""
    sales = Registry("sales")

    async def double(command: Double) -> int:
        return command.number * 2

    assert sales.command_handler(double) is double
    assert sales.command_handler(name="double", timeout=1)(double) is double
    assert await double(Double(number=2)) == 4


async def test_an_app_takes_a_snapshot_of_its_registry_and_reads_it_anew_when_entered_again() -> None:
    """What is recorded while it runs must not change it under the feet of its messages."""
    sales = Registry("sales")

    @sales.command_handler
    async def double(command: Double) -> int:
        return command.number * 2

    app = app_of(sales)
    async with app:

        @sales.command_handler
        async def triple(command: Triple) -> int:
            return command.number * 3

        plans_before = [plan.spec.name for plan in app.plans]
    async with app:
        result = await app.send(Triple(number=2))

    assert [name.rsplit(".", 1)[-1] for name in plans_before] == ["double"]
    assert result == 6


async def test_a_registry_is_restored_to_a_snapshot() -> None:
    """Tests that declare handlers leave the registry as they found it."""
    sales = Registry("sales")
    before = sales.snapshot()

    @sales.command_handler
    async def double(command: Double) -> int:
        return command.number * 2

    sales.restore(before)

    assert sales.snapshot() == before


async def test_what_a_handler_raises_reaches_the_sender_unchanged() -> None:
    """Callers catch their own exceptions, not wrappers of ours."""
    sales = Registry("sales")
    error = LookupError("sold out")

    @sales.command_handler
    async def double(command: Double) -> int:
        raise error

    async with app_of(sales) as app:
        with pytest.raises(LookupError) as caught:
            await app.send(Double(number=1))

    assert caught.value is error
