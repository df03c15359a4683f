"""Settings: from code or the environment, all faults at once, never a secret in sight."""

from pathlib import Path

import pytest

from cqrs_decor import Registry, Settings, bootstrap
from cqrs_decor.assembly import Run
from cqrs_decor.checks import fitting_concurrency, setting_faults
from cqrs_decor.errors import SettingError
from cqrs_decor.memory import MemoryStore

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


@pytest.mark.parametrize(
    ("given", "setting"),
    [
        ({"lease_s": 10, "publish_timeout_s": 7.5}, "publish_timeout_s and lease_s"),
        ({"inbox_retention_days": 14}, "inbox_retention_days and replay_horizon_days"),
        ({"replay_horizon_days": 60}, "inbox_retention_days and replay_horizon_days"),
        ({"worker_concurrency": 20, "worker_prefetch": 10}, "worker_concurrency and worker_prefetch"),
        ({"worker_batch": 20, "worker_prefetch": 10}, "worker_batch and worker_prefetch"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_stop_the_start(given: dict[str, float], setting: str) -> None:
    """Each is fine alone; together they lose or repeat messages, or do not do what they say."""
    app = bootstrap(discover=False, registry=Registry("none"), settings=Settings(**given))

    [fault] = app.parts().faults

    assert isinstance(fault, SettingError)
    assert fault.setting == setting
    for name in setting.split(" and "):
        assert f"CQRS_DECOR_{name.upper()}" in fault.where


@pytest.mark.parametrize(
    "given",
    [{}, {"lease_s": 1}, {"worker_prefetch": 1}, {"worker_prefetch": 5}, {"lease_s": 10, "publish_timeout_s": 7}],
    ids=str,
)
def test_what_is_not_set_fits_what_is(given: dict[str, float]) -> None:
    """A default must not contradict what somebody chose."""
    app = bootstrap(discover=False, registry=Registry("none"), settings=Settings(**given))

    assert app.parts().faults == []
    assert app.settings.model_fields_set == set(given)


class _StoreWithPool(MemoryStore):
    connections: int | None = 20


@pytest.mark.parametrize(
    ("run", "concurrency", "limit", "refused"),
    [
        ("all", 12, 20, True),
        ("all", 11, 20, False),
        ("worker", 17, 20, False),
        ("worker", 18, 20, True),
        ("relay", 900, 20, False),
        ("none", 900, 20, False),
        ("all", 900, None, False),
    ],
)
def test_a_pool_that_is_too_small_for_what_runs_stops_the_start(
    run: Run, concurrency: int, limit: int | None, refused: bool
) -> None:
    """Handlers would hold every connection, and the relay would lose its lanes while it waits for one."""
    store = _StoreWithPool()
    store.connections = limit

    faults = list(setting_faults(Settings(worker_concurrency=concurrency), store, run))

    assert [type(fault) for fault in faults] == [SettingError] * refused


@pytest.mark.parametrize(
    ("limit", "beside_a_relay", "handlers"),
    [(None, True, 16), (30, True, 16), (15, True, 6), (15, False, 12), (5, True, 1)],
)
def test_unless_it_is_set_a_worker_runs_as_many_handlers_as_there_are_connections_for(
    limit: int | None, beside_a_relay: bool, handlers: int
) -> None:
    """An engine as `create_async_engine` makes it has 15: it must not be refused for a setting that nobody gave."""
    store = _StoreWithPool()
    store.connections = limit

    assert fitting_concurrency(Settings(), store, beside_a_relay=beside_a_relay) == handlers
    assert fitting_concurrency(Settings(worker_concurrency=40), store, beside_a_relay=beside_a_relay) == 40
