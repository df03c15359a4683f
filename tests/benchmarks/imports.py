"""The time of `import cqrs_decor` over that of starting Python."""

import sys
from collections.abc import Sequence
from subprocess import run
from time import perf_counter

from tests.benchmarks.figures import Figure


def _milliseconds(code: str) -> float:
    began = perf_counter()
    run([sys.executable, "-c", code], check=True)
    return (perf_counter() - began) * 1e3


async def measure(rounds: int) -> Sequence[Figure]:
    pairs = [(_milliseconds("import cqrs_decor"), _milliseconds("pass")) for _ in range(rounds)]
    over = sorted(ours - bare for ours, bare in pairs)[len(pairs) // 2]
    return [
        Figure(
            what="import cqrs_decor over bare Python",
            ours=over,
            other=200.0,
            other_is="the budget",
            unit="ms",
            ratio=over / 200.0,
            budget="<= 1",
            within=over <= 200.0,
        )
    ]
