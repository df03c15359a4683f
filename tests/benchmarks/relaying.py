"""One relay from PostgreSQL to Kafka against aiokafka's own producer: same payload, headers, settings, same minute."""

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from time import perf_counter
from typing import Any

from aiokafka import AIOKafkaProducer
from sqlalchemy.ext.asyncio import AsyncEngine

from cqrs_decor import Envelope
from cqrs_decor.broker import Broker
from cqrs_decor.clock import SystemClock
from cqrs_decor.observers import Observers
from cqrs_decor.parts import open_broker, open_store
from cqrs_decor.relay import Relay
from cqrs_decor.store import Store
from tests.benchmarks.figures import Figure, at_least, compared
from tests.benchmarks.orders import PAYLOAD, TOPIC, database
from tests.services import KafkaServer, PostgresServer, running
from tests.services.fixtures import fresh_name

RECORDS = 30_000
KEYS = 1_000


async def measure(rounds: int) -> Sequence[Figure]:
    with running(PostgresServer) as postgres, running(KafkaServer) as kafka:
        topic = f"{TOPIC}.{fresh_name()}"
        await kafka.create_topic(topic, partitions=12)
        async with database(postgres) as engine:
            pairs = [await _round(engine, kafka, topic) for _ in range(max(3, rounds // 2))]
    return [
        compared(
            "relay PostgreSQL -> Kafka, one process",
            pairs,
            other_is="aiokafka's producer",
            unit="records/s",
            budget=at_least(0.6),
        )
    ]


async def _round(engine: AsyncEngine, kafka: KafkaServer, topic: str) -> tuple[float, float]:
    envelopes = [envelope_of(number, topic) for number in range(RECORDS)]
    return await _ours(engine, f"kafka://{kafka.bootstrap}", envelopes), await _raw(kafka.bootstrap, envelopes)


def envelope_of(number: int, topic: str) -> Envelope:
    return Envelope(
        id=f"{number:032d}",
        source="benchmark",
        type="benchmark.order-placed",
        topic=topic,
        key=str(number % KEYS),
        time=SystemClock().now(),
        data=f'{{"order_id":{number},"text":"{PAYLOAD}"}}'.encode(),
    )


async def _ours(engine: AsyncEngine, url: str, envelopes: Sequence[Envelope]) -> float:
    store: Store = open_store(engine)
    await store.open()
    broker: Broker = open_broker(url, store)
    await broker.open()
    await _fill(store, envelopes)
    relay = Relay(
        store.outbox,
        broker,
        lease=timedelta(seconds=15),
        batch=500,
        poll_interval_s=0.5,
        clock=SystemClock(),
        observers=Observers(),
    )
    began = perf_counter()
    running_relay = asyncio.create_task(relay.run())
    while relay.published < len(envelopes):
        await asyncio.sleep(0.005)
    rate = len(envelopes) / (perf_counter() - began)
    relay.stop()
    await running_relay
    await broker.close()
    await store.close()
    return rate


async def _fill(store: Store, envelopes: Sequence[Envelope]) -> None:
    for start in range(0, len(envelopes), 1_000):
        transaction = await store.begin()
        transaction.add(envelopes[start : start + 1_000])
        await transaction.commit()


async def _raw(bootstrap: str, envelopes: Sequence[Envelope]) -> float:
    """What aiokafka does with the same records when nothing stands in its way: pipelined, idempotent, acks=all."""
    producer: Any = AIOKafkaProducer(
        bootstrap_servers=bootstrap,
        enable_idempotence=True,
        acks="all",
        max_batch_size=128 * 1024,
        linger_ms=5,
    )
    await producer.start()
    records = [(envelope, _headers(envelope)) for envelope in envelopes]
    began = perf_counter()
    waiting = []
    for number, (envelope, headers) in enumerate(records, start=1):
        key = (envelope.key or "").encode()
        waiting.append(await producer.send(envelope.topic, envelope.data, key=key, headers=headers))
        if number % 5_000 == 0:
            await asyncio.gather(*waiting)
            waiting.clear()
    await asyncio.gather(*waiting)
    rate = len(records) / (perf_counter() - began)
    await producer.stop()
    return rate


def _headers(envelope: Envelope) -> list[tuple[str, bytes]]:
    attributes = envelope.with_sequence(int(envelope.id)).attributes()
    return [(f"ce_{name}", value.encode()) for name, value in attributes.items()]
