"""Apps in memory for the tests of the core: nothing discovered, no loop running unless a test asks for it."""

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio

from cqrs_decor import App, CqrsDecorError, Registry, StartupError, bootstrap
from cqrs_decor.clock import Clock


def app_of(*registries: Registry, clock: Clock | None = None, **options: Any) -> App:
    """An app of these registries that starts no loops."""
    app = bootstrap(**{"registry": registries, "discover": False, "run": "none", "service": "shop", **options})
    return app if clock is None else app.configured(clock=clock)


async def faults_of(*registries: Registry, **options: Any) -> list[CqrsDecorError]:
    """What keeps an app from starting."""
    app = app_of(*registries, **options)
    try:
        await app.start()
    except StartupError as error:
        return list(error.exceptions)
    await app.stop()
    return []


async def eventually(holds: Callable[[], bool], *, within: float = 10.0) -> None:
    """Wait for a condition that loops in the background bring about."""
    with anyio.fail_after(within):
        while not holds():  # noqa: ASYNC110 - loops of the library set no event of the test's
            await anyio.sleep(0.001)


@asynccontextmanager
async def in_background(run: Callable[[], Any]) -> AsyncGenerator[None, None]:
    """Run something beside the test, cancelled at its end."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        try:
            yield
        finally:
            tasks.cancel_scope.cancel()
