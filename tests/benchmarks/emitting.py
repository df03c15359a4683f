"""A command that emits one event against the same command without, on PostgreSQL, with one client and with eight."""

import asyncio
from collections.abc import Sequence
from time import perf_counter

from cqrs_decor import App, Command
from tests.benchmarks.figures import Figure, at_most, compared
from tests.benchmarks.orders import PlaceOrder, PlaceQuietly, commanding, database
from tests.services import PostgresServer, running

COMMANDS = 400


async def measure(rounds: int) -> Sequence[Figure]:
    with running(PostgresServer) as server:
        async with database(server) as engine, commanding(engine) as app:
            await _milliseconds(app, PlaceOrder(sku="tea"), 8)
            return [await _figure(app, clients, limit, rounds) for clients, limit in ((1, 1.25), (8, 1.35))]


async def _figure(app: App, clients: int, limit: float, rounds: int) -> Figure:
    pairs = [
        (
            await _milliseconds(app, PlaceOrder(sku="tea"), clients),
            await _milliseconds(app, PlaceQuietly(sku="tea"), clients),
        )
        for _ in range(rounds)
    ]
    title = f"emit one event, {clients} client{'s' * (clients > 1)}"
    return compared(title, pairs, other_is="no event", unit="ms", budget=at_most(limit))


async def _milliseconds(app: App, command: Command[int], clients: int) -> float:
    """Per command, as one client of so many sees it."""

    async def client() -> None:
        for _ in range(COMMANDS // clients):
            await app.send(command)

    began = perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return (perf_counter() - began) / COMMANDS * 1e3
