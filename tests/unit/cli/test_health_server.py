"""Probes over HTTP, as Kubernetes and load balancers send them."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator

import pytest

from cqrs_decor.cli.errors import CommandLineError
from cqrs_decor.cli.health_server import served
from cqrs_decor.health import Verdict


class Answers:
    """What is probed; live, and not ready."""

    async def live(self) -> Verdict:
        return Verdict(good=True, document={"status": "live"})

    async def ready(self) -> Verdict:
        return Verdict(good=False, document={"status": "starting"})


@pytest.fixture
async def port() -> AsyncIterator[int]:
    async with served(Answers(), host="127.0.0.1", port=0) as address:
        assert address is not None
        yield int(address.rpartition(":")[2])


async def sent(port: int, request: bytes, *, end: bool = False) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    if end:
        writer.write_eof()
    answer = await reader.read()
    writer.close()
    return answer


@pytest.mark.parametrize(
    ("request_line", "status", "said"),
    [
        ("GET /live HTTP/1.1", 200, "live"),
        ("GET /live/?from=kubelet HTTP/1.0", 200, "live"),
        ("GET /ready HTTP/1.1", 503, "starting"),
        ("GET / HTTP/1.1", 404, "not found"),
        ("POST /live HTTP/1.1", 405, "method not allowed"),
    ],
)
async def test_a_probe_has_a_status_and_a_document(port: int, request_line: str, status: int, said: str) -> None:
    """Machines read the status, people the document."""
    answer = await sent(port, f"{request_line}\r\nHost: probe\r\n\r\n".encode())

    head, body = answer.split(b"\r\n\r\n", 1)
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    assert f"Content-Length: {len(body)}".encode() in head
    assert json.loads(body)["status"] == said


async def test_head_has_no_body(port: int) -> None:
    """Some balancers ask so."""
    answer = await sent(port, b"HEAD /live HTTP/1.1\r\n\r\n")

    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    "request_", [b"", b"hello\r\n\r\n", b"\xff\xfe / HTTP\r\n\r\n", b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n\r\n"]
)
async def test_what_is_no_request_is_hung_up_on(port: int, request_: bytes) -> None:
    """A port scanner must neither hold a connection nor fill the log."""
    try:
        answer = await sent(port, request_, end=True)
    except ConnectionResetError:
        answer = b""

    assert answer == b""
    assert (await sent(port, b"GET /live HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 200 ")


async def test_an_address_that_is_taken_is_named() -> None:
    """Found at start-up rather than by a probe that restarts the process for ever."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CommandLineError, match=f"127.0.0.1:{port}"):
            async with served(Answers(), host="127.0.0.1", port=port):
                pass


async def test_without_a_port_nothing_listens() -> None:
    """It is off unless somebody asks for it."""
    async with served(Answers(), host="127.0.0.1", port=None) as address:
        assert address is None
