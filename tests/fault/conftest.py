"""What every fault test gets: a seed, and a world on each of the setups that it names."""

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.fault.oracle import KafkaPositions
from tests.fault.world import World, world_of
from tests.services import KafkaServer
from tests.services.fixtures import fresh_name

SETUPS = ("postgres-kafka", "postgres-log", "mariadb-log", "sqlite-log")
PARTITIONS = 3
LIMIT_S = 120


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "negative_control: a protection is switched off; the invariants must be broken")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A cap for each test, servers not counted; its seed stands in its name, so that a failure prints it."""
    for item in items:
        if "world" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(LIMIT_S, func_only=True))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`SEED` is the first seed, `RUNS` how many there are. Negative controls run once: they must fail each time."""
    if "seed" not in metafunc.fixturenames:
        return
    first, runs = int(os.environ.get("SEED", "1")), int(os.environ.get("RUNS", "1"))
    if metafunc.definition.get_closest_marker("negative_control"):
        runs = 1
    metafunc.parametrize("seed", range(first, first + runs), ids=lambda seed: f"seed{seed}")


@pytest.fixture(scope="session")
def quick_kafka() -> Iterator[KafkaServer]:
    """A Kafka that takes a killed member for gone after a second, not after six at the least."""
    with KafkaServer(options={"group.min.session.timeout.ms": "1000"}) as server:
        yield server


@pytest.fixture(params=SETUPS)
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    """On each setup, or on those that `@pytest.mark.parametrize("world", [...], indirect=True)` names."""
    database, _, broker = request.param.partition("-")
    url = request.getfixturevalue(f"{database}_url")
    topic = fresh_name()
    where, positions = "log", None
    if broker == "kafka":
        server: KafkaServer = request.getfixturevalue("quick_kafka")
        await server.create_topic(topic, partitions=PARTITIONS)
        where, positions = server.url(), KafkaPositions(server.bootstrap, topic, PARTITIONS)
    async with world_of(url, where, topic, tmp_path, positions) as made:
        yield made
