"""One relay in a process of its own: `relay_process.py DATABASE_URL BROKER_URL`, until it is killed."""

import asyncio
import sys

from cqrs_decor import bootstrap
from tests.benchmarks.orders import commands


async def relay(database: str, broker: str) -> None:
    app = bootstrap(
        registry=commands, discover=False, database=database, broker=broker, service="benchmark", run="relay"
    )
    async with app:
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(relay(*sys.argv[1:3]))
