"""The jars of Apache Kafka: fetched once with Maven, then kept in the user's cache."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.services.server import MissingServerError, ServerFailedError

_POM = Path(__file__).with_name("kafka-pom.xml")


def jars() -> Path:
    """The folder with the jars; fetched now if it is not there.

    Raises:
        MissingServerError: They are not in the cache, and there is no Maven to fetch them with.
    """
    folder = _cache() / f"kafka-{hashlib.sha256(_POM.read_bytes()).hexdigest()[:12]}"
    if not folder.exists():
        _fetch(folder)
    return folder


def java() -> Path:
    """The Java program, 17 or newer."""
    home = os.environ.get("JAVA_HOME")
    found = shutil.which("java", path=f"{home}/bin") if home else None
    found = found or shutil.which("java")
    if found is None:
        raise MissingServerError("Apache Kafka needs Java 17. Install it with: apt-get install default-jre-headless")
    return Path(found)


def _fetch(folder: Path) -> None:
    maven = shutil.which("mvn")
    if maven is None:
        raise MissingServerError(
            "The jars of Apache Kafka are not in the cache yet, and Maven fetches them. "
            "Install it with: apt-get install maven default-jre-headless"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        _copy_dependencies(maven, Path(scratch))
        _move_into_place(Path(scratch) / "jars", folder)


def _copy_dependencies(maven: str, scratch: Path) -> None:
    shutil.copy(_POM, scratch / "pom.xml")
    done = subprocess.run(
        [maven, "--batch-mode", "--quiet", "dependency:copy-dependencies", "-DoutputDirectory=jars"],
        cwd=scratch,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise ServerFailedError(f"Maven could not fetch the jars of Apache Kafka:\n{done.stdout[-4000:]}")


def _move_into_place(fetched: Path, folder: Path) -> None:
    """One rename: a half-filled folder is never taken for a whole one. Who comes second throws its copy away."""
    try:
        fetched.rename(folder)
    except OSError:
        if not folder.exists():
            raise


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "cqrs-decor-services"
