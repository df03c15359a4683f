"""The proxy itself, with a server that echoes: a fault that does not happen would let every scenario pass."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from tests.fault.proxy import Proxy


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1000):
                writer.write(data)
        except ConnectionResetError:
            pass  # which is what these tests are about
        finally:
            writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    with Proxy(server.sockets[0].getsockname()[1]) as made:
        yield made
    server.close()


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def asks(self, what: bytes) -> bytes:
        self.writer.write(what)
        return await asyncio.wait_for(self.reader.read(1000), timeout=0.3)


Connect = Callable[[], Awaitable[Client]]


@pytest.fixture
async def connect(proxy: Proxy) -> AsyncIterator[Connect]:
    clients: list[Client] = []

    async def connected() -> Client:
        clients.append(client := Client(*await asyncio.open_connection("127.0.0.1", proxy.port)))
        assert await client.asks(b"hello") == b"hello"
        return client

    yield connected
    for client in clients:
        client.writer.transport.abort()


async def test_a_cut_connection_is_reset_and_a_new_one_works(proxy: Proxy, connect: Connect) -> None:
    """A reset is what a client sees when a server or a firewall goes away with the connection open."""
    client = await connect()

    assert proxy.cut() == 1

    with pytest.raises(ConnectionResetError):
        await client.asks(b"still there?")
    await connect()


async def test_nobody_listens_while_it_refuses(proxy: Proxy, connect: Connect) -> None:
    """Refused at once is another way to be away than silence."""
    await connect()

    proxy.refuse()

    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", proxy.port)
    proxy.heal()
    await connect()


async def test_each_try_is_counted_while_it_turns_everybody_away(proxy: Proxy, connect: Connect) -> None:
    """How often somebody knocks can only be counted by one who opens."""
    await connect()
    before = proxy.tries()

    proxy.turn_away()
    for _ in range(3):
        with pytest.raises(ConnectionResetError):
            await connect()
    proxy.heal()

    assert proxy.tries() == before + 3
    await connect()


async def test_what_was_stalled_arrives_afterwards(proxy: Proxy, connect: Connect) -> None:
    """A stalled connection is alive: what was sent meanwhile is late, not lost."""
    client = await connect()

    proxy.stall()
    with pytest.raises(TimeoutError):
        await client.asks(b"late")
    proxy.heal()

    assert await client.asks(b"") == b"late"


async def test_a_half_open_connection_takes_everything_and_answers_nothing(proxy: Proxy, connect: Connect) -> None:
    """Neither end hears of it; only a limit of one's own finds it."""
    client = await connect()

    proxy.half_open()
    with pytest.raises(TimeoutError):
        await client.asks(b"gone")
    proxy.heal()

    with pytest.raises(ConnectionResetError):
        await client.asks(b"again")


async def test_lost_replies_lose_nothing_that_was_asked(proxy: Proxy, connect: Connect) -> None:
    """The server has done it, and the client cannot know."""
    client = await connect()
    proxy.lose_replies()

    with pytest.raises(TimeoutError):
        await client.asks(b"did you?")

    assert proxy.requests() == len(b"hello" + b"did you?")


async def test_slow_is_late_and_whole(proxy: Proxy, connect: Connect) -> None:
    """Slow must not turn into lost."""
    client = await connect()

    proxy.slow(0.05)

    assert await client.asks(b"slowly") == b"slowly"
