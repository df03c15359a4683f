"""What can be set, where it comes from (URL, environment, code), and whether it can work."""

# pyright: reportMissingTypeStubs=false
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_type_hints
from urllib.parse import parse_qsl, unquote

from aiokafka import codec
from pydantic import SecretStr, ValidationError, create_model
from pydantic_settings import BaseSettings, SettingsConfigDict

from cqrs_decor.errors import BadUrlError, SettingError

Security = Literal["plain", "tls", "sasl_plain", "sasl_tls"]
Mechanism = Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"]
Compression = Literal["gzip", "snappy", "lz4", "zstd"]

ENVIRONMENT_PREFIX = "CQRS_DECOR_KAFKA_"
EXAMPLE_URL = "kafka://user:password@k1:9092,k2:9092?security=sasl_tls"

Faults = list[tuple[str, str]]
"""Pairs of a setting's name and what is wrong with it."""


class KafkaSettingsError(SettingError):
    """The settings cannot work. `faults` has each setting's name and what is wrong with it."""

    def __init__(self, faults: Sequence[tuple[str, str]]) -> None:
        self.faults = tuple(faults)
        super().__init__(
            ", ".join(dict.fromkeys(name for name, _ in faults)),
            faults[0][1] if len(faults) == 1 else _told(faults),
            f"mend it where it was given: the broker's URL, the code, or {ENVIRONMENT_PREFIX}* in the environment",
            where="the settings of cqrs-decor-kafka",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class KafkaSettings:
    """How to reach Kafka and how patient to be. Validated when it is made; all faults come at once.

    Attributes:
        bootstrap_servers: `host:port` of some brokers, comma-separated; the port may be left out (9092).
        security: `plain`, `tls`, `sasl_plain` (a password in clear text) or `sasl_tls`.
        mechanism: How the password is proven, with the two `sasl_` kinds.
        username: Needed with `sasl_`.
        password: Needed with `sasl_`.
        ca_file: PEM file of the authority that signed the brokers' certificates; the system's own when it is None.
        cert_file: PEM file of our certificate, where brokers ask for one.
        key_file: PEM file of its private key.
        key_password: Opens the private key.
        client_id: How brokers name this client in their logs and quotas.
        compression: What whole batches are compressed with.
        max_batch_bytes: How much of one partition goes into one request.
        max_record_bytes: Refuse larger records here; None takes what the topic takes. Measured before compression.
        connect_timeout_s: For opening, and for one look at the cluster.
        publish_timeout_s: After which a batch that is not acknowledged counts as an outage.
        commit_timeout_s: After which an acknowledgement counts as an outage.
        close_timeout_s: After which leaving a group is given up, and its members notice by themselves.
        session_timeout_s: After which a member that fell silent loses its partitions.
        heartbeat_interval_s: How often a member says that it is alive.
        revoke_timeout_s: How long a worker may finish what it holds before its partitions go to another member.
        fetch_max_wait_ms: How long a broker keeps a fetch that finds nothing.
        fetch_partition_bytes: How much of one partition is read ahead.
        metadata_max_age_s: How soon new partitions and changed topic limits are noticed.
        topic_partitions: Partitions of the topics that we make.
        topic_replication: Copies of the topics that we make; -1 leaves it to the broker.
    """

    bootstrap_servers: str = "localhost:9092"
    security: Security = "plain"
    mechanism: Mechanism = "SCRAM-SHA-512"
    username: str | None = None
    password: SecretStr | None = None
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    key_password: SecretStr | None = None
    client_id: str = "cqrs-decor"
    compression: Compression | None = None
    max_batch_bytes: int = 128 * 1024
    max_record_bytes: int | None = None
    connect_timeout_s: float = 10.0
    publish_timeout_s: float = 30.0
    commit_timeout_s: float = 10.0
    close_timeout_s: float = 5.0
    session_timeout_s: float = 10.0
    heartbeat_interval_s: float = 3.0
    revoke_timeout_s: float = 20.0
    fetch_max_wait_ms: int = 500
    fetch_partition_bytes: int = 1024 * 1024
    metadata_max_age_s: float = 60.0
    topic_partitions: int = 12
    topic_replication: int = -1

    def __post_init__(self) -> None:
        faults = [*_type_faults(self), *_faults(self)]
        if faults:
            raise KafkaSettingsError(faults)

    @classmethod
    def read(cls, given: Mapping[str, Any] | None = None, *, otherwise: Mapping[str, Any] | None = None) -> Self:
        """Take what is given, then `CQRS_DECOR_KAFKA_*`, then `otherwise`, then the defaults.

        Texts become numbers where the attribute is one.

        Raises:
            KafkaSettingsError: With everything that is wrong.
        """
        values, faults = _coerced(given or {})
        try:
            settings = cls(**{**(otherwise or {}), **values})
        except KafkaSettingsError as error:
            raise KafkaSettingsError([*faults, *error.faults]) from None
        if faults:
            raise KafkaSettingsError(faults)
        return settings

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Read `kafka://user:password@k1:9092,k2:9092?option=value`; `kafkas://` turns TLS on.

        An option is any attribute of this class. With a user and no `security`, TLS is on: a password does not go
        over the wire in clear text unless `security=sasl_plain` says so.

        Raises:
            BadUrlError: With everything that is wrong; the text shows no password.
        """
        options, faults = _url_options(url)
        try:
            settings = cls.read(options, otherwise=_implied(url, options))
        except KafkaSettingsError as error:
            faults.extend(error.faults)
        else:
            if not faults:
                return settings
        raise BadUrlError("broker", without_secrets(url), _told(faults), EXAMPLE_URL)

    @property
    def uses_tls(self) -> bool:
        return self.security in ("tls", "sasl_tls")

    @property
    def uses_sasl(self) -> bool:
        return self.security in ("sasl_plain", "sasl_tls")

    @property
    def address(self) -> str:
        """A URL without secrets, for texts."""
        return f"{'kafkas' if self.uses_tls else 'kafka'}://{self.bootstrap_servers}"

    @property
    def servers(self) -> list[str]:
        return [server.strip() for server in self.bootstrap_servers.split(",")]

    def ssl_context(self) -> ssl.SSLContext | None:
        """Reads the certificate files.

        Raises:
            SettingError: A file cannot be used.
        """
        if not self.uses_tls:
            return None
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
            if self.cert_file:
                secret = self.key_password.get_secret_value() if self.key_password else ""
                context.load_cert_chain(self.cert_file, self.key_file, password=secret)
        except (OSError, ValueError) as error:
            raise KafkaSettingsError([("ca_file, cert_file, key_file", f"not usable: {error}")]) from error
        return context


def without_secrets(url: str) -> str:
    """The URL as it may be shown: no user, no password, no options that hold one."""
    scheme, found, rest = url.partition("://")
    if not found:
        return "(not a URL)"
    address, _, query = rest.partition("?")
    shown = "&".join(part for part in query.split("&") if part and not part.lower().startswith(_SECRET_OPTIONS))
    return f"{scheme}://{address.rpartition('@')[2]}{'?' + shown if shown else ''}"


_SECRET_OPTIONS = ("password", "key_password", "username")


def _url_options(url: str) -> tuple[dict[str, Any], Faults]:
    faults: Faults = []
    scheme, _, rest = url.partition("://")
    if scheme not in ("kafka", "kafkas"):
        faults.append(("scheme", "it must begin with kafka:// or kafkas://"))
    address, _, query = rest.partition("?")
    userinfo, _, location = address.rpartition("@")
    servers, _, path = location.partition("/")
    if path or "#" in url:
        faults.append(("path", "only hosts and options are expected"))
    options: dict[str, Any] = dict(parse_qsl(query, keep_blank_values=True))
    if servers:
        options.setdefault("bootstrap_servers", servers)
    elif "bootstrap_servers" not in options:
        faults.append(("host", "none is named"))
    if userinfo:
        username, _, password = userinfo.partition(":")
        options |= {"username": unquote(username), "password": unquote(password)}
    return options, faults


def _implied(url: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What holds unless options or the environment say otherwise."""
    if options.get("username"):
        return {"security": "sasl_tls"}
    return {"security": "tls"} if url.startswith("kafkas://") else {}


def _coerced(given: Mapping[str, Any]) -> tuple[dict[str, Any], Faults]:
    """Texts of the URL and the environment as the types of the fields; what cannot be read is left out."""
    known = {field.name: field.default for field in fields(KafkaSettings)}
    faults = [(name, f"there is no such option{_near(name, known)}") for name in given if name not in known]
    taken = {name: value for name, value in given.items() if name in known}
    try:
        return _Environment(**taken).model_dump(exclude_unset=True), faults
    except ValidationError as error:
        unreadable = {str(entry["loc"][0]): entry["msg"] for entry in error.errors(include_input=False)}
    faults += [(name, reason[0].lower() + reason[1:]) for name, reason in unreadable.items()]
    return _Environment(**taken | {name: known[name] for name in unreadable}).model_dump(exclude_unset=True), faults


def _near(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _type_faults(settings: KafkaSettings) -> Iterator[tuple[str, str]]:
    choices = {"security": Security, "mechanism": Mechanism, "compression": Compression}
    for name, choice in choices.items():
        value = getattr(settings, name)
        if value is not None and value not in get_args(choice):
            yield name, f"{value!r} is none of {', '.join(get_args(choice))}"


def _faults(settings: KafkaSettings) -> Iterator[tuple[str, str]]:
    yield from _server_faults(settings)
    yield from _sasl_faults(settings)
    yield from _tls_faults(settings)
    yield from _number_faults(settings)
    if settings.compression and not _COMPRESSION_INSTALLED.get(settings.compression, bool)():
        yield "compression", f"{settings.compression} is not installed (pip install aiokafka[{settings.compression}])"


def _server_faults(settings: KafkaSettings) -> Iterator[tuple[str, str]]:
    for server in settings.servers:
        host, _, port = server.rpartition(":") if _has_port(server) else (server, "", "9092")
        if not host or any(letter in server for letter in "/@? "):
            yield "bootstrap_servers", f"{server!r} is not host:port"
        elif not (port.isdecimal() and 0 < int(port) < 65_536):
            yield "bootstrap_servers", f"{server!r} has no usable port"


def _has_port(server: str) -> bool:
    """An IPv6 address has colons of its own, inside brackets."""
    return ":" in server.rpartition("]")[2]


def _sasl_faults(settings: KafkaSettings) -> Iterator[tuple[str, str]]:
    if settings.uses_sasl:
        if not settings.username:
            yield "username", f"needed with security={settings.security}"
        if settings.password is None or not settings.password.get_secret_value():
            yield "password", f"needed with security={settings.security}"
    elif settings.username or settings.password:
        yield "security", f"{settings.security} sends no user; use sasl_tls (or sasl_plain: clear text)"


def _tls_faults(settings: KafkaSettings) -> Iterator[tuple[str, str]]:
    files = {"ca_file": settings.ca_file, "cert_file": settings.cert_file, "key_file": settings.key_file}
    for name, path in files.items():
        if path is None:
            continue
        if not settings.uses_tls:
            yield name, f"not used with security={settings.security}"
        elif not Path(path).is_file():
            yield name, f"there is no file {path!r}"
    if settings.key_file and not settings.cert_file:
        yield "key_file", "it needs cert_file"


def _number_faults(settings: KafkaSettings) -> Iterator[tuple[str, str]]:
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name.endswith(("_s", "_ms", "_bytes", "_partitions")) and value is not None and value <= 0:
            yield field.name, "it must be more than 0"
    if settings.topic_replication < 1 and settings.topic_replication != -1:
        yield "topic_replication", "it must be at least 1, or -1 for the broker's default"
    if settings.heartbeat_interval_s * 2 > settings.session_timeout_s:
        yield "heartbeat_interval_s", "it must be at most half of session_timeout_s"


def _told(faults: Sequence[tuple[str, str]]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in faults)


_COMPRESSION_INSTALLED: Mapping[str, Any] = {
    "gzip": codec.has_gzip,
    "snappy": codec.has_snappy,
    "lz4": codec.has_lz4,
    "zstd": codec.has_zstd,
}


class _EnvironmentBase(BaseSettings):
    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX, hide_input_in_errors=True)


def _optional_fields(settings: type) -> dict[str, Any]:
    return {name: (hint | None, None) for name, hint in get_type_hints(settings).items()}


# The same fields, each of which may be absent: so the list of settings stands in one place only.
_Environment: Callable[..., BaseSettings] = create_model(
    "_Environment", __base__=_EnvironmentBase, **_optional_fields(KafkaSettings)
)
