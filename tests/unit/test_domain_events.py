"""Domain events: in the command's transaction, breadth first; isolated ones after it."""

import logging

import pytest

from cqrs_decor import App, Command, DomainEvent, IntegrationEvent, MessageContext, Registry, Settings, emit
from cqrs_decor.errors import EventDepthError
from cqrs_decor.outbox import OutboxFilter
from tests.unit.apps import app_of

pytestmark = pytest.mark.feature("M3")


class Start(Command[str]):
    name: str = ""


class Step(DomainEvent):
    name: str


class Told(IntegrationEvent, topic="told", name="domain.told"):
    name: str


async def stored(app: App) -> list[str]:
    return [record.envelope.data.decode() for record in await app.store.outbox.find(OutboxFilter())]


async def test_events_are_handled_after_the_handler_and_before_send_returns() -> None:
    """The handler's own work is complete when others react to it; the sender sees all of it."""
    sales = Registry("sales")
    log: list[str] = []

    @sales.command_handler
    async def start(command: Start) -> str:
        emit(Step(name="a"))
        log.append("handler ends")
        return "done"

    @sales.event_handler
    async def step(event: Step) -> None:
        log.append(f"event {event.name}")

    async with app_of(sales) as app:
        await app.send(Start())

    assert log == ["handler ends", "event a"]


async def test_every_handler_of_an_event_runs_in_the_order_of_declaration() -> None:
    """Fan-out is deterministic."""
    sales = Registry("sales")
    log: list[str] = []

    @sales.command_handler
    async def start(command: Start) -> str:
        emit(Step(name="a"))
        return ""

    @sales.event_handler
    async def first(event: Step) -> None:
        log.append("first")

    @sales.event_handler
    async def second(event: Step) -> None:
        log.append("second")

    async with app_of(sales) as app:
        await app.send(Start())

    assert log == ["first", "second"]


async def test_follow_ups_are_handled_breadth_first() -> None:
    """What one event causes comes after what was emitted beside it."""
    sales = Registry("sales")
    log: list[str] = []

    @sales.command_handler
    async def start(command: Start) -> str:
        emit(Step(name="1"), Step(name="2"))
        return ""

    @sales.event_handler
    async def step(event: Step) -> None:
        log.append(event.name)
        if len(event.name) < 2:
            emit(Step(name=event.name + "1"), Step(name=event.name + "2"))

    async with app_of(sales) as app:
        await app.send(Start())

    assert log == ["1", "2", "11", "12", "21", "22"]


async def test_an_event_without_handlers_is_no_error() -> None:
    """A domain event may have none yet."""
    sales = Registry("sales")

    @sales.command_handler
    async def start(command: Start) -> str:
        emit(Step(name="a"))
        return "done"

    async with app_of(sales) as app:
        assert await app.send(Start()) == "done"


async def test_a_failing_event_handler_fails_the_command_and_leaves_nothing() -> None:
    """python-cqrs logs and swallows it; a half-done command must not be committed."""
    sales = Registry("sales")

    @sales.command_handler
    async def start(command: Start) -> str:
        emit(Told(name="before"), Step(name="a"))
        return "done"

    @sales.event_handler
    async def step(event: Step) -> None:
        emit(Told(name="inside"))
        raise LookupError("sold out")

    async with app_of(sales) as app:
        with pytest.raises(LookupError, match="sold out"):
            await app.send(Start())

        assert await stored(app) == []


async def test_what_event_handlers_emit_is_committed_with_the_command() -> None:
    """One transaction: rows of the handler and of those who reacted, in the order of emitting."""
    sales = Registry("sales")

    @sales.command_handler
    async def start(command: Start) -> str:
        emit(Step(name="a"), Told(name="1"))
        return "done"

    @sales.event_handler
    async def step(event: Step) -> None:
        emit(Told(name="2"))

    async with app_of(sales) as app:
        await app.send(Start())

        assert await stored(app) == ['{"name":"1"}', '{"name":"2"}']


async def test_events_that_go_round_in_a_circle_end_at_the_depth_limit() -> None:
    """A circle must not hang a request; the chain in the error shows it."""
    sales = Registry("sales")
    runs: list[str] = []

    @sales.command_handler
    async def start(command: Start) -> str:
        emit(Told(name="never"), Step(name="a"))
        return ""

    @sales.event_handler
    async def step(event: Step) -> None:
        runs.append(event.name)
        emit(Step(name="a"))

    async with app_of(sales, settings=Settings(max_event_depth=3)) as app:
        with pytest.raises(EventDepthError) as caught:
            await app.send(Start())

        assert await stored(app) == []
    assert (caught.value.code, caught.value.limit, caught.value.chain) == ("CD207", 3, ("Step",) * 4)
    assert len(runs) == 3


async def test_a_chain_as_deep_as_the_limit_passes() -> None:
    """The limit is what it says, not one less."""
    sales = Registry("sales")
    runs: list[str] = []

    @sales.command_handler
    async def start(command: Start) -> str:
        emit(Step(name="a"))
        return "done"

    @sales.event_handler
    async def step(event: Step) -> None:
        runs.append(event.name)
        if len(event.name) < 3:
            emit(Step(name=event.name + "a"))

    async with app_of(sales, settings=Settings(max_event_depth=3)) as app:
        assert await app.send(Start()) == "done"

    assert runs == ["a", "aa", "aaa"]


async def test_a_rolled_back_command_handles_no_events() -> None:
    """What did not happen is not reacted to."""
    sales = Registry("sales")
    seen: list[str] = []

    @sales.command_handler
    async def start(command: Start) -> str:
        emit(Step(name="a"), Told(name="a"))
        raise LookupError

    @sales.event_handler
    async def step(event: Step) -> None:
        seen.append(event.name)

    @sales.event_handler(isolated=True)
    async def later(event: Step) -> None:
        seen.append(event.name)

    async with app_of(sales) as app:
        with pytest.raises(LookupError):
            await app.send(Start())

        assert await stored(app) == []
    assert seen == []


async def test_an_isolated_handler_runs_after_the_commit_in_a_transaction_of_its_own() -> None:
    """It sees the command's rows committed, and what it emits is committed by itself."""
    sales = Registry("sales")
    seen: list[list[str]] = []
    apps: list[App] = []

    @sales.command_handler
    async def start(command: Start) -> str:
        emit(Told(name="command"), Step(name="a"))
        return "done"

    @sales.event_handler(isolated=True)
    async def later(event: Step) -> None:
        seen.append(await stored(apps[0]))
        emit(Told(name="isolated"))

    async with app_of(sales) as app:
        apps.append(app)
        await app.send(Start())

        assert seen == [['{"name":"command"}']]
        assert await stored(app) == ['{"name":"command"}', '{"name":"isolated"}']


async def test_a_failing_isolated_handler_is_logged_and_fails_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The command has been committed: its sender must not be told that it failed."""
    sales = Registry("sales")

    @sales.command_handler
    async def start(command: Start) -> str:
        emit(Told(name="command"), Step(name="a"))
        return "done"

    @sales.event_handler(isolated=True, name="mailer")
    async def later(event: Step) -> None:
        emit(Told(name="isolated"))
        raise LookupError("no mail today")

    async with app_of(sales) as app:
        with caplog.at_level(logging.ERROR):
            assert await app.send(Start()) == "done"

        assert await stored(app) == ['{"name":"command"}']
    (record,) = [record for record in caplog.records if getattr(record, "action", "") == "isolated_handler_failed"]
    assert record.handler == "mailer"  # type: ignore[attr-defined]
    assert record.exc_info is not None


async def test_one_failing_isolated_handler_does_not_keep_the_next_from_running() -> None:
    """Each is on its own."""
    sales = Registry("sales")
    seen: list[str] = []

    @sales.command_handler
    async def start(command: Start) -> str:
        emit(Step(name="a"))
        return "done"

    @sales.event_handler(isolated=True)
    async def fails(event: Step) -> None:
        raise LookupError

    @sales.event_handler(isolated=True)
    async def works(event: Step) -> None:
        seen.append(event.name)

    async with app_of(sales) as app:
        await app.send(Start())

    assert seen == ["a"]


async def test_an_isolated_handler_has_its_domain_events_handled() -> None:
    """It is a dispatch of its own, with all that belongs to one."""
    sales = Registry("sales")
    seen: list[str] = []

    @sales.command_handler
    async def start(command: Start) -> str:
        emit(Step(name="a"))
        return "done"

    @sales.event_handler(isolated=True)
    async def later(event: Step) -> None:
        seen.append(event.name)
        if event.name == "a":
            emit(Step(name="b"))

    async with app_of(sales) as app:
        await app.send(Start())

    assert seen == ["a", "b"]


async def test_ids_follow_from_command_to_event() -> None:
    """A trace of causes is only as good as its weakest link."""
    sales = Registry("sales")
    ids: dict[str, tuple[str, str, str | None]] = {}

    def note(name: str) -> None:
        context = MessageContext.current()
        ids[name] = (context.id, context.correlation_id, context.causation_id)

    @sales.command_handler
    async def start(command: Start) -> str:
        note("command")
        emit(Step(name="a"))
        return "done"

    @sales.event_handler
    async def step(event: Step) -> None:
        note("joined")

    @sales.event_handler(isolated=True)
    async def later(event: Step) -> None:
        note("isolated")

    async with app_of(sales) as app:
        await app.send(Start())

    command = ids["command"][0]
    assert ids["command"] == (command, command, None)
    assert ids["joined"][1:] == (command, command)
    assert ids["isolated"][1:] == (command, command)
    assert len({context[0] for context in ids.values()}) == 3
