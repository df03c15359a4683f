"""Run the tests that need no server on every other supported Python of this machine.

Each gets an environment of its own under .venvs, with the core and its test tools only: the drivers may have no wheels
yet for the newest Python, and what unit tests hold is the core. They run side by side, and each is shown when it is
through.
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

VERSIONS = ("3.11", "3.12", "3.13", "3.14")
# `service` tests need drivers; what is under these folders needs none.
_TESTS = ("tests/unit", "tests/conformance")

_ROOT = Path(__file__).parents[1]


def main() -> int:
    folders = [folder for folder in _TESTS if (_ROOT / folder).exists()]
    others = {version: found for version in VERSIONS if version != _main_version() and (found := find(version))}
    print(f"Python {_main_version()} is the main one; others found: {', '.join(others) or 'none'}")
    with ThreadPoolExecutor(max(1, len(others))) as side_by_side:
        passed = side_by_side.map(partial(_passes, folders=folders), others, others.values())
        failed = [version for version, well in zip(others, passed, strict=True) if not well]
    if failed:
        print(f"Tests failed on Python {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def find(version: str) -> Path | None:
    """An interpreter of this version that really starts: pyenv has shims on PATH for versions that are switched off."""
    return next((python for python in _candidates(version) if _is_python(python, version)), None)


def _candidates(version: str) -> Iterator[Path]:
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        yield Path(folder) / f"python{version}"
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from sorted(pyenv.glob(f"versions/{version}.*/bin/python{version}"), reverse=True)


def _is_python(python: Path, version: str) -> bool:
    if not python.is_file():
        return False
    ask = "import sys, ensurepip, venv; print('.'.join(map(str, sys.version_info[:2])))"
    answer = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False)
    return answer.stdout.strip() == version


def _main_version() -> str:
    return ".".join(map(str, sys.version_info[:2]))


def _passes(version: str, python: Path, folders: list[str]) -> bool:
    environment = _ROOT / ".venvs" / version
    _bring_up_to_date(environment, python)
    # The conftest.py above these folders knows the servers, and with them drivers that are not installed here.
    tests = _run(environment / "bin/pytest", "--quiet", "--confcutdir=tests", *folders)
    print(f"--- Python {version} ---\n{tests.stdout}", flush=True)
    return tests.returncode == 0


def _bring_up_to_date(environment: Path, python: Path) -> None:
    stamp = environment / ".stamp"
    wanted = _fingerprint()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    _must_run(python, "-m", "venv", "--clear", environment)
    install = (environment / "bin/pip", "--disable-pip-version-check", "--quiet", "install", "-c", "constraints.txt")
    _must_run(*install, "hatchling", "editables")
    _must_run(*install, "--no-build-isolation", "--editable", ".[cli,test]")
    stamp.write_text(wanted)


def _fingerprint() -> str:
    """Of what decides which packages are installed."""
    files = ("pyproject.toml", "constraints.txt")
    return hashlib.sha256(b"".join((_ROOT / name).read_bytes() for name in files)).hexdigest()


def _must_run(*command: str | Path) -> None:
    done = _run(*command)
    if done.returncode != 0:
        raise SystemExit(f"Failed: {' '.join(map(str, command))}\n{done.stdout}")


def _run(*command: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command,
        cwd=_ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


if __name__ == "__main__":
    sys.exit(main())
