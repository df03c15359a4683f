"""What holds for the repository as a whole: one version, nothing tied to one machine, nothing claimed twice."""

import re
import tomllib
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path

import pytest

import cqrs_decor
from tests.packaging import tracked_files

_ROOT = Path(__file__).parents[2]
_PLUGINS = sorted(path.name for path in (_ROOT / "plugins").iterdir() if (path / "pyproject.toml").exists())


def test_no_tracked_file_names_a_machine_path_or_an_index_host() -> None:
    """A clone has to work on any machine and against any index."""
    assert tracked_files.problems() == []


@pytest.mark.parametrize(
    "line",
    [
        "cd /" + "home/anna/shop",
        'path = "/' + 'root/.cache"',
        "https://files.python" + "hosted.org/packages/",
        "index-url = https://py" + "pi.org/simple",
        "deb http://deb.deb" + "ian.org/debian bookworm main",
    ],
)
def test_the_check_sees_what_it_is_there_for(line: str) -> None:
    """A pattern that matches nothing would pass for ever."""
    assert tracked_files.offends(line)


@pytest.mark.parametrize("line", ["https://example.org/home/page", "src/work/file", "find it on PyPI", "~/.cache/x"])
def test_the_check_leaves_other_text_alone(line: str) -> None:
    """One that cries wolf would soon be switched off."""
    assert not tracked_files.offends(line)


@pytest.mark.parametrize("name", ["cqrs-decor", *_PLUGINS])
def test_all_distributions_have_one_version(name: str) -> None:
    """They are released together, so a user need only compare one number."""
    assert version(name) == cqrs_decor.__version__


@pytest.mark.parametrize("name", _PLUGINS)
def test_a_plugin_is_named_for_its_folder_and_package(name: str) -> None:
    """`pip install NAME`, `plugins/NAME` and `import NAME_WITH_UNDERSCORES` are one thing to remember."""
    project = _pyproject(name)["project"]

    assert project["name"] == name
    assert (_ROOT / "plugins" / name / name.replace("-", "_") / "py.typed").exists()
    assert (_ROOT / "plugins" / name / "README.md").exists()


@pytest.mark.parametrize("name", _PLUGINS)
def test_a_plugin_accepts_the_core_it_is_released_with(name: str) -> None:
    """Its range has an upper end, which is easily forgotten when the version is raised."""
    [requirement] = [need for need in _pyproject(name)["project"]["dependencies"] if need.startswith("cqrs-decor")]
    low, high = re.fullmatch(r"cqrs-decor>=([\d.]+),<([\d.]+)", requirement).groups()

    assert _numbers(low) <= _numbers(cqrs_decor.__version__) < _numbers(high)


@pytest.mark.parametrize("name", _PLUGINS)
def test_a_plugin_is_part_of_the_development_environment(name: str) -> None:
    """One that is left out of requirements-dev.txt is neither linted nor tested."""
    lines = (_ROOT / "requirements-dev.txt").read_text().splitlines()

    assert any(re.fullmatch(rf"-e plugins/{name}(\[.*\])?", line) for line in lines)


@pytest.mark.parametrize("group", ["cqrs_decor.brokers", "cqrs_decor.stores", "cqrs_decor.codecs"])
def test_no_two_distributions_of_ours_claim_one_name(group: str) -> None:
    """The loader refuses to choose between two."""
    names = [entry_point.name for entry_point in entry_points(group=group)]

    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "entry_point",
    [*entry_points(group="cqrs_decor.brokers"), *entry_points(group="cqrs_decor.stores")],
    ids=lambda entry_point: f"{entry_point.group}-{entry_point.name}",
)
def test_every_entry_point_of_ours_loads(entry_point: EntryPoint) -> None:
    """A renamed class leaves a plugin that is installed and cannot be used."""
    assert isinstance(entry_point.load(), type)


def test_constraints_are_pins_by_name_and_version_only() -> None:
    """A hash, a host or a path would tie them to one index."""
    lines = (_ROOT / "constraints.txt").read_text().splitlines()

    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+]+", line)] == []


def _pyproject(name: str) -> dict[str, dict]:
    return tomllib.loads((_ROOT / "plugins" / name / "pyproject.toml").read_text())


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(".")]
