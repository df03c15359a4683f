"""python -m shop.up: everything that the example needs, until Ctrl-C.

Starts PostgreSQL and Kafka (from the repository's `tests.services`, so run it there; or give the URLs of yours), makes
databases, tables and topics, and keeps five processes running: one that ends is started again.
"""

import argparse
import asyncio
import os
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from sqlalchemy.engine import make_url

import billing.models
import shop.models
import sink
from shop.tables import create_database, create_tables, fill_stock

SERVICES = ("shop", "billing")
STOP_LIMIT_S = 30.0
RESTART_AFTER_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Servers:
    """Where PostgreSQL and Kafka are. Each service has a database of its own, and so has the sink."""

    postgres: str
    kafka: str

    def database(self, name: str) -> str:
        return make_url(self.postgres).set(database=name).render_as_string(hide_password=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A process, and what it is told."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]


def main() -> None:
    arguments = _parser().parse_args()
    with _servers(arguments.postgres, arguments.kafka) as servers:
        asyncio.run(_run(servers, arguments.port))


async def _run(servers: Servers, port: int) -> None:
    await prepare(servers)
    print(f"http://127.0.0.1:{port}/docs (Ctrl-C ends everything)", flush=True)
    await keep_running(parts(servers, port))


async def prepare(servers: Servers) -> None:
    """Databases, tables, stock and topics."""
    for name, base in (("shop", shop.models.Base), ("billing", billing.models.Base), ("sink", sink.Base)):
        await create_database(servers.database(name))
        await create_tables(servers.database(name), base.metadata)
    await fill_stock(servers.database("shop"))
    for service in SERVICES:
        await _run_once(_cqrs_decor(servers, service, "db", "upgrade"))
        await _run_once(_cqrs_decor(servers, service, "topics", "create"))


def parts(servers: Servers, port: int) -> list[Part]:
    """The web process of the shop, and a relay and a worker of each service."""
    web = Part(
        name="shop web",
        command=[sys.executable, "-m", "uvicorn", "shop.main:app", "--port", str(port), "--no-access-log"],
        environment=_environment(servers, "shop"),
    )
    loops = [_cqrs_decor(servers, service, "run", loop) for service in SERVICES for loop in ("relay", "worker")]
    return [web, *loops]


def _cqrs_decor(servers: Servers, service: str, *arguments: str) -> Part:
    return Part(
        name=f"{service} {arguments[-1]}",
        command=[sys.executable, "-m", "cqrs_decor", *arguments],
        environment=_environment(servers, service),
    )


def _environment(servers: Servers, service: str) -> Mapping[str, str]:
    """All that a service is told. Without the last two lines nothing would be noted in the sink."""
    return {
        "CQRS_DECOR_APP": f"{service}.main:cqrs",
        "CQRS_DECOR_DATABASE": servers.database(service),
        "CQRS_DECOR_BROKER": servers.kafka,
        "CQRS_DECOR_HANDLERS": os.environ.get("CQRS_DECOR_HANDLERS", "sink"),
        "SINK_DATABASE": servers.database("sink"),
    }


async def _run_once(part: Part) -> None:
    process = await _start(part)
    if await process.wait() != 0:
        raise SystemExit(f"{part.name} failed: {' '.join(part.command)}")


# --- keep them running ------------------------------------------------------------------------------------------------


async def keep_running(wanted: Sequence[Part]) -> None:
    """Keep all parts running until SIGINT or SIGTERM; then stop them all, and return when they have ended."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with asyncio.TaskGroup() as tasks:
        for part in wanted:
            tasks.create_task(_keep_running(part, stop))


async def _keep_running(part: Part, stop: asyncio.Event) -> None:
    stopped = asyncio.ensure_future(stop.wait())
    while not stop.is_set():
        process = await _start(part)
        print(f"{part.name}: pid {process.pid}", flush=True)
        ended = asyncio.ensure_future(process.wait())
        await asyncio.wait((ended, stopped), return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set():
            await _stop(process)
        else:
            print(f"{part.name}: ended with {process.returncode}, starting it again", flush=True)
            await asyncio.wait((stopped,), timeout=RESTART_AFTER_S)
        await ended


async def _start(part: Part) -> Process:
    """In a session of its own: Ctrl-C reaches this process only, which passes it on once."""
    environment = {**os.environ, **part.environment}
    return await asyncio.create_subprocess_exec(*part.command, env=environment, start_new_session=True)


async def _stop(process: Process) -> None:
    """Relay and worker finish what they have in hand; one that does not end is killed."""
    try:
        process.terminate()
        async with asyncio.timeout(STOP_LIMIT_S):
            await process.wait()
    except TimeoutError:
        process.kill()
    except ProcessLookupError:
        pass  # it ended by itself at the same moment


# --- servers ----------------------------------------------------------------------------------------------------------


@contextmanager
def _servers(postgres: str | None, kafka: str | None) -> Generator[Servers]:
    """Those whose URLs are given; the others are started, and end with the block, data and all."""
    with ExitStack() as started:
        if postgres is None or kafka is None:
            from tests.services import KafkaServer, PostgresServer, running  # only there in the repository

            postgres = postgres or started.enter_context(running(PostgresServer)).url(driver="asyncpg")
            kafka = kafka or started.enter_context(running(KafkaServer)).url()
        yield Servers(postgres=postgres, kafka=kafka)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m shop.up", description=__doc__)
    parser.add_argument("--postgres", help="postgresql+asyncpg://user:password@host:port/postgres")
    parser.add_argument("--kafka", help="kafka://host:port")
    parser.add_argument("--port", type=int, default=8000, help="of the web process")
    return parser


if __name__ == "__main__":
    main()
