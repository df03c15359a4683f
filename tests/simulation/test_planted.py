"""Negative controls: with one protection taken away, some seed of a few finds what then breaks."""

from dataclasses import replace

import pytest

from tests.simulation.chance import Odds
from tests.simulation.planted import HastyBroker, UncountedCrashesInbox, UncountedCrashesOutbox, UnfencedOutbox
from tests.simulation.world import Scenario, simulate

SEEDS = range(1, 17)

NO_KILLERS = Odds(killing_relays=0.0, killing_workers=0.0)
PAUSING = replace(NO_KILLERS, pauses=1.0)
KILLING_RELAYS = replace(NO_KILLERS, killing_relays=0.002)
KILLING_WORKERS = replace(NO_KILLERS, killing_workers=0.002)

SLOW = Scenario(seed=1, messages=3_000, rate=60)
"""Long enough for a message to kill one process after the other: each takes a lease to be missed."""


def is_found(scenario: Scenario, promise: str) -> bool:
    """Whether some seed finds this promise broken."""
    outcomes = (simulate(replace(scenario, seed=seed)) for seed in SEEDS)
    return any(outcome.broken.startswith(promise) for outcome in outcomes if outcome.broken)


def test_a_settlement_without_a_fence_is_found() -> None:
    """A relay that was stopped for longer than its lease writes under a fence that has moved on."""
    assert is_found(Scenario(seed=1, messages=3_000, odds=PAUSING, outbox=UnfencedOutbox), "fence: ")


def test_an_acknowledgement_past_what_is_in_flight_is_found() -> None:
    """Whoever takes over begins behind what was never handled."""
    assert is_found(Scenario(seed=1, messages=3_000, odds=NO_KILLERS, remote_broker=HastyBroker), "I4 order: shop.")


@pytest.mark.parametrize(
    "planted",
    [
        pytest.param(replace(SLOW, odds=KILLING_RELAYS, outbox=UncountedCrashesOutbox), id="relay"),
        pytest.param(replace(SLOW, odds=KILLING_WORKERS, inbox=UncountedCrashesInbox), id="worker"),
    ],
)
def test_a_crash_that_is_counted_after_the_fact_is_found(planted: Scenario) -> None:
    """A message that kills whoever has it in hand goes on killing: nobody lives to count."""
    assert is_found(planted, "I6 crash loop: ")


@pytest.mark.parametrize("odds", [pytest.param(KILLING_RELAYS, id="relay"), pytest.param(KILLING_WORKERS, id="worker")])
def test_a_message_that_kills_is_parked_and_the_rest_flows(odds: Odds) -> None:
    """Without the planted bug the same odds break nothing."""
    outcome = simulate(replace(SLOW, odds=odds))

    assert outcome.broken is None
