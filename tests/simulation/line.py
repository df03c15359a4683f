"""The line between one process and one server: what is sent arrives after a while, or not; so does what comes back."""

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import Context
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from tests.simulation.chance import Chance, Fate
from tests.simulation.loop import VirtualLoop


class Caller(Protocol):
    """The process at the near end."""

    name: str
    dead: bool

    def kill(self, why: str) -> None:
        """Nothing of it runs any more; the step that calls this must wait for ever."""
        ...

    def start(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> "asyncio.Task[Any] | None":
        """Run something in this process; None if there is none any more."""
        ...


class Server:
    """The far end: a database or a broker, which may be away for all, and keeps the tail of what it was asked."""

    def __init__(self, name: str, loop: VirtualLoop, chance: Chance, note: Callable[[str, str, str], None]) -> None:
        self.name = name
        self.loop = loop
        self.chance = chance
        self.note = note
        self.context = Context()  # what it does belongs to no process
        self.away_until = 0.0

    def later(self, delay: float, callback: Callable[..., object], *args: Any) -> None:
        """Do something of the server's own, whoever is killed meanwhile."""
        self.loop.call_later(delay, callback, *args, context=self.context)

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Work of the server's own that waits for something."""
        return self.loop.create_task(work, context=self.context.copy())


@dataclass(slots=True, eq=False)
class _Call:
    what: str
    request: Callable[[], Coroutine[Any, Any, Any]]
    reply: asyncio.Future[Any]
    fate: Fate
    waits: bool
    error: Callable[[str], Exception]


class Line:
    """One process's way to one server.

    Args:
        caller: Whose line it is.
        server: Where it leads.
        error: What the caller is told when the line, or the server, fails.
        patience_s: What is slow, or belated, is so by at most this.
    """

    def __init__(self, caller: Caller, server: Server, *, error: Callable[[str], Exception], patience_s: float) -> None:
        self.cut_until = 0.0
        self._caller = caller
        self._server = server
        self._loop = server.loop
        self._chance = server.chance
        self._error = error
        self._patience_s = patience_s

    async def die(self, why: str) -> NoReturn:
        """Kill the caller, from a step of its own."""
        self._caller.kill(why)
        await self._loop.create_future()
        raise AssertionError("a killed process went on")

    @property
    def is_down(self) -> bool:
        return self._loop.time() < max(self.cut_until, self._server.away_until)

    async def call(
        self,
        what: str,
        request: Callable[[], Coroutine[Any, Any, Any]],
        *,
        waits: bool = False,
        error: Callable[[str], Exception] | None = None,
    ) -> Any:
        """Have the server carry out `request`.

        Args:
            what: How traces call it.
            request: Makes the coroutine that the server runs.
            waits: The server may have to wait before it can answer.
            error: What the caller is told if it goes wrong, unless the line's own.
        """
        if self._caller.dead:  # its coroutines are taken apart, and what their clean-up asks for was never sent
            await self._loop.create_future()
        call = _Call(
            what=what,
            request=request,
            reply=self._loop.create_future(),
            fate=self._chance.fate(),
            waits=waits,
            error=error or self._error,
        )
        delay = self._chance.latency()
        if call.fate == "slow":
            delay += self._chance.random.random() * self._patience_s
        self._server.later(delay, self._arrive, call)
        return await call.reply

    def _arrive(self, call: _Call) -> None:
        fate = call.fate
        self._server.note(self._caller.name, call.what, fate)
        if self.is_down and fate == "well":
            fate = call.fate = self._chance.random.choice(("request lost", "reply lost"))
        if fate == "request lost":
            self._fail(call)
        elif fate == "crash before":
            self._caller.kill(f"before {call.what}")
        elif fate == "belated":
            self._fail(call)
            self._server.later(self._chance.random.random() * self._patience_s, self._carry_out, call)
        else:
            self._carry_out(call)

    def _carry_out(self, call: _Call) -> None:
        work = call.request()
        if call.waits:
            self._server.start(self._wait_for(call, work))
            return
        try:
            work.send(None)
        except StopIteration as end:
            self._answer(call, end.value)
        except Exception as error:  # the answer to the caller, whatever it is
            self._refuse(call, error)
        else:
            raise AssertionError(f"{call.what} waits, and its call does not say so")

    async def _wait_for(self, call: _Call, work: Coroutine[Any, Any, Any]) -> None:
        try:
            self._answer(call, await work)
        except Exception as error:  # the answer to the caller, whatever it is
            self._refuse(call, error)

    def _answer(self, call: _Call, value: Any) -> None:
        if call.fate == "crash after":
            self._caller.kill(f"after {call.what}")
        elif call.fate == "reply lost":
            self._server.later(self._chance.latency(), self._fail, call)
        elif self._chance.random.random() < 0.3:
            self._server.later(self._chance.latency(), _reply, call.reply, value)
        else:
            _reply(call.reply, value)

    def _refuse(self, call: _Call, error: Exception) -> None:
        if not call.reply.done():
            call.reply.set_exception(error)

    def _fail(self, call: _Call) -> None:
        self._refuse(call, call.error(call.fate))


def _reply(reply: asyncio.Future[Any], value: Any) -> None:
    if not reply.done():
        reply.set_result(value)
