"""Handlers on a database that fail at something else: that is a failure of theirs, and no outage of the database."""

import asyncio
import socket
from collections.abc import AsyncGenerator
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from cqrs_decor import App, Command, IntegrationEvent, Registry, Retry, bootstrap, emit
from cqrs_decor.inbox import InboxFilter
from cqrs_decor_sqlalchemy import SqlAlchemyStore

pytestmark = pytest.mark.feature("B4")

TWICE = Retry(max_attempts=2, first_delay=timedelta(0), max_delay=timedelta(0))
NOBODY = ("127.0.0.1", 1)


class Ship(Command[None]):
    order: str


class Shipped(IntegrationEvent, topic="shipped", key="order"):
    order: str


shop = Registry("shop")
tries: list[str] = []


@shop.command_handler
async def ship(command: Ship, session: AsyncSession) -> None:
    emit(Shipped(order=command.order))


@shop.event_handler(name="calls", retry=TWICE)
async def call_a_carrier(event: Shipped, session: AsyncSession) -> None:
    tries.append("calls")
    await asyncio.open_connection(*NOBODY)


@shop.event_handler(name="calls-in-a-thread", retry=TWICE)
def call_a_carrier_in_a_thread(event: Shipped, session: Session) -> None:
    tries.append("calls-in-a-thread")
    socket.create_connection(NOBODY)


@shop.event_handler(name="is-slow", retry=TWICE, timeout=0.05)
async def wait_for_a_carrier(event: Shipped, session: AsyncSession) -> None:
    tries.append("is-slow")
    await asyncio.sleep(60)


@pytest.fixture
async def app(tmp_path: Path) -> AsyncGenerator[App]:
    url = f"sqlite+aiosqlite:///{tmp_path}/shop.db"
    store = SqlAlchemyStore.from_url(url)
    await store.schema.upgrade()
    await store.close()
    tries.clear()
    async with bootstrap(registry=shop, discover=False, database=url, service="shop", run="none") as app:
        yield app


async def test_another_service_that_is_away_and_a_time_limit_count_as_attempts(app: App) -> None:
    """They would else be tried for ever, and hold up the others of their key, while "the inbox is away" is said."""
    await app.send(Ship(order="a"))
    await app.drain(30)

    parked = await app.store.inbox.find(InboxFilter())
    assert {each.consumer: (each.attempts, each.error.partition(" ")[0]) for each in parked} == {
        "shop.calls": (2, "ConnectionRefusedError"),
        "shop.calls-in-a-thread": (2, "ConnectionRefusedError"),
        "shop.is-slow": (2, "HandlerTimeoutError"),
    }
    assert sorted(tries) == ["calls"] * 2 + ["calls-in-a-thread"] * 2 + ["is-slow"] * 2
