"""A relay from PostgreSQL to Kafka against aiokafka's own producer: same payload, headers, settings, same minute. And
against the producer of python-cqrs, and against two and four relays on the same rows. Order per key is checked on all
that arrives.
"""

import asyncio
import statistics
from collections.abc import Sequence
from datetime import timedelta
from subprocess import DEVNULL, check_output
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
from tests.benchmarks.backlog import require_order
from tests.benchmarks.figures import Figure, at_least, compared
from tests.benchmarks.orders import PAYLOAD, TOPIC, database
from tests.benchmarks.peer import VERSION, python_of_peer
from tests.services import KafkaServer, PostgresServer, running
from tests.services.fixtures import fresh_name

RECORDS = 100_000
KEYS = 1_000


async def measure(rounds: int) -> Sequence[Figure]:
    with running(PostgresServer) as postgres, running(KafkaServer) as kafka:
        async with database(postgres) as engine:
            pairs = [await _round(engine, kafka, TOPIC) for _ in range(max(3, rounds // 2))]
            ours = statistics.median(ours for ours, _ in pairs)
            peers = await _peer(engine, kafka)
    return [
        compared(
            "relay PostgreSQL -> Kafka, one process",
            pairs,
            other_is="aiokafka's producer",
            unit="records/s",
            budget=at_least(0.6),
        ),
        compared(
            "the same",
            [(ours, peers)],
            other_is=f"python-cqrs {VERSION}'s producer",
            unit="records/s",
            budget=at_least(20),
        ),
    ]


async def _round(engine: AsyncEngine, kafka: KafkaServer, name: str) -> tuple[float, float]:
    topic, other = f"{name}.{fresh_name()}", f"{name}.{fresh_name()}"
    for each in (topic, other):
        await kafka.create_topic(each, partitions=12)
    ours = await _ours(engine, f"kafka://{kafka.bootstrap}", [envelope_of(n, topic) for n in range(RECORDS)])
    await require_order(kafka.bootstrap, topic, RECORDS)
    return ours, await _raw(kafka.bootstrap, [envelope_of(n, other) for n in range(RECORDS)])


async def _peer(engine: AsyncEngine, kafka: KafkaServer) -> float:
    """Events per second of the peer's own loop, in its own environment, on the same database and broker."""
    topic = f"{TOPIC}.{fresh_name()}"
    await kafka.create_topic(topic, partitions=12)
    url = engine.url.render_as_string(hide_password=False)
    command = [python_of_peer(), "tests/benchmarks/peer_outbox.py", url, kafka.bootstrap, topic, "1000"]
    return float(check_output(command, text=True, stderr=DEVNULL).split()[-1])


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
