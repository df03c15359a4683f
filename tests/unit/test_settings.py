"""Settings: from code or the environment, all faults at once, never a secret in sight."""

from datetime import timedelta
from pathlib import Path

import pytest

from cqrs_decor import Settings, bootstrap
from cqrs_decor.errors import SettingError

pytestmark = pytest.mark.feature("U12")


def settings_of_an_app(given: Settings | None = None) -> Settings:
    """As an app has them: what was given, completed from the environment."""
    return bootstrap(discover=False, settings=given).settings


def test_settings_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same image runs everywhere."""
    monkeypatch.setenv("CQRS_DECOR_BROKER", "kafka://k1:9092,k2:9092")
    monkeypatch.setenv("CQRS_DECOR_DATABASE", "postgresql+asyncpg://localhost/shop")
    monkeypatch.setenv("CQRS_DECOR_SERVICE", "shop")
    monkeypatch.setenv("CQRS_DECOR_APP", "shop.main:cqrs")
    monkeypatch.setenv("CQRS_DECOR_LEASE_S", "7.5")

    settings = settings_of_an_app()

    assert (settings.broker, settings.database) == ("kafka://k1:9092,k2:9092", "postgresql+asyncpg://localhost/shop")
    assert (settings.service, settings.app) == ("shop", "shop.main:cqrs")
    assert settings.lease.total_seconds() == 7.5


@pytest.mark.parametrize(
    ("text", "modules"),
    [
        ("shop.orders", ("shop.orders",)),
        ("shop.orders, shop.stock ,,", ("shop.orders", "shop.stock")),
        ("", ()),
    ],
)
def test_handler_modules_are_separated_by_commas(
    monkeypatch: pytest.MonkeyPatch, text: str, modules: tuple[str, ...]
) -> None:
    """Nobody writes JSON into an environment variable by hand."""
    monkeypatch.setenv("CQRS_DECOR_HANDLERS", text)

    assert settings_of_an_app().handlers == modules


def test_what_code_says_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test must not depend on the shell that it runs in."""
    monkeypatch.setenv("CQRS_DECOR_SERVICE", "from the environment")

    assert settings_of_an_app(Settings(service="from code")).service == "from code"
    assert bootstrap(service="from code", discover=False).service == "from code"
    assert bootstrap(discover=False).service == "from the environment"


def test_all_bad_values_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the variables in which they stand."""
    monkeypatch.setenv("CQRS_DECOR_LEASE_S", "soon")
    monkeypatch.setenv("CQRS_DECOR_RELAY_BATCH", "0")
    monkeypatch.setenv("CQRS_DECOR_UNKNOWN_EVENTS", "shred")

    with pytest.raises(SettingError) as caught:
        settings_of_an_app()

    assert caught.value.code == "CD705"
    for variable in ("CQRS_DECOR_LEASE_S", "CQRS_DECOR_RELAY_BATCH", "CQRS_DECOR_UNKNOWN_EVENTS"):
        assert variable in caught.value.where
    assert "soon" not in str(caught.value)


def test_urls_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings end up in logs; URLs hold passwords."""
    monkeypatch.setenv("CQRS_DECOR_DATABASE", "postgresql://shop:secret@localhost/shop")
    monkeypatch.setenv("CQRS_DECOR_BROKER", "kafka://shop:secret@localhost")

    settings = settings_of_an_app()

    assert settings.database is not None
    assert "secret" in settings.database
    assert "secret" not in repr(settings)
    assert "secret" not in str(settings)


def test_no_env_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an application reads from files is its own decision."""
    (tmp_path / ".env").write_text("CQRS_DECOR_SERVICE=from the file\n")
    monkeypatch.chdir(tmp_path)

    assert settings_of_an_app().service is None


def test_unknown_variables_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plugins have variables of their own under the same prefix."""
    monkeypatch.setenv("CQRS_DECOR_KAFKA_ACKS", "all")

    assert settings_of_an_app().service is None


def test_settings_cannot_be_changed() -> None:
    """A running app has read them."""
    with pytest.raises(Exception, match="frozen"):
        settings_of_an_app().service = "other"  # type: ignore[misc]


async def test_handler_modules_of_the_environment_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker image needs no code of its own to name its handlers."""
    source = """
from cqrs_decor import Command, Registry
sales = Registry("sales")
class Greet(Command[str]):
    pass
@sales.command_handler
async def greet(command: Greet) -> str:
    return "hello"
"""
    (tmp_path / "handlers_under_test.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("CQRS_DECOR_HANDLERS", "handlers_under_test")
    import handlers_under_test  # type: ignore[import-not-found]

    async with bootstrap(discover=False, registry=handlers_under_test.sales) as app:
        assert await app.send(handlers_under_test.Greet()) == "hello"


def test_a_broker_has_no_longer_for_a_batch_than_a_relay_may_publish() -> None:
    """What still flew when the lease ended could land after the first records of the next relay."""
    with pytest.raises(SettingError) as refused:
        Settings(lease_s=10, publish_timeout_s=7.1)

    assert "publish_timeout_s: must not be more than 7 s, 70 % of the lease" in str(refused.value)
    assert Settings(lease_s=10, publish_timeout_s=7).publish_timeout == timedelta(seconds=7)


def test_a_lease_from_the_environment_is_held_against_a_time_out_that_was_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each is fine by itself; together they are not."""
    monkeypatch.setenv("CQRS_DECOR_LEASE_S", "5")

    with pytest.raises(SettingError, match="publish_timeout_s"):
        settings_of_an_app(Settings(publish_timeout_s=6))


def test_a_shorter_lease_alone_makes_the_time_out_shorter_as_well() -> None:
    """Who sets one setting need not know of the other."""
    assert Settings().publish_timeout == timedelta(seconds=9)
    assert Settings(lease_s=60).publish_timeout == timedelta(seconds=9)
    assert Settings(lease_s=5).publish_timeout == timedelta(seconds=3)
