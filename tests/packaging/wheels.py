"""The distributions as a user gets them: built, and installed where no source of theirs can be seen."""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECTS = (ROOT, *sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml")))

_HOME = ROOT / ".cache" / "wheel_check"
_LEFT_OUT = ("PYTHONPATH", "VIRTUAL_ENV", "PYTEST_ADDOPTS")
_CORE_EXTRAS = "[cli,test]"  # what the unit tests need


@dataclass(frozen=True, slots=True)
class Built:
    """One distribution, packed; the wheel was built from the sdist, not from the repository."""

    project: str
    version: str
    wheel: Path
    sdist: Path

    @property
    def package(self) -> str:
        return self.project.replace("-", "_")

    def names_in_wheel(self) -> list[str]:
        with zipfile.ZipFile(self.wheel) as wheel:
            return wheel.namelist()

    def text_in_wheel(self, name: str) -> str:
        with zipfile.ZipFile(self.wheel) as wheel:
            return wheel.read(name).decode()

    def names_in_sdist(self) -> list[str]:
        with tarfile.open(self.sdist) as sdist:
            return [name.partition("/")[2] for name in sdist.getnames()]


def build(project: Path, folder: Path) -> Built:
    """Pack one distribution into `folder`, with the build tools of this environment."""
    _must_run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, project)
    name = tomllib.loads((project / "pyproject.toml").read_text())["project"]["name"]
    [wheel] = folder.glob(f"{name.replace('-', '_')}-*.whl")
    [sdist] = folder.glob(f"{name.replace('-', '_')}-*.tar.gz")
    return Built(name, wheel.name.split("-")[1], wheel, sdist)


def install(built: list[Built]) -> Path:
    """The interpreter of an environment that holds these wheels and what they need, and nothing else of ours.

    What they need is resolved by pip and kept between runs; the wheels themselves are installed anew each time.
    """
    python = _HOME / "bin" / "python"
    stamp = _HOME / ".stamp"
    pip = (python, "-m", "pip", "--disable-pip-version-check", "--quiet", "install")
    wanted = _fingerprint(built)
    if not stamp.exists() or stamp.read_text() != wanted:
        shutil.rmtree(_HOME, ignore_errors=True)
        _must_run(sys.executable, "-m", "venv", _HOME)
        _must_run(*pip, "--constraint", ROOT / "constraints.txt", *map(_requirement, built))
        stamp.write_text(wanted)
    else:
        _must_run(*pip, "--no-deps", "--force-reinstall", *(each.wheel for each in built))
    _must_run(python, "-m", "pip", "--disable-pip-version-check", "check")
    return python


def environment() -> dict[str, str]:
    """That of this process without what could lead an interpreter to the sources, or belongs to this run of pytest."""
    return {name: value for name, value in os.environ.items() if name not in _LEFT_OUT}


def _requirement(built: Built) -> str:
    return f"{built.wheel}{_CORE_EXTRAS if built.project == 'cqrs-decor' else ''}"


def _fingerprint(built: list[Built]) -> str:
    """Of what decides which packages are installed: the pins and what the wheels ask for."""
    metadata = "".join(each.text_in_wheel(f"{each.package}-{each.version}.dist-info/METADATA") for each in built)
    pins = (ROOT / "constraints.txt").read_text()
    return hashlib.sha256(f"{sys.version}{pins}{metadata}".encode()).hexdigest()


def _must_run(*command: str | Path) -> None:
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
