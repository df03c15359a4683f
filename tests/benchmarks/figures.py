"""What a benchmark measured, and how it is shown."""

import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One comparison.

    Attributes:
        what: What is compared.
        ours: Our figure, in `unit`.
        other: The figure it is compared with.
        other_is: What that is.
        unit: Of both.
        ratio: Median of the ratios of all rounds; not always the quotient of the medians.
        budget: What the ratio should be, in words.
        within: Whether it is.
    """

    what: str
    ours: float
    other: float
    other_is: str
    unit: str
    ratio: float
    budget: str
    within: bool | None


def at_most(limit: float) -> tuple[str, Callable[[float], bool]]:
    return f"<= {limit:g}", lambda ratio: ratio <= limit


def at_least(limit: float) -> tuple[str, Callable[[float], bool]]:
    return f">= {limit:g}", lambda ratio: ratio >= limit


def compared(
    what: str,
    rounds: Sequence[tuple[float, float]],
    *,
    other_is: str,
    unit: str,
    budget: tuple[str, Callable[[float], bool]] | None = None,
) -> Figure:
    """A figure from rounds of (ours, other), measured alternately."""
    ratio = statistics.median(ours / other for ours, other in rounds)
    return Figure(
        what=what,
        ours=statistics.median(ours for ours, _ in rounds),
        other=statistics.median(other for _, other in rounds),
        other_is=other_is,
        unit=unit,
        ratio=ratio,
        budget=budget[0] if budget else "",
        within=budget[1](ratio) if budget else None,
    )


async def microseconds_per_call(call: Callable[[], Awaitable[object]], times: int) -> float:
    began = perf_counter()
    for _ in range(times):
        await call()
    return (perf_counter() - began) / times * 1e6


def as_json(figures: Sequence[Figure]) -> list[dict[str, object]]:
    return [asdict(figure) for figure in figures]


def show(figures: Sequence[Figure], console: Console) -> None:
    table = Table(title="ratios, median of all rounds", title_justify="left")
    for heading, justify in (("what", "left"), ("ours", "right"), ("other", "right"), ("unit", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for heading in ("against", "ratio", "budget", ""):
        table.add_column(heading, justify="right" if heading == "ratio" else "left")
    for figure in figures:
        verdict = {True: "[green]within[/]", False: "[red]over[/]", None: ""}[figure.within]
        row = (figure.what, f"{figure.ours:,.4g}", f"{figure.other:,.4g}", figure.unit, figure.other_is)
        table.add_row(*row, f"{figure.ratio:.2f}", figure.budget, verdict)
    console.print(table)
