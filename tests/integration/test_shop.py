"""The example shop under load, while its processes are killed: what its ledgers say is what arrived, once and in order.

A small run by default. The full one: ORDERS=20000 CLIENTS=8 KILLS=10 pytest -s tests/integration/test_shop.py
The negative control, in which effects must be doubled: CONTROL=1 pytest -s tests/integration/test_shop.py
"""

import asyncio
import importlib.util
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import orjson
import psutil
import psycopg
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from tests.services import KafkaServer, PostgresServer, wait_until
from tests.services.server import free_port, freeze

ORDERS = int(os.environ.get("ORDERS", "1500"))
CLIENTS = int(os.environ.get("CLIENTS", "8"))
KILLS = int(os.environ.get("KILLS", "2"))
WEB_KILLS = max(1, KILLS * 3 // 10)
CONTROL = os.environ.get("CONTROL") == "1"
SEED = int(os.environ.get("SEED", str(random.randrange(1_000_000))))

# Generous: a busy machine places some ten orders a second.
LIMIT_S = 120 + ORDERS / 10
KILL_WITHIN_S = 60.0
PREFETCH = 1_000
RELAY_BATCH = 500

pytestmark = [pytest.mark.service("postgres"), pytest.mark.service("kafka")]

SHOP = Path(__file__).parents[2] / "examples" / "shop"
TOPICS = {"shop": "shop.orders", "billing": "billing.invoices"}
READS = {"shop": "billing.invoices", "billing": "shop.orders"}

# The negative control: the inbox notes messages as ever, and lets every repeat pass.
WITHOUT_INBOX = """
from cqrs_decor_sqlalchemy.inbox import SqlAlchemyInbox

note = SqlAlchemyInbox.record

async def record(self, *arguments):
    await note(self, *arguments)
    return True

SqlAlchemyInbox.record = record
"""


@dataclass(frozen=True, slots=True, order=True)
class Event:
    """What an event is about, as both the ledger and the sink know it."""

    type: str
    key: str
    sequence: int


@dataclass(frozen=True, slots=True)
class Arrival:
    """An event that was seen, under the id of its message; arrivals are listed in the order in which they came."""

    event: Event
    message_id: str


@dataclass(slots=True)
class Stage:
    """`python -m shop.up`, and which processes it says it has started."""

    postgres: PostgresServer
    kafka: KafkaServer
    port: int
    process: subprocess.Popen[str]
    pids: dict[str, int] = field(default_factory=dict[str, int])
    output: list[str] = field(default_factory=list[str])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def read(self) -> None:
        for line in self.process.stdout or ():
            self.output.append(line)
            part, found, pid = line.partition(": pid ")
            if found:
                self.pids[part] = int(pid)

    def answers(self) -> bool:
        assert self.process.poll() is None, "".join(self.output)
        try:
            return httpx.get(f"{self.url}/openapi.json").is_success
        except httpx.TransportError:
            return False

    def rows(self, database: str, query: str, *values: object) -> list[tuple[Any, ...]]:
        address = self.postgres.url(driver=None, database=database)
        with psycopg.connect(address, autocommit=True) as connection:
            return connection.execute(query.encode(), values).fetchall()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """The shop, installed as a wheel, on servers of its own: topics and groups have fixed names."""
    packages = tmp_path_factory.mktemp("installed")
    _install_shop(packages)
    (packages / "without_inbox.py").write_text(WITHOUT_INBOX)
    with ExitStack() as servers:
        postgres = servers.enter_context(PostgresServer())
        kafka = servers.enter_context(KafkaServer(options={"group.min.session.timeout.ms": "1000"}))
        stage = _start(packages, postgres, kafka)
        reader = threading.Thread(target=stage.read)
        reader.start()
        try:
            wait_until(stage.answers, limit_s=180, what="the shop answers")
            yield stage
        finally:
            with stage.process:
                stage.process.send_signal(signal.SIGINT)
                stage.process.wait(timeout=60)
                reader.join()
            print("".join(stage.output[-50:]))
    assert stage.process.returncode == 0, "".join(stage.output)
    assert not [pid for pid in stage.pids.values() if psutil.pid_exists(pid)], "Ctrl-C left processes behind"


def _install_shop(target: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([*command, str(target), str(SHOP)], check=True)


def _start(packages: Path, postgres: PostgresServer, kafka: KafkaServer) -> Stage:
    port = free_port()
    # Short leases and sessions: what a killed process held goes to the next one within seconds.
    broker = f"{kafka.url()}?session_timeout_s=3&heartbeat_interval_s=0.5"
    path = os.pathsep.join(filter(None, [str(packages), os.environ.get("PYTHONPATH")]))
    handlers = "sink,without_inbox" if CONTROL else "sink"
    settings = {"PYTHONPATH": path, "CQRS_DECOR_LEASE_S": "2", "CQRS_DECOR_HANDLERS": handlers}
    process = subprocess.Popen(
        [sys.executable, "-m", "shop.up", "--postgres", postgres.url(), "--kafka", broker, "--port", str(port)],
        env={**os.environ, **settings},
        cwd=packages,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return Stage(postgres=postgres, kafka=kafka, port=port, process=process)


def test_the_shop_answers_as_its_readme_says(stage: Stage) -> None:
    """An order goes its whole way: placed, invoiced by billing, billed in the shop, cancelled, billed no more."""
    order = {"number": "readme-1", "sku": "tea-03", "quantity": 2}
    with httpx.Client(base_url=stage.url) as http:
        placed = http.post("/orders", json=order)
        assert placed.status_code == 201
        assert placed.json() == order | {"total": 16, "status": "placed", "billed": 0}
        repeated = http.post("/orders", json=order)
        assert (repeated.status_code, repeated.json()["number"]) == (201, "readme-1")
        assert http.post("/orders", json=order | {"quantity": 3}).status_code == 409
        assert http.post("/orders", json=order | {"number": "readme-2", "quantity": 0}).status_code == 422
        assert http.post("/orders", json=order | {"number": "readme-2", "sku": "coal"}).status_code == 404
        assert http.get("/orders/nothing").status_code == 404
        assert http.delete("/orders/nothing").status_code == 404

        wait_until(lambda: http.get("/orders/readme-1").json()["billed"] == 16, limit_s=60, what="it is billed")
        assert http.delete("/orders/readme-1").json()["status"] == "cancelled"
        wait_until(lambda: http.get("/orders/readme-1").json()["billed"] == 0, limit_s=60, what="it is billed no more")


@pytest.mark.slow
@pytest.mark.timeout(60 + 3 * LIMIT_S)
async def test_kills_lose_nothing_double_nothing_and_reorder_nothing(stage: Stage) -> None:
    """Relays, workers and the web process are killed with work in hand, again and again, while orders come in."""
    load = _load_client(stage.url)
    async with _tools(stage, load) as killer, asyncio.timeout(2 * LIMIT_S), asyncio.TaskGroup() as tasks:
        load.enough = lambda: killer.kills.total() == WEB_KILLS + 2 * len(TOPICS) * KILLS
        tasks.create_task(load.run())
        tasks.create_task(killer.kill_all("shop web", WEB_KILLS, killer.open_requests))
        for service in TOPICS:
            tasks.create_task(killer.kill_all(f"{service} relay", KILLS, killer.pending_records(service)))
            tasks.create_task(killer.kill_all(f"{service} worker", KILLS, killer.unacknowledged(service)))
    began = time.monotonic()
    quiet = await _reached(lambda: _is_quiet(stage), LIMIT_S if not CONTROL else KILL_WITHIN_S)
    print(f"\nseed {SEED}: {load}")
    print(f"kills: {dict(killer.kills)}; all was quiet {time.monotonic() - began:.1f} s after the last order and kill")

    found = violations(stage, load, await _published(stage), sum(killer.kills.values()))
    if CONTROL:
        assert any(text.startswith("I3") for text in found), "no effect was doubled: the test would not notice"
        return
    assert found == [], f"seed {SEED}"
    assert quiet, "the outboxes did not become empty"
    expected = dict.fromkeys((f"{service} {loop}" for service in TOPICS for loop in ("relay", "worker")), KILLS)
    assert killer.kills == expected | {"shop web": WEB_KILLS}


A1, A2, A3, B1 = (Event("shop.order-placed", key, number) for key, number in (("a", 1), ("a", 2), ("a", 3), ("b", 1)))


@pytest.mark.parametrize(
    ("arrivals", "found"),
    [
        pytest.param([(A1, "1"), (B1, "3"), (A2, "2"), (A1, "1")], [], id="a late repeat is no fault"),
        pytest.param([(A1, "1"), (A2, "2")], ["I1"], id="lost"),
        pytest.param([(A1, "1"), (A2, "2"), (B1, "3"), (A3, "4")], ["I2"], id="ghost"),
        pytest.param([(A2, "2"), (A1, "1"), (B1, "3")], ["I4"], id="out of order"),
        pytest.param([(A1, "1"), (A2, "2"), (B1, "3"), (A1, "4")], ["I5"], id="a repeat under another id"),
    ],
)
def test_the_oracle_notices(arrivals: list[tuple[Event, str]], found: list[str]) -> None:
    """An oracle that finds nothing must be one that can find something."""
    violated = _delivery_violations({A1, A2, B1}, [Arrival(event, message_id) for event, message_id in arrivals])

    assert [text[:2] for text in violated] == found


# --- the oracle -------------------------------------------------------------------------------------------------------


def violations(stage: Stage, load: Any, published: Mapping[str, Sequence[Arrival]], kills: int) -> list[str]:
    """Hold what arrived, at the broker and at the handlers, against what was committed."""
    found = _effect_violations(stage, load)
    for service, topic in TOPICS.items():
        committed = _committed(stage)[topic]
        reader = next(name for name, read in READS.items() if read == topic)
        sunk = _sunk(stage, reader)
        for where, arrivals, limit in (("broker", published[topic], RELAY_BATCH), ("sink", sunk, PREFETCH)):
            repeated = len(arrivals) - len(set(arrivals))
            print(f"{topic} at the {where}: {len(committed)} committed, {len(arrivals)} arrived, {repeated} repeats")
            found += [f"{service}, {where}: {text}" for text in _delivery_violations(committed, arrivals)]
            if repeated > kills * limit:
                found.append(f"I5 {service}, {where}: {repeated} repeats after {kills} kills")
    return found


def _delivery_violations(committed: set[Event], arrivals: Sequence[Arrival]) -> Iterator[str]:
    seen = {arrival.event for arrival in arrivals}
    yield from (f"I1 lost: {event}" for event in sorted(committed - seen)[:5])
    yield from (f"I2 ghost: {event}" for event in sorted(seen - committed)[:5])
    ids = Counter(arrival.event for arrival in set(arrivals))
    yield from (f"I5 under several ids: {event}" for event, count in ids.items() if count > 1)
    for key, sequences in _first_arrivals(arrivals).items():
        if sequences != sorted(sequences):
            yield f"I4 out of order: {key} {sequences[:20]}"


def _first_arrivals(arrivals: Iterable[Arrival]) -> Mapping[str, list[int]]:
    """The sequence numbers of each key, in the order in which each came first."""
    firsts: dict[str, dict[int, None]] = defaultdict(dict)
    for arrival in arrivals:
        firsts[arrival.event.key].setdefault(arrival.event.sequence)
    return {key: list(sequences) for key, sequences in firsts.items()}


def _effect_violations(stage: Stage, load: Any) -> list[str]:
    """I3: each effect once; and what clients were told is true."""
    orders = {row[0]: row[1:] for row in stage.rows("shop", "SELECT number, status, total, billed FROM orders")}
    lines = Counter(number for (number,) in stage.rows("billing", "SELECT order_number FROM postings"))
    moves = Counter(number for (number,) in stage.rows("shop", "SELECT order_number FROM stock_movements"))
    found: list[str] = []
    for number, (status, total, billed) in orders.items():
        effects = 1 if status == "placed" else 2
        if billed != (total if status == "placed" else 0):
            found.append(f"I3 {number}: {status}, {total} in total, {billed} billed")
        if (lines[number], moves[number]) != (effects, effects):
            found.append(f"I3 {number}: {status}, {lines[number]} postings, {moves[number]} stock movements")
    found += [f"I1 confirmed to a client, and not there: {number}" for number in load.placed - orders.keys()]
    found += [f"confirmed as cancelled: {number}" for number in load.cancelled if orders[number][0] != "cancelled"]
    for service in TOPICS:
        for table in ("cqrs_outbox_parked", "cqrs_inbox_parked"):
            found += [f"{service}: {table} {row}" for row in stage.rows(service, f"SELECT message_id FROM {table}")]
    return found


def _committed(stage: Stage) -> Mapping[str, set[Event]]:
    """The ledger: the events that follow from the rows of the business."""
    orders = stage.rows("shop", "SELECT sku, number, placed_sequence, cancelled_sequence FROM orders")
    invoices = stage.rows("billing", "SELECT order_number, sequence FROM invoices")
    return {
        "shop.orders": {Event("shop.order-placed", sku, placed) for sku, _, placed, _ in orders}
        | {Event("shop.order-cancelled", sku, cancelled) for sku, _, _, cancelled in orders if cancelled is not None},
        "billing.invoices": {Event("billing.invoice-issued", number, 1) for number, _ in invoices}
        | {Event("billing.invoice-voided", number, 2) for number, sequence in invoices if sequence == 2},
    }


def _sunk(stage: Stage, service: str) -> Sequence[Arrival]:
    """What the handlers of a service were given."""
    query = "SELECT type, key, sequence, message_id FROM deliveries WHERE consumer LIKE %s ORDER BY id"
    return [Arrival(Event(*row[:3]), row[3]) for row in stage.rows("sink", query, f"{service}.%")]


async def _published(stage: Stage) -> Mapping[str, Sequence[Arrival]]:
    """What Kafka has, read without a group and without the library."""
    return {topic: await _read_topic(stage.kafka.bootstrap, topic) for topic in TOPICS.values()}


async def _read_topic(bootstrap: str, topic: str) -> Sequence[Arrival]:
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=bootstrap, auto_offset_reset="earliest", group_id=None)
    await consumer.start()
    try:
        ends = await consumer.end_offsets([TopicPartition(topic, n) for n in consumer.partitions_for_topic(topic)])
        arrivals: list[Arrival] = []
        while len(arrivals) < sum(ends.values()):
            for records in (await consumer.getmany(timeout_ms=1_000)).values():
                arrivals += [_arrival(record) for record in records]
        return arrivals
    finally:
        await consumer.stop()


def _arrival(record: Any) -> Arrival:
    headers = {name: value.decode() for name, value in record.headers}
    event = Event(headers["ce_type"], record.key.decode(), orjson.loads(record.value)["sequence"])
    return Arrival(event, headers["ce_id"])


async def _is_quiet(stage: Stage) -> bool:
    """Nothing waits in an outbox, and every committed event has been handled."""
    return await asyncio.to_thread(_is_quiet_now, stage)


def _is_quiet_now(stage: Stage) -> bool:
    (placed, cancelled), *_ = stage.rows("shop", "SELECT count(*), count(cancelled_sequence) FROM orders")
    waiting = [stage.rows(service, "SELECT count(*) FROM cqrs_outbox")[0][0] for service in TOPICS]
    handled = [stage.rows(service, "SELECT count(*) FROM cqrs_inbox")[0][0] for service in TOPICS]
    return waiting == [0, 0] and handled == [placed + cancelled] * 2


# --- kills ------------------------------------------------------------------------------------------------------------

InFlight = Callable[[], Awaitable[set[Any]]]
"""What a process has in hand: anything that tells one piece of work from another."""


@dataclass(slots=True)
class Killer:
    """Kills processes that have work in hand, spread over the orders of the load."""

    stage: Stage
    load: Any
    admin: AIOKafkaAdminClient
    chance: random.Random
    kills: Counter[str] = field(default_factory=Counter[str])

    async def kill_all(self, part: str, times: int, in_flight: InFlight) -> None:
        for number in range(times):
            share = (number + self.chance.random()) / (times + 1)
            await _until(lambda share=share: _true_if(len(self.load.placed) >= share * ORDERS), LIMIT_S, "orders")
            await _until(lambda: self._kill(part, in_flight), KILL_WITHIN_S, f"{part} has work in hand")
            self.kills[part] += 1

    async def _kill(self, part: str, in_flight: InFlight) -> bool:
        """Kill it if it has work in hand. It is frozen while we make sure, so that the work cannot slip away."""
        pid = self.stage.pids[part]
        before = await in_flight()
        if not before:
            return False
        freeze(pid)
        if not before & await in_flight():
            os.kill(pid, signal.SIGCONT)
            return False
        os.kill(pid, signal.SIGKILL)
        await _until(lambda: _true_if(self.stage.pids[part] != pid), 30, f"{part} is started again")
        return True

    async def open_requests(self) -> set[Any]:
        return {"open"} if self.load.open_requests else set()

    def pending_records(self, service: str) -> InFlight:
        """Records of lanes under the lease of a relay that is alive: one that had lanes at an earlier kill is not."""
        owners: set[str] = set()
        seen = 0

        async def in_flight() -> set[Any]:
            nonlocal seen
            if self.kills[f"{service} relay"] != seen:
                seen = self.kills[f"{service} relay"]
                owners.update(former)
            query = (
                "SELECT id, owner FROM cqrs_outbox JOIN cqrs_outbox_lane USING (lane) "
                "WHERE lease_until > now() AND owner <> ALL(%s) ORDER BY id LIMIT 1000"
            )
            rows = await asyncio.to_thread(self.stage.rows, service, query, list(owners))
            former.update(owner for _, owner in rows)
            return {id_ for id_, _ in rows}

        former: set[str] = set()
        return in_flight

    def unacknowledged(self, service: str) -> InFlight:
        """What the living worker has committed and Kafka does not know of yet: it will be delivered again."""
        seen = committed_before = committed = 0

        async def in_flight() -> set[Any]:
            nonlocal seen, committed_before, committed
            if self.kills[f"{service} worker"] != seen:
                seen, committed_before = self.kills[f"{service} worker"], committed
            [(committed,)] = await asyncio.to_thread(self.stage.rows, service, "SELECT count(*) FROM cqrs_inbox")
            known = await self._acknowledged(service)
            return set(range(known, committed)) if committed > committed_before else set()

        return in_flight

    async def _acknowledged(self, service: str) -> int:
        positions = await self.admin.list_consumer_group_offsets(service)
        return sum(max(position.offset, 0) for position in positions.values())


@asynccontextmanager
async def _tools(stage: Stage, load: Any) -> AsyncIterator[Killer]:
    admin = AIOKafkaAdminClient(bootstrap_servers=stage.kafka.bootstrap)
    await admin.start()
    try:
        yield Killer(stage, load, admin, random.Random(SEED))
    finally:
        await admin.close()


def _load_client(url: str) -> Any:
    """`load.py` is a script: it is loaded by its path."""
    spec = importlib.util.spec_from_file_location("shop_load", SHOP / "load.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.Load(url=url, orders=ORDERS, clients=CLIENTS)


async def _until(condition: Callable[[], Awaitable[bool]], limit_s: float, what: str) -> None:
    assert await _reached(condition, limit_s), f"waited {limit_s:g} s in vain until {what}"


async def _reached(condition: Callable[[], Awaitable[bool]], limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not await condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.02)
    return True


async def _true_if(holds: bool) -> bool:
    return holds
