"""One relay in a process of its own: `relay_process.py DATABASE_URL BROKER_URL`, until it is told to stop."""

import asyncio
import signal
import sys

from cqrs_decor import bootstrap
from tests.benchmarks.orders import commands


async def relay(database: str, broker: str) -> None:
    app = bootstrap(
        registry=commands, discover=False, database=database, broker=broker, service="benchmark", run="relay"
    )
    told_to_stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told_to_stop.set)
    async with app:
        await told_to_stop.wait()


if __name__ == "__main__":
    asyncio.run(relay(*sys.argv[1:3]))
