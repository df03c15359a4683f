"""python-cqrs's outbox producer, as its documentation runs it: fetch a batch, send each event, commit.

Run by `relaying.py` with the peer's interpreter: `peer_outbox.py DATABASE_URL BOOTSTRAP TOPIC COUNT`. It prints events
per second and nothing else. Its Kafka driver is the one it pins, or where that is too old for the server, ours.
"""

import asyncio
import sys
from time import perf_counter

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

BATCH = 100


async def measure(url: str, bootstrap: str, topic: str, count: int) -> float:
    import cqrs
    from cqrs.adapters.kafka import kafka_producer_factory
    from cqrs.message_brokers.kafka import KafkaMessageBroker
    from cqrs.outbox.sqlalchemy import Base, SqlAlchemyOutboxedEventRepository

    class OrderPlaced(cqrs.PydanticNotificationEvent[dict[str, str]], frozen=True):
        """What the other side of the comparison publishes, too."""

    cqrs.OutboxedEventMap.register("benchmark.order-placed", OrderPlaced)
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with AsyncSession(engine) as session:
        outbox = SqlAlchemyOutboxedEventRepository(session)
        for number in range(count):
            payload = {"order_id": str(number), "text": "x" * 150}
            outbox.add(OrderPlaced(event_name="benchmark.order-placed", topic=topic, payload=payload))
        await outbox.commit()
        producer = cqrs.EventProducer(KafkaMessageBroker(kafka_producer_factory(bootstrap)), outbox)
        sent, began = 0, 0.0
        async for batch in producer.event_batch_generator(BATCH):
            for event in batch:
                await producer.send_message(event)
                began = began or perf_counter()  # the first one connects
                sent += 1
            await outbox.commit()
            if sent >= count or not batch:
                break
        rate = (sent - 1) / (perf_counter() - began)
        await _require_all_sent(session, count)
    await engine.dispose()
    return rate


async def _require_all_sent(session: AsyncSession, count: int) -> None:
    """It counts failures as sent; a rate of failures is not what is measured."""
    sent = await session.scalar(text("SELECT count(*) FROM outbox WHERE event_status = 'PRODUCED'"))
    if sent != count:
        raise SystemExit(f"the peer sent {sent} of {count}")


if __name__ == "__main__":
    sys.stdout.write(f"{asyncio.run(measure(*sys.argv[1:4], int(sys.argv[4])))}\n")  # type: ignore[call-arg]
