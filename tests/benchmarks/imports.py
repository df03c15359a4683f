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
    """Names are loaded when they are first used: the second figure is what an application pays in the end."""
    return [
        _over_bare("import cqrs_decor over bare Python", "import cqrs_decor", rounds, budget=200.0),
        _over_bare("every public name over bare Python", "from cqrs_decor import *", rounds, budget=None),
    ]


def _over_bare(what: str, code: str, rounds: int, *, budget: float | None) -> Figure:
    pairs = [(_milliseconds(code), _milliseconds("pass")) for _ in range(rounds)]
    over = sorted(ours - bare for ours, bare in pairs)[len(pairs) // 2]
    other = budget or _milliseconds("import pydantic; pydantic.BaseModel") - _milliseconds("pass")
    return Figure(
        what=what,
        ours=over,
        other=other,
        other_is="the budget" if budget else "import pydantic",
        unit="ms",
        ratio=over / other,
        budget="<= 1" if budget else "",
        within=over <= budget if budget else None,
    )
