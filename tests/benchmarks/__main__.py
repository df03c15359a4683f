"""`python -m tests.benchmarks [NAME ...] [--json FILE] [--rounds N]`; names as in `BENCHMARKS`."""

import argparse
import asyncio
import json
import platform
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from importlib_metadata import version
from rich.console import Console

from tests.benchmarks import bursts, dispatch, emitting, imports, latency, poison, relaying, scaling, working
from tests.benchmarks.figures import Figure, as_json, show

Benchmark = Callable[[int], Awaitable[Sequence[Figure]]]

BENCHMARKS: dict[str, Benchmark] = {
    "dispatch": dispatch.measure,
    "imports": imports.measure,
    "emitting": emitting.measure,
    "relaying": relaying.measure,
    "latency": latency.measure,
    "scaling": scaling.measure,
    "bursts": bursts.measure,
    "working": working.measure,
    "poison": poison.measure,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; all by default")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    unknown = sorted(set(options.names) - BENCHMARKS.keys())
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(BENCHMARKS)}")
    figures: list[Figure] = []
    for name in options.names or BENCHMARKS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        figures.extend(asyncio.run(_measured(BENCHMARKS[name], options.rounds)))
    show(figures, Console(width=140))
    if options.json:
        options.json.write_text(json.dumps({"versions": _versions(), "figures": as_json(figures)}, indent=2) + "\n")
    return 0


async def _measured(benchmark: Benchmark, rounds: int) -> Sequence[Figure]:
    return await benchmark(rounds)


def _versions() -> dict[str, str]:
    packages = ("cqrs-decor", "sqlalchemy", "asyncpg", "aiokafka", "pydantic")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


if __name__ == "__main__":
    sys.exit(main())
