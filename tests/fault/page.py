"""python -m tests.fault.page: one page of what a long run came to, from the facts that each run left behind.

A table of scenarios, and for each the course of one run: what waited, how fast it was delivered, when what was killed.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from tests.fault.report import FACTS

WIDTH, HEIGHT, LEFT, FOOT = 640, 150, 44, 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One line of the facts."""

    fault: str
    scenario: str
    negative_control: bool
    setup: str
    seed: int
    failed: str | None
    violations: Sequence[str]
    blows: Sequence[dict[str, Any]]
    recovery_s: float | None
    committed: int
    delivered: int
    samples: Sequence[tuple[float, int | None, int]]


def main() -> None:
    page = Path(sys.argv[1]) if len(sys.argv) > 1 else FACTS.parent / "index.html"
    runs = [Run(**json.loads(line)) for line in FACTS.read_text().splitlines()]
    page.write_text(drawn(runs))
    failed = sum(run.failed is not None for run in runs)
    print(f"{len(runs)} runs, {failed} failed: {page}")


def drawn(runs: Sequence[Run]) -> str:
    """The page, with nothing in it that has to be fetched."""
    scenarios = _grouped(runs)
    kept = [group for group in scenarios if not group[0].negative_control]
    broken = [group for group in scenarios if group[0].negative_control]
    return _PAGE.format(
        runs=len(runs),
        kills=sum(len(run.blows) for run in runs),
        failed=sum(run.failed is not None for run in runs),
        entries=sum(run.committed for run in runs),
        scenarios="".join(_row(group, _controls_of(group[0].fault, broken)) for group in kept),
        controls="".join(map(_control_row, broken)),
        courses="".join(map(_course, kept)),
    )


def _grouped(runs: Iterable[Run]) -> list[list[Run]]:
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault((_number(run.fault), run.negative_control, run.scenario, run.setup), []).append(run)
    return [groups[key] for key in sorted(groups)]


def _number(fault: str) -> int:
    return int(fault[1:]) if fault[1:].isdigit() else 99


def _controls_of(fault: str, controls: Sequence[Sequence[Run]]) -> str:
    """What the negative controls of a fault came to, as one cell."""
    own = [group for group in controls if group[0].fault == fault]
    missed = [group for group in own if any(run.failed is not None for run in group)]
    if not own:
        return "none was run"
    return f"{len(missed)} of {len(own)} not found out" if missed else f"{len(own)} of {len(own)} found out"


def _row(group: Sequence[Run], controls: str) -> str:
    recoveries = [run.recovery_s for run in group if run.recovery_s is not None]
    recovery = f"{median(recoveries):.1f} / {max(recoveries):.1f} s" if recoveries else "none to measure"
    failed = [run for run in group if run.failed is not None]
    told = "none" if not failed else "; ".join(f"seed {run.seed}: {run.failed}" for run in failed)
    cells = [
        group[0].fault,
        f'<a href="#{_anchor(group)}">{escape(group[0].scenario)}</a>',
        escape(group[0].setup),
        str(len(group)),
        str(sum(len(run.blows) for run in group)),
        f"{sum(run.committed for run in group):,}",
        f"{sum(max(run.delivered - run.committed, 0) for run in group):,}",
        recovery,
        escape(controls),
        escape(told),
    ]
    return _tr(cells, bad=bool(failed))


def _control_row(group: Sequence[Run]) -> str:
    """Of these the invariants had to break: the test fails when they did not."""
    found = [violation for run in group for violation in run.violations]
    missed = any(run.failed is not None for run in group)
    told = "not found out" if missed else found[0][:140] if found else "seen by the scenario itself"
    cells = [group[0].fault, escape(group[0].scenario), escape(group[0].setup), escape(told)]
    return _tr(cells, bad=missed)


def _tr(cells: Sequence[str], *, bad: bool) -> str:
    kind = ' class="bad"' if bad else ""
    return f"<tr{kind}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n"


def _anchor(group: Sequence[Run]) -> str:
    return f"{group[0].fault}-{group[0].scenario}-{group[0].setup}".replace(" ", "-")


def _course(group: Sequence[Run]) -> str:
    """The run with the most to see: the one with the most faults dealt."""
    run = max(group, key=lambda each: (each.failed is not None, len(each.blows)))
    if len(run.samples) < 2:
        return ""
    title = f"{run.fault}, {run.setup}, seed {run.seed}: {run.scenario}"
    return f'<figure id="{_anchor(group)}"><figcaption>{escape(title)}</figcaption>{_chart(run)}</figure>\n'


def _chart(run: Run) -> str:
    end = max(run.samples[-1][0], *(blow["at"] for blow in run.blows), 0.1)
    pending = [(at, waiting) for at, waiting, _ in run.samples]
    rates = [
        (late, (done - before) / max(late - early, 0.05))
        for (early, _, before), (late, _, done) in zip(run.samples, run.samples[1:], strict=False)
    ]
    most = max(1, *(waiting or 0 for _, waiting in pending))
    fastest = max(1.0, *(rate for _, rate in rates))

    def x(at: float) -> float:
        return LEFT + at / end * (WIDTH - 2 * LEFT)

    def y(share: float) -> float:
        return HEIGHT - FOOT - share * (HEIGHT - 2 * FOOT)

    lines = [
        *(_path(part, "pending") for part in _parts([(x(at), w, most) for at, w in pending], y)),
        _path([(x(at), y(rate / fastest)) for at, rate in rates], "rate"),
        *_blows([(x(blow["at"]), blow) for blow in run.blows]),
        f'<text x="{LEFT - 6}" y="{y(1) + 4}" class="pending end">{most:,}</text>',
        f'<text x="{WIDTH - LEFT + 6}" y="{y(1) + 4}" class="rate">{fastest:,.0f}/s</text>',
        f'<line x1="{LEFT}" x2="{WIDTH - LEFT}" y1="{y(0)}" y2="{y(0)}" class="axis"/>',
        f'<text x="{LEFT}" y="{HEIGHT - 6}">0 s</text>',
        f'<text x="{WIDTH - LEFT}" y="{HEIGHT - 6}" class="end">{end:.0f} s</text>',
    ]
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(lines)}</svg>'


def _parts(points: Sequence[tuple[float, int | None, int]], y: Any) -> list[list[tuple[float, float]]]:
    """A line has a gap where the database could not be asked."""
    parts: list[list[tuple[float, float]]] = [[]]
    for at, waiting, most in points:
        if waiting is None:
            parts.append([])
        else:
            parts[-1].append((at, y(waiting / most)))
    return [part for part in parts if part]


def _path(points: Sequence[tuple[float, float]], kind: str) -> str:
    told = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{told}" class="{kind}"/>'


def _blows(blows: Sequence[tuple[float, dict[str, Any]]]) -> Iterable[str]:
    """A line where a fault was dealt. It is named where there is room; the tooltip tells the rest."""
    free_from = 0.0
    for x, blow in blows:
        name = escape(f"{blow['what']} ({blow['in_flight']} in the outbox)")
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="6" y2="{HEIGHT - FOOT}" class="blow"><title>{name}</title></line>'
        if x >= free_from:
            yield f'<text x="{x + 3:.1f}" y="14" class="what">{escape(blow["what"])}</text>'
            free_from = x + 6 * len(blow["what"])


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Faults</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 96rem; padding: 0 1rem; color: #1c2733 }}
h1 {{ margin-bottom: .2rem }} h2 {{ margin-top: 2.4rem }}
table {{ border-collapse: collapse; width: 100%; font-size: 13px }}
th, td {{ text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #dde3ea; vertical-align: top }}
th {{ position: sticky; top: 0; background: #f3f6f9 }}
td:nth-child(2) {{ min-width: 24rem }} td:nth-child(10) {{ overflow-wrap: anywhere }}
tr.bad td {{ background: #fde8e6 }}
td:nth-child(n+4):nth-child(-n+9) {{ white-space: nowrap }}
a {{ color: inherit }}
.numbers b {{ font-size: 1.5rem; margin-right: .3rem }} .numbers span {{ margin-right: 2rem }}
.courses {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(36rem, 1fr)); gap: 1.2rem }}
figure {{ margin: 0; border: 1px solid #dde3ea; border-radius: 6px; padding: .6rem }}
figcaption {{ font-size: 13px; margin-bottom: .3rem }}
svg {{ width: 100%; display: block }}
polyline {{ fill: none; stroke-width: 1.6 }}
polyline.pending {{ stroke: #c2571a }} text.pending {{ fill: #c2571a }}
polyline.rate {{ stroke: #2a6fb0; opacity: .75 }} text.rate {{ fill: #2a6fb0 }}
text {{ font-size: 10px; fill: #5b6875 }} text.end {{ text-anchor: end }} text.what {{ fill: #8f1d1d }}
line.axis {{ stroke: #9aa7b4 }} line.blow {{ stroke: #b3261e; stroke-dasharray: 3 2 }}
i.key {{ display: inline-block; width: 1.4rem; height: .2rem; vertical-align: middle; margin: 0 .3rem 0 1rem }}
</style>
<h1>Faults</h1>
<p class="numbers"><span><b>{runs:,}</b>runs</span><span><b>{kills:,}</b>faults dealt</span>
<span><b>{entries:,}</b>entries committed</span><span><b>{failed}</b>runs failed</span></p>
<h2>What held</h2>
<p>Invariants I1 to I9 are checked after every run. Recovery: median and longest time until the oldest pending record
was younger than a second again and stayed so, counted from the end of the fault.</p>
<table>
<tr><th>Fault<th>Scenario<th>On<th>Runs<th>Faults dealt<th>Entries<th>Delivered again<th>Recovery
<th>Negative controls<th>Violations</tr>
{scenarios}</table>
<h2>What had to break</h2>
<p>A protection is switched off, and the same checks must see it.</p>
<table><tr><th>Fault<th>Negative control<th>On<th>Found</tr>
{controls}</table>
<h2>Courses</h2>
<p><i class="key" style="background:#c2571a"></i>records in the outbox
<i class="key" style="background:#2a6fb0"></i>deliveries a second
<i class="key" style="background:#b3261e"></i>a fault; the outbox has a gap where the database did not answer</p>
<div class="courses">
{courses}</div>
</html>
"""


if __name__ == "__main__":
    main()
