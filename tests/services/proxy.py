"""A TCP connection between a client and its server, that can be cut."""

import asyncio
from urllib.parse import urlsplit


class Proxy:
    """Stands in front of the server of a URL.

    Attributes:
        cut_at: What is cut off, with everything after it, once a client sends it; it does so once.
        deliver_first: Whether the server still gets it, so that only its answer is lost.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = (parts.hostname, parts.port)
        self._url = url
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.cut_at: bytes | None = None
        self.deliver_first = False

    async def start(self) -> str:
        """The URL that leads through here."""
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        return self._url.replace(f":{self._target[1]}/", f":{port}/")

    async def stop(self) -> None:
        self._server.close()
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Cut what is open; new connections are let through."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._keep(asyncio.current_task())
        there_reader, there_writer = await asyncio.open_connection(*self._target)
        self._writers += [writer, there_writer]
        self._keep(asyncio.create_task(self._pump(there_reader, writer, None)))
        await self._pump(reader, there_writer, writer)

    def _keep(self, task: asyncio.Task[None] | None) -> None:
        if task is not None:
            self._tasks.add(task)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answers: asyncio.StreamWriter | None
    ) -> None:
        try:
            while chunk := await reader.read(65536):
                if answers is not None and self.cut_at is not None and self.cut_at in chunk.upper():
                    self.cut_at = None
                    self._cut_here(chunk, writer, answers)
                    return
                writer.write(chunk)
                await writer.drain()
        except (ConnectionError, OSError):  # it was cut
            pass
        finally:
            writer.close()

    def _cut_here(self, chunk: bytes, writer: asyncio.StreamWriter, answers: asyncio.StreamWriter) -> None:
        answers.transport.abort()
        if self.deliver_first:
            writer.write(chunk)
            writer.write_eof()
        else:
            writer.transport.abort()
