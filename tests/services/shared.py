"""Servers that outlive one run: who started them, and how the next run finds them."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import psutil

from tests.services.kafka import KafkaServer
from tests.services.mariadb import MariaDbServer
from tests.services.postgres import PostgresServer
from tests.services.server import Server

SERVERS: Mapping[str, type[Server]] = {server.name: server for server in (PostgresServer, MariaDbServer, KafkaServer)}

_STATE = Path(__file__).parents[2] / ".services"

# The kernel counts from boot; where the wall clock is corrected, the difference moves a little.
_CLOCK_CORRECTION_S = 2.0

S = TypeVar("S", bound=Server)


@contextmanager
def running(kind: type[S]) -> Iterator[S]:
    """The server that `python -m tests.services up` left running, else one that ends with the block, data and all."""
    if shared := attach(kind):
        yield shared
        return
    with kind() as own:
        yield own


def start_shared(kind: type[S]) -> S:
    """Start one that outlives this process, unless it is running already."""
    return attach(kind) or kind(on_start=_record).start()


def attach(kind: type[S]) -> S | None:
    """The shared server of this kind, if one is running."""
    record = _Record.read(kind.name)
    if record is None or not record.is_current():
        return None
    server = kind(directory=Path(record.directory), port=record.port, pid=record.pid, on_start=_record)
    return server if server.is_running else None


def end_shared(kind: type[Server]) -> bool:
    """End the shared server and delete its data. Returns whether there was one."""
    server = attach(kind)
    if server is not None:
        server.discard()
    _file_of(kind.name).unlink(missing_ok=True)
    return server is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    """What is on disk about a shared server; `created` tells its process from a later one with the same pid."""

    pid: int
    created: float
    port: int
    directory: str

    @classmethod
    def read(cls, name: str) -> "_Record | None":
        try:
            return cls(**json.loads(_file_of(name).read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def is_current(self) -> bool:
        try:
            same = abs(psutil.Process(self.pid).create_time() - self.created) < _CLOCK_CORRECTION_S
        except psutil.NoSuchProcess:
            return False
        return same and Path(self.directory).exists()


def _record(server: Server) -> None:
    record = _Record(
        pid=server.pid,
        created=psutil.Process(server.pid).create_time(),
        port=server.port,
        directory=str(server.directory),
    )
    _STATE.mkdir(exist_ok=True)
    _file_of(server.name).write_text(json.dumps(asdict(record)))


def _file_of(name: str) -> Path:
    return _STATE / f"{name}.json"
