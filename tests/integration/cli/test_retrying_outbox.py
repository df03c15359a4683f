"""A script that retries what is parked must not run poison for ever: each record knows how often it was retried."""

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from anyio import to_thread

from cqrs_decor.lanes import LANES
from cqrs_decor.outbox import FailedRecord, OutboxFilter, Settlement
from cqrs_decor.testing.conformance.kit import sample
from cqrs_decor_sqlalchemy import SqlAlchemyStore

_APP = """
import os

from cqrs_decor import Registry, bootstrap

cqrs = bootstrap(registry=Registry("shop"), discover=False, database=os.environ["SHOP_DATABASE"], service="shop")
"""


class Shop:
    """A database whose outbox is on record with operators, and the command line on it."""

    def __init__(self, store: SqlAlchemyStore, url: str, directory: Path) -> None:
        self.store = store
        self._url = url
        self._directory = directory
        (directory / "shop.py").write_text(_APP)

    async def refuse_everything(self) -> None:
        """What a relay does with records that the broker refuses for good."""
        lanes = [
            taken.lane for taken in await self.store.outbox.acquire("relay", timedelta(minutes=5), LANES, in_hand=9)
        ]
        while records := await self.store.outbox.claim(lanes, 1):
            failed = [FailedRecord(record=record, error="no", delay=None) for record in records]
            await self.store.outbox.settle(Settlement(lanes=lanes, failed=failed))
        await self.store.outbox.release("relay", lanes, leaving=True)

    async def asks(self, *arguments: str) -> Any:
        answer = await to_thread.run_sync(self._run, arguments)
        return json.loads(answer.stdout)

    def _run(self, arguments: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "cqrs_decor", *arguments, "--json"],
            cwd=self._directory,
            env={**os.environ, "CQRS_DECOR_APP": "shop:cqrs", "SHOP_DATABASE": self._url},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest_asyncio.fixture(params=["sqlite_url", "postgres_url"])
async def shop(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Shop]:
    url = request.getfixturevalue(request.param)
    store = SqlAlchemyStore.from_url(url)
    await store.schema.upgrade()
    await store.open()
    yield Shop(store, url, tmp_path)
    await store.close()


@pytest.mark.feature("B5")
async def test_what_fails_again_and_again_is_left_alone_by_a_retry_of_all(shop: Shop) -> None:
    """Three times unless told otherwise; who names its id wants it all the same."""
    transaction = await shop.store.begin()
    transaction.add([sample("orders", "a"), sample("orders", "a")])
    await transaction.commit()

    changed: list[int] = []
    for _ in range(4):
        await shop.refuse_everything()
        answer = await shop.asks("outbox", "retry", "--all", "--yes")
        changed.append(answer["changed"])
    listed = await shop.asks("outbox", "list")
    [parked, behind] = await shop.store.outbox.find(OutboxFilter())
    named = await shop.asks("outbox", "retry", str(parked.id), "--yes")

    assert changed == [1, 1, 1, 0]
    assert answer["skipped"] == [
        {"reason": "failed again although it was retried 3 times", "count": 1, "ids": [parked.id]}
    ]
    assert [record["retries"] for record in listed["records"]] == [3, 0]
    assert (parked.state, behind.state, named["changed"]) == ("parked", "held", 1)
