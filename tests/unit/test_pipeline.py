"""What stands around a handler: middlewares, time-outs, retries, and the order of it all."""

import asyncio
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import anyio
import pytest
from pydantic import BaseModel, ValidationError

from cqrs_decor import (
    App,
    CallNext,
    Command,
    DomainEvent,
    IntegrationEvent,
    MessageContext,
    Park,
    Query,
    Registry,
    Retry,
    RetryLater,
    emit,
)
from cqrs_decor.errors import CommitOutcomeUnknownError, HandlerTimeoutError, UnitOfWorkClosedError
from cqrs_decor.memory import MemoryStore
from cqrs_decor.observers import MessageDispatched, Moment
from cqrs_decor.outbox import OutboxFilter
from tests.unit.apps import app_of

QUICK = Retry(max_attempts=3, first_delay=timedelta(0), max_delay=timedelta(0))


class Ship(Command[str]):
    order: int = 1


class HowMany(Query[int]):
    pass


class Noted(DomainEvent):
    pass


class Shipped(IntegrationEvent, topic="shipping", name="pipeline.shipped"):
    order: int = 1


async def stored(app: App) -> list[str]:
    return [record.envelope.data.decode() for record in await app.store.outbox.find(OutboxFilter())]


# --- middlewares ------------------------------------------------------------------------------------------------------


@pytest.mark.feature("M10")
async def test_a_middleware_runs_around_commands_queries_events_and_consumed_messages() -> None:
    """One protocol for everything: who measures, authorises or logs writes it once."""
    sales = Registry("sales")
    seen: list[tuple[str, str, bool]] = []

    @sales.middleware
    async def watch(message: Any, call_next: CallNext) -> Any:
        context = MessageContext.current()
        seen.append((type(message).__name__, context.origin.kind, context.message is message))
        return await call_next(message)

    @sales.command_handler
    async def ship(command: Ship) -> str:
        emit(Noted(), Shipped())
        return "shipped"

    @sales.query_handler
    async def count(query: HowMany) -> int:
        return 3

    @sales.event_handler
    async def note(event: Noted) -> None: ...

    @sales.event_handler
    async def bill(event: Shipped) -> None: ...

    async with app_of(sales) as app:
        assert await app.send(Ship()) == "shipped"
        assert await app.ask(HowMany()) == 3
        await app.drain()

    assert seen == [
        ("Ship", "command", True),
        ("Noted", "event", True),
        ("HowMany", "query", True),
        ("Shipped", "event", True),
    ]


@pytest.mark.feature("M10")
async def test_middlewares_run_outermost_first_as_listed() -> None:
    """Those of bootstrap stand outside those of the registry, each in its order."""
    sales = Registry("sales")
    log: list[str] = []

    def named(name: str) -> Callable[..., Any]:
        async def middleware(message: Any, call_next: CallNext) -> Any:
            log.append(f"{name} in")
            try:
                return await call_next(message)
            finally:
                log.append(f"{name} out")

        return middleware

    sales.middleware(named("third"))
    sales.middleware(named("fourth"))

    @sales.command_handler
    async def ship(command: Ship) -> str:
        log.append("handler")
        return ""

    async with app_of(sales, middlewares=[named("first"), named("second")]) as app:
        await app.send(Ship())

    inwards = [f"{name} in" for name in ("first", "second", "third", "fourth")]
    outwards = [f"{name} out" for name in ("fourth", "third", "second", "first")]
    assert log == [*inwards, "handler", *outwards]


@pytest.mark.feature("M10")
async def test_a_middleware_changes_message_and_result_and_may_skip_the_handler() -> None:
    """What it passes on is what comes next; not passing on is an answer as well."""
    sales = Registry("sales")
    handled: list[int] = []

    @sales.middleware
    async def discount(message: Any, call_next: CallNext) -> Any:
        if message.order < 0:
            return "refused"
        return f"<{await call_next(Ship(order=message.order * 10))}>"

    @sales.command_handler
    async def ship(command: Ship) -> str:
        handled.append(command.order)
        return "shipped"

    async with app_of(sales) as app:
        assert [await app.send(Ship(order=2)), await app.send(Ship(order=-1))] == ["<shipped>", "refused"]

    assert handled == [20]


@pytest.mark.feature("M10")
async def test_a_middleware_may_catch_what_the_handler_raised_after_the_rollback() -> None:
    """It stands outside the transaction: nothing of the failed handler is kept."""
    sales = Registry("sales")

    @sales.middleware
    async def soften(message: Any, call_next: CallNext) -> Any:
        try:
            return await call_next(message)
        except LookupError:
            return "sold out"

    @sales.command_handler
    async def ship(command: Ship) -> str:
        emit(Shipped())
        raise LookupError

    async with app_of(sales) as app:
        assert await app.send(Ship()) == "sold out"

        assert await stored(app) == []


@pytest.mark.feature("M10")
async def test_a_middleware_class_is_made_once_with_app_wide_dependencies() -> None:
    """Its constructor asks for what it needs, as a handler class does."""
    sales = Registry("sales")

    class Tariff:
        factor = 3

    made: list[object] = []

    @sales.provider(scope="app")
    async def tariff() -> Tariff:
        return Tariff()

    @sales.middleware
    class Pricing:
        def __init__(self, tariff: Tariff) -> None:
            made.append(self)
            self.tariff = tariff

        async def __call__(self, message: Any, call_next: CallNext) -> Any:
            return await call_next(Ship(order=message.order * self.tariff.factor))

    @sales.command_handler
    async def ship(command: Ship) -> str:
        return str(command.order)

    async with app_of(sales) as app:
        assert [await app.send(Ship(order=1)), await app.send(Ship(order=2))] == ["3", "6"]

    assert len(made) == 1


@pytest.mark.feature("M10")
async def test_a_middleware_runs_inside_a_joined_send_too() -> None:
    """Authorisation must hold for every command, however it was sent."""
    sales = Registry("sales")
    seen: list[str] = []

    class Outer(Command[str]):
        pass

    @sales.middleware
    async def watch(message: Any, call_next: CallNext) -> Any:
        seen.append(type(message).__name__)
        return await call_next(message)

    @sales.command_handler
    async def outer(command: Outer, app: App) -> str:
        return await app.send(Ship())

    @sales.command_handler
    async def ship(command: Ship) -> str:
        return "shipped"

    async with app_of(sales) as app:
        assert await app.send(Outer()) == "shipped"

    assert seen == ["Outer", "Ship"]


# --- time-out ---------------------------------------------------------------------------------------------------------


@pytest.mark.feature("M11")
async def test_a_time_out_rolls_back_and_is_a_timeout_error() -> None:
    """A handler that hangs must not hold its locks for ever."""
    sales = Registry("sales")

    @sales.command_handler(name="ship", timeout=0.01)
    async def ship(command: Ship) -> str:
        emit(Shipped())
        await asyncio.Event().wait()
        return "never"

    async with app_of(sales) as app:
        with pytest.raises(TimeoutError) as caught:
            await app.send(Ship())

        assert await stored(app) == []
    assert isinstance(caught.value, HandlerTimeoutError)
    assert (caught.value.code, caught.value.handler, caught.value.limit_s) == ("CD206", "ship", 0.01)


@pytest.mark.feature("M11")
async def test_a_timeout_error_of_the_handlers_own_passes_unchanged() -> None:
    """A socket that timed out is not our time-out."""
    sales = Registry("sales")

    @sales.command_handler(timeout=60)
    async def ship(command: Ship) -> str:
        raise TimeoutError("socket")

    async with app_of(sales) as app:
        with pytest.raises(TimeoutError, match=r"^socket$"):
            await app.send(Ship())


@pytest.mark.feature("M11")
async def test_a_time_out_ends_each_attempt_and_not_all_of_them() -> None:
    """timeout= is documented as the limit of one attempt: the next one gets as long."""
    sales = Registry("sales")
    attempts: list[int] = []

    @sales.command_handler(timeout=0.05, retry=QUICK)
    async def ship(command: Ship) -> str:
        attempts.append(MessageContext.current().attempt)
        if len(attempts) < 2:
            await asyncio.Event().wait()
        return "shipped"

    async with app_of(sales) as app:
        assert await app.send(Ship()) == "shipped"

    assert attempts == [1, 2]


# --- retries ----------------------------------------------------------------------------------------------------------


@pytest.mark.feature("M11")
async def test_every_attempt_has_a_unit_of_work_of_its_own() -> None:
    """What a failed attempt emitted must not come along with the one that worked."""
    sales = Registry("sales")
    units: list[object] = []
    ids: set[str] = set()

    @sales.command_handler(retry=QUICK)
    async def ship(command: Ship) -> str:
        context = MessageContext.current()
        units.append(context.unit_of_work)
        ids.add(context.id)
        emit(Shipped(order=context.attempt), Noted())
        if context.attempt < 3:
            raise LookupError
        return "shipped"

    noted: list[int] = []

    @sales.event_handler
    async def note(event: Noted) -> None:
        noted.append(1)

    async with app_of(sales) as app:
        assert await app.send(Ship()) == "shipped"

        assert await stored(app) == ['{"order":3}']
    assert len({id(unit) for unit in units}) == 3
    assert len(ids) == 1
    assert noted == [1]


@pytest.mark.feature("M11")
async def test_the_last_error_is_raised_when_attempts_are_used_up() -> None:
    """Not an error about retrying: the handler's own."""
    sales = Registry("sales")

    @sales.command_handler(retry=QUICK)
    async def ship(command: Ship) -> str:
        raise LookupError(MessageContext.current().attempt)

    async with app_of(sales) as app:
        with pytest.raises(LookupError) as caught:
            await app.send(Ship())

    assert caught.value.args == (3,)


@pytest.mark.feature("M11")
async def test_only_what_on_names_is_tried_again() -> None:
    """A bug is not mended by repeating it."""
    sales = Registry("sales")
    attempts: list[int] = []

    @sales.command_handler(retry=Retry(max_attempts=3, on=(ConnectionError,), first_delay=timedelta(0)))
    async def ship(command: Ship) -> str:
        attempts.append(1)
        raise LookupError

    async with app_of(sales) as app:
        with pytest.raises(LookupError):
            await app.send(Ship())

    assert attempts == [1]


class Fields(BaseModel):
    number: int


def a_validation_error() -> ValidationError:
    with pytest.raises(ValidationError) as caught:
        Fields.model_validate({"number": "no"})
    return caught.value


@pytest.mark.feature("M11")
@pytest.mark.parametrize(
    "error",
    [
        Park("why"),
        a_validation_error(),
        CommitOutcomeUnknownError("memory://"),
        UnitOfWorkClosedError("A transaction"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_what_another_try_cannot_help_is_not_tried_again(error: Exception) -> None:
    """Repeating is useless, or, after a commit whose outcome is unknown, unsafe."""
    sales = Registry("sales")
    attempts: list[int] = []

    @sales.command_handler(retry=QUICK)
    async def ship(command: Ship) -> str:
        attempts.append(1)
        raise error

    async with app_of(sales) as app:
        with pytest.raises(type(error)):
            await app.send(Ship())

    assert attempts == [1]


@pytest.mark.feature("M11")
async def test_retry_later_is_tried_again_after_the_wait_that_it_names() -> None:
    """It says what the policy cannot know; the policy still says how often."""
    sales = Registry("sales")
    attempts: list[int] = []

    @sales.command_handler(
        retry=Retry(max_attempts=2, on=(ConnectionError,), first_delay=timedelta(hours=1), max_delay=timedelta(hours=1))
    )
    async def ship(command: Ship) -> str:
        attempts.append(1)
        if len(attempts) == 1:
            raise RetryLater(0)
        return "shipped"

    async with app_of(sales) as app:
        assert await app.send(Ship()) == "shipped"

    assert attempts == [1, 1]


@pytest.mark.feature("M11")
async def test_retry_later_without_a_policy_reaches_the_sender() -> None:
    """A send has no retries unless it was told so: somebody is waiting for its answer."""
    sales = Registry("sales")

    @sales.command_handler
    async def ship(command: Ship) -> str:
        raise RetryLater(0)

    async with app_of(sales) as app:
        with pytest.raises(RetryLater):
            await app.send(Ship())


class MoodyStore(MemoryStore):
    """Its first commits fail with what it calls transient."""

    resources = {dict: False}  # noqa: RUF012 - as declared in the protocol

    def __init__(self, failures: int) -> None:
        super().__init__()
        self.failures = failures

    async def begin(self, *, read_only: bool = False) -> Any:
        transaction = await super().begin(read_only=read_only)
        commit = transaction.commit
        transaction.resource = lambda kind: {}  # type: ignore[method-assign,assignment,return-value,misc]

        async def fail() -> None:
            if self.failures:
                self.failures -= 1
                await transaction.rollback()
                raise ConnectionAbortedError("deadlock")
            await commit()

        transaction.commit = fail  # type: ignore[method-assign]
        return transaction

    def is_transient(self, error: BaseException) -> bool:
        return isinstance(error, ConnectionAbortedError)


@pytest.mark.feature("M11")
async def test_what_the_store_calls_transient_is_tried_again_without_a_policy() -> None:
    """A deadlock is nobody's fault, and the next try passes."""
    sales = Registry("sales")
    attempts: list[int] = []

    @sales.command_handler
    async def ship(command: Ship, session: dict) -> str:  # type: ignore[type-arg]
        attempts.append(MessageContext.current().attempt)
        emit(Shipped())
        return "shipped"

    async with app_of(sales, database=MoodyStore(failures=2)) as app:
        assert await app.send(Ship()) == "shipped"

        assert await stored(app) == ['{"order":1}']
    assert attempts == [1, 2, 3]


@pytest.mark.feature("M11")
async def test_transient_failures_without_end_reach_the_sender() -> None:
    """Four attempts, then the truth."""
    sales = Registry("sales")

    @sales.command_handler
    async def ship(command: Ship, session: dict) -> str:  # type: ignore[type-arg]
        return "shipped"

    store = MoodyStore(failures=99)
    async with app_of(sales, database=store) as app:
        with pytest.raises(ConnectionAbortedError, match="deadlock"):
            await app.send(Ship())

    assert store.failures == 95


# --- concurrency ------------------------------------------------------------------------------------------------------


@pytest.mark.feature("M11")
async def test_no_more_than_the_given_number_run_at_a_time() -> None:
    """A handler that calls a fragile API says how much that API can take."""
    sales = Registry("sales")
    running, most = 0, 0
    entered = 0
    gate = asyncio.Event()

    @sales.command_handler(concurrency=2)
    async def ship(command: Ship) -> str:
        nonlocal running, most, entered
        running += 1
        entered += 1
        most = max(most, running)
        if entered == 2:
            gate.set()
        await gate.wait()
        await anyio.lowlevel.checkpoint()
        running -= 1
        return ""

    async with app_of(sales) as app, anyio.create_task_group() as tasks:
        for _ in range(10):
            tasks.start_soon(app.send, Ship())

    assert (most, entered) == (2, 10)


@pytest.mark.feature("M11")
async def test_a_joined_send_does_not_wait_for_a_place() -> None:
    """Waiting while holding the outer transaction could wait for itself."""
    sales = Registry("sales")

    @sales.command_handler(concurrency=1)
    async def ship(command: Ship, app: App) -> str:
        return "end" if command.order == 0 else await app.send(Ship(order=command.order - 1))

    async with app_of(sales) as app:
        with anyio.fail_after(5):
            assert await app.send(Ship(order=3)) == "end"


# --- observers --------------------------------------------------------------------------------------------------------


async def test_observers_are_told_how_each_dispatch_ended() -> None:
    """Metrics and traces hang on this seam."""
    sales = Registry("sales")
    moments: list[Moment] = []

    class Recorder:
        def notice(self, moment: Moment) -> None:
            moments.append(moment)

    @sales.command_handler(name="ship")
    async def ship(command: Ship) -> str:
        if command.order < 0:
            raise LookupError
        return ""

    async with app_of(sales, observers=[Recorder()]) as app:
        await app.send(Ship())
        with pytest.raises(LookupError):
            await app.send(Ship(order=-1))

    told = [(each.message, each.handler, each.error) for each in moments if isinstance(each, MessageDispatched)]
    name = "tests.unit.test_pipeline.Ship"
    assert told == [(name, "ship", None), (name, "ship", "LookupError")]


# --- the order --------------------------------------------------------------------------------------------------------


@pytest.mark.feature("M10")
async def test_the_order_of_stages_is_kept() -> None:
    """Retries outside the transaction, the time-out of an attempt inside the retries, user code outside both: a change
    here changes what every application does, so it must be seen.
    """
    sales = Registry("sales")
    options: dict[str, Any] = {"timeout": 5, "concurrency": 5}

    @sales.middleware
    async def watch(message: Any, call_next: CallNext) -> Any:
        return await call_next(message)

    class Scoped:
        pass

    @sales.provider
    def scoped() -> Iterator[Scoped]:
        yield Scoped()

    class Recorder:
        def notice(self, moment: Moment) -> None: ...

    @sales.command_handler(name="command", retry=QUICK, **options)
    async def ship(command: Ship, scoped: Scoped, session: dict) -> str: ...  # type: ignore[type-arg]

    @sales.query_handler(name="query", retry=QUICK, **options)
    async def count(query: HowMany, scoped: Scoped, session: dict) -> int: ...  # type: ignore[type-arg]

    @sales.event_handler(name="joined event", **options)
    async def note(event: Noted, scoped: Scoped, session: dict) -> None: ...  # type: ignore[type-arg]

    @sales.event_handler(name="consumer", retry=QUICK, **options)
    async def bill(event: Shipped, scoped: Scoped, session: dict) -> None: ...  # type: ignore[type-arg]

    class Plain(Command[None]):
        pass

    @sales.command_handler(name="plain")
    async def plain(command: Plain) -> None: ...

    async with app_of(sales, database=MoodyStore(0), observers=[Recorder()]) as app:
        orders = {plan.spec.name: plan.order for plan in app.plans}

    assert orders == {
        "command": ("logging", "middlewares", "concurrency", "retries", "timeout", "scope", "transaction"),
        "query": ("logging", "middlewares", "concurrency", "retries", "timeout", "scope", "transaction"),
        "joined event": ("logging", "middlewares", "concurrency", "retries", "timeout", "scope", "transaction"),
        "consumer": ("logging", "middlewares", "concurrency", "timeout", "scope", "transaction", "inbox"),
        "plain": ("logging", "middlewares", "transaction"),
    }
