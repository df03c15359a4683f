"""What keeps an app from starting: all of it at once, each with a code, a place and a way to mend it."""

from typing import Any, Literal

import pytest

from cqrs_decor import App, Command, DomainEvent, IntegrationEvent, Query, Registry, Retry, StartupError, bootstrap
from cqrs_decor.errors import (
    CqrsDecorError,
    DependencyCycleError,
    DuplicateConsumerError,
    DuplicateHandlerError,
    DuplicateWireNameError,
    HandlerDefinitionError,
    HandlerImportError,
    InvalidOptionError,
    MissingDependencyError,
    MissingResourceError,
    MissingServiceNameError,
    NoHandlerError,
    ReturnTypeMismatchError,
    ScopeMismatchError,
    SyncHandlerWithAsyncResourceError,
    UnknownTopicError,
    UnreadableAnnotationError,
)
from cqrs_decor.memory import MemoryBroker, MemoryStore
from tests.unit.apps import app_of, faults_of


class Ship(Command[int]):
    order: int


class Cancel(Command[None]):
    order: int


class HowMany(Query[int]):
    pass


class Noted(DomainEvent):
    pass


class Shipped(IntegrationEvent, topic="shipping", key="order", name="startup.shipped"):
    order: int


class Lost(IntegrationEvent):
    """It has no topic."""

    order: int


class Stock:
    pass


class AsyncSession:
    """Stands for a session that only coroutines can use."""


class Session:
    """Stands for a session that blocks."""


AsyncSession.__module__ = Session.__module__ = "sqlalchemy.orm"


class StoreWithSessions(MemoryStore):
    """A store that offers both kinds of session."""

    resources = {AsyncSession: False, Session: True}  # noqa: RUF012 - as declared in the protocol


class DurableBroker(MemoryBroker):
    """A broker that keeps the positions of consumer groups."""

    capabilities = MemoryBroker.capabilities.__class__(
        durable=True,
        ordered_by_key=True,
        replayable=True,
        shared=True,
        creates_topics=True,
        crash_may_lose="nothing",
        crash_may_repeat="nothing",
        crash_may_reorder="nothing",
    )


async def only_fault(*registries: Registry, **options: Any) -> CqrsDecorError:
    (fault,) = await faults_of(*registries, **options)
    return fault


@pytest.mark.feature("M1")
@pytest.mark.feature("M13")
async def test_two_handlers_for_a_command_are_both_named_by_their_source_lines() -> None:
    """Whoever reads it must find both without searching."""
    sales = Registry("sales")

    @sales.command_handler
    async def first(command: Ship) -> int: ...

    @sales.command_handler
    async def second(command: Ship) -> int: ...

    fault = await only_fault(sales)

    assert isinstance(fault, DuplicateHandlerError)
    assert (fault.code, fault.message) == ("CD102", "Ship")
    assert len(fault.places) == 2
    assert "first (test_startup.py:" in fault.where
    assert "second (test_startup.py:" in fault.where
    assert "remove all but one" in fault.fix


@pytest.mark.feature("M2")
@pytest.mark.feature("M13")
async def test_two_handlers_for_a_query_are_a_fault_as_well() -> None:
    """A query has one answer."""
    sales = Registry("sales")

    @sales.query_handler
    async def first(query: HowMany) -> int: ...

    @sales.query_handler
    async def second(query: HowMany) -> int: ...

    fault = await only_fault(sales)

    assert isinstance(fault, DuplicateHandlerError)
    assert fault.kind == "query"


@pytest.mark.feature("M1")
async def test_a_command_without_a_handler_names_what_is_known() -> None:
    """The commonest cause is a module that was not imported: the text says how one is found."""
    sales = Registry("sales")

    @sales.command_handler
    async def ship(command: Ship) -> int: ...

    async with app_of(sales) as app:
        with pytest.raises(NoHandlerError) as caught:
            await app.send(Cancel(order=1))

    assert caught.value.code == "CD101"
    assert caught.value.known == ["Ship"]
    assert "tests.unit.test_startup.Cancel" in str(caught.value)
    assert "Handlers are known for: Ship." in str(caught.value)
    assert "@command_handler" in caught.value.fix


@pytest.mark.feature("M2")
async def test_a_query_without_a_handler_names_the_other_decorator() -> None:
    """The fix must fit the kind of message."""
    async with app_of(Registry("sales")) as app:
        with pytest.raises(NoHandlerError, match="decorate one with @query_handler"):
            await app.ask(HowMany())


@pytest.mark.feature("M13")
async def test_an_annotation_that_cannot_be_read_names_its_parameter() -> None:
    """Names imported only for type checkers are the usual reason."""
    sales = Registry("sales")

    @sales.command_handler
    async def ship(command: Ship, stock: "NotImported") -> int: ...  # type: ignore[name-defined]  # noqa: F821

    fault = await only_fault(sales)

    assert isinstance(fault, UnreadableAnnotationError)
    assert (fault.code, fault.parameter) == ("CD103", "stock")
    assert "NameError: name 'NotImported' is not defined" in str(fault)
    assert "ship (test_startup.py:" in fault.where
    assert "TYPE_CHECKING" in fault.fix


@pytest.mark.feature("M13")
async def test_a_parameter_without_an_annotation_is_a_fault() -> None:
    """Nothing says what it wants."""
    sales = Registry("sales")

    @sales.command_handler
    async def ship(command: Ship, stock) -> int: ...  # type: ignore[no-untyped-def]

    fault = await only_fault(sales)

    assert isinstance(fault, UnreadableAnnotationError)
    assert fault.parameter == "stock"


@pytest.mark.feature("M13")
async def test_a_dependency_that_nobody_provides_names_parameter_and_type() -> None:
    """It must not wait for the first message."""
    sales = Registry("sales")

    @sales.command_handler
    async def ship(command: Ship, stock: Stock) -> int: ...

    fault = await only_fault(sales)

    assert isinstance(fault, MissingDependencyError)
    assert (fault.code, fault.parameter, fault.wanted) == ("CD104", "stock", "Stock")
    assert "ship (test_startup.py:" in fault.where
    assert "@provider" in fault.fix


@pytest.mark.feature("M13")
async def test_a_dependency_of_a_dependency_is_looked_at_too() -> None:
    """The whole graph is drawn at start-up."""
    sales = Registry("sales")

    class Clerk:
        pass

    @sales.provider
    def clerk(stock: Stock) -> Clerk: ...

    @sales.command_handler
    async def ship(command: Ship, clerk: Clerk) -> int: ...

    fault = await only_fault(sales)

    assert isinstance(fault, MissingDependencyError)
    assert fault.parameter == "stock"
    assert "clerk (test_startup.py:" in fault.where


@pytest.mark.feature("M13")
async def test_a_session_without_a_database_says_which_url_to_give() -> None:
    """With no arguments everything is in memory; the next step must be in the text."""
    sales = Registry("sales")

    @sales.command_handler
    async def ship(command: Ship, session: AsyncSession) -> int: ...

    fault = await only_fault(sales)

    assert isinstance(fault, MissingResourceError)
    assert fault.code == "CD113"
    assert 'bootstrap(database="sqlite+aiosqlite:///app.db")' in fault.fix


@pytest.mark.feature("M13")
async def test_a_return_type_against_the_command_is_a_fault() -> None:
    """Callers rely on Command[int]; no type checker may have looked at the handler."""
    sales = Registry("sales")

    @sales.command_handler
    async def ship(command: Ship) -> str: ...

    fault = await only_fault(sales)

    assert isinstance(fault, ReturnTypeMismatchError)
    assert (fault.code, fault.promised, fault.returned) == ("CD105", "int", "str")
    assert "ship (test_startup.py:" in fault.where


@pytest.mark.feature("M13")
@pytest.mark.parametrize("returned", [int, Any, bool, Literal[3]])
async def test_a_return_type_that_may_fit_is_let_pass(returned: Any) -> None:
    """Only what is surely wrong stops a start-up; the rest is a type checker's business."""
    sales = Registry("sales")

    async def ship(command: Ship) -> Any: ...

    ship.__annotations__["return"] = returned
    sales.command_handler(ship)

    assert await faults_of(sales) == []


@pytest.mark.feature("M13")
async def test_a_consumer_of_an_event_without_a_topic_is_a_fault() -> None:
    """No broker could carry it, so the handler would never run."""
    sales = Registry("sales")

    @sales.event_handler
    async def mourn(event: Lost) -> None: ...

    fault = await only_fault(sales)

    assert isinstance(fault, UnknownTopicError)
    assert fault.code == "CD106"
    assert "mourn (test_startup.py:" in fault.where
    assert 'class Lost(IntegrationEvent, topic="...")' in fault.fix


@pytest.mark.feature("M13")
async def test_a_plain_function_that_asks_for_an_async_session_is_a_fault() -> None:
    """It would fail at the first await it cannot make."""
    sales = Registry("sales")

    @sales.command_handler
    def ship(command: Ship, session: AsyncSession) -> int: ...

    fault = await only_fault(sales, database=StoreWithSessions())

    assert isinstance(fault, SyncHandlerWithAsyncResourceError)
    assert (fault.code, fault.parameter) == ("CD107", "session")
    assert "or ask for Session" in fault.fix


@pytest.mark.feature("M13")
async def test_a_coroutine_that_asks_for_a_blocking_session_is_a_fault() -> None:
    """It would stop the loop at every query."""
    sales = Registry("sales")

    @sales.command_handler
    async def ship(command: Ship, session: Session) -> int: ...

    fault = await only_fault(sales, database=StoreWithSessions())

    assert isinstance(fault, HandlerDefinitionError)
    assert "would block the loop" in str(fault)


@pytest.mark.feature("M13")
async def test_everything_that_is_wrong_comes_at_once() -> None:
    """One start, one list: not a new error after each mend."""
    sales = Registry("sales")

    @sales.command_handler
    async def ship(command: Ship, stock: Stock) -> str: ...

    @sales.command_handler
    async def ship_again(command: Ship, stock: Stock) -> int: ...

    @sales.command_handler
    async def cancel(command: Cancel, clerk: "Nobody") -> None: ...  # type: ignore[name-defined]  # noqa: F821

    @sales.event_handler
    async def mourn(event: Lost) -> None: ...

    @sales.command_handler
    async def orphan(command: Cancel, stock: Stock, session: AsyncSession) -> None: ...

    with pytest.raises(StartupError) as caught:
        await app_of(sales, broker="carrier-pigeon://roof").start()

    codes = sorted({fault.code for fault in caught.value.exceptions})
    assert codes == ["CD102", "CD103", "CD104", "CD105", "CD106", "CD113", "CD701"]
    for fault in caught.value.exceptions:
        assert fault.fix
        assert f"({fault.code})" in str(fault)
    assert str(caught.value).startswith(f"The app cannot start: {len(caught.value.exceptions)} problems.\n1. ")


@pytest.mark.feature("M13")
async def test_an_app_that_could_not_start_can_be_mended_and_started() -> None:
    """Nothing of the failed start may be left over."""
    sales = Registry("sales")

    @sales.command_handler
    async def ship(command: Ship, stock: Stock) -> int:
        return 1

    app = app_of(sales)
    with pytest.raises(StartupError):
        await app.start()
    app.container.register(Stock)

    async with app:
        assert await app.send(Ship(order=1)) == 1


@pytest.mark.feature("M13")
async def test_faults_can_be_sorted_by_type() -> None:
    """except* works on the group, and keeps its class."""
    sales = Registry("sales")

    @sales.command_handler
    async def ship(command: Ship, stock: Stock) -> str: ...

    missing, others = [], []
    try:
        await app_of(sales).start()
    except* MissingDependencyError as group:
        missing.append(group)
    except* CqrsDecorError as group:
        others.append(group)

    assert [type(group) for group in (*missing, *others)] == [StartupError, StartupError]


@pytest.mark.feature("M13")
async def test_a_scoped_value_in_an_app_wide_one_is_a_fault() -> None:
    """The app-wide object would keep the first message's value for good."""
    sales = Registry("sales")

    class Session:
        pass

    @sales.provider
    def session() -> Session: ...

    @sales.provider(scope="app")
    def stock(session: Session) -> Stock: ...

    @sales.command_handler
    async def ship(command: Ship, stock: Stock) -> int: ...

    fault = await only_fault(sales)

    assert isinstance(fault, ScopeMismatchError)
    assert fault.code == "CD109"
    assert fault.held.endswith("Session")


@pytest.mark.feature("M13")
async def test_a_circle_of_dependencies_is_drawn() -> None:
    """The path is the whole answer."""
    sales = Registry("sales")

    class Hen:
        def __init__(self, egg: "Egg") -> None: ...

    class Egg:
        def __init__(self, hen: Hen) -> None: ...

    Hen.__init__.__annotations__["egg"] = Egg

    @sales.command_handler
    async def ship(command: Ship, hen: Hen) -> int: ...

    app = app_of(sales)
    app.container.register(Hen)
    app.container.register(Egg)
    with pytest.raises(StartupError) as caught:
        await app.start()

    (fault,) = caught.value.exceptions
    assert isinstance(fault, DependencyCycleError)
    assert [name.rsplit(".", 1)[-1] for name in fault.cycle] == ["Hen", "Egg", "Hen"]


@pytest.mark.feature("B3")
async def test_two_consumers_of_one_name_are_a_fault() -> None:
    """Inbox rows are kept by that name: the second one would be taken for a repeat of the first."""
    sales = Registry("sales")

    @sales.event_handler(name="bill")
    async def first(event: Shipped) -> None: ...

    @sales.event_handler(name="bill")
    async def second(event: Shipped) -> None: ...

    fault = await only_fault(sales)

    assert isinstance(fault, DuplicateConsumerError)
    assert (fault.code, fault.name, len(fault.places)) == ("CD112", "bill", 2)


async def test_two_classes_of_one_wire_name_are_a_fault_where_both_are_handled() -> None:
    """An incoming message can become one of them only."""
    sales = Registry("sales")

    class One(IntegrationEvent, topic="startup", name="startup.same"):
        pass

    class Other(IntegrationEvent, topic="startup", name="startup.same"):
        pass

    @sales.event_handler
    async def one(event: One) -> None: ...

    @sales.event_handler
    async def other(event: Other) -> None: ...

    fault = await only_fault(sales)

    assert isinstance(fault, DuplicateWireNameError)
    assert (fault.code, fault.topic, fault.name, fault.version) == ("CD114", "startup", "startup.same", 1)


async def test_a_broker_that_keeps_positions_needs_the_name_of_the_service() -> None:
    """Without it two services would share one consumer group."""
    fault = await only_fault(Registry("sales"), broker=DurableBroker(), service=None)

    assert isinstance(fault, MissingServiceNameError)
    assert fault.code == "CD115"
    assert "CQRS_DECOR_SERVICE" in fault.fix


async def test_a_module_that_cannot_be_imported_keeps_its_cause() -> None:
    """The user's own traceback is what helps."""
    fault = await only_fault_of_module("tests.unit.no_such_module")

    assert isinstance(fault, HandlerImportError)
    assert (fault.code, fault.module) == ("CD117", "tests.unit.no_such_module")
    assert isinstance(fault.__cause__, ModuleNotFoundError)


async def only_fault_of_module(name: str) -> CqrsDecorError:
    app = app_of(Registry("sales"))
    app = app.configured(modules=(name,))
    with pytest.raises(StartupError) as caught:
        await app.start()
    (fault,) = caught.value.exceptions
    return fault


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"timeout": 0}, "timeout"),
        ({"timeout": -1.5}, "timeout"),
        ({"concurrency": 0}, "concurrency"),
    ],
)
async def test_an_option_that_makes_no_sense_is_a_fault(options: dict[str, Any], option: str) -> None:
    """A typing error in a number must not become a handler that never runs."""
    sales = Registry("sales")

    @sales.command_handler(**options)
    async def ship(command: Ship) -> int: ...

    fault = await only_fault(sales)

    assert isinstance(fault, InvalidOptionError)
    assert (fault.code, fault.option) == ("CD108", option)


async def test_isolated_is_for_domain_events_only() -> None:
    """A consumer has its own transaction already; saying so twice hints at a misunderstanding."""
    sales = Registry("sales")

    @sales.event_handler(isolated=True)
    async def bill(event: Shipped) -> None: ...

    fault = await only_fault(sales)

    assert isinstance(fault, InvalidOptionError)
    assert fault.option == "isolated"


async def test_retry_on_a_domain_event_handler_points_to_the_command() -> None:
    """It runs inside the command's transaction: a part of a transaction cannot be tried again."""
    sales = Registry("sales")

    @sales.event_handler(retry=Retry())
    async def note(event: Noted) -> None: ...

    fault = await only_fault(sales)

    assert isinstance(fault, InvalidOptionError)
    assert "put retry= on the command handler" in fault.fix


async def test_the_wrong_decorator_for_a_message_names_the_right_one() -> None:
    """A query handler for a command would never be found by send."""
    sales = Registry("sales")

    @sales.query_handler
    async def ship(command: Ship) -> int: ...

    fault = await only_fault(sales)

    assert isinstance(fault, HandlerDefinitionError)
    assert fault.code == "CD111"
    assert "@command_handler" in fault.fix


async def test_a_handler_of_something_that_is_no_message_is_a_fault() -> None:
    """The first parameter says which message it is for."""
    sales = Registry("sales")

    @sales.command_handler
    async def ship(command: int) -> int: ...

    fault = await only_fault(sales)

    assert isinstance(fault, HandlerDefinitionError)
    assert "int is no message class" in str(fault)


async def test_a_handler_without_parameters_is_a_fault() -> None:
    """It does not say which message it handles."""
    sales = Registry("sales")

    @sales.command_handler
    async def ship() -> int: ...

    fault = await only_fault(sales)

    assert isinstance(fault, HandlerDefinitionError)
    assert "annotate its first parameter" in fault.fix


async def test_a_class_without_handle_is_a_fault() -> None:
    """It would be called like a function."""
    sales = Registry("sales")

    @sales.command_handler
    class Shipping:
        pass

    fault = await only_fault(sales)

    assert isinstance(fault, HandlerDefinitionError)
    assert "has no method `handle`" in str(fault)


async def test_a_generator_is_no_handler() -> None:
    """Its body would never run."""
    sales = Registry("sales")

    @sales.command_handler
    async def ship(command: Ship):  # type: ignore[no-untyped-def]
        yield 1

    fault = await only_fault(sales)

    assert isinstance(fault, HandlerDefinitionError)
    assert "must not be a generator" in str(fault)


def test_what_cannot_be_called_is_refused_where_it_is_decorated() -> None:
    """Nothing of it could be told later."""
    with pytest.raises(HandlerDefinitionError, match="Only functions and classes can be handlers"):
        Registry("sales").command_handler(3)  # type: ignore[type-var]


async def test_parts_examines_without_starting_anything() -> None:
    """`doctor` and start-up look at the same thing."""
    sales = Registry("sales")

    @sales.command_handler
    async def ship(command: Ship, stock: Stock) -> int: ...

    parts = app_of(sales).parts()

    assert [fault.code for fault in parts.faults] == ["CD104"]


@pytest.mark.feature("M14")
async def test_a_hook_may_send_when_the_app_starts_and_when_it_stops() -> None:
    """Filling a cache and saying goodbye are commands like any other."""
    sales, sent = Registry("hooks that send"), list[str]()

    class Note(Command[None]):
        text: str

    @sales.command_handler(message=Note)
    async def note(command: Note) -> None:
        sent.append(command.text)

    @sales.on_startup
    async def seed(app: App) -> None:
        await app.send(Note(text="seed"))

    @sales.on_shutdown
    async def farewell(app: App) -> None:
        await app.send(Note(text="farewell"))

    async with bootstrap(registry=sales, discover=False):
        assert sent == ["seed"]

    assert sent == ["seed", "farewell"]
