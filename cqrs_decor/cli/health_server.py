"""Answers `GET /live` and `GET /ready` over HTTP: 200 or 503, and a JSON document.

Written on asyncio alone: two fixed paths with no body need no framework, and every process would have to load it.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol

import orjson

from cqrs_decor.cli.errors import CommandLineError
from cqrs_decor.health import Verdict

_REQUEST_BYTES = 8_192
_REQUEST_S = 5.0


class Probed(Protocol):
    """What is asked: one process, or a group of them."""

    async def live(self) -> Verdict: ...

    async def ready(self) -> Verdict: ...


@asynccontextmanager
async def served(probed: Probed, *, host: str, port: int | None) -> AsyncGenerator[str | None, None]:
    """Answer probes for as long as the block lasts; yields the address, None without a port.

    Raises:
        CommandLineError: The address cannot be had.
    """
    if port is None:
        yield None
        return
    try:
        server = await asyncio.start_server(_answering(probed), host, port, limit=_REQUEST_BYTES)
    except OSError as error:
        raise CommandLineError(
            f"Health checks cannot be answered at {host}:{port}: {error.strerror or error}.",
            fix="name another address: --health-host, --health-port",
        ) from error
    async with _closing(server):
        address = server.sockets[0].getsockname()
        yield f"{address[0]}:{address[1]}"


@asynccontextmanager
async def served_at(probed: Probed, path: Path) -> AsyncGenerator[None, None]:
    """Answer the process that this one belongs to, at a socket in the file system."""
    server = await asyncio.start_unix_server(_answering(probed), path, limit=_REQUEST_BYTES)
    async with _closing(server):
        yield


async def asked(path: Path, question: str) -> tuple[int, dict[str, Any]]:
    """What the process at this socket answers to `/live` or `/ready`.

    Raises:
        OSError: Nobody is there.
        ValueError: It is no answer.
    """
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(f"GET {question} HTTP/1.1\r\nHost: group\r\n\r\n".encode())
        answer = await reader.read()
    finally:
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    return status, orjson.loads(body)


@asynccontextmanager
async def _closing(server: asyncio.Server) -> AsyncGenerator[None, None]:
    """Connections that are open then end by themselves, after one answer each."""
    try:
        yield
    finally:
        server.close()


_Connection = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def _answering(probed: Probed) -> _Connection:
    questions = {"/live": probed.live, "/ready": probed.ready}

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_REQUEST_S):
                method, path = await _request(reader)
                status, document = await _outcome(questions, method, path)
                writer.write(_response(status, document, head_only=method == "HEAD"))
                await writer.drain()
        except (TimeoutError, OSError, EOFError, ValueError, asyncio.LimitOverrunError):
            pass  # whoever asked is gone, or does not speak HTTP
        finally:
            writer.close()

    return answer


async def _request(reader: asyncio.StreamReader) -> tuple[str, str]:
    """Method and path; what else a request says changes no answer."""
    head = await reader.readuntil(b"\r\n\r\n")
    method, target, _ = head.split(b"\r\n", 1)[0].decode("ascii").split(" ")
    return method, target.partition("?")[0].rstrip("/")


async def _outcome(
    questions: Mapping[str, Callable[[], Awaitable[Verdict]]], method: str, path: str
) -> tuple[HTTPStatus, dict[str, Any]]:
    if method not in ("GET", "HEAD"):
        return HTTPStatus.METHOD_NOT_ALLOWED, {"status": "method not allowed"}
    if path not in questions:
        return HTTPStatus.NOT_FOUND, {"status": "not found", "paths": sorted(questions)}
    verdict = await questions[path]()
    return HTTPStatus.OK if verdict.good else HTTPStatus.SERVICE_UNAVAILABLE, verdict.document


def _response(status: HTTPStatus, document: dict[str, Any], *, head_only: bool) -> bytes:
    body = orjson.dumps(document, default=str) + b"\n"
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        "Cache-Control: no-store\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (b"" if head_only else body)
