"""Apache Kafka: one KRaft node that is broker and controller, from its Maven artifacts."""

import socket
import ssl
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from tests.services import kafka_jars
from tests.services.certificates import Certificates
from tests.services.server import Server, accepts_connections, free_port

_CLUSTER = "Y3Fycy1kZWNvci10ZXN0cw"


class KafkaServer(Server):
    """A Kafka broker. Topics are never made by themselves.

    The plain listener is always there. Client certificates are asked for and checked, but not required.

    Args:
        tls: A further listener for SSL, at `tls_bootstrap`.
        sasl: A further listener for SASL_SSL with SCRAM-SHA-512, at `sasl_bootstrap`, for `username` and `password`.
        advertised: A port of somebody who stands in front of this broker, such as a proxy. A further plain listener, at
            `behind_port`, sends all its clients there.
        options: Broker settings over those given here.
    """

    name = "kafka"
    install_hint = "apt-get install maven default-jre-headless"
    start_limit_s = 90.0

    username = "alice"
    password = "alice-secret"

    def __init__(
        self,
        *,
        tls: bool = False,
        sasl: bool = False,
        advertised: int | None = None,
        options: Mapping[str, str] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self._advertised = advertised
        self.behind_port = free_port()
        self._controller_port = free_port()
        self._tls_port = free_port() if tls else None
        self._sasl_port = free_port() if sasl else None
        self._options = dict(options or {})
        self._certificates: Certificates | None = None

    @classmethod
    def check_installed(cls) -> None:
        kafka_jars.java()
        kafka_jars.jars()

    @property
    def bootstrap(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def tls_bootstrap(self) -> str:
        if self._tls_port is None:
            raise ValueError("This server has no TLS listener: KafkaServer(tls=True).")
        return f"127.0.0.1:{self._tls_port}"

    @property
    def sasl_bootstrap(self) -> str:
        if self._sasl_port is None:
            raise ValueError("This server has no SASL listener: KafkaServer(sasl=True).")
        return f"127.0.0.1:{self._sasl_port}"

    @property
    def certificates(self) -> Certificates:
        """The authority that signed the broker's certificate, and a client's certificate signed by it."""
        if self._certificates is None:
            self._certificates = Certificates.create(self.directory / "certificates")
        return self._certificates

    def url(self) -> str:
        return f"kafka://{self.bootstrap}"

    def ssl_context(self) -> ssl.SSLContext:
        """Trusts this broker and checks its name."""
        return ssl.create_default_context(cafile=str(self.certificates.authority))

    async def create_topic(self, name: str, *, partitions: int = 1, configs: Mapping[str, str] | None = None) -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap)
        await admin.start()
        try:
            topic = NewTopic(name, partitions, replication_factor=1, topic_configs=dict(configs or {}))
            response = await admin.create_topics([topic])
        finally:
            await admin.close()
        for topic_name, code, *message in response.topic_errors:
            if code != 0:
                raise RuntimeError(f"Kafka refused to create topic {topic_name!r}: {message or code}")

    async def delete_topic(self, name: str) -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap)
        await admin.start()
        try:
            response = await admin.delete_topics([name])
        finally:
            await admin.close()
        for topic_name, code in response.topic_error_codes:
            if code != 0:
                raise RuntimeError(f"Kafka refused to delete topic {topic_name!r}: {code}")

    def _prepare(self) -> None:
        self._settings_file.write_text("".join(f"{name}={value}\n" for name, value in self._settings().items()))
        if self._data.exists():
            return
        self._run(
            *self._java("kafka.tools.StorageTool", heap_mb=128),
            *("format", "--cluster-id", _CLUSTER, "--config", str(self._settings_file)),
            *self._scram_user(),
        )

    def _command(self) -> Sequence[str]:
        return [*self._java("kafka.Kafka", heap_mb=512), str(self._settings_file)]

    def _answers(self) -> bool:
        """A broker accepts connections early, and answers requests only once it is registered and caught up. It opens
        one listener after the other.
        """
        ports = [port for port in (self.port, self._tls_port, self._sasl_port) if port is not None]
        if not all(accepts_connections(port) for port in ports):
            return False
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(_API_VERSIONS)
                return len(connection.recv(4)) == 4
        except OSError:
            return False

    def _java(self, main: str, *, heap_mb: int) -> Sequence[str]:
        jars = kafka_jars.jars()
        log_level = "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"
        return [str(kafka_jars.java()), f"-Xmx{heap_mb}m", log_level, "-cp", f"{jars}/*", main]

    def _scram_user(self) -> Sequence[str]:
        if self._sasl_port is None:
            return []
        return ["--add-scram", f"SCRAM-SHA-512=[name={self.username},password={self.password}]"]

    def _settings(self) -> dict[str, str]:
        listeners = {"PLAINTEXT": self.port, "CONTROLLER": self._controller_port}
        listeners |= {"SSL": self._tls_port} if self._tls_port else {}
        listeners |= {"SASL_SSL": self._sasl_port} if self._sasl_port else {}
        listeners |= {"BEHIND": self.behind_port} if self._advertised else {}
        told = {name: port for name, port in listeners.items() if name != "CONTROLLER"}
        told |= {"BEHIND": self._advertised} if self._advertised else {}
        return {
            **_SETTINGS,
            "controller.quorum.voters": f"1@127.0.0.1:{self._controller_port}",
            "listeners": _at(listeners),
            "advertised.listeners": _at(told),
            "log.dirs": str(self._data),
            **(self._security() if self._tls_port or self._sasl_port else {}),
            **self._options,
        }

    def _security(self) -> dict[str, str]:
        scram = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
        return {
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(self.certificates.broker_keystore),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(self.certificates.authority),
            "ssl.client.auth": "requested",
            "sasl.enabled.mechanisms": "SCRAM-SHA-512",
            "listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config": scram,
        }

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    @property
    def _settings_file(self) -> Path:
        return self.directory / "server.properties"


def _at(listeners: Mapping[str, int | None]) -> str:
    return ",".join(f"{name}://127.0.0.1:{port}" for name, port in listeners.items())


_SETTINGS = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "controller.listener.names": "CONTROLLER",
    "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,BEHIND:PLAINTEXT,CONTROLLER:PLAINTEXT,"
    "SSL:SSL,SASL_SSL:SASL_SSL",
    "inter.broker.listener.name": "PLAINTEXT",
    "auto.create.topics.enable": "false",
    "default.replication.factor": "1",
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "8",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "8",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    # A broker that was killed may register again only when its last session has run out: 9 s by default.
    "broker.session.timeout.ms": "3000",
    "broker.heartbeat.interval.ms": "500",
    "group.initial.rebalance.delay.ms": "0",
    "log.cleaner.dedupe.buffer.size": str(16 * 1024 * 1024),
}

# ApiVersions, version 0, correlation id 1, client "tests": size, key, version, correlation, client id.
_API_VERSIONS = struct.pack(">ihhih5s", 15, 18, 0, 1, 5, b"tests")
