"""What is uploaded: complete, of one version, and at work where no source is in sight."""

import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

import pytest

import cqrs_decor
from tests.packaging import wheels
from tests.packaging.wheels import PROJECTS, ROOT, Built

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NAMES = [project.name if project != ROOT else "cqrs-decor" for project in PROJECTS]


@dataclass(frozen=True, slots=True)
class Installed:
    """An environment with the wheels in it, seen from a folder that holds nothing else."""

    python: Path
    folder: Path

    def run(self, *arguments: str | Path, program: str = "python") -> str:
        done = subprocess.run(
            [self.python.with_name(program), *arguments],
            cwd=self.folder,
            env=wheels.environment(),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Built]:
    folder = tmp_path_factory.mktemp("dist")
    return {built.project: built for built in (wheels.build(project, folder) for project in PROJECTS)}


@pytest.fixture(scope="module")
def python(built: Mapping[str, Built]) -> Path:
    return wheels.install(list(built.values()))


@pytest.fixture
def installed(python: Path, tmp_path: Path) -> Installed:
    return Installed(python, tmp_path)


def test_every_distribution_is_packed(built: Mapping[str, Built]) -> None:
    """A plugin that is not built here is not checked here either."""
    assert sorted(built) == ["cqrs-decor", "cqrs-decor-kafka", "cqrs-decor-sqlalchemy"] == sorted(NAMES)


def test_all_distributions_are_packed_with_one_version(built: Mapping[str, Built]) -> None:
    """Plugins read it from the core's sources, which their own sdist does not have."""
    assert {each.version for each in built.values()} == {cqrs_decor.__version__}


@pytest.mark.feature("U11")
@pytest.mark.parametrize("name", NAMES)
def test_a_wheel_holds_its_package_types_and_licence_and_nothing_else(name: str, built: Mapping[str, Built]) -> None:
    """Tests at the top level would land in a user's site-packages; without py.typed no type checker looks inside."""
    each = built[name]
    info = f"{each.package}-{each.version}.dist-info"
    inside = each.names_in_wheel()

    assert {file.partition("/")[0] for file in inside} == {each.package, info}
    assert f"{each.package}/py.typed" in inside
    assert each.text_in_wheel(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_a_wheel_holds_every_file_of_its_package(name: str, built: Mapping[str, Built]) -> None:
    """An exclusion that matches too much takes a module away without a word."""
    each = built[name]
    home = ROOT if name == "cqrs-decor" else ROOT / "plugins" / name
    listed = subprocess.run(
        ["git", "ls-files", "-z", each.package], cwd=home, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    tracked = [file for file in listed if file and (home / file).exists()]

    assert [file for file in tracked if file not in each.names_in_wheel()] == []
    assert [file for file in tracked if file not in each.names_in_sdist()] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_wheel_says_what_an_index_shows(name: str, built: Mapping[str, Built]) -> None:
    """Name, Python, licence and the text of the page."""
    each = built[name]
    metadata = Parser().parsestr(each.text_in_wheel(f"{each.package}-{each.version}.dist-info/METADATA"))

    assert metadata["Name"] == name
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "MIT"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata["Summary"]


def test_the_library_is_imported_from_the_wheels(installed: Installed) -> None:
    """Else every other test here would prove nothing."""
    code = """
import json
import cqrs_decor, cqrs_decor_kafka, cqrs_decor_sqlalchemy
print(json.dumps([module.__file__ for module in (cqrs_decor, cqrs_decor_kafka, cqrs_decor_sqlalchemy)]))
"""
    places = json.loads(installed.run("-c", code))

    assert [Path(place).is_relative_to(installed.python.parents[1]) for place in places] == [True, True, True]


def test_the_installed_distributions_have_one_version(installed: Installed) -> None:
    """Of the metadata, of the module, and of what the command line says."""
    code = """
from importlib.metadata import version
import cqrs_decor
names = ("cqrs-decor", "cqrs-decor-kafka", "cqrs-decor-sqlalchemy")
print(*{cqrs_decor.__version__, *map(version, names)})
"""
    assert installed.run("-c", code).split() == [cqrs_decor.__version__]
    assert cqrs_decor.__version__ in installed.run("--version", program="cqrs-decor")
    assert cqrs_decor.__version__ in installed.run("-m", "cqrs_decor", "--version")


def test_the_entry_points_are_there_and_load(installed: Installed) -> None:
    """Brokers and stores by the scheme of a URL, the pytest plugin, the command."""
    code = """
import json
from importlib.metadata import entry_points
groups = ("console_scripts", "cqrs_decor.brokers", "cqrs_decor.stores", "pytest11")
found = [point for group in groups for point in entry_points(group=group) if point.value.startswith("cqrs_decor")]
for point in found:
    point.load()
print(json.dumps(sorted(f"{point.group} {point.name} = {point.value}" for point in found)))
"""
    assert json.loads(installed.run("-c", code)) == [
        "console_scripts cqrs-decor = cqrs_decor.cli:main",
        "cqrs_decor.brokers kafka = cqrs_decor_kafka:KafkaBroker",
        "cqrs_decor.brokers kafkas = cqrs_decor_kafka:KafkaBroker",
        "cqrs_decor.brokers mariadb = cqrs_decor_sqlalchemy:LogTableBroker",
        "cqrs_decor.brokers memory = cqrs_decor.memory:MemoryBroker",
        "cqrs_decor.brokers mysql = cqrs_decor_sqlalchemy:LogTableBroker",
        "cqrs_decor.brokers postgresql = cqrs_decor_sqlalchemy:LogTableBroker",
        "cqrs_decor.brokers sqlite = cqrs_decor_sqlalchemy:LogTableBroker",
        "cqrs_decor.stores mariadb = cqrs_decor_sqlalchemy:SqlAlchemyStore",
        "cqrs_decor.stores memory = cqrs_decor.memory:MemoryStore",
        "cqrs_decor.stores mysql = cqrs_decor_sqlalchemy:SqlAlchemyStore",
        "cqrs_decor.stores postgresql = cqrs_decor_sqlalchemy:SqlAlchemyStore",
        "cqrs_decor.stores sqlite = cqrs_decor_sqlalchemy:SqlAlchemyStore",
        "pytest11 cqrs_decor = cqrs_decor.testing.pytest_plugin",
    ]


def test_the_quickstart_runs_on_the_wheels(installed: Installed) -> None:
    """What a reader copies runs after `pip install cqrs-decor`, away from this repository."""
    shutil.copy(ROOT / "examples" / "quickstart.py", installed.folder)

    assert "delivered twice, handled once: ['tea']" in installed.run("quickstart.py")


def test_the_unit_tests_pass_on_the_wheels(installed: Installed) -> None:
    """A file that only the repository has, or a dependency that only the development environment has, shows here."""
    copied = installed.folder / "tests"
    shutil.copytree(ROOT / "tests" / "unit", copied / "unit", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "tests" / "__init__.py", copied)
    shutil.copy(ROOT / "pyproject.toml", installed.folder)  # for what it says about pytest

    installed.run("-m", "pytest", "--quiet", "-p", "no:cacheprovider", "tests/unit")
