"""A reader of a consumer group in a process of its own, to be killed: URL GROUP TOPIC LEDGER ack|hold.

It writes a line `id partition position` to the ledger for each delivery, and then acknowledges it, or holds it.
"""

import asyncio
import sys
from datetime import timedelta
from pathlib import Path

from cqrs_decor_kafka import KafkaBroker


async def main(url: str, group: str, topic: str, ledger: str, then: str) -> None:
    broker = KafkaBroker.from_url(url)
    await broker.open()
    with Path(ledger).open("a", buffering=1) as lines:
        async with broker.subscribe(group, [topic]) as subscription:
            while True:
                for delivery in await subscription.receive(10, timedelta(seconds=1)):
                    partition = delivery.partition
                    print(delivery.content.id, partition.number, delivery.position, file=lines)
                    if then == "ack":
                        await subscription.ack([delivery])


asyncio.run(main(*sys.argv[1:]))
