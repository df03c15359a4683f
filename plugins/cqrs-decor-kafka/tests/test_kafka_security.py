"""TLS and SASL against the real server, and what is said about a door that does not open."""

import asyncio
import socket
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta

import anyio
import pytest

from cqrs_decor.broker import TopicPlan
from cqrs_decor.errors import BrokerAccessError, BrokerError, BrokerUnavailableError, BrokerVersionError
from cqrs_decor.testing.conformance.kit import sample
from cqrs_decor_kafka import KafkaBroker
from tests.services.fixtures import fresh_name
from tests.services.kafka import KafkaServer


class AllMechanisms(KafkaServer):
    """Knows the user by all three mechanisms."""

    def _scram_user(self) -> Sequence[str]:
        sha_256 = f"SCRAM-SHA-256=[name={self.username},password={self.password}]"
        return [*super()._scram_user(), "--add-scram", sha_256]


_JAAS = "org.apache.kafka.common.security"
_OPTIONS = {
    "sasl.enabled.mechanisms": "SCRAM-SHA-512,SCRAM-SHA-256,PLAIN",
    "listener.name.sasl_ssl.scram-sha-256.sasl.jaas.config": f"{_JAAS}.scram.ScramLoginModule required;",
    "listener.name.sasl_ssl.plain.sasl.jaas.config": f"{_JAAS}.plain.PlainLoginModule required "
    f'user_{KafkaServer.username}="{KafkaServer.password}";',
    "listener.name.ssl.ssl.client.auth": "required",
}


@pytest.fixture(scope="module")
def server() -> Iterator[KafkaServer]:
    """Its TLS listener asks for a certificate, its SASL listener for a password."""
    with AllMechanisms(tls=True, sasl=True, options=_OPTIONS) as server:
        yield server.start()


@pytest.fixture(scope="module")
def files(server: KafkaServer) -> dict[str, str]:
    certificates = server.certificates
    return {
        "ca": f"ca_file={certificates.authority}",
        "client": f"cert_file={certificates.client_certificate}&key_file={certificates.client_key}",
    }


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-512", "SCRAM-SHA-256", "PLAIN"])
async def test_a_password_opens_over_tls(server: KafkaServer, files: dict[str, str], mechanism: str) -> None:
    """What managed Kafka offers; publishing and reading each open connections of their own."""
    user = f"{server.username}:{server.password}"
    url = f"kafka://{user}@{server.sasl_bootstrap}?mechanism={mechanism}&{files['ca']}"

    await publish_and_read(url)


async def test_a_certificate_opens(server: KafkaServer, files: dict[str, str]) -> None:
    """Mutual TLS: the broker knows us by our certificate."""
    await publish_and_read(f"kafkas://{server.tls_bootstrap}?{files['ca']}&{files['client']}")


async def test_a_wrong_password_is_an_access_error(server: KafkaServer, files: dict[str, str]) -> None:
    """Tried again for ever it would lock the account; the text must not show it."""
    error = await refusal(f"kafka://{server.username}:wr0ng-s3cret@{server.sasl_bootstrap}?{files['ca']}")

    assert isinstance(error, BrokerAccessError)
    assert "wr0ng-s3cret" not in f"{error}{error!r}"
    assert "invalid credentials" in str(error)


async def test_a_mechanism_that_the_broker_lacks_is_an_access_error(files: dict[str, str]) -> None:
    """Another mechanism is a setting, another password would not help."""
    with KafkaServer(tls=True, sasl=True) as scram_only:
        scram_only.start()
        ca = f"ca_file={scram_only.certificates.authority}"
        user = f"{scram_only.username}:{scram_only.password}"
        error = await refusal(f"kafka://{user}@{scram_only.sasl_bootstrap}?mechanism=PLAIN&{ca}")

    assert isinstance(error, BrokerAccessError)
    assert "does not support the requested SASL mechanism" in str(error)


async def test_an_unknown_authority_is_an_access_error(server: KafkaServer, files: dict[str, str]) -> None:
    """The usual reason is a missing ca_file."""
    error = await refusal(f"kafkas://{server.tls_bootstrap}")

    assert isinstance(error, BrokerAccessError)
    assert "certificate" in str(error).lower()


async def test_a_missing_client_certificate_is_an_access_error(server: KafkaServer, files: dict[str, str]) -> None:
    """With TLS 1.3 the broker says so only after the handshake, when it looks like a lost connection."""
    error = await refusal(f"kafkas://{server.tls_bootstrap}?{files['ca']}")

    assert isinstance(error, BrokerAccessError), str(error)
    assert "cert_file" in str(error)


async def test_no_tls_at_a_tls_listener_gets_the_true_hint(server: KafkaServer) -> None:
    """The broker just hangs up; without the hint people look for the fault in the network."""
    error = await refusal(f"kafka://{server.tls_bootstrap}")

    assert isinstance(error, BrokerUnavailableError)
    assert "may want TLS" in str(error)


async def test_tls_at_a_plain_listener_gets_the_true_hint(server: KafkaServer, files: dict[str, str]) -> None:
    """The other way round."""
    error = await refusal(f"kafkas://{server.bootstrap}?{files['ca']}")

    assert isinstance(error, BrokerUnavailableError | BrokerVersionError)
    assert "without TLS" in str(error)


async def test_a_port_that_is_not_kafka_ends_in_bounded_time() -> None:
    """A web server answers with text, whose first bytes look like a length of a gigabyte."""

    writers: list[asyncio.StreamWriter] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        await reader.read(10)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as web:
        port = web.sockets[0].getsockname()[1]
        with anyio.fail_after(15):
            error = await refusal(f"kafka://127.0.0.1:{port}?connect_timeout_s=1")
        for writer in writers:
            writer.close()
            await writer.wait_closed()

    assert isinstance(error, BrokerUnavailableError)
    assert "does not answer" in str(error)


async def test_a_port_where_nobody_listens_is_unavailable() -> None:
    """The most frequent of all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        error = await refusal(f"kafka://127.0.0.1:{free.getsockname()[1]}")

    assert isinstance(error, BrokerUnavailableError)
    assert "Connect call failed" in str(error)


async def test_the_next_server_is_asked_when_the_first_is_away(server: KafkaServer) -> None:
    """That is what several hosts in a URL are for."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        async with opened(f"kafka://127.0.0.1:{free.getsockname()[1]},{server.bootstrap}") as broker:
            findings = await broker.check([])

    assert [finding.severity for finding in findings] == ["ok"]


async def publish_and_read(url: str) -> None:
    topic, envelope = fresh_name(), None
    async with opened(url) as broker:
        await broker.create_topics([TopicPlan(name=topic)])
        envelope = sample(topic, "a")
        assert await broker.publish([envelope]) == [None]
        async with broker.subscribe(fresh_name(), [topic]) as subscription:
            deliveries: list[object] = []
            with anyio.fail_after(20):
                while not deliveries:
                    deliveries += [d.content for d in await subscription.receive(1, timedelta(seconds=1))]
        assert deliveries == [envelope]
        assert [f.severity for f in await broker.check([])] == ["ok"]


async def refusal(url: str) -> BrokerError:
    broker = KafkaBroker.from_url(url)
    with pytest.raises(BrokerError) as caught:
        await broker.open()
    await broker.close()
    [finding] = await broker.check([])
    assert finding.code == caught.value.code
    return caught.value


@asynccontextmanager
async def opened(url: str) -> AsyncGenerator[KafkaBroker]:
    broker = KafkaBroker.from_url(url)
    await broker.open()
    yield broker
    await broker.close()
