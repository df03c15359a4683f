"""Where settings come from, and what is said about wrong ones. No server."""

import dataclasses
from pathlib import Path

import pytest
from pydantic import SecretStr

from cqrs_decor.errors import BadUrlError, SettingError
from cqrs_decor_kafka import KafkaBroker, KafkaSettings, KafkaSettingsError

READ = [
    ("kafka://k1", {"bootstrap_servers": "k1", "security": "plain"}),
    ("kafka://k1:9092,k2:9093", {"bootstrap_servers": "k1:9092,k2:9093", "security": "plain"}),
    ("kafka://[::1]:9092,k2", {"bootstrap_servers": "[::1]:9092,k2"}),
    ("kafka://k1/", {"bootstrap_servers": "k1"}),
    ("kafkas://k1", {"security": "tls"}),
    ("kafka://k1?security=tls", {"security": "tls"}),
    ("kafka://al:s3cret@k1", {"security": "sasl_tls", "username": "al", "password": SecretStr("s3cret")}),
    ("kafka://al:p%40%3Ass@k1,k2", {"username": "al", "password": SecretStr("p@:ss"), "bootstrap_servers": "k1,k2"}),
    ("kafka://al:s@k1?security=sasl_plain&mechanism=PLAIN", {"security": "sasl_plain", "mechanism": "PLAIN"}),
    ("kafka://k1?publish_timeout_s=2.5&topic_partitions=3", {"publish_timeout_s": 2.5, "topic_partitions": 3}),
    ("kafka://k1?compression=gzip", {"compression": "gzip"}),
]

REFUSED = [
    ("kafka://", "host: none is named"),
    ("redis://k1", "it must begin with kafka://"),
    ("k1:9092", "it must begin with kafka://"),
    ("kafka://k1/orders", "path: only hosts and options are expected"),
    ("kafka://k1:notaport", "'k1:notaport' has no usable port"),
    ("kafka://k1:70000", "'k1:70000' has no usable port"),
    ("kafka://k1,,k2", "'' is not host:port"),
    ("kafka://k1?sekurity=tls", "sekurity: there is no such option, did you mean 'security'?"),
    ("kafka://k1?security=ssl", "security: "),
    ("kafka://k1?topic_partitions=many", "topic_partitions: "),
    ("kafka://k1?publish_timeout_s=0", "publish_timeout_s: it must be more than 0"),
    ("kafka://k1?topic_replication=0", "topic_replication: it must be at least 1, or -1"),
    ("kafka://k1?session_timeout_s=4&heartbeat_interval_s=3", "it must be at most half of session_timeout_s"),
    ("kafka://al@k1", "password: needed with security=sasl_tls"),
    ("kafka://al:s3cret@k1?security=tls", "security: tls sends no user"),
    ("kafkas://k1?ca_file=/no/such.pem", "ca_file: there is no file '/no/such.pem'"),
    ("kafka://k1?ca_file=/no/such.pem", "ca_file: not used with security=plain"),
    ("kafka://k1?compression=brotli", "compression: "),
]


@pytest.mark.parametrize(("url", "expected"), READ)
def test_a_url_is_read(url: str, expected: dict[str, object]) -> None:
    """urlsplit fails on several hosts, and users copy their URLs from elsewhere: each form must mean one thing."""
    settings = KafkaSettings.from_url(url)

    assert {name: getattr(settings, name) for name in expected} == expected


@pytest.mark.parametrize(("url", "reason"), REFUSED)
def test_a_wrong_url_says_what_is_wrong(url: str, reason: str) -> None:
    """A typo in a deployment must be found at its place, not as a timeout an hour later."""
    with pytest.raises(BadUrlError) as caught:
        KafkaBroker.from_url(url)

    assert reason in str(caught.value)
    assert "kafka://user:password@k1:9092,k2:9092" in str(caught.value)


def test_all_faults_of_a_url_come_at_once() -> None:
    """Mending one fault per deployment takes a day."""
    with pytest.raises(BadUrlError) as caught:
        KafkaSettings.from_url("kafka://k1:0/x?topic_partitions=many&linger=3&commit_timeout_s=-1")

    told = str(caught.value)
    assert all(part in told for part in ("path:", "linger:", "topic_partitions:", "commit_timeout_s:", "'k1:0'"))


def test_all_faults_of_the_constructor_come_at_once() -> None:
    """The same holds for settings that are written in code."""
    with pytest.raises(KafkaSettingsError) as caught:
        KafkaSettings(bootstrap_servers="k1:x", publish_timeout_s=0, key_file="/no/key.pem")

    assert {name for name, _ in caught.value.faults} == {"bootstrap_servers", "publish_timeout_s", "key_file"}
    assert isinstance(caught.value, SettingError)
    assert "CQRS_DECOR_KAFKA_*" in str(caught.value)


def test_the_environment_fills_what_the_url_leaves_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Secrets come from the environment, addresses from the URL."""
    monkeypatch.setenv("CQRS_DECOR_KAFKA_USERNAME", "alice")
    monkeypatch.setenv("CQRS_DECOR_KAFKA_PASSWORD", "s3cret")
    monkeypatch.setenv("CQRS_DECOR_KAFKA_SECURITY", "sasl_tls")
    monkeypatch.setenv("CQRS_DECOR_KAFKA_PUBLISH_TIMEOUT_S", "7")

    settings = KafkaSettings.from_url("kafka://k1?publish_timeout_s=9")

    assert (settings.username, settings.password) == ("alice", SecretStr("s3cret"))
    assert settings.publish_timeout_s == 9
    assert KafkaBroker().settings.publish_timeout_s == 7


def test_the_environment_says_how_a_user_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a URL only implies is weaker than what somebody has set."""
    monkeypatch.setenv("CQRS_DECOR_KAFKA_SECURITY", "sasl_plain")

    assert KafkaSettings.from_url("kafka://al:s@k1").security == "sasl_plain"


def test_no_text_shows_a_secret() -> None:
    """Errors and reprs end in logs."""
    broker = KafkaBroker.from_url("kafka://alice:s3cret@k1")
    texts = [repr(broker), broker.name, repr(broker.settings), str(broker.settings)]

    with pytest.raises(BadUrlError) as caught:
        KafkaSettings.from_url("kafka://alice:s3cret@k1:x?key_password=s3cret&password=s3cret&linger=1")
    error: BaseException | None = caught.value
    while error is not None:
        texts += [str(error), repr(error)]
        error = error.__cause__ or error.__context__

    assert "s3cret" not in "".join(texts)
    assert "kafka://k1:x?linger=1" in str(caught.value)


def test_certificates_that_cannot_be_used_are_a_setting_error(tmp_path) -> None:
    """A truncated PEM file must not look like a network problem."""
    (tmp_path / "ca.pem").write_text("not a certificate")

    with pytest.raises(KafkaSettingsError, match="not usable"):
        KafkaSettings(security="tls", ca_file=str(tmp_path / "ca.pem")).ssl_context()


def test_the_readme_lists_every_setting() -> None:
    """A setting that is not in the table does not exist for users."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()

    assert [field.name for field in dataclasses.fields(KafkaSettings) if f"`{field.name}`" not in readme] == []


def test_the_readme_shows_the_card() -> None:
    """What a crash may do is promised in one place, and shown elsewhere."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    card = KafkaBroker.capabilities

    said = (card.crash_may_lose, card.crash_may_repeat, card.crash_may_reorder)
    assert [words for words in said if words not in readme] == []
