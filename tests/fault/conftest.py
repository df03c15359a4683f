"""What every fault test gets: a seed, and a world on each of the setups that it names."""

import os
import re
import subprocess
import tempfile
from collections.abc import AsyncIterator, Generator, Iterator
from functools import partial
from pathlib import Path

import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import GroupCoordinatorNotAvailableError

from tests.fault.nursery import nursery
from tests.fault.processes import until
from tests.fault.proxy import Proxy
from tests.fault.report import note
from tests.fault.setups import SETUPS, WIDE
from tests.fault.world import Setup, World, world_of
from tests.services import KafkaServer, MariaDbServer, PgBouncerServer, PostgresServer
from tests.services.fixtures import fresh_name
from tests.services.server import free_port

PARTITIONS = 3
LIMIT_S = 180

_outcome = pytest.StashKey[pytest.CallInfo[None]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "negative_control: a protection is switched off; the invariants must be broken")
    config.addinivalue_line("markers", "long: only when FAULT_WIDE is set, as `make fault` does")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A cap for each test, servers not counted; its seed stands in its name, so that a failure prints it."""
    for item in items:
        if "world" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(LIMIT_S, func_only=True))
    left_out = [] if WIDE else [item for item in items if item.get_closest_marker("long")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`SEED` is the first seed, `RUNS` how many there are. Negative controls run once: they must fail each time."""
    if "seed" not in metafunc.fixturenames:
        return
    first, runs = int(os.environ.get("SEED", "1")), int(os.environ.get("RUNS", "1"))
    if metafunc.definition.get_closest_marker("negative_control"):
        runs = 1
    metafunc.parametrize("seed", range(first, first + runs), ids=lambda seed: f"seed{seed}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    if call.when == "call":
        item.stash[_outcome] = call
    return (yield)


def pytest_sessionfinish() -> None:
    if nursery.cache_info().currsize:
        nursery().close()


# --- servers of the harness's own: they are killed ------------------------------------------------------------------


@pytest.fixture(scope="session")
def own_postgres() -> Iterator[PostgresServer]:
    with PostgresServer() as server:
        yield server


@pytest.fixture(scope="session")
def own_mariadb() -> Iterator[MariaDbServer]:
    with MariaDbServer() as server:
        yield server


@pytest.fixture(scope="session")
def own_pgbouncer(own_postgres: PostgresServer) -> Iterator[PgBouncerServer]:
    with PgBouncerServer(own_postgres) as server:
        yield server


@pytest.fixture(scope="session")
def own_kafka() -> Iterator[tuple[KafkaServer, Proxy]]:
    """A Kafka that takes a killed member for gone after a second, not after six at the least; with its proxy."""
    port = free_port()
    options = {"group.min.session.timeout.ms": "1000"}
    with KafkaServer(advertised=port, options=options) as server, Proxy(server.behind_port, port) as proxy:
        yield server, proxy


async def _wait_for_the_topic_of_groups(server: KafkaServer) -> None:
    """Kafka makes it when the first group asks, and turns members away meanwhile: that is no fault to be tried."""
    admin = AIOKafkaAdminClient(bootstrap_servers=server.bootstrap)
    await admin.start()
    try:
        await until(partial(_knows_groups, admin), "Kafka had a topic for groups", 60)
    finally:
        await admin.close()


async def _knows_groups(admin: AIOKafkaAdminClient) -> bool:
    try:
        await admin.list_consumer_group_offsets("first")
    except GroupCoordinatorNotAvailableError:
        return False
    return True


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A disk of 48 MB, which only root can make."""
    folder = Path(tempfile.mkdtemp(prefix="cqrs-decor-disk-"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "none", str(folder)], check=True)
    folder.chmod(0o777)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
    folder.rmdir()


@pytest.fixture(params=SETUPS)
async def world(request: pytest.FixtureRequest, tmp_path: Path, seed: int) -> AsyncIterator[World]:
    """On each setup, or on those that `@pytest.mark.parametrize("world", [...], indirect=True)` names: a database
    (postgres, bouncer, mariadb, sqlite) and a broker (kafka, log).
    """
    name = str(request.param)
    setup = await _setup(name, request, tmp_path, seed)
    try:
        async with world_of(setup, tmp_path) as made:
            yield made
    finally:
        if setup.database_server is not None:
            setup.database_server.start().drop_database(setup.topic)  # type: ignore[attr-defined]
    note(made, _scenario(request), failed=_error_of(request))


async def _setup(name: str, request: pytest.FixtureRequest, folder: Path, seed: int) -> Setup:
    database, _, broker = name.partition("-")
    topic = fresh_name()
    kafka, victims, server, pooler = None, None, None, None
    disk = request.getfixturevalue("small_disk") if database.endswith("disk") else None
    url = f"sqlite+aiosqlite:///{(disk or folder) / 'test.db'}"
    if database in ("postgres", "bouncer", "asyncpgbouncer"):
        server = request.getfixturevalue("own_postgres")
        server.start().create_database(topic)
        url = server.url(database=topic)
    if database == "postgresdisk":
        server = request.getfixturevalue("own_postgres")
        server.start().create_database(topic, on=disk)
        url = server.url(database=topic)
    if database in ("bouncer", "asyncpgbouncer"):
        driver = "psycopg" if database == "bouncer" else "asyncpg"
        pooler = request.getfixturevalue("own_pgbouncer").start()
        victims = pooler.url(driver=driver, database=topic)
    if database == "mariadb":
        server = request.getfixturevalue("own_mariadb")
        server.start().create_database(topic)
        url = server.url(database=topic)
    if broker == "kafka":
        kafka = request.getfixturevalue("own_kafka")
        await kafka[0].start().create_topic(topic, partitions=PARTITIONS)
        await _wait_for_the_topic_of_groups(kafka[0])
    return Setup(
        name=name,
        database=url,
        victims_database=victims,
        broker="log" if kafka is None else kafka[0].url(),
        topic=topic,
        database_server=server,
        kafka=kafka,
        pooler=pooler,
        disk=disk,
        partitions=PARTITIONS,
        seed=seed,
    )


def _scenario(request: pytest.FixtureRequest) -> tuple[str, str, bool]:
    """The number of the fault, the sentence that the test's name is, and whether it is a negative control."""
    item = request.node
    found = re.match(r"test_(f\d+)_", item.path.name)
    number = found[1].upper() if found else "-"
    name = str(item.originalname).removeprefix("test_").replace("_", " ")
    return number, name, item.get_closest_marker("negative_control") is not None


def _error_of(request: pytest.FixtureRequest) -> str | None:
    call = request.node.stash.get(_outcome, None)
    if call is None or call.excinfo is None:
        return None
    return call.excinfo.exconly().partition("\n--- ")[0].removeprefix("tests.fault.invariants.")[:300]
