"""`send` against the bare call of the handler, against wiring two dependencies by hand, against python-cqrs."""

import asyncio
from collections.abc import Sequence

import punq

from cqrs_decor import Command, Registry, bootstrap
from tests.benchmarks.figures import Figure, at_least, at_most, compared, microseconds_per_call
from tests.benchmarks.peer import VERSION, microseconds_of_peer

registry = Registry("benchmark")
CALLS = 30_000


class Nothing(Command[int]):
    sku: str


class Awaits(Command[int]):
    sku: str


class TwoNeeds(Command[int]):
    sku: str


class Clock:
    pass


class Orders:
    def __init__(self, clock: Clock) -> None:
        self.clock = clock


class Mailer:
    pass


@registry.command_handler
async def nothing(command: Nothing) -> int:
    return len(command.sku)


@registry.command_handler
async def awaits(command: Awaits) -> int:
    return await _stock(command.sku)


async def _stock(sku: str) -> int:
    return len(sku)


@registry.command_handler
async def two_needs(command: TwoNeeds, orders: Orders, mailer: Mailer) -> int:
    return await _stock(command.sku)


async def measure(rounds: int) -> Sequence[Figure]:
    container = punq.Container()
    container.register(Clock)
    container.register(Orders)
    container.register(Mailer, scope=punq.Scope.singleton)
    app = bootstrap(registry=registry, discover=False, container=container, run="none")
    async with app:
        mailer = Mailer()
        bare, sends, hands, plans, waits, waited = Nothing(sku="tea"), [], [], [], [], []
        one, needs = Awaits(sku="tea"), TwoNeeds(sku="tea")
        for _ in range(rounds * 3):
            waits.append(await microseconds_per_call(lambda: awaits(one), CALLS))
            waited.append(await microseconds_per_call(lambda: app.send(one), CALLS))
            hands.append(await microseconds_per_call(lambda: nothing(bare), CALLS))
            sends.append(await microseconds_per_call(lambda: app.send(bare), CALLS))
            plans.append(
                (
                    await microseconds_per_call(lambda: app.send(needs), CALLS),
                    await microseconds_per_call(lambda: two_needs(needs, Orders(Clock()), mailer), CALLS),
                )
            )
        peer = [(await asyncio.to_thread(microseconds_of_peer), ours) for ours in sends[:3]]
    us = "us"
    return [
        compared(
            "send, a handler that awaits once",
            list(zip(waited, waits, strict=True)),
            other_is="bare await",
            unit=us,
            budget=at_most(4),
        ),
        compared(
            "send, a handler that does nothing",
            list(zip(sends, hands, strict=True)),
            other_is="bare await",
            unit=us,
            budget=at_most(4),
        ),
        compared("send, two dependencies, one scoped", plans, other_is="wired by hand", unit=us, budget=at_most(2.5)),
        compared(f"python-cqrs {VERSION} send", peer, other_is="our send", unit=us, budget=at_least(20)),
    ]
