"""An app for the command line: handlers of every kind in a registry of its own, everything in memory."""

from datetime import UTC, datetime
from typing import ClassVar

from cqrs_decor import App, Command, DomainEvent, Envelope, Finding, IntegrationEvent, Query, Registry, bootstrap
from cqrs_decor.broker import Capabilities, TopicPlan
from cqrs_decor.memory import MemoryBroker, MemoryStore

registry = Registry("sample")
NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


class PlaceOrder(Command[int]):
    sku: str


class OrderPlaced(IntegrationEvent, topic="sample-orders", key="order_id", name="sample.order-placed"):
    order_id: int


class OrderPaid(IntegrationEvent, topic="sample-payments", key="order_id", name="sample.order-paid"):
    order_id: int


class GetOrder(Query[int]):
    order_id: int


class StockChanged(DomainEvent):
    sku: str


@registry.command_handler
async def place_order(command: PlaceOrder) -> int:
    return 1


@registry.query_handler
async def get_order(query: GetOrder) -> int:
    return query.order_id


@registry.event_handler
async def count_stock(event: StockChanged) -> None: ...


@registry.event_handler
async def write_invoice(event: OrderPlaced) -> None: ...


class Clock:
    """Nobody provides it."""


faulty = Registry("faulty")


@faulty.command_handler
async def place_order_late(command: PlaceOrder, clock: Clock) -> int:
    return 1


@faulty.command_handler
async def place_order_twice(command: PlaceOrder) -> int:
    return 1


class StrictBroker(MemoryBroker):
    """One that wants its topics made."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        durable=True,
        ordered_by_key=True,
        replayable=True,
        shared=True,
        creates_topics=False,
        crash_may_lose="nothing",
        crash_may_repeat="what was not acknowledged",
        crash_may_reorder="nothing",
    )

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    async def missing_topics(self, topics: list[TopicPlan]) -> list[TopicPlan]:
        return [topic for topic in topics if topic.name not in self.made]

    async def create_topics(self, topics: list[TopicPlan]) -> None:
        self.made.extend(topic.name for topic in topics)

    async def check(self, topics: list[TopicPlan]) -> list[Finding]:
        missing = await self.missing_topics(topics)
        if not missing:
            return [Finding.ok("every topic is there")]
        return [
            Finding(code="CD503", severity="error", problem=f"Topic {topic.name} is missing.", fix="create it")
            for topic in missing
        ]


class TwoTables:
    """Tables of which one is missing until `upgrade`."""

    def __init__(self) -> None:
        self.missing = ["CREATE TABLE outbox (id INTEGER)"]

    async def plan(self) -> list[str]:
        return self.missing

    async def upgrade(self) -> list[str]:
        done, self.missing = self.missing, []
        return done

    async def check(self) -> list[Finding]:
        if self.missing:
            return [Finding(code="CD403", severity="error", problem="The table outbox is missing.", fix="upgrade")]
        return [Finding.ok("the tables are there")]


class StoreWithTables(MemoryStore):
    def __init__(self) -> None:
        super().__init__()
        self.schema = TwoTables()


def make_app(**changes: object) -> App:
    given = {"registry": registry, "discover": False, "service": "sample", **changes}
    return bootstrap(**given)


cqrs = make_app()
NOT_AN_APP = 7


def envelope(number: int, *, topic: str = "sample-orders", key: str | None = "1", data: bytes = b'{"a":1}') -> Envelope:
    return Envelope(
        id=f"message-{number}", source="sample", type="sample.order-placed", topic=topic, key=key, data=data, time=NOON
    )
