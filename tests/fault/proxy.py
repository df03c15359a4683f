"""A TCP proxy that misbehaves on demand, in a thread of its own: a test that waits does not stop it."""

import asyncio
import socket
import struct
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self, TypeVar

import psutil

from tests.services.server import free_port

T = TypeVar("T")

CHUNK = 64 * 1024


@dataclass(eq=False)
class Link:
    """One connection of a client, and the one that was made to the server for it.

    Attributes:
        client_port: The client's own port, by which its process is found.
        requests: How many bytes the client has sent so far.
        swallowed: Part of what was sent has been dropped: it can never be continued, only cut.
    """

    client_port: int
    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    requests: int = 0
    swallowed: bool = False
    pumps: list[asyncio.Task[None]] = field(default_factory=list[asyncio.Task[None]])


class Proxy:
    """Stands between victims and a server on 127.0.0.1. All methods may be called from any thread; they return when
    what they say is true for connections that are there as for those that come.

        cut            resets every connection (RST); new ones are fine
        refuse         and nobody listens any more, until `heal`
        turn_away      the same to a client, but each that comes is counted first
        stall          nothing is forwarded, either way; it all arrives after `heal`
        half_open      takes what is sent and drops it; no answer, no FIN, as behind a firewall that forgot us
        lose_replies   requests arrive, answers are dropped: "acknowledgements lost"
        slow           each chunk waits, either way
        heal           all is well again; connections that lost bytes are cut

    Args:
        target: The port of the server.
        port: The port to listen on; a free one when none is given.
    """

    def __init__(self, target: int, port: int | None = None) -> None:
        self.port = port or free_port()
        self._target = target
        self._links: set[Link] = set()
        self._forwarding = asyncio.Event()
        self._drops_requests = False
        self._drops_replies = False
        self._delay_s = 0.0
        self._turns_away = False
        self._tries = 0
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy to {target}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._forwarding.set()
        self._run(self._listen)
        return self

    def __exit__(self, *exc: object) -> None:
        self._run(self._close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()

    # --- what it can do to connections ------------------------------------------------------------------------------

    def cut(self, process: int | None = None) -> int:
        """Reset connections, all or those of one process; how many."""
        ports = None if process is None else _ports_of(process)
        return self._run(partial(self._cut, ports))

    def refuse(self) -> None:
        self._run(self._refuse)

    def turn_away(self) -> None:
        self._run(self._turn_away)

    def stall(self) -> None:
        self._run(partial(self._behave, forwards=False))

    def half_open(self) -> None:
        self._run(partial(self._behave, drops_requests=True, drops_replies=True))

    def lose_replies(self) -> None:
        self._run(partial(self._behave, drops_replies=True))

    def slow(self, delay_s: float) -> None:
        self._run(partial(self._behave, delay_s=delay_s))

    def heal(self) -> None:
        self._run(self._heal)

    # --- what can be seen -------------------------------------------------------------------------------------------

    def connections(self) -> int:
        return self._run(self._count)

    def tries(self) -> int:
        """How often somebody has tried to connect so far."""
        return self._tries

    def requests(self) -> int:
        """How many bytes clients have sent on the connections that are there."""
        return self._run(self._sent)

    # --- on its own loop --------------------------------------------------------------------------------------------

    def _run(self, work: Callable[[], Awaitable[T]]) -> T:
        async def run() -> T:
            return await work()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(timeout=10)

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def _refuse(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._cut(None)

    async def _turn_away(self) -> None:
        self._turns_away = True
        await self._cut(None)

    async def _behave(
        self,
        *,
        forwards: bool = True,
        drops_requests: bool = False,
        drops_replies: bool = False,
        delay_s: float = 0.0,
    ) -> None:
        self._drops_requests, self._drops_replies, self._delay_s = drops_requests, drops_replies, delay_s
        if forwards:
            self._forwarding.set()
        else:
            self._forwarding.clear()

    async def _heal(self) -> None:
        await self._behave()
        self._turns_away = False
        for link in [link for link in self._links if link.swallowed]:
            self._reset(link)
        await self._listen()

    async def _cut(self, ports: set[int] | None) -> int:
        chosen = [link for link in self._links if ports is None or link.client_port in ports]
        for link in chosen:
            self._reset(link)
        return len(chosen)

    async def _count(self) -> int:
        return len(self._links)

    async def _sent(self) -> int:
        return sum(link.requests for link in self._links)

    async def _close(self) -> None:
        await self._refuse()
        pumps = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        self._tries += 1
        if self._turns_away:
            _abort(client)
            return
        try:
            answers, server = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            _abort(client)  # the server is away: to the client it looks as if it had gone just now
            return
        link = Link(client.get_extra_info("peername")[1], client, server)
        self._links.add(link)
        link.pumps = [
            asyncio.create_task(self._pump(link, reader, server, asks=True)),
            asyncio.create_task(self._pump(link, answers, client, asks=False)),
        ]
        await asyncio.wait(link.pumps, return_when=asyncio.FIRST_COMPLETED)
        self._hang_up(link)

    async def _pump(
        self, link: Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, asks: bool
    ) -> None:
        try:
            while chunk := await reader.read(CHUNK):
                link.requests += len(chunk) if asks else 0
                await self._forwarding.wait()
                if self._drops_requests if asks else self._drops_replies:
                    link.swallowed = True
                    continue
                if self._delay_s:
                    await asyncio.sleep(self._delay_s)
                writer.write(chunk)
                await writer.drain()
        except OSError:
            pass  # one side is gone; the other one hears of it from `_hang_up`

    def _hang_up(self, link: Link) -> None:
        """One side has closed: so does the other, unless this proxy plays dead."""
        if link in self._links and not self._drops_replies:
            self._links.discard(link)
            for writer in (link.client, link.server):
                writer.close()
        for pump in link.pumps:
            pump.cancel()

    def _reset(self, link: Link) -> None:
        self._links.discard(link)
        for pump in link.pumps:
            pump.cancel()
        _abort(link.client)
        _abort(link.server)


def _abort(writer: asyncio.StreamWriter) -> None:
    """Close with RST instead of FIN: what is on the way is lost, and the other side gets an error."""
    connection: Any = writer.get_extra_info("socket")
    if connection is not None and connection.fileno() >= 0:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def _ports_of(process: int) -> set[int]:
    return {each.laddr.port for each in psutil.Process(process).net_connections("tcp") if each.laddr}
