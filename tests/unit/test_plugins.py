"""Brokers, stores and handler modules found by entry points, and what is said when one is not to be had."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from importlib_metadata import EntryPoint

from cqrs_decor import Registry, StartupError
from cqrs_decor.discovery import BROKERS, HANDLERS, STORES, import_handlers, installed, load_all, load_plugin
from cqrs_decor.errors import (
    BadUrlError,
    BrokenPluginError,
    ConflictingPluginsError,
    HandlerImportError,
    SettingError,
    UnknownPluginError,
)
from cqrs_decor.memory import MemoryBroker, MemoryStore
from cqrs_decor.parts import open_broker, open_store
from tests.unit.apps import app_of, faults_of

pytestmark = pytest.mark.feature("U1")


def nothing(group: str) -> Iterable[EntryPoint]:
    return []


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on sys.path in which distributions can be put."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("plugin_under_test"):
            del sys.modules[name]


def install(site: Path, distribution: str, group: str, entries: str, modules: dict[str, str]) -> None:
    info = site / f"{distribution.replace('-', '_')}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{entries}\n")
    for name, source in modules.items():
        (site / f"{name}.py").write_text(source)


async def test_the_plugin_that_a_url_names_is_loaded(site: Path) -> None:
    """A pip install and a URL are all that it takes."""
    source = "from cqrs_decor.memory import MemoryBroker as Pigeon"
    install(site, "pigeon-post", BROKERS, "pigeon = plugin_under_test_a:Pigeon", {"plugin_under_test_a": source})
    plugin = load_plugin(BROKERS, "pigeon")

    assert plugin is MemoryBroker


async def test_a_plugin_that_no_url_names_is_not_imported(site: Path) -> None:
    """What is installed and unused costs nothing, and cannot break anything."""
    source = "raise AssertionError('imported')"
    install(site, "pigeon-post", BROKERS, "pigeon = plugin_under_test_b:Pigeon", {"plugin_under_test_b": source})

    assert await faults_of(Registry("sales"), broker="memory://") == []
    assert "plugin_under_test_b" not in sys.modules


async def test_a_missing_plugin_of_ours_says_what_to_install() -> None:
    """The commonest first error of all."""
    with pytest.raises(UnknownPluginError) as caught:
        open_broker("kafka://localhost", MemoryStore(), find=nothing)

    assert caught.value.code == "CD701"
    assert caught.value.fix == "pip install cqrs-decor-kafka"


async def test_an_unknown_scheme_names_what_is_installed_and_the_nearest() -> None:
    """A misspelt scheme looks like a missing plugin."""
    (fault,) = await faults_of(Registry("sales"), broker="memry://")

    assert isinstance(fault, UnknownPluginError)
    assert fault.name == "memry"
    assert "memory" in fault.installed
    assert "Did you mean 'memory'?" in str(fault)


async def test_a_broken_plugin_shows_its_own_traceback(site: Path) -> None:
    """Nothing is skipped in silence: the cause is the plugin's own error."""
    source = "import a_module_that_is_not_installed"
    install(site, "pigeon-post", BROKERS, "pigeon = plugin_under_test_c:Pigeon", {"plugin_under_test_c": source})

    (fault,) = await faults_of(Registry("sales"), broker="pigeon://roof")

    assert isinstance(fault, BrokenPluginError)
    assert (fault.code, fault.distribution, fault.version) == ("CD702", "pigeon-post", "1.2")
    assert fault.where == "cqrs_decor.brokers: pigeon = plugin_under_test_c:Pigeon"
    cause = fault.__cause__
    assert isinstance(cause, ModuleNotFoundError)
    frames = []
    trace = cause.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    assert str(site / "plugin_under_test_c.py") in frames


async def test_two_distributions_that_claim_a_name_are_both_named(site: Path) -> None:
    """Which of them is loaded must not depend on the order of folders."""
    install(site, "pigeon-post", BROKERS, "pigeon = plugin_under_test_d:A", {})
    install(site, "pigeon-mail", BROKERS, "pigeon = plugin_under_test_e:B", {})

    (fault,) = await faults_of(Registry("sales"), broker="pigeon://roof")

    assert isinstance(fault, ConflictingPluginsError)
    assert fault.code == "CD703"
    assert sorted(fault.distributions) == ["pigeon-mail", "pigeon-post"]


def test_an_entry_point_that_is_listed_twice_counts_once() -> None:
    """Editable installs do that; it is no conflict."""
    names = [(point.name, point.value) for point in installed(BROKERS)]

    assert len(names) == len(set(names))


async def test_a_handler_module_is_imported_by_its_entry_point(site: Path) -> None:
    """Installing an application is enough to have its handlers."""
    source = "from tests.unit import test_plugins\ntest_plugins.imported.append('f')"
    install(site, "shop", HANDLERS, "shop = plugin_under_test_f", {"plugin_under_test_f": source})

    assert import_handlers([], discover=["shop"]) == []
    assert imported == ["f"]


imported: list[str] = []


def test_only_the_named_handler_modules_are_imported(site: Path) -> None:
    """`discover=["shop"]` leaves every other application of the environment alone."""
    raising = {"plugin_under_test_g": "raise AssertionError('imported')"}
    install(site, "other", HANDLERS, "other = plugin_under_test_g", raising)

    assert import_handlers([], discover=[]) == []
    assert import_handlers([], discover=False) == []


def test_a_name_to_discover_that_is_not_there_is_a_fault() -> None:
    """A misspelt name would mean an app without handlers."""
    (fault,) = import_handlers([], discover=["shopp"], find=nothing)

    assert isinstance(fault, UnknownPluginError)
    assert fault.name == "shopp"


async def test_a_handler_module_that_raises_is_a_finding_with_its_cause(site: Path) -> None:
    """The start-up lists it beside everything else."""
    raising = {"plugin_under_test_h": "1 / 0"}
    install(site, "shop", HANDLERS, "shop = plugin_under_test_h", raising)
    app = app_of(Registry("sales"), discover=["shop"])

    with pytest.raises(StartupError) as caught:
        await app.start()

    (fault,) = caught.value.exceptions
    assert isinstance(fault, HandlerImportError)
    assert isinstance(fault.__cause__, ZeroDivisionError)
    assert "entry point 'shop' of shop" in fault.where


def test_load_all_raises_for_a_broken_one(site: Path) -> None:
    """Plugins that are loaded together are not skipped one by one."""
    install(site, "spy", "cqrs_decor.observers", "spy = plugin_under_test_i:Spy", {"plugin_under_test_i": ""})

    with pytest.raises(BrokenPluginError, match="AttributeError"):
        load_all("cqrs_decor.observers")


async def test_a_broken_observer_is_a_finding_of_the_start_up(site: Path) -> None:
    """As every other broken part: with all the rest, in one error."""
    install(site, "spy", "cqrs_decor.observers", "spy = plugin_under_test_j:Spy", {"plugin_under_test_j": ""})

    (fault,) = await faults_of(Registry("sales"))

    assert isinstance(fault, BrokenPluginError)


@pytest.mark.parametrize("url", ["localhost:9092", "://localhost", ""])
async def test_a_broker_url_without_a_scheme_is_a_fault_that_shows_no_url(url: str) -> None:
    """A URL may hold a password, and one that cannot be read cannot be masked."""
    with pytest.raises(BadUrlError) as caught:
        open_broker(url, MemoryStore())

    assert caught.value.code == "CD704"
    assert "localhost" not in caught.value.problem
    assert "kafka://localhost:9092" in caught.value.fix


@pytest.mark.parametrize("thing", [3, object(), b"kafka://"])
def test_an_object_that_is_no_broker_is_a_fault(thing: object) -> None:
    """It would fail much later, at the first publish."""
    with pytest.raises(SettingError, match="is no broker"):
        open_broker(thing, MemoryStore())


def test_an_object_that_no_store_plugin_knows_is_a_fault() -> None:
    """The text says what could be given."""
    with pytest.raises(SettingError, match=r"no installed store plugin can use a int"):
        open_store(3)


def test_a_store_and_a_broker_can_be_given_as_objects() -> None:
    """Two apps of one process share a broker by being given the same object."""
    store, broker = MemoryStore(), MemoryBroker()

    assert open_store(store) is store
    assert open_broker(broker, store) is broker


def test_nothing_given_means_memory() -> None:
    """The first start needs no server."""
    assert isinstance(open_store(None), MemoryStore)
    assert isinstance(open_broker(None, MemoryStore()), MemoryBroker)
    assert load_plugin(STORES, "memory") is MemoryStore
