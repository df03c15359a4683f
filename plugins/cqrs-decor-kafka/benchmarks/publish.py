"""How much of aiokafka's own throughput publishing through the plugin reaches, on one topic in one run.

    python -m tests.services up kafka
    python plugins/cqrs-decor-kafka/benchmarks/publish.py 127.0.0.1:PORT

Both sides write the same bodies, keys and headers, idempotent, acks=all, batches of 128 KiB, in calls of 500. Rounds
alternate, so that a noisy machine is noisy for both; the ratio is that of the medians. The last line is what aiokafka
reaches when nobody waits for a call to be acknowledged, which a relay has to.
"""

import asyncio
import statistics
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime

from aiokafka import AIOKafkaProducer

from cqrs_decor.broker import TopicPlan
from cqrs_decor.envelope import Envelope
from cqrs_decor_kafka import KafkaBroker, KafkaSettings
from cqrs_decor_kafka.binding import headers_of

CALL = 500
CALLS = 40
ROUNDS = 9


def envelopes(topic: str) -> list[Envelope]:
    """As the relay hands them over: 200 bytes of body, keys that come again, all attributes that an event has."""
    now = datetime.now(UTC)
    return [
        Envelope(
            id=str(uuid.uuid4()),
            source="shop",
            type="shop.order-placed",
            topic=topic,
            key=f"order-{n % 5000}",
            data=b"x" * 200,
            time=now,
            sequence=n,
            correlation_id="c" * 36,
        )
        for n in range(CALL * CALLS)
    ]


async def throughput(calls: Sequence[list[Envelope]], publish: Callable[[list[Envelope]], Awaitable[object]]) -> float:
    started = time.perf_counter()
    for call in calls:
        await publish(call)
    return CALL * len(calls) / (time.perf_counter() - started)


async def main(bootstrap: str) -> None:
    topic = f"bench-{uuid.uuid4().hex[:8]}"
    broker = KafkaBroker(KafkaSettings(bootstrap_servers=bootstrap))
    await broker.open()
    await broker.create_topics([TopicPlan(name=topic)])
    raw = AIOKafkaProducer(
        bootstrap_servers=bootstrap, enable_idempotence=True, acks="all", max_batch_size=128 * 1024, linger_ms=2
    )
    await raw.start()
    everything = envelopes(topic)
    calls = [everything[start : start + CALL] for start in range(0, len(everything), CALL)]
    headers = {envelope.id: headers_of(envelope) for envelope in everything}
    few = {id: [header for header in all_ if header[0] in FIVE] for id, all_ in headers.items()}

    def driver(chosen: dict[str, list[tuple[str, bytes]]]) -> Callable[[list[Envelope]], Awaitable[object]]:
        async def publish(call: list[Envelope]) -> None:
            flights = [await raw.send(e.topic, e.data, key=(e.key or "").encode(), headers=chosen[e.id]) for e in call]
            await asyncio.gather(*flights)

        return publish

    async def through_plugin(call: list[Envelope]) -> None:
        if any(await broker.publish(call)):
            raise RuntimeError("a record was refused")

    async def stream(call: list[Envelope]) -> None:
        flights.extend(
            [await raw.send(e.topic, e.data, key=(e.key or "").encode(), headers=headers[e.id]) for e in call]
        )

    async def streaming() -> float:
        flights.clear()
        started = time.perf_counter()
        for call in calls:
            await stream(call)
        await asyncio.gather(*flights)
        return len(everything) / (time.perf_counter() - started)

    flights: list[asyncio.Future[object]] = []
    ways = {
        "aiokafka, five headers": driver(few),
        "aiokafka, the same headers": driver(headers),
        "KafkaBroker.publish": through_plugin,
    }
    measured: dict[str, list[float]] = {name: [] for name in [*ways, STREAM]}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            measured[name].append(await throughput(calls, way))
        measured[STREAM].append(await streaming())
    ours = statistics.median(measured["KafkaBroker.publish"])
    for name, values in measured.items():
        middle = statistics.median(values)
        sys.stdout.write(f"{name:38} {middle:>9,.0f}/s   KafkaBroker.publish is {ours / middle:.0%} of it\n")
    await raw.stop()
    await broker.close()


STREAM = "aiokafka, the same headers, no calls"
FIVE = ("ce_id", "ce_source", "ce_type", "ce_time", "ce_specversion")

if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
