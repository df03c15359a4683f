"""The log passes the kit for brokers on every database that it supports."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from cqrs_decor.broker import Broker
from cqrs_decor.envelope import Envelope
from cqrs_decor.testing.conformance import BrokerConformance
from cqrs_decor.testing.conformance.kit import sample
from cqrs_decor_sqlalchemy.log_broker import LogTableBroker

pytestmark = pytest.mark.feature("B14")


class _LogConformance(BrokerConformance):
    url: str

    @asynccontextmanager
    async def open_broker(self) -> AsyncGenerator[Broker]:
        broker = LogTableBroker.from_url(self.url)
        await broker.open()
        try:
            yield broker
        finally:
            await broker.close()

    def oversized_envelope(self, topic: str, key: str) -> Envelope:
        return sample(topic, key, data=b"x" * 1_048_577)


class TestLogOnSqlite(_LogConformance):
    @pytest.fixture(autouse=True)
    def use_file(self, sqlite_url: str) -> None:
        self.url = sqlite_url


class TestLogOnPostgresWithAsyncpg(_LogConformance):
    @pytest.fixture(autouse=True)
    def use_server(self, postgres_url: str) -> None:
        self.url = postgres_url


class TestLogOnPostgresWithPsycopg(_LogConformance):
    @pytest.fixture(autouse=True)
    def use_server(self, postgres_url: str) -> None:
        self.url = postgres_url.replace("+asyncpg", "+psycopg")


class TestLogOnMariaDb(_LogConformance):
    @pytest.fixture(autouse=True)
    def use_server(self, mariadb_url: str) -> None:
        self.url = mariadb_url
