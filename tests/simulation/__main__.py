"""Simulate from the command line: python -m tests.simulation --messages 100000 --seed 1 [--runs N] [--jobs N]"""

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor

from tests.simulation.world import Outcome, Scenario, simulate


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--messages", type=int, default=20_000, help="per run")
    parser.add_argument("--seed", type=int, default=1, help="of the first run; the next one has the next")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    given = parser.parse_args()
    scenarios = [Scenario(seed=given.seed + run, messages=given.messages) for run in range(given.runs)]
    # Each run in a process of its own: what is left of one would be looked through by each collection of the next.
    with ProcessPoolExecutor(given.jobs, max_tasks_per_child=1) as processes:
        outcomes = [_told(outcome) for outcome in processes.map(simulate, scenarios)]
    broken = [outcome for outcome in outcomes if outcome.broken]
    print(f"{len(outcomes)} runs, {sum(each.messages for each in outcomes):,} messages, {len(broken)} broken")
    return 1 if broken else 0


def _told(outcome: Outcome) -> Outcome:
    faults = ", ".join(f"{name} {count}" for name, count in sorted(outcome.faults.items()))
    print(
        f"seed {outcome.seed} {outcome.messages:,} messages in {outcome.virtual_s:,.0f} s of virtual time, "
        f"{outcome.repeats:,} landed again; {outcome.real_s:.1f} s, {outcome.per_minute:,.0f} messages a minute; "
        f"{outcome.digest}\n  faults: {faults}",
        flush=True,
    )
    if outcome.broken:
        print(*outcome.trace, f"seed {outcome.seed} BROKEN: {outcome.broken}", sep="\n", flush=True)
    return outcome


if __name__ == "__main__":
    sys.exit(main())
