"""The servers that all other tests stand on: they answer, a crash keeps what was committed, nothing is left behind."""

import asyncio
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.errors import UnknownTopicOrPartitionError
from psycopg import sql
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from tests.services import (
    KafkaServer,
    MariaDbServer,
    MissingServerError,
    PgBouncerServer,
    PostgresServer,
    Server,
    ServerFailedError,
    shared,
    wait_until,
)
from tests.services.fixtures import fresh_name
from tests.services.server import stands_still


class TestDatabases:
    async def test_a_fresh_postgresql_database_answers_through_asyncpg(self, postgres_url: str) -> None:
        """This is how most integration tests reach it."""
        assert await _scalar(postgres_url, "SELECT 41 + 1") == 42

    async def test_postgresql_answers_through_psycopg(self, postgres_server: PostgresServer) -> None:
        """The same server serves the second driver."""
        assert await _scalar(postgres_server.url(driver="psycopg"), "SELECT 41 + 1") == 42

    async def test_postgresql_flushes_on_commit(self, postgres_url: str) -> None:
        """Durability is promised and measured: a faster, unsafe setting would make both worthless."""
        assert await _scalar(postgres_url, "SHOW fsync") == "on"
        assert await _scalar(postgres_url, "SHOW synchronous_commit") == "on"

    @pytest.mark.parametrize("dialect", ["mysql", "mariadb"])
    async def test_a_mariadb_database_answers_through_asyncmy(
        self, mariadb_server: MariaDbServer, dialect: str
    ) -> None:
        """It has two names in SQLAlchemy, with different dialects."""
        assert await _scalar(mariadb_server.url(dialect=dialect), "SELECT 41 + 1") == 42

    async def test_mariadb_flushes_on_commit(self, mariadb_url: str) -> None:
        """As for PostgreSQL."""
        assert await _scalar(mariadb_url, "SELECT @@innodb_flush_log_at_trx_commit") == 1

    async def test_an_sqlite_file_answers(self, sqlite_url: str) -> None:
        """The embedded default needs no server, only a file of its own."""
        assert await _scalar(sqlite_url, "SELECT 41 + 1") == 42

    def test_each_test_gets_a_database_of_its_own(self, postgres_url: str, mariadb_url: str) -> None:
        """What one test leaves must not meet the next."""
        names = {fresh_name() for _ in range(100)}

        assert len(names) == 100
        assert not names & {postgres_url.rpartition("/")[2], mariadb_url.rpartition("/")[2]}

    def test_postgresql_comes_back_from_a_sigkill_with_what_was_committed(self) -> None:
        """Fault tests kill it in the middle of everything and then count rows."""
        with PostgresServer() as server:
            server.create_database("shop")
            server.execute(sql.SQL("CREATE TABLE sale AS SELECT 7 AS id"), database="shop")
            port, pid = server.port, server.pid
            server.kill()
            assert not psutil.pid_exists(pid)
            server.start()

            assert server.port == port
            assert server.execute(sql.SQL("SELECT id FROM sale"), database="shop") == [(7,)]

    def test_a_pooler_gives_a_server_connection_for_one_transaction(self) -> None:
        """What a session keeps elsewhere is not kept here: that is what tests behind a pooler are about."""
        with PostgresServer() as server, PgBouncerServer(server, pool_size=1) as pooler:
            url = pooler.url(driver=None)
            with psycopg.connect(url, autocommit=True) as one, psycopg.connect(url, autocommit=True) as another:
                pid = one.execute("SELECT pg_backend_pid()").fetchone()
                assert another.execute("SELECT pg_backend_pid()").fetchone() == pid

    def test_mariadb_comes_back_from_a_sigkill_with_what_was_committed(self) -> None:
        """As for PostgreSQL."""
        with MariaDbServer() as server:
            server.create_database("shop")
            server.execute("CREATE TABLE sale AS SELECT 7 AS id", database="shop")
            port = server.port
            server.kill()
            server.start()

            assert server.port == port
            assert server.execute("SELECT id FROM sale", database="shop") == [["7"]]


class TestKafka:
    async def test_a_record_goes_through(self, kafka_server: KafkaServer, kafka_bootstrap: str) -> None:
        """One topic made by hand, one record in, the same record out."""
        topic = fresh_name()
        await kafka_server.create_topic(topic, partitions=3)

        assert await _round_trip(topic, b"tea", bootstrap_servers=kafka_bootstrap) == b"tea"

    async def test_a_topic_is_never_made_by_itself(self, kafka_bootstrap: str) -> None:
        """Production brokers refuse it as well, so a test that relies on it would lie."""
        producer = AIOKafkaProducer(bootstrap_servers=kafka_bootstrap, request_timeout_ms=1000)
        await producer.start()
        try:
            with pytest.raises(UnknownTopicOrPartitionError):
                await producer.partitions_for(fresh_name())
        finally:
            await producer.stop()

    async def test_it_comes_back_from_a_sigkill_with_its_records(self) -> None:
        """Acknowledged means kept, and the relay has to find the broker where it was."""
        with KafkaServer() as server:
            await server.create_topic("sales")
            await _produce("sales", b"tea", bootstrap_servers=server.bootstrap)
            bootstrap = server.bootstrap
            server.kill()
            server.start()

            assert server.bootstrap == bootstrap
            assert await _consume("sales", bootstrap_servers=bootstrap) == b"tea"

    async def test_it_speaks_tls_and_scram_on_further_listeners(self) -> None:
        """Managed Kafka is reached in one of these two ways."""
        with KafkaServer(tls=True, sasl=True) as server:
            await server.create_topic("tls")
            await server.create_topic("sasl")
            tls = {"bootstrap_servers": server.tls_bootstrap, "security_protocol": "SSL"}
            scram = {
                "bootstrap_servers": server.sasl_bootstrap,
                "security_protocol": "SASL_SSL",
                "sasl_mechanism": "SCRAM-SHA-512",
                "sasl_plain_username": server.username,
                "sasl_plain_password": server.password,
            }

            assert await _round_trip("tls", b"tea", ssl_context=server.ssl_context(), **tls) == b"tea"
            assert await _round_trip("sasl", b"tea", ssl_context=server.ssl_context(), **scram) == b"tea"
            with pytest.raises(ssl.SSLCertVerificationError):
                await asyncio.open_connection(*server.tls_bootstrap.split(":"), ssl=ssl.create_default_context())


class TestLife:
    def test_a_paused_server_keeps_connections_open_and_answers_later(self) -> None:
        """A hanging server is a fault of its own: no error arrives, only silence."""
        with PostgresServer() as server:
            server.pause()
            asked = subprocess.Popen([sys.executable, "-c", _ASK.format(url=server.url(driver=None))])
            with pytest.raises(subprocess.TimeoutExpired):
                asked.wait(timeout=1)
            server.resume()

            assert asked.wait(timeout=30) == 0

    def test_a_paused_server_stands_still_at_once(self) -> None:
        """SIGSTOP only asks for it; a thread that goes on for a moment answers what a test took for swallowed."""
        with KafkaServer() as server:
            for _ in range(50):
                server.pause()
                still = stands_still(server.pid)
                server.resume()
                wait_until(lambda: not stands_still(server.pid), limit_s=10, what="it goes on")
                assert still

    def test_a_stopped_server_keeps_its_data_and_a_discarded_one_does_not(self) -> None:
        """A run must leave nothing in the temporary folder."""
        server = MariaDbServer().start()
        folder = server.directory
        server.stop()
        assert not server.is_running
        assert folder.exists()
        server.discard()

        assert not folder.exists()

    def test_a_server_ends_with_the_process_that_started_it(self, tmp_path: Path) -> None:
        """A run that is killed must not leave servers behind, on a port that nobody knows."""
        note = tmp_path / "note"
        starter = subprocess.Popen([sys.executable, "-c", _START_AND_HANG.format(note=str(note))])
        wait_until(lambda: note.exists() and note.read_text().endswith("\n"), limit_s=60, what="the server has started")
        pid, folder = note.read_text().split()
        os.kill(starter.pid, signal.SIGKILL)
        starter.wait(timeout=10)

        wait_until(lambda: not _is_alive(int(pid)), limit_s=30, what="the server has ended")
        wait_until(lambda: not Path(folder).exists(), limit_s=30, what="its data is gone")

    def test_a_server_that_cannot_start_says_why(self) -> None:
        """The log lies in a folder that is about to be deleted, so its end belongs into the error."""
        server = PostgresServer(options={"max_connections": "many"})

        with pytest.raises(ServerFailedError, match=r'invalid value for parameter "max_connections": "many"'):
            server.start()
        server.discard()

    def test_a_server_that_is_not_installed_names_the_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The sentence is all that a newcomer sees, and it must be enough."""
        monkeypatch.setattr("tests.services.postgres.find_binary", lambda *_: None)

        with pytest.raises(MissingServerError, match=r"Install it with: apt-get install postgresql$"):
            PostgresServer().start()


class TestShared:
    @pytest.fixture(autouse=True)
    def _own_state(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr(shared, "_STATE", tmp_path / "state")
        yield
        shared.end_shared(PostgresServer)

    def test_a_shared_server_is_found_by_the_next_run_and_survives_it(self) -> None:
        """Starting servers is most of the time of a short run."""
        started = shared.start_shared(PostgresServer)
        with shared.running(PostgresServer) as found:
            assert found.url() == started.url()

        assert _is_alive(started.pid)

    def test_a_shared_server_that_a_test_restarts_is_still_found(self) -> None:
        """Its pid has changed; the record follows."""
        shared.start_shared(PostgresServer)
        with shared.running(PostgresServer) as found:
            found.kill()
            found.start()

        again = shared.attach(PostgresServer)
        assert again is not None
        assert again.pid == found.pid

    def test_a_record_of_a_server_that_is_gone_is_ignored(self) -> None:
        """A reboot or a kill leaves the record behind."""
        server = shared.start_shared(PostgresServer)
        server.kill()

        assert shared.attach(PostgresServer) is None
        server.discard()

    def test_down_deletes_the_data(self) -> None:
        """Nothing stays behind."""
        server: Server = shared.start_shared(PostgresServer)
        folder = server.directory

        assert shared.end_shared(PostgresServer)
        assert not folder.exists()
        assert not shared.end_shared(PostgresServer)


_ASK = "import psycopg; psycopg.connect({url!r}, connect_timeout=30).execute('SELECT 1')"

_START_AND_HANG = """
import pathlib, signal
from tests.services import PostgresServer
server = PostgresServer().start()
pathlib.Path({note!r}).write_text(f"{{server.pid}} {{server.directory}}\\n")
signal.pause()
"""


async def _scalar(url: str, statement: str) -> object:
    engine = create_async_engine(url)
    try:
        async with engine.connect() as connection:
            return (await connection.execute(text(statement))).scalar_one()
    finally:
        await engine.dispose()


async def _round_trip(topic: str, value: bytes, **connection: object) -> bytes:
    await _produce(topic, value, **connection)
    return await _consume(topic, **connection)


async def _produce(topic: str, value: bytes, **connection: object) -> None:
    producer = AIOKafkaProducer(acks="all", **connection)
    await producer.start()
    try:
        await producer.send_and_wait(topic, value)
    finally:
        await producer.stop()


async def _consume(topic: str, **connection: object) -> bytes:
    consumer = AIOKafkaConsumer(topic, group_id=fresh_name(), auto_offset_reset="earliest", **connection)
    await consumer.start()
    try:
        record = await asyncio.wait_for(consumer.getone(), timeout=30)
    finally:
        await consumer.stop()
    return record.value


def _is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
