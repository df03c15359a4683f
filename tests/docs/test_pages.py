"""Every block of Python in README and documentation runs as it stands, on real servers where it names one."""

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, Block, blocks, pages
from tests.services import KafkaServer, PostgresServer
from tests.services.fixtures import fresh_name

_LIMITS = {
    ("docs/index.md", 1): 9,
    ("docs/tutorial/events.md", 1): 16,
    ("docs/tutorial/testing.md", 2): 6,
    ("README.md", 1): 12,
}
"""Non-blank lines that a page promises."""


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.feature("U7")
@pytest.mark.parametrize("page", pages(), ids=_name)
def test_every_block_of_the_page_runs(page: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A reader who copies a block must get what the page says."""
    for block in blocks(page):
        _run(block, tmp_path, request)


@pytest.mark.parametrize(("page", "number"), _LIMITS, ids=str)
def test_a_first_program_is_as_short_as_promised(page: str, number: int) -> None:
    """The shortest useful program is the first impression."""
    assert blocks(ROOT / page)[number - 1].lines <= _LIMITS[page, number]


def _run(block: Block, folder: Path, request: pytest.FixtureRequest) -> None:
    file = folder / (block.file or f"block_{block.number}.py")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(_with_real_servers(block.code, request))
    is_test = file.name.startswith("test_")
    pytest_options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "asyncio_mode=auto",
        "-c",
        os.devnull,
        f"--rootdir={folder}",
    ]
    command = [sys.executable, "-m", "pytest", *pytest_options, str(file)] if is_test else [sys.executable, str(file)]
    result = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert result.returncode == 0, f"block {block.number} of {_name(block.page)}:\n{result.stdout}\n{result.stderr}"


def _with_real_servers(code: str, request: pytest.FixtureRequest) -> str:
    """The same code with the addresses of this run's servers; its topics are made, as `topics create` would."""
    if "localhost:9092" in code:
        kafka: KafkaServer = request.getfixturevalue("kafka_server")
        for topic in sorted(set(re.findall(r'topic="([^"]+)"', code))):
            asyncio.run(_create(kafka, topic))
        code = code.replace("localhost:9092", kafka.bootstrap)
    if "postgresql+asyncpg://localhost/shop" in code:
        postgres: PostgresServer = request.getfixturevalue("postgres_server")
        name = fresh_name()
        postgres.create_database(name)
        code = code.replace("postgresql+asyncpg://localhost/shop", postgres.url(driver="asyncpg", database=name))
    return code


async def _create(kafka: KafkaServer, topic: str) -> None:
    try:
        await kafka.create_topic(topic)
    except Exception as error:  # the client's own error class; another page may have made it
        if "exists" not in repr(error).lower():
            raise
