"""What the simulated service does: a command that emits, two consumers of what it emits, and one of what they emit."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, cast

from cqrs_decor import Command, IntegrationEvent, MessageContext, Registry, emit
from cqrs_decor.envelope import Envelope
from tests.simulation.loop import current_owner

SERVICE = "shop"

registry = Registry("simulated shop")


class Written(IntegrationEvent, topic="entries", key="aggregate", name="simulation.written"):
    aggregate: str
    nature: str = "plain"


class Ordered(IntegrationEvent, topic="entries", key="aggregate", name="simulation.ordered"):
    """In line with the others of its aggregate, and for two consumers."""

    aggregate: str
    nature: str = "plain"


class Shipped(IntegrationEvent, topic="shipments", key="aggregate", name="simulation.shipped"):
    aggregate: str


class Counted(IntegrationEvent, topic="shipments", name="simulation.counted"):
    """Without a key, and so without an order."""

    aggregate: str


class Write(Command[None]):
    aggregate: str
    natures: tuple[str, ...]


CONSUMERS = {
    "simulation.written": (f"{SERVICE}.file",),
    "simulation.ordered": (f"{SERVICE}.bill", f"{SERVICE}.ship"),
    "simulation.shipped": (f"{SERVICE}.notify",),
    "simulation.counted": (f"{SERVICE}.count",),
}
"""Who has an effect of each event, by its wire name."""


def is_plain(envelope: Envelope) -> bool:
    """Whether nothing is the matter with a message."""
    return b'"nature"' not in envelope.data or b'"nature":"plain"' in envelope.data


class Host(Protocol):
    """The process that a handler runs in."""

    async def run(self, context: MessageContext, nature: str) -> None:
        """What may happen to the handler: it fails, or its process dies."""
        ...

    def take_effect(self, consumer: str, envelope: Envelope) -> None: ...


def _host() -> Host:
    return cast(Host, current_owner.get())


@registry.command_handler
async def write(command: Write) -> None:
    for place, nature in enumerate(command.natures):
        event = Ordered if place == 2 else Written
        emit(event(aggregate=command.aggregate, nature=nature))


@registry.event_handler(name="file")
async def file_away(event: Written, context: MessageContext) -> None:
    await effect(context, event.nature)


@registry.event_handler(name="bill")
async def bill(event: Ordered, context: MessageContext) -> None:
    await effect(context, event.nature)


@registry.event_handler(name="ship")
async def ship(event: Ordered, context: MessageContext) -> None:
    """Of what fails always, only its other consumer makes anything."""
    envelope = await effect(context, "plain" if event.nature == "raises" else event.nature)
    emit(Shipped(aggregate=event.aggregate))
    if (envelope.sequence or 0) % 3 == 0:
        emit(Counted(aggregate=event.aggregate))


@registry.event_handler(name="notify")
async def notify(event: Shipped, context: MessageContext) -> None:
    await effect(context, "plain")


@registry.event_handler(name="count")
async def count(event: Counted, context: MessageContext) -> None:
    await effect(context, "plain")


async def effect(context: MessageContext, nature: str) -> Envelope:
    """The one effect of a consumer: it is there if its transaction commits."""
    envelope = context.envelope
    assert envelope is not None
    host = _host()
    await host.run(context, nature)
    transaction: Any = await context.unit_of_work.open()
    at_commit: Callable[[Callable[[], object]], None] = transaction.at_commit
    at_commit(partial(host.take_effect, context.consumer or "", envelope))
    return envelope
