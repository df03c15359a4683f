"""Every fault is visible as a number (invariant I9): what is counted, and by what."""

from dataclasses import MISSING, fields
from typing import Any, get_args

import pytest

from cqrs_decor.counters import Counters
from cqrs_decor.observers import (
    BatchPublished,
    ConnectionChanged,
    FenceRejected,
    LanesChanged,
    MessageConsumed,
    Moment,
    WakeUpChanged,
)

_SAMPLES: dict[Any, Any] = {int: 2, float: 0.5, str: "text", bool: True}


def sample(kind: Any) -> Any:
    """A moment with something in every field that must be given."""
    return kind(**{f.name: _SAMPLES[f.type] for f in fields(kind) if f.default is MISSING})


@pytest.mark.parametrize("kind", get_args(Moment))
def test_every_kind_of_moment_is_counted(kind: type[Moment]) -> None:
    """A new kind that nobody counts would be a fault that nobody sees."""
    counters = Counters()

    counters.notice(sample(kind))
    counters.notice(sample(kind))

    assert counters.count(kind) == 2
    assert sum(number for name, number in counters.document().items() if name.startswith(kind.__name__)) >= 2


def test_amounts_are_summed_and_labels_tell_counts_apart() -> None:
    """How many were delivered, not in how many batches; parked ones, not those that went well."""
    counters = Counters()
    for delivered in (3, 4):
        counters.notice(BatchPublished(delivered=delivered, rescheduled=0, parked=1, seconds=0.1))
    for outcome in ("done", "done", "parked"):
        counters.notice(MessageConsumed(consumer="shop.bill", message="m", outcome=outcome, attempts=1, seconds=0.1))

    assert counters.count(BatchPublished, "delivered") == 7
    assert counters.count(BatchPublished) == 2
    assert counters.count(MessageConsumed, outcome="parked") == 1
    assert counters.count(MessageConsumed, consumer="shop.bill") == 3
    assert counters.count(FenceRejected) == 0


def test_ids_are_no_labels() -> None:
    """Each relay has an id of its own: by id the counts would grow for ever."""
    counters = Counters()
    for number in range(100):
        counters.notice(LanesChanged(owner=f"relay-{number}", held=1, gained=1, lost=0))

    assert counters.document() == {"LanesChanged": 100, "LanesChanged.gained": 100, "LanesChanged.lost": 0}


def test_what_is_away_and_how_it_is_woken_is_remembered() -> None:
    """Health asks how it is now, not how often it was otherwise."""
    counters = Counters()
    counters.notice(ConnectionChanged(part="the broker", up=False))
    counters.notice(ConnectionChanged(part="the outbox", up=False))
    counters.notice(ConnectionChanged(part="the broker", up=True))
    counters.notice(WakeUpChanged(works=False))

    assert counters.away == {"the outbox"}
    assert counters.wake_ups_work is False
