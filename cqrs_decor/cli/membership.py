"""What a process knows of the group that it was started in by `run --processes`."""

import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

_SPARE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """Hidden options of `run`.

    Attributes:
        member: Its number, from 1.
        parent_pipe: A descriptor that reads to its end once the process that started this one is gone, however it went.
        health_socket: Where that one asks it for its health.
    """

    member: Annotated[int | None, typer.Option("--member", hidden=True)] = None
    parent_pipe: Annotated[int | None, typer.Option("--parent-pipe", hidden=True)] = None
    health_socket: Annotated[Path | None, typer.Option("--health-socket", hidden=True)] = None

    def arguments(self) -> list[str]:
        given = (
            ("--member", self.member),
            ("--parent-pipe", self.parent_pipe),
            ("--health-socket", self.health_socket),
        )
        return [text for name, value in given if value is not None for text in (name, str(value))]


def leave_with_parent(descriptor: int, drain_limit_s: float) -> None:
    """When the parent is gone, stop as if told to by a signal; leave at once if that takes longer than it may.

    A pipe rather than PR_SET_PDEATHSIG: it works on every system, and for a parent that died before this was called. In
    a thread, so that it works though user code blocks the loop.
    """

    def watch() -> None:
        os.read(descriptor, 1)  # nobody writes: it returns when the last one who could is gone
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(drain_limit_s + _SPARE_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="cqrs-decor parent", daemon=True).start()
