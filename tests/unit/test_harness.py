"""The harness on memory: overrides, what was published, deliver, drain, a shared broker, a clock of the test's own."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from cqrs_decor import (
    App,
    Command,
    Envelope,
    IntegrationEvent,
    MessageContext,
    Park,
    Query,
    Registry,
    Retry,
    RetryLater,
    Settings,
    StartupError,
    bootstrap,
    emit,
)
from cqrs_decor.app import AppStartedTwiceError
from cqrs_decor.errors import AppStoppedError, MissingDependencyError
from cqrs_decor.inbox import InboxFilter
from cqrs_decor.memory import MemoryBroker, MemoryStore
from cqrs_decor.testing import FakeClock, NoSuchConsumerError, NotPublishedError, OpenApp, ParkedError
from tests.unit.apps import eventually, in_background

pytestmark = pytest.mark.feature("U3")


class Stock:
    """What a test replaces."""

    def take(self, sku: str) -> None:
        raise AssertionError("the real stock was asked")


class FakeStock(Stock):
    def __init__(self) -> None:
        self.taken: list[str] = []

    def take(self, sku: str) -> None:
        self.taken.append(sku)


class PlaceOrder(Command[str]):
    sku: str


class CountOrders(Query[int]):
    pass


class OrderPlaced(IntegrationEvent, topic="orders", key="sku", name="harness.order-placed"):
    sku: str


class InvoiceSent(IntegrationEvent, topic="invoices", key="sku", name="harness.invoice-sent"):
    sku: str


class NobodyCares(IntegrationEvent, topic="void", name="harness.nobody-cares"):
    pass


class Shop:
    """An application under test, and what its consumers saw."""

    def __init__(self, *, service: str = "shop", retry: Retry | None = None, **options: Any) -> None:
        self.attempts: list[tuple[str, int]] = []
        registry = Registry(service)

        @registry.provider
        def stock() -> Stock:
            raise AssertionError("the real stock was made")

        @registry.command_handler
        async def place_order(command: PlaceOrder, stock: Stock) -> str:
            stock.take(command.sku)
            emit(OrderPlaced(sku=command.sku))
            if command.sku == "gone":
                raise LookupError("sold out")
            return command.sku

        @registry.query_handler
        async def count_orders(query: CountOrders) -> int:
            return len(self.attempts)

        @registry.event_handler(name="invoice", retry=retry)
        async def invoice(event: OrderPlaced) -> None:
            attempt = MessageContext.current().attempt
            self.attempts.append((event.sku, attempt))
            if event.sku == "bad":
                raise ValueError("no invoice today")
            if event.sku == "parked":
                raise Park("by hand")
            if event.sku == "later" and attempt == 1:
                raise RetryLater(timedelta(hours=9))
            emit(InvoiceSent(sku=event.sku))

        self.cqrs = bootstrap(registry=registry, discover=False, service=service, **options)


def overridden() -> Mapping[Any, Any]:
    return {Stock: FakeStock()}


async def test_a_command_runs_on_overrides_and_what_it_published_is_known_at_once(cqrs_app: OpenApp) -> None:
    """The first test that anybody writes: send, then look at what was published."""
    shop, stock = Shop(), FakeStock()

    async with cqrs_app(shop.cqrs, overrides={Stock: stock}) as app:
        result = await app.send(PlaceOrder(sku="tea"))
        event = app.published.one(OrderPlaced)

    assert result == "tea"
    assert stock.taken == ["tea"]
    assert event == OrderPlaced(sku="tea")


async def test_overrides_are_there_before_anything_is_compiled(cqrs_app: OpenApp) -> None:
    """A missing dependency is no fault when the test brings it."""
    registry = Registry("shop")

    @registry.command_handler
    async def place_order(command: PlaceOrder, stock: Stock) -> str:
        stock.take(command.sku)
        return "placed"

    cqrs = bootstrap(registry=registry, discover=False)
    with pytest.raises(StartupError) as caught:
        await cqrs.start()
    async with cqrs_app(cqrs, overrides=overridden()) as app:
        assert await app.send(PlaceOrder(sku="tea")) == "placed"

    assert [type(fault) for fault in caught.value.exceptions] == [MissingDependencyError]


async def test_nothing_runs_until_the_test_says_so(cqrs_app: OpenApp) -> None:
    """No consumer runs beside the assertions."""
    shop = Shop()

    async with cqrs_app(shop.cqrs, overrides=overridden()) as app:
        await app.send(PlaceOrder(sku="tea"))
        for _ in range(20):
            await anyio.lowlevel.checkpoint()
        before = list(shop.attempts)
        drained = await app.drain()

        assert (app.app.relay, app.app.worker) == (None, None)
    assert before == []
    assert shop.attempts == [("tea", 1)]
    assert (drained.published, drained.handled, drained.parked) == (2, 1, [])


async def test_what_consumers_published_is_known_after_the_drain(cqrs_app: OpenApp) -> None:
    """In the order of writing, each as its own type."""
    shop = Shop()

    async with cqrs_app(shop.cqrs, overrides=overridden()) as app:
        await app.send(PlaceOrder(sku="tea"))
        await app.send(PlaceOrder(sku="milk"))
        app.published.none(InvoiceSent)
        await app.drain()

        assert app.published.all(OrderPlaced) == [OrderPlaced(sku="tea"), OrderPlaced(sku="milk")]
        assert sorted(event.sku for event in app.published.all(InvoiceSent)) == ["milk", "tea"]
        assert app.published.one(OrderPlaced, where=lambda event: event.sku == "milk") == OrderPlaced(sku="milk")
        assert [each.key for each in app.published.envelopes(OrderPlaced)] == ["tea", "milk"]
        assert len(app.published.envelopes()) == 4


async def test_a_rolled_back_command_published_nothing(cqrs_app: OpenApp) -> None:
    """emit was called; nothing was committed."""
    shop = Shop()

    async with cqrs_app(shop.cqrs, overrides=overridden()) as app:
        with pytest.raises(LookupError):
            await app.send(PlaceOrder(sku="gone"))

        app.published.none(OrderPlaced)


async def test_events_of_publish_and_of_a_unit_of_work_are_known_too(cqrs_app: OpenApp) -> None:
    """Whatever way an event took into the outbox."""
    shop = Shop()

    async with cqrs_app(shop.cqrs, overrides=overridden()) as app:
        await app.publish(OrderPlaced(sku="one"))
        async with app.unit_of_work():
            emit(OrderPlaced(sku="two"))
        async with app.app.unit_of_work():
            emit(OrderPlaced(sku="three"))
        transaction = await app.store.begin()
        app.app.outbox.add(transaction, OrderPlaced(sku="four"))
        await transaction.commit()
        await app.drain()

        assert [event.sku for event in app.published.all(OrderPlaced)] == ["one", "two", "three", "four"]


async def test_the_very_object_that_the_application_imports_is_under_test(cqrs_app: OpenApp) -> None:
    """A web application sends by its own name for the app."""
    shop = Shop()

    async with cqrs_app(shop.cqrs, overrides=overridden()) as app:
        await shop.cqrs.send(PlaceOrder(sku="tea"))

        assert app.app is shop.cqrs
        app.published.one(OrderPlaced)


async def test_the_app_is_as_it_was_after_the_test(cqrs_app: OpenApp) -> None:
    """One test's parts must not be found by the next."""
    shop = Shop(broker="memory://")
    before = shop.cqrs.configuration

    async with cqrs_app(shop.cqrs, overrides=overridden()):
        assert shop.cqrs.configuration is not before
    with pytest.raises(AppStoppedError):
        await shop.cqrs.send(PlaceOrder(sku="tea"))

    assert shop.cqrs.configuration is before


@pytest.mark.parametrize("database", [None, "memory://", MemoryStore()], ids=["none", "url", "object"])
async def test_each_opening_starts_empty(cqrs_app: OpenApp, database: Any) -> None:
    """Also in one test, and without a database plugin where the app names none."""
    shop = Shop(database=database)

    for _ in range(2):
        async with cqrs_app(shop.cqrs, overrides=overridden()) as app:
            await app.send(PlaceOrder(sku="tea"))
            app.published.one(OrderPlaced)


async def test_an_app_that_runs_is_refused(cqrs_app: OpenApp) -> None:
    """Its lifespan is on: the test would work on two sets of parts."""
    shop = Shop()

    async with cqrs_app(shop.cqrs, overrides=overridden()):
        with pytest.raises(AppStartedTwiceError):
            await cqrs_app(shop.cqrs).__aenter__()


async def test_one_says_what_it_found_and_what_was_published(cqrs_app: OpenApp) -> None:
    """The report of a failed test is all that its reader has."""
    shop = Shop()

    async with cqrs_app(shop.cqrs, overrides=overridden()) as app:
        await app.send(PlaceOrder(sku="tea"))
        await app.send(PlaceOrder(sku="milk"))
        with pytest.raises(NotPublishedError) as too_many:
            app.published.one(OrderPlaced)
        with pytest.raises(NotPublishedError) as none_fits:
            app.published.one(OrderPlaced, where=lambda event: event.sku == "rum")
        with pytest.raises(NotPublishedError) as one_fits:
            app.published.none(OrderPlaced, where=lambda event: event.sku == "tea")

    assert isinstance(too_many.value, AssertionError)
    assert (too_many.value.code, too_many.value.found, none_fits.value.found) == ("CD802", 2, 0)
    assert str(too_many.value).startswith("Expected one OrderPlaced, found 2.\n  OrderPlaced(sku='tea')\n")
    assert "orders: harness.order-placed (key 'milk')" in str(none_fits.value)
    assert str(one_fits.value).startswith("Expected no OrderPlaced, found 1.")


async def test_a_class_of_the_tests_own_finds_the_event(cqrs_app: OpenApp) -> None:
    """By topic and wire name: a consumer's test needs no import of the producer."""

    class Theirs(IntegrationEvent, topic="orders", name="harness.order-placed", version=99):
        sku: str

    shop = Shop()
    async with cqrs_app(shop.cqrs, overrides=overridden()) as app:
        await app.send(PlaceOrder(sku="tea"))

        assert app.published.one(Theirs).sku == "tea"


async def test_drain_raises_what_was_parked_with_the_handlers_own_error_as_cause(cqrs_app: OpenApp) -> None:
    """A test that does not look at parked messages must not pass."""
    shop = Shop()

    async with cqrs_app(shop.cqrs, overrides=overridden()) as app:
        await app.send(PlaceOrder(sku="bad"))
        await app.send(PlaceOrder(sku="tea"))
        with pytest.raises(ParkedError) as caught:
            await app.drain()
        again = await app.drain()

    (line,) = caught.value.parked
    assert caught.value.code == "CD801"
    assert line.startswith("shop.invoice: harness.order-placed ")
    assert line.endswith(": ValueError")
    assert isinstance(caught.value.__cause__, ValueError)
    assert shop.attempts.count(("bad", 8)) == 1
    assert ("tea", 1) in shop.attempts
    assert again.parked == []


async def test_several_parked_messages_have_a_group_as_cause(cqrs_app: OpenApp) -> None:
    """Each handler's lines are in the report."""
    shop = Shop()

    async with cqrs_app(shop.cqrs, overrides=overridden()) as app:
        await app.send(PlaceOrder(sku="bad"))
        await app.send(PlaceOrder(sku="parked"))
        with pytest.raises(ParkedError) as caught:
            await app.drain()

    assert len(caught.value.parked) == 2
    cause = caught.value.__cause__
    assert isinstance(cause, ExceptionGroup)
    assert {type(error) for error in cause.exceptions} == {ValueError, Park}


async def test_waits_between_attempts_take_no_time(cqrs_app: OpenApp) -> None:
    """Eight attempts over a minute, and nine hours, in one test."""
    shop = Shop()

    with anyio.fail_after(10):
        async with cqrs_app(shop.cqrs, overrides=overridden()) as app:
            await app.send(PlaceOrder(sku="later"))
            await app.drain()

    assert shop.attempts == [("later", 1), ("later", 2)]


async def test_deliver_runs_the_consumers_from_bytes(cqrs_app: OpenApp) -> None:
    """A consumer is tested without its producer."""
    shop = Shop()

    async with cqrs_app(shop.cqrs) as app:
        handled = await app.deliver(OrderPlaced(sku="tea"))

        assert app.published.one(InvoiceSent).sku == "tea"
    assert handled == 1
    assert shop.attempts == [("tea", 1)]


@pytest.mark.feature("B3")
async def test_a_delivery_of_the_same_id_is_handled_once(cqrs_app: OpenApp) -> None:
    """The test that every consumer deserves: the broker repeats."""
    shop = Shop()

    async with cqrs_app(shop.cqrs) as app:
        first = await app.deliver(OrderPlaced(sku="tea"), message_id="m-1")
        again = await app.deliver(OrderPlaced(sku="tea"), message_id="m-1")
        other = await app.deliver(OrderPlaced(sku="tea"), message_id="m-1", source="elsewhere")

        assert len(app.published.all(InvoiceSent)) == 2
    assert (first, again, other) == (1, 0, 1)


async def test_a_delivery_does_not_run_what_waits_elsewhere(cqrs_app: OpenApp) -> None:
    """deliver is one message; drain is everything."""
    shop = Shop()

    async with cqrs_app(shop.cqrs, overrides=overridden()) as app:
        await app.send(PlaceOrder(sku="tea"))
        await app.deliver(OrderPlaced(sku="milk"))

    assert shop.attempts == [("milk", 1)]


async def test_a_delivery_that_is_parked_raises(cqrs_app: OpenApp) -> None:
    """And what is parked can be looked at."""
    shop = Shop()

    async with cqrs_app(shop.cqrs) as app:
        with pytest.raises(ParkedError, match="by hand") as caught:
            await app.deliver(OrderPlaced(sku="parked"), message_id="m-1")
        (parked,) = await app.store.inbox.find(InboxFilter())

    assert isinstance(caught.value.__cause__, Park)
    assert (parked.envelope.id, parked.attempts) == ("m-1", 1)


async def test_an_envelope_is_delivered_as_it_is(cqrs_app: OpenApp) -> None:
    """What a foreign producer sends, however odd."""
    shop = Shop()

    async with cqrs_app(shop.cqrs) as app:
        await app.deliver(OrderPlaced(sku="tea"), headers={"tenant": "blue"})
        envelope = Envelope(
            id="1", source="them", type="harness.order-plazed", topic="orders", data=b"{}", time=app.clock.now()
        )
        with pytest.raises(ParkedError, match="UnknownMessageTypeError"):
            await app.deliver(envelope)


async def test_a_delivery_that_nobody_consumes_is_an_error(cqrs_app: OpenApp) -> None:
    """It would pass, and prove nothing."""
    shop = Shop()

    async with cqrs_app(shop.cqrs) as app:
        with pytest.raises(NoSuchConsumerError) as caught:
            await app.deliver(NobodyCares())

    assert (caught.value.code, caught.value.topic, caught.value.topics) == ("CD803", "void", ("orders",))


async def test_two_apps_share_a_broker(cqrs_app: OpenApp) -> None:
    """Two services of one company, in one test, without a server."""
    broker = MemoryBroker()
    shop = Shop()
    books, sent = Registry("books"), list[str]()

    @books.event_handler
    async def book(event: InvoiceSent) -> None:
        sent.append(event.sku)

    accounting = bootstrap(registry=books, discover=False, service="books")
    async with (
        cqrs_app(shop.cqrs, overrides=overridden(), broker=broker) as app,
        cqrs_app(accounting, broker=broker) as other,
    ):
        await app.send(PlaceOrder(sku="tea"))
        await app.drain()
        drained = await other.drain()

        app.published.one(InvoiceSent)
        other.published.none(InvoiceSent)
    assert sent == ["tea"]
    assert drained.handled == 1


async def test_a_clock_of_the_tests_own_decides_when_time_passes(cqrs_app: OpenApp) -> None:
    """Where the wait itself is what is tested."""
    shop, clock = Shop(), FakeClock()

    async with (
        cqrs_app(shop.cqrs, clock=clock) as app,
        in_background(lambda: app.deliver(OrderPlaced(sku="later"))),
    ):
        await eventually(lambda: timedelta(hours=9) in clock.waits)
        clock.advance(timedelta(hours=8))
        for _ in range(20):
            await anyio.lowlevel.checkpoint()
        after_eight = list(shop.attempts)
        clock.advance(timedelta(hours=1))
        await eventually(lambda: len(shop.attempts) == 2)

    assert after_eight == [("later", 1)]


async def test_settings_of_the_test_are_taken(cqrs_app: OpenApp) -> None:
    """Limits are tested with small numbers."""
    shop = Shop()

    async with cqrs_app(shop.cqrs, settings=Settings(max_body_bytes=5)) as app:
        with pytest.raises(ParkedError, match="BodyTooLargeError"):
            await app.deliver(OrderPlaced(sku="tea"))


async def test_queries_are_asked(cqrs_app: OpenApp) -> None:
    """The harness has the verbs of the app."""
    shop = Shop()

    async with cqrs_app(shop.cqrs) as app:
        await app.deliver(OrderPlaced(sku="tea"))

        assert await app.ask(CountOrders()) == 1


async def test_an_error_in_the_test_stops_the_app(cqrs_app: OpenApp) -> None:
    """A failing test must not make the next one fail."""
    shop = Shop()

    with pytest.raises(RuntimeError, match="the test failed"):
        await fail_inside(cqrs_app, shop.cqrs)

    async with cqrs_app(shop.cqrs):
        pass


async def fail_inside(cqrs_app: OpenApp, app: App) -> None:
    async with cqrs_app(app):
        raise RuntimeError("the test failed")
