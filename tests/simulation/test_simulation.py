"""Relays, workers and producers in trouble by seed: nothing is lost, doubled, reordered or left lying."""

import pytest

from tests.simulation.seeds import ALWAYS, FOUND, MESSAGES
from tests.simulation.world import Outcome, Scenario, simulate


@pytest.mark.parametrize("seed", [*ALWAYS, *FOUND])
def test_nothing_is_broken_whatever_happens(seed: int) -> None:
    """Every promise is checked at every step: at each commit, landing, effect, lease and settlement, and at rest."""
    outcome = simulate(Scenario(seed=seed, messages=MESSAGES))

    assert outcome.broken is None, told(outcome)
    assert outcome.messages >= MESSAGES


def test_the_same_seed_is_the_same_run() -> None:
    """A seed that found something has to find it again."""
    first, second = (simulate(Scenario(seed=5, messages=500)) for _ in range(2))

    assert first.digest == second.digest
    assert first.faults == second.faults


def test_trouble_is_made() -> None:
    """A run in which nothing went wrong would prove nothing."""
    faults = simulate(Scenario(seed=6, messages=3_000)).faults

    assert {"kills", "pauses", "request lost", "reply lost", "belated", "refused", "flaky", "conflict"} <= set(faults)


def told(outcome: Outcome) -> str:
    return "\n".join((*outcome.trace, f"seed {outcome.seed}: {outcome.broken}"))
