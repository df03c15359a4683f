"""Simulate from the command line: python -m tests.simulation --messages 100000 --seed 1 [--runs N]"""

import argparse
import sys

from tests.simulation.world import Outcome, Scenario, simulate


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--messages", type=int, default=20_000, help="per run")
    parser.add_argument("--seed", type=int, default=1, help="of the first run; the next one has the next")
    parser.add_argument("--runs", type=int, default=1)
    given = parser.parse_args()
    seeds = range(given.seed, given.seed + given.runs)
    broken = [seed for seed in seeds if _run(seed, given.messages)]
    return 1 if broken else 0


def _run(seed: int, messages: int) -> bool:
    """Whether this seed breaks anything."""
    print(f"seed {seed}", end=" ", flush=True)
    return _told(simulate(Scenario(seed=seed, messages=messages))).broken is not None


def _told(outcome: Outcome) -> Outcome:
    faults = ", ".join(f"{name} {count}" for name, count in sorted(outcome.faults.items()))
    print(
        f"{outcome.messages:,} messages in {outcome.virtual_s:,.0f} s of virtual time, "
        f"{outcome.repeats:,} landed again; {outcome.real_s:.1f} s, {outcome.per_minute:,.0f} messages a minute; "
        f"{outcome.digest}\n  faults: {faults}",
        flush=True,
    )
    if outcome.broken:
        print(*outcome.trace, f"seed {outcome.seed} BROKEN: {outcome.broken}", sep="\n", flush=True)
    return outcome


if __name__ == "__main__":
    sys.exit(main())
