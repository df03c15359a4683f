"""No tracked file names a folder of one machine or the host of a package index.

A clone has to work anywhere, against any index or mirror; both slip in easily, with a pasted path or a lock file.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path(__file__).parents[2]

_MACHINE_PATH = re.compile(r"(?<![\w.:/-])/(?:work|farm|root|home|Users)/[\w.-]")
_INDEX_HOST = re.compile(
    r"\b(?:(?:\w+\.)?pypi\.(?:org|io|python)|\w+\.pythonhosted|registry\.(?:npmjs|yarnpkg)|repo\d?\.maven"
    r"|repo\.maven\.apache|(?:deb|security)\.debian|archive\.ubuntu)\b"
)


def problems() -> list[str]:
    """One line for each place: file, line number, text."""
    return [problem for path in tracked_files() for problem in _problems_in(path)]


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=_ROOT, capture_output=True, text=True, check=True)
    return [path for name in listed.stdout.split("\0") if name and (path := _ROOT / name).is_file()]


def offends(line: str) -> bool:
    return bool(_MACHINE_PATH.search(line) or _INDEX_HOST.search(line))


def _problems_in(path: Path) -> Iterator[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        return
    for number, line in enumerate(lines, start=1):
        if offends(line):
            yield f"{path.relative_to(_ROOT)}:{number}: {line.strip()}"


if __name__ == "__main__":
    found = problems()
    print(*found, sep="\n", end="\n" if found else "")
    sys.exit("Tracked files must name no folder of one machine and no host of a package index." if found else 0)
