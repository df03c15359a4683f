"""The kits as what they are to the author of a plugin: classes to subclass, run by whatever pytest setup they have."""

import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cqrs_decor.broker import Broker
from cqrs_decor.memory import MemoryBroker
from cqrs_decor.testing.conformance import BrokerConformance, InboxStoreConformance

PLUGIN_TESTS = """
from contextlib import asynccontextmanager

import pytest

from cqrs_decor.memory import MemoryBroker
from cqrs_decor.testing.conformance import BrokerConformance


class ForgetfulBroker(MemoryBroker):
    async def publish(self, envelopes):
        await super().publish(envelopes)
        return [None]


class TestForgetful(BrokerConformance):
    @pytest.fixture(autouse=True)
    def use_server(self, tmp_path):
        self.folder = tmp_path

    @asynccontextmanager
    async def open_broker(self):
        assert self.folder.is_dir()
        yield ForgetfulBroker()
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    (tmp_path / "test_plugin.py").write_text(PLUGIN_TESTS)
    return tmp_path


def run_pytest(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "--tb=short", *arguments, str(folder)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False).stdout


@pytest.mark.parametrize(
    "setup",
    [
        ("-o", "asyncio_mode=auto"),
        ("-o", "asyncio_mode=strict"),
        ("-p", "no:asyncio"),
        ("-p", "no:anyio", "-p", "no:asyncio"),
    ],
    ids=["pytest-asyncio auto", "pytest-asyncio strict", "anyio", "none"],
)
def test_a_kit_runs_under_any_asynchronous_plugin_and_under_none(plugin: Path, setup: tuple[str, ...]) -> None:
    """Authors have their own setup, which must not decide whether their tests run at all."""
    output = run_pytest(plugin, *setup, "-k", "empty_body or any_bytes or outcome")

    assert "1 failed, 2 passed" in output


def test_a_failure_shows_the_values_that_were_compared(plugin: Path) -> None:
    """Without rewritten assertions an author would read "AssertionError" and nothing else."""
    output = run_pytest(plugin, "-k", "one_outcome")

    assert "assert [None] == [None, None, " in output
    assert "ExceptionGroup" not in output


def test_a_skip_names_the_capability_that_is_not_declared(plugin: Path) -> None:
    """A skip that gives no reason hides what a plugin does not do."""
    output = run_pytest(plugin, "-k", "two_brokers_on_one_server or oversized or refused_record_takes")

    assert "ForgetfulBroker does not declare the capability 'shared'" in output
    assert "TestForgetful declares no limit: oversized_envelope() gives none" in output


def test_overriding_a_test_of_a_kit_is_refused() -> None:
    """A kit that is passed by leaving tests out proves nothing to its users."""
    with pytest.raises(TypeError, match="Lenient overrides test_an_empty_body_arrives"):

        class Lenient(BrokerConformance):
            def test_an_empty_body_arrives(self) -> None:
                pass


def test_overriding_further_down_is_refused_as_well() -> None:
    """A class between the kit and the plugin is no way round it."""

    class Between(BrokerConformance):
        pass

    with pytest.raises(TypeError, match="test_any_key_arrives"):

        class Below(Between):
            test_any_key_arrives = None  # type: ignore[assignment]


def test_a_plugin_may_add_tests_of_its_own() -> None:
    """What only this broker does is tested beside the kit."""

    class TestMine(BrokerConformance):
        @asynccontextmanager
        async def open_broker(self) -> AsyncGenerator[Broker]:
            yield MemoryBroker()

        def test_something_of_mine(self) -> None:
            pass

    TestMine().test_an_empty_body_arrives()


def test_a_kit_that_is_not_told_how_to_open_its_part_says_what_to_write() -> None:
    """The first thing that an author sees."""

    class Bare(InboxStoreConformance):
        pass

    with pytest.raises(NotImplementedError, match=r"Bare must say how its store is opened: open_store\(\)"):
        Bare().test_a_message_is_new_once()


@pytest.mark.parametrize("kit", [BrokerConformance, InboxStoreConformance])
def test_every_test_of_a_kit_says_why_it_matters(kit: type) -> None:
    """The author of a plugin reads the docstring first when a test fails."""
    tests = [value for name, value in vars(kit).items() if name.startswith("test_")]

    assert tests
    assert [test.__name__ for test in tests if not test.__doc__] == []
