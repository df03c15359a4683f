"""python-cqrs from PyPI, in an environment of its own: what it pins does not fit beside ours.

Run by `dispatch.py` with that environment's interpreter; it prints microseconds per dispatch and nothing else.
"""

import asyncio
import sys
import venv
from pathlib import Path
from subprocess import check_output, run

VERSION = "5.3.0"


def python_of_peer() -> Path:
    """The interpreter of an environment that has the peer installed; made on first use."""
    home = Path(".cache") / f"python-cqrs-{VERSION}"
    python = home / "bin" / "python"
    if not (home / "ready-to-relay").exists():
        venv.create(home, with_pip=True, clear=True)
        packages = [f"python-cqrs[pydantic,sqlalchemy,kafka]=={VERSION}", "asyncpg"]
        run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        (home / "ready-to-relay").touch()
    return python


def microseconds_of_peer() -> float:
    """One measurement of the peer's `send`, in a process of its own."""
    return float(check_output([python_of_peer(), __file__], text=True).split()[-1])


async def _measure() -> float:
    from time import perf_counter

    import cqrs
    import di
    from cqrs.bootstrap import requests

    class PlaceOrder(cqrs.PydanticRequest):
        sku: str

    class PlaceOrderHandler(cqrs.RequestHandler[PlaceOrder, None]):
        @property
        def events(self) -> list[object]:
            return []

        async def handle(self, request: PlaceOrder) -> None:
            return None

    mediator = requests.bootstrap(
        di_container=di.Container(), commands_mapper=lambda mapper: mapper.bind(PlaceOrder, PlaceOrderHandler)
    )
    command, times = PlaceOrder(sku="tea"), 5_000
    for _ in range(200):
        await mediator.send(command)
    began = perf_counter()
    for _ in range(times):
        await mediator.send(command)
    return (perf_counter() - began) / times * 1e6


if __name__ == "__main__":
    sys.stdout.write(f"{asyncio.run(_measure())}\n")
