"""What all servers have in common: a process on a fixed port, with a directory of its own."""

import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, Self

import psutil

# Below the range from which the kernel gives ports to outgoing connections: a server that is down keeps its port.
_PORTS = range(20_000, 32_000)

_STANDING_STILL = {psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD}


class MissingServerError(RuntimeError):
    """The server is not installed; the text says what to install."""


class ServerFailedError(RuntimeError):
    """The server did not become ready, or did not stop; the text has the end of its log."""


class Server(ABC):
    """One server process on 127.0.0.1.

    It dies with the Python process that started it, however that one ends, unless `on_start` is given: then somebody
    keeps a record of it and will end it.

    Args:
        directory: Holds data, settings and log. A new one is made when none is given.
        port: The main port. A free one is chosen when none is given.
        pid: A server that is running already in that directory and on that port.
        on_start: Called after each start with the server, so that a record of it can follow its pid.
    """

    name: ClassVar[str]
    install_hint: ClassVar[str]
    # Fast but clean. What a session ends with, when the data is thrown away, is `quick_signal`.
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM
    quick_signal: ClassVar[signal.Signals] = signal.SIGKILL
    start_limit_s: ClassVar[float] = 60.0
    account: ClassVar[str | None] = None

    def __init__(
        self,
        *,
        directory: Path | None = None,
        port: int | None = None,
        pid: int | None = None,
        on_start: Callable[["Server"], None] | None = None,
    ) -> None:
        self.port = port or free_port()
        self._directory = directory
        self._process = psutil.Process(pid) if pid else None
        self._child: subprocess.Popen[bytes] | None = None
        self._guardian: subprocess.Popen[bytes] | None = None
        self._on_start = on_start

    @property
    def pid(self) -> int:
        if self._process is None:
            raise ServerFailedError(f"{self.name} has not been started.")
        return self._process.pid

    @property
    def directory(self) -> Path:
        """Where data, settings and log are. Made on first use; it belongs to the account the server runs under."""
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix=f"cqrs-decor-{self.name}-"))
            if user := self._user():
                shutil.chown(self._directory, user)
        return self._directory

    @property
    def log(self) -> Path:
        return self.directory / "server.log"

    @property
    def is_running(self) -> bool:
        return self._process is not None and _is_alive(self._process)

    def start(self) -> Self:
        """Start it and return when it answers. Data of an earlier start is kept."""
        if self.is_running:
            return self
        self.check_installed()
        self._reap()
        self._prepare()
        self._launch()
        self._wait_until_ready()
        if self._on_start:
            self._on_start(self)
        return self

    def stop(self) -> None:
        """Shut it down cleanly; its data stays. One that does not obey within 30 s is killed, and that is an error."""
        if not self._end(self.stop_signal, limit_s=30):
            raise ServerFailedError(f"{self.name} did not stop within 30 s and was killed.\n{self._log_tail()}")

    def kill(self) -> None:
        """SIGKILL it with all its children, as a crash or the kernel's out-of-memory killer would. Its data stays."""
        self._end(signal.SIGKILL, limit_s=30)

    def restart(self) -> Self:
        """Stop it if it is running, and start it on the same port and data."""
        self.stop()
        return self.start()

    def pause(self) -> None:
        """Freeze it: connections stay open and nothing answers, as behind a network that swallows packets."""
        if self.is_running:
            freeze(self.pid)  # first, so that it can start no others meanwhile
        for process in self._family():
            freeze(process.pid)

    def resume(self) -> None:
        for process in self._family():
            _send(process, signal.SIGCONT)

    def discard(self) -> None:
        """End it the quickest way and delete its data."""
        self._end(self.quick_signal, limit_s=10)
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.discard()
            raise

    def __exit__(self, *exc: object) -> None:
        self.discard()

    @classmethod
    @abstractmethod
    def check_installed(cls) -> None:
        """See whether all it needs is here, and fetch what can be fetched without being root.

        Raises:
            MissingServerError: Something has to be installed first.
        """

    @abstractmethod
    def _prepare(self) -> None:
        """Write settings and, the first time only, the data directory."""

    @abstractmethod
    def _command(self) -> Sequence[str]: ...

    @abstractmethod
    def _answers(self) -> bool:
        """Whether it serves a real request now."""

    def _environment(self) -> Mapping[str, str]:
        return {}

    @classmethod
    def _user(cls) -> str | None:
        """The account to run under: servers of databases refuse to run as root."""
        if os.geteuid() != 0 or cls.account is None:
            return None
        return cls.account if _account_exists(cls.account) else "nobody"

    def _run(self, *command: str) -> None:
        """Run a tool that comes with the server, under the server's account, to its end."""
        done = subprocess.run(
            command,
            cwd=self.directory,
            user=self._user(),
            group=_group_of(self._user()),
            extra_groups=_no_groups(self._user()),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode != 0:
            raise ServerFailedError(f"{Path(command[0]).name} of {self.name} failed:\n{done.stdout[-4000:]}")

    def _launch(self) -> None:
        with self.log.open("ab") as log:
            child = subprocess.Popen(
                self._command(),
                cwd=self.directory,
                env={**os.environ, **self._environment()},
                user=self._user(),
                group=_group_of(self._user()),
                extra_groups=_no_groups(self._user()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._process = psutil.Process(child.pid)
        if self._on_start is None:
            self._child = child
            self._guardian = _guard(child.pid, self.directory)
        else:
            child.returncode = (
                0  # not true, but it is meant to outlive us, and an open Popen warns when it is collected
            )

    def _wait_until_ready(self) -> None:
        def ready() -> bool:
            if not self.is_running:
                raise ServerFailedError(f"{self.name} ended while it started.\n{self._log_tail()}")
            return self._answers()

        try:
            wait_until(ready, limit_s=self.start_limit_s, what=f"{self.name} answers on port {self.port}")
        except TimeoutError as error:
            self.kill()
            raise ServerFailedError(f"{error}\n{self._log_tail()}") from None

    def _family(self) -> list[psutil.Process]:
        """The process and all its children; the parent first."""
        if self._process is None or not self.is_running:
            return []
        return [self._process, *self._process.children(recursive=True)]

    def _end(self, how: signal.Signals, *, limit_s: float) -> bool:
        """Signal it and wait until all of it is gone. Returns False if it had to be killed in the end."""
        family = self._family()
        if how != signal.SIGKILL:
            self.resume()
        for process in family if how == signal.SIGKILL else family[:1]:
            _send(process, how)
        obeyed = _all_end(family, limit_s=limit_s)
        if not obeyed:
            for process in family:
                _send(process, signal.SIGKILL)
            _all_end(family, limit_s=10)
        self._reap()
        return obeyed

    def _reap(self) -> None:
        """Wait until the pid itself is free, and dismiss the guardian, who has nobody to watch any more.

        A zombie still counts as alive for the next PostgreSQL on the same data, which finds its pid in a lock file.
        """
        if self._process is not None:
            self._process.wait(timeout=10)
        if self._child is not None:
            self._child.wait()
            self._child = None
        if self._guardian is not None:
            self._guardian.kill()
            self._guardian.communicate()
            self._guardian = None

    def _log_tail(self) -> str:
        if not self.log.exists():
            return "(no log)"
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])


def find_binary(name: str, *patterns: str) -> Path | None:
    """The newest match of the patterns (`/usr/lib/postgresql/*/bin`), else what PATH has."""
    found = [match for pattern in patterns for match in Path("/").glob(f"{pattern.lstrip('/')}/{name}")]
    if found:
        return max(found, key=_version_in)
    on_path = shutil.which(name)
    return Path(on_path) if on_path else None


def free_port() -> int:
    """A port of 127.0.0.1 on which nothing listens."""
    for port in random.sample(_PORTS, k=200):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ServerFailedError("No free port on 127.0.0.1 between 20000 and 32000.")


def accepts_connections(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until(condition: Callable[[], bool], *, limit_s: float, what: str) -> None:
    """Return as soon as the condition holds.

    Raises:
        TimeoutError: It did not within the limit; `what` names it in a few words.
    """
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"Waited {limit_s:g} s in vain until {what}.")
        time.sleep(0.02)


def freeze(pid: int) -> None:
    """SIGSTOP a process, and return when none of its threads runs any more.

    The signal only asks for that: a thread may go on for tens of milliseconds, long enough to answer a request. A
    process that has ended stands still as well.
    """
    try:
        os.kill(pid, signal.SIGSTOP)
        wait_until(partial(stands_still, pid), limit_s=10, what=f"process {pid} stands still")
    except (ProcessLookupError, psutil.NoSuchProcess):
        return


def stands_still(pid: int) -> bool:
    """Whether all threads of the process have been stopped, or have ended.

    Raises:
        psutil.NoSuchProcess: There is no such process.
    """
    return all(_thread_stands_still(thread.id) for thread in psutil.Process(pid).threads())


def _thread_stands_still(number: int) -> bool:
    try:
        return psutil.Process(number).status() in _STANDING_STILL
    except psutil.NoSuchProcess:
        return True


def _guard(pid: int, directory: Path) -> subprocess.Popen[bytes]:
    """A shell that waits for the end of this Python process, even by SIGKILL, and then ends the server.

    Its standard input is a pipe that only this process holds. PR_SET_PDEATHSIG is no replacement: it follows the thread
    that started the server, which may well be a short-lived one.
    """
    script = 'read -r _; kill -9 "$0" 2>/dev/null && sleep 1; rm -rf "$1"'
    return subprocess.Popen(
        ["/bin/sh", "-c", script, str(pid), str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _send(process: psutil.Process, what: signal.Signals) -> None:
    try:
        process.send_signal(what)
    except psutil.NoSuchProcess:
        return


def _all_end(family: Sequence[psutil.Process], *, limit_s: float) -> bool:
    try:
        wait_until(lambda: not any(map(_is_alive, family)), limit_s=limit_s, what="all of it has ended")
    except TimeoutError:
        return False
    return True


def _is_alive(process: psutil.Process) -> bool:
    """A zombie is not: orphans of a killed parent wait for the init process to notice them, which may take a second."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _account_exists(name: str) -> bool:
    return any(entry.pw_name == name for entry in pwd.getpwall())


def _group_of(user: str | None) -> int | None:
    return pwd.getpwnam(user).pw_gid if user else None


def _no_groups(user: str | None) -> list[int] | None:
    return [] if user else None


def _version_in(path: Path) -> list[int]:
    return [int(part) for part in path.parts if part.isdigit()]
