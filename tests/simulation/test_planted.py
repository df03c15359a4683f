"""Negative controls: with one protection taken away, some seed of a few finds what then breaks."""

from dataclasses import replace

import pytest

from cqrs_decor.memory import MemoryOutbox
from tests.simulation.chance import Odds
from tests.simulation.planted import HastyBroker, UncountedCrashesInbox, UncountedCrashesOutbox, UnfencedOutbox
from tests.simulation.world import Scenario, simulate

SEEDS = range(1, 9)

PAUSING = Odds(pauses=1.0)
KILLING_RELAYS = Odds(killing_relays=0.002)
KILLING_WORKERS = Odds(killing_workers=0.002)

SLOW = Scenario(seed=0, messages=3_000, rate=60)
"""Long enough for a message to kill one process after the other: each takes a lease to be missed."""


def first_broken(scenario: Scenario) -> str | None:
    """What the first seed that finds anything finds."""
    outcomes = (simulate(replace(scenario, seed=seed)) for seed in SEEDS)
    return next((outcome.broken for outcome in outcomes if outcome.broken), None)


def test_a_settlement_without_a_fence_is_found() -> None:
    """A relay that was stopped for longer than its lease writes under a fence that has moved on."""
    broken = first_broken(Scenario(seed=0, messages=3_000, odds=PAUSING, outbox=UnfencedOutbox))

    assert broken is not None
    assert broken.startswith("fence: ")


def test_an_acknowledgement_past_what_is_in_flight_is_found() -> None:
    """Whoever takes over begins behind what was never handled."""
    broken = first_broken(Scenario(seed=0, messages=3_000, remote_broker=HastyBroker))

    assert broken is not None
    assert "order" in broken or "lost" in broken


@pytest.mark.parametrize(
    ("odds", "planted"),
    [
        pytest.param(KILLING_RELAYS, Scenario(seed=0, messages=2_000, outbox=UncountedCrashesOutbox), id="relay"),
        pytest.param(KILLING_WORKERS, Scenario(seed=0, messages=2_000, inbox=UncountedCrashesInbox), id="worker"),
    ],
)
def test_a_crash_that_is_counted_after_the_fact_is_found(odds: Odds, planted: Scenario) -> None:
    """A message that kills whoever has it in hand goes on killing: nobody lives to count."""
    broken = first_broken(replace(planted, odds=odds))

    assert broken is not None
    assert broken.startswith("I6 crash loop: ")


@pytest.mark.skipif(not hasattr(MemoryOutbox, "step"), reason="neither relay nor worker goes in single steps")
@pytest.mark.parametrize("odds", [pytest.param(KILLING_RELAYS, id="relay"), pytest.param(KILLING_WORKERS, id="worker")])
def test_a_message_that_kills_is_parked_and_the_rest_flows(odds: Odds) -> None:
    """Without the planted bug the same odds break nothing."""
    outcome = simulate(replace(SLOW, seed=1, odds=odds))

    assert outcome.broken is None
