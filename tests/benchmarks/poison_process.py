"""A worker in a process of its own, whose handler fails or dies by what it reads: `poison_process.py DATABASE_URL
BROKER_URL TOPIC`, until it is killed. The topic is the name of the service as well.
"""

import asyncio
import os
import signal
import sys

from sqlalchemy.ext.asyncio import AsyncSession

from cqrs_decor import IntegrationEvent, Park, Registry, bootstrap
from tests.benchmarks.orders import Effect

DATABASE, BROKER, TOPIC = sys.argv[1:4]

registry = Registry("benchmark poison")


class OrderPlaced(IntegrationEvent, topic=TOPIC, key="order_id", name="benchmark.order-placed"):
    order_id: int
    text: str


@registry.event_handler(name="note")
async def note(event: OrderPlaced, session: AsyncSession) -> None:
    if event.text == "raise":
        raise Park("it can never be handled")
    if event.text == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    session.add(Effect(order_id=event.order_id))


async def work() -> None:
    app = bootstrap(registry=registry, discover=False, database=DATABASE, broker=BROKER, service=TOPIC, run="worker")
    async with app:
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(work())
