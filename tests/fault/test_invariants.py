"""The checks themselves, on small made-up runs. The negative controls beside each fault try them on real ones."""

from pathlib import Path

import pytest

from tests.fault.invariants import (
    Delivered,
    Effect,
    Entry,
    InvariantBrokenError,
    Left,
    Span,
    effects_happen_once,
    faults_are_visible,
    no_session_is_left_behind,
    nothing_grows,
    nothing_is_lost,
    nothing_is_stranded,
    nothing_runs_beside_itself,
    order_is_kept,
    recovers_soon,
    repeats_are_few,
    there_are_no_ghosts,
)
from tests.fault.oracle import Ledger
from tests.fault.processes import Footprint
from tests.fault.samples import Sample, Sampler


def test_an_entry_that_never_arrived_is_named() -> None:
    """Who reads the failure looks for this id in logs and tables."""
    with pytest.raises(InvariantBrokenError, match=r"^I1 lost: committed, never delivered: b\.$"):
        nothing_is_lost([_entry("a", 1), _entry("b", 2)], [_delivered("a", 1)], [_effect("a")])


def test_an_entry_without_an_effect_is_named() -> None:
    """A delivery that was noted and rolled back is no effect."""
    with pytest.raises(InvariantBrokenError, match=r"^I1 lost: committed, without an effect: a\.$"):
        nothing_is_lost([_entry("a", 1)], [_delivered("a", 1)], [])


def test_an_event_of_an_entry_that_was_rolled_back_is_named() -> None:
    """The ghost is what an outbox exists to prevent."""
    with pytest.raises(InvariantBrokenError, match=r"^I2 ghosts: delivered, never committed: b\.$"):
        there_are_no_ghosts([_entry("a", 1)], [_delivered("a", 1), _delivered("b", 2)])


def test_an_effect_that_happened_twice_is_named() -> None:
    """Deliveries may repeat, effects may not."""
    with pytest.raises(InvariantBrokenError, match=r"^I3 doubled: more than one effect: a\.$"):
        effects_happen_once([_effect("a"), _effect("b"), _effect("a")])


def test_a_first_delivery_after_a_later_one_of_its_aggregate_is_named() -> None:
    """Only the first delivery counts: what is delivered again may come late."""
    order_is_kept([_delivered("a", 1), _delivered("b", 2), _delivered("a", 1), _delivered("x", 1, aggregate=2)])

    with pytest.raises(InvariantBrokenError, match=r"a \(number 1 of aggregate 1\)\.$"):
        order_is_kept([_delivered("b", 2), _delivered("a", 1)])


def test_more_repeats_than_can_have_been_in_flight_are_counted() -> None:
    """A relay that starts over from the beginning loses nothing, and is wrong all the same. Retries are no repeats."""
    repeats_are_few([_delivered("a", 1), _delivered("a", 1, attempt=2), _delivered("a", 1)], at_most=1)

    with pytest.raises(
        InvariantBrokenError, match=r"^I5 repeated: 2 deliveries came again, 1 can have been in flight\.$"
    ):
        repeats_are_few([_delivered("a", 1)] * 3, at_most=1)


def test_a_repeat_under_another_message_id_is_named() -> None:
    """No inbox could know it again."""
    with pytest.raises(InvariantBrokenError, match=r"^I5 renamed: delivered under several message ids: a\.$"):
        repeats_are_few([_delivered("a", 1, message_id="1"), _delivered("a", 1, message_id="2")], at_most=1)


def test_what_is_left_on_the_way_is_counted() -> None:
    """Nothing lost is not enough: a record that nobody will ever take is lost to its users."""
    nothing_is_stranded(Left(pending=0, parked=0, unacknowledged=0))

    with pytest.raises(InvariantBrokenError, match="1 records in the outbox, 2 parked, 3 deliveries not acknowledged"):
        nothing_is_stranded(Left(pending=1, parked=2, unacknowledged=3))


def test_entries_that_are_parked_have_no_effect_and_no_others() -> None:
    """What an operator has yet to decide about is not lost; but it must be as many as are parked."""
    nothing_is_lost([_entry("a", 1), _entry("b", 2)], [_delivered("a", 1)], [_effect("a")], unhandled=1)

    with pytest.raises(InvariantBrokenError, match=r"^I1 lost: committed, without an effect: a, b\.$"):
        nothing_is_lost([_entry("a", 1), _entry("b", 2)], [_delivered("a", 1)], [], unhandled=1)


def test_two_processes_at_the_same_thing_are_named() -> None:
    """One after the other is fine, and so is one after another that was killed; at the same time is not."""
    nothing_runs_beside_itself([_span(1, 0, 5), _span(2, 5, 6), _span(3, 7, None), _span(4, 8, 9)], "a handler")

    with pytest.raises(InvariantBrokenError, match=r"^a handler at the same time, twice: x \(processes 1 and 3\)\.$"):
        nothing_runs_beside_itself([_span(1, 0, 5), _span(3, 4, 6)], "a handler")


def test_something_long_is_still_there_after_something_short_beside_it() -> None:
    """The second that begins within it is beside it as well."""
    with pytest.raises(InvariantBrokenError, match=r"processes 1 and 2\), x \(processes 1 and 3\)"):
        nothing_runs_beside_itself([_span(1, 0, 9), _span(2, 1, 2), _span(3, 4, 5)], "a handler")


def test_a_recovery_that_takes_too_long_is_told() -> None:
    """Or one that never comes."""
    recovers_soon(1.0, at_most=2)

    with pytest.raises(InvariantBrokenError, match=r"^I6 slow: .* young again after 3\.0 s, not within 2 s\.$"):
        recovers_soon(3.0, at_most=2)
    with pytest.raises(InvariantBrokenError, match="young never again"):
        recovers_soon(None, at_most=2)


def test_a_process_that_grows_is_named() -> None:
    """Each outage that leaves a connection behind is an outage of its own in a month."""
    before = Footprint(files=20, memory=100_000_000)
    nothing_grows("all1", before, Footprint(files=30, memory=110_000_000))

    with pytest.raises(InvariantBrokenError, match=r"^I8 grown: all1 "):
        nothing_grows("all1", before, Footprint(files=90, memory=100_000_000))


def _span(process: int, began: float, ended: float | None) -> Span:
    return Span(what="x", place=0, process=process, began=began, ended=ended)


def _entry(entry: str, number: int) -> Entry:
    return Entry(entry=entry, aggregate=1, number=number)


def _effect(entry: str) -> Effect:
    return Effect(entry=entry, message_id=entry)


def _delivered(
    entry: str, number: int, *, aggregate: int = 1, attempt: int = 1, message_id: str | None = None
) -> Delivered:
    return Delivered(
        message_id=message_id or entry,
        entry=entry,
        aggregate=aggregate,
        number=number,
        attempt=attempt,
        process=1,
        at=0.0,
    )


def test_sessions_that_stay_behind_are_told() -> None:
    """The database keeps memory for each, and has only so many."""
    no_session_is_left_behind(5, 25)

    with pytest.raises(InvariantBrokenError, match="I8 grown: the database had 5 sessions and has 26"):
        no_session_is_left_behind(5, 26)


def test_a_fault_that_nobody_is_told_of_is_found() -> None:
    """What no metric and no line of the log shows cannot be put right at night."""
    faults_are_visible("all0", "FenceRejected", 1, "fence_rejected", 1)

    with pytest.raises(InvariantBrokenError, match="I9 unseen: all0 told no observer of FenceRejected"):
        faults_are_visible("all0", "FenceRejected", 0, "fence_rejected", 1)
    with pytest.raises(InvariantBrokenError, match="I9 unseen: all0 logged no line with action=fence_rejected"):
        faults_are_visible("all0", "FenceRejected", 1, "fence_rejected", 0)


def test_recovery_counts_until_the_outbox_stays_young() -> None:
    """Just after a kill everything in it is young still: that is no recovery."""
    sampler = Sampler(Ledger("sqlite+aiosqlite://"), Path("unused"))
    ages = [(0.0, 0.2), (1.0, 1.2), (2.0, 2.2), (3.0, 0.1), (4.0, 0.1)]
    sampler.samples = [Sample(at=at, pending=1, oldest_s=age, delivered=0) for at, age in ages]

    assert sampler.recovery_s(0.0) == 3.0
    assert sampler.recovery_s(3.5) == 0.5
    sampler.samples.append(Sample(at=5.0, pending=None, oldest_s=None, delivered=0))
    assert sampler.recovery_s(0.0) is None
