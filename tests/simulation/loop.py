"""An event loop without a selector: time is virtual and jumps to the next timer; who goes first is drawn by seed.

Only the order of tasks that are ready at the same moment is left to chance: asyncio promises none for them, and one for
callbacks, which is kept. Everything that is scheduled belongs to an owner, a simulated process, by the context it was
scheduled in: so one can be killed (nothing of it ever runs again) or stopped for a while (all of it waits).
"""

import asyncio
import asyncio.events
import gc
import heapq
import signal
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from contextlib import contextmanager
from contextvars import Context, ContextVar
from random import Random
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

_SPINNING = 100_000
"""So many rounds without time passing are a busy loop."""

_REPEATING = 8
"""So many rounds without a step of any task are one callback that repeats itself."""

_COLLECTED_AFTER = ((20_000, 2), (2_000, 1), (200, 0))
"""Rounds, and the generation of garbage that is collected after so many."""

_LAST_WORDS = 50
"""A coroutine that is taken apart may wait so often before it is given up."""


class Owner:
    """A simulated process, as far as the loop is concerned: what it schedules is its own."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dead = False
        self.stopped = False
        self.stalled: list[asyncio.Handle] = []
        self.tasks: list[OwnedTask] = []
        self._many = 64

    def keep(self, task: "OwnedTask") -> None:
        """Hold a task until it is done: one that nobody refers to would be collected, and taken apart, too early."""
        if len(self.tasks) > self._many:
            self.tasks = [each for each in self.tasks if not each.done()]
            self._many = 2 * len(self.tasks) + 64
        self.tasks.append(task)


current_owner: ContextVar[Owner | None] = ContextVar("simulated_process", default=None)


class OwnedTask(asyncio.Task[Any]):
    """A task with a number: ready tasks are put in order before they are shuffled, so that a seed means one order,
    whatever sets of tasks or of strings were walked through meanwhile.
    """

    number: int


class NothingLeftError(RuntimeError):
    """Everybody waits for somebody else, and no timer is set."""


class BusyLoopError(RuntimeError):
    """Something goes on and on, and no time passes."""


class VirtualLoop(asyncio.AbstractEventLoop):
    """Runs as fast as it can; `time()` is what has been waited for.

    Args:
        random: Decides who goes first.
        endless_s: A round that takes so much processor time is a loop that never waits.
    """

    def __init__(self, random: Random, *, endless_s: float = 4.0) -> None:
        self._random = random
        self._endless_s = endless_s
        self._now = 0.0
        self._ready: list[asyncio.Handle] = []
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._scheduled = 0
        self._tasks = 0
        self._rounds = 0
        self._rounds_without_time = 0
        self._rounds_of_callbacks = 0
        self._stopping = False
        self._running = False
        self._closed = False

    # --- what asyncio and anyio ask of a loop -----------------------------------------------------------------------

    def time(self) -> float:
        return self._now

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._scheduled += 1
        heapq.heappush(self._timers, (when, self._scheduled, handle))
        return handle

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(
        self,
        coro: Generator[Any, None, T] | Coroutine[Any, Any, T],
        *,
        name: str | None = None,
        context: Context | None = None,
    ) -> asyncio.Task[T]:
        task = OwnedTask(coro, loop=self, name=name, context=context)
        self._tasks += 1
        task.number = self._tasks
        owner = current_owner.get() if context is None else context.get(current_owner)
        if owner is not None:
            owner.keep(task)
        return task

    def get_task_factory(self) -> None:
        """Its tasks are its own."""

    def run_until_complete(self, future: Any) -> Any:
        task = asyncio.ensure_future(future, loop=self)
        task.add_done_callback(self._stop_after)
        self.run_forever()
        return task.result()

    def _stop_after(self, task: asyncio.Task[Any]) -> None:
        self.stop()

    def run_forever(self) -> None:
        self._running, self._stopping = True, False
        hooks = sys.get_asyncgen_hooks()
        asyncio.events._set_running_loop(self)
        sys.set_asyncgen_hooks(finalizer=_forget)
        try:
            with self._watched(), _collected_by_hand():
                while not self._stopping:
                    self._run_round()
        finally:
            sys.set_asyncgen_hooks(*hooks)
            asyncio.events._set_running_loop(None)
            self._running = False

    def stop(self) -> None:
        self._stopping = True

    def is_running(self) -> bool:
        return self._running

    def is_closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        self._closed = True
        self._ready.clear()
        self._timers.clear()

    def get_debug(self) -> bool:
        return False

    def set_debug(self, enabled: bool) -> None:
        """It has no other way to run."""

    async def shutdown_asyncgens(self) -> None:
        """Nobody's last words are heard."""

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """There is none: nothing in a simulation may run in a thread."""

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """A callback that fails ends the run; what nobody asked for, since its process was killed, says nothing."""
        if "handle" not in context:
            return
        error = context.get("exception")
        raise RuntimeError(context["message"]) from error if isinstance(error, BaseException) else None

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Asked by each `TimerHandle.cancel`; the timer is passed over when its time comes."""

    @contextmanager
    def _watched(self) -> Generator[None]:
        """Interrupt a step that never waits: it stops virtual time as it would stop a real loop. By processor time, so
        that no other load counts.
        """
        seen = -1

        def look(number: int, frame: FrameType | None) -> None:
            nonlocal seen
            if seen == self._rounds:
                raise BusyLoopError(f"one round takes {self._endless_s:g} s of processor time")
            seen = self._rounds

        handler = signal.signal(signal.SIGVTALRM, look)
        signal.setitimer(signal.ITIMER_VIRTUAL, self._endless_s, self._endless_s)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, handler)

    # --- rounds -----------------------------------------------------------------------------------------------------

    def _run_round(self) -> None:
        """Run what is ready now; what it makes ready has the next round, as in asyncio."""
        self._rounds += 1
        self._rounds_without_time += 1
        if self._rounds_without_time > _SPINNING:
            raise BusyLoopError(f"{_SPINNING:,} rounds at {self._now:.6f} s")
        batch, self._ready = self._ready, []
        places = [place for place, handle in enumerate(batch) if _is_step(handle)]
        if places:
            self._rounds_of_callbacks = 0
            if len(places) > 1:
                self._shuffle(batch, places)
        else:
            self._rounds_of_callbacks += 1
            # Also when only callbacks are ready, round after round: anyio repeats a cancellation until its task is out,
            # and where that takes time, time has to pass.
            if not batch or self._rounds_of_callbacks > _REPEATING:
                self._let_time_pass(required=not batch)
        for handle in batch:
            if not handle._cancelled and self._may_run(handle):
                handle._run()
        self._collect()

    def _collect(self) -> None:
        """Collect garbage while no task runs: `finally` blocks of what is collected may enter a cancel scope, which
        would be the scope of whatever task runs just then.
        """
        for rounds, generation in _COLLECTED_AFTER:
            if self._rounds % rounds == 0:
                gc.collect(generation)
                return

    def _shuffle(self, batch: list[asyncio.Handle], places: list[int]) -> None:
        """Shuffle the steps of tasks among their places."""
        steps = sorted((batch[place] for place in places), key=_number)
        self._random.shuffle(steps)
        for place, handle in zip(places, steps, strict=True):
            batch[place] = handle

    def _let_time_pass(self, *, required: bool) -> None:
        timers = self._timers
        while timers and timers[0][2]._cancelled:
            heapq.heappop(timers)
        if not timers:
            if required:
                raise NothingLeftError("everybody waits, and no timer is set")
            return
        if timers[0][0] > self._now:
            self._now = timers[0][0]
            self._rounds_without_time = 0
        while timers and timers[0][0] <= self._now:
            self._ready.append(heapq.heappop(timers)[2])

    def _may_run(self, handle: asyncio.Handle) -> bool:
        owner = handle._context.get(current_owner)
        if owner is None:
            return True
        if owner.stopped and not owner.dead:
            owner.stalled.append(handle)
            return False
        return not owner.dead

    # --- owners -----------------------------------------------------------------------------------------------------

    def resume(self, owner: Owner) -> None:
        """Let a stopped owner go on: what waited goes first, in its order."""
        owner.stopped = False
        self._ready.extend(owner.stalled)
        owner.stalled = []

    def bury(self, owner: Owner, context: Context) -> None:
        """Take apart what a dead owner left, so that no frame of it is still there to be collected later."""
        for task in owner.tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            if not task.done():
                context.run(_take_apart, task.get_coro())
        owner.tasks, owner.stalled = [], []


@contextmanager
def _collected_by_hand() -> Generator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _take_apart(coroutine: Any) -> None:
    """Close a coroutine whose process is gone: what its `finally` blocks say and wait for is not heard."""
    for _ in range(_LAST_WORDS):
        try:
            coroutine.close()
        except BaseException:  # whatever it raises, a killed process would not have raised it
            continue
        return


def _forget(generator: AsyncGenerator[Any, Any]) -> None:
    """Generators of killed processes are not closed: closing runs their `finally` blocks."""


def _is_step(handle: asyncio.Handle) -> bool:
    return getattr(handle._callback, "__self__", None).__class__ is OwnedTask


def _number(handle: asyncio.Handle) -> int:
    return handle._callback.__self__.number  # type: ignore[union-attr]
