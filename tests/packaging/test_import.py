"""What an import of the library does to the process that imports it: define and record, nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def in_a_fresh_process(code: str, folder: Path | None = None) -> Any:
    """What `code` prints as JSON."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CQRS_DECOR")}
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=folder,
        env=environment,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    return json.loads(ended.stdout)


def test_importing_configures_no_logging() -> None:
    """A library that sets levels or adds handlers takes them out of its user's hands."""
    code = """
import json, logging
before = (list(logging.root.handlers), logging.root.level, logging.lastResort)
from cqrs_decor import *
from cqrs_decor.testing import *
ours = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith("cqrs_decor")]
print(json.dumps({
    "root as before": before == (list(logging.root.handlers), logging.root.level, logging.lastResort),
    "levels": sorted({logger.level for logger in ours}),
    "handlers": sum(len(logger.handlers) for logger in ours),
    "propagate": all(logger.propagate for logger in ours),
}))
"""
    assert in_a_fresh_process(code) == {"root as before": True, "levels": [0], "handlers": 0, "propagate": True}


def test_running_an_app_configures_no_logging_either() -> None:
    """Not at start-up, and not by the loops."""
    code = """
import asyncio, json, logging
from cqrs_decor import Command, Registry, bootstrap
sales = Registry("sales")
class Ping(Command[int]):
    pass
@sales.command_handler
async def ping(command: Ping) -> int:
    return 1
async def main():
    async with bootstrap(registry=sales, discover=False) as app:
        await app.send(Ping())
        await app.drain()
asyncio.run(main())
ours = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith("cqrs_decor")]
print(json.dumps([logging.root.handlers, sorted({logger.level for logger in ours})]))
"""
    assert in_a_fresh_process(code) == [[], [0]]


def test_importing_and_bootstrapping_start_nothing() -> None:
    """No thread, no loop, no connection before `async with app`."""
    code = """
import json, socket, threading
opened = []
socket.socket.connect = lambda *arguments: opened.append(arguments)
from cqrs_decor import *
from cqrs_decor.testing import *
bootstrap(broker="kafka://nowhere.invalid", database="postgresql://nowhere.invalid/shop")
print(json.dumps([threading.active_count(), opened]))
"""
    assert in_a_fresh_process(code) == [1, []]


def test_importing_loads_no_plugin_and_no_driver() -> None:
    """Each is loaded by the name that the configuration asks for."""
    code = """
import json, sys
from cqrs_decor import *
from cqrs_decor.testing import *
import cqrs_decor.testing.pytest_plugin
heavy = ("sqlalchemy", "aiokafka", "aiosqlite", "asyncpg", "asyncmy", "typer", "rich", "cqrs_decor_")
print(json.dumps(sorted(name for name in sys.modules if name.startswith(heavy))))
"""
    assert in_a_fresh_process(code) == []


def test_importing_leaves_out_what_only_a_running_app_needs() -> None:
    """Settings are read and retries are made later: a script that only defines messages does not pay for them."""
    code = """
import json, sys
from cqrs_decor import *
later = ("stamina", "tenacity", "pydantic_settings", "dotenv", "importlib_metadata")
print(json.dumps(sorted(name for name in sys.modules if name.startswith(later))))
"""
    assert in_a_fresh_process(code) == []


def test_the_library_alone_imports_no_test_tools() -> None:
    """A service in production needs no pytest."""
    code = """
import json, sys
from cqrs_decor import *
print(json.dumps(sorted(name for name in sys.modules if name in ("pytest", "_pytest", "cqrs_decor.testing"))))
"""
    assert in_a_fresh_process(code) == []


def test_no_env_file_is_read(tmp_path: Path) -> None:
    """Neither by the import nor by bootstrap."""
    (tmp_path / ".env").write_text("CQRS_DECOR_SERVICE=from the file\nPYTHONUNBUFFERED_TEST=1\n")
    code = """
import json, os
from cqrs_decor import *
print(json.dumps([bootstrap().service, "PYTHONUNBUFFERED_TEST" in os.environ]))
"""
    assert in_a_fresh_process(code, tmp_path) == ["app", False]
