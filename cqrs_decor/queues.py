"""Queues of works by key: those of one key wait for each other, and so many keys are served at a time."""

from collections import deque
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager

from anyio.abc import TaskGroup

from cqrs_decor.in_hand import QueueKey, Work


class Queues:
    """Serves keys in the order in which they came. One that waits for its next attempt lets another key go meanwhile.

    A task for each key would be simpler. But most of a thousand messages in hand do nothing but wait: each would have a
    task, a scope and a place in the queue of a semaphore, for the collector of garbage to walk through.

    Args:
        limit: So many keys are served at a time.
        serve: Brings a work to its end.
    """

    def __init__(self, limit: int, serve: Callable[[Work], Awaitable[None]]) -> None:
        self._limit = limit
        self._serve = serve
        self._queues: dict[QueueKey, deque[Work]] = {}
        self._ready: deque[QueueKey] = deque()
        self._serving = 0
        self._tasks: TaskGroup | None = None

    def serve_in(self, tasks: TaskGroup) -> None:
        """Serve from now on, in tasks of this group."""
        self._tasks = tasks
        for _ in self._ready:
            self._serve_more()

    def __contains__(self, key: QueueKey) -> bool:
        return key in self._queues

    def add(self, work: Work) -> bool:
        """Queue it behind the others of its key; whether it is the first of them."""
        work.lets_others_go = self._one_less
        queue = self._queues.get(work.key)
        if queue is not None:
            queue.append(work)
            return False
        self._queues[work.key] = deque([work])
        self._ready.append(work.key)
        self._serve_more()
        return True

    def _serve_more(self) -> None:
        if self._ready and self._serving < self._limit and self._tasks is not None:
            self._serving += 1
            self._tasks.start_soon(self._serve_ready)

    async def _serve_ready(self) -> None:
        while self._ready and self._serving <= self._limit:
            await self._serve_key(self._ready.popleft())
        self._serving -= 1

    async def _serve_key(self, key: QueueKey) -> None:
        queue = self._queues[key]
        while queue:
            await self._serve(queue[0])
            queue.popleft()
        del self._queues[key]

    @contextmanager
    def _one_less(self) -> Generator[None, None, None]:
        self._serving -= 1
        self._serve_more()
        try:
            yield
        finally:
            self._serving += 1
