"""Telling telemetry what happens, without letting it break what it watches."""

import logging

import pytest

from cqrs_decor.observers import FenceRejected, LanesChanged, Moment, Observers

MOMENT = FenceRejected(owner="relay-1", lane=3)


class Notes:
    def __init__(self) -> None:
        self.moments: list[Moment] = []

    def notice(self, moment: Moment) -> None:
        self.moments.append(moment)


class Faulty:
    def notice(self, moment: Moment) -> None:
        raise OSError("no route to the collector")


def test_every_observer_is_told_every_moment_in_order() -> None:
    """Metrics and tracing are two plugins that watch the same things."""
    one, other = Notes(), Notes()
    observers = Observers([one, other])

    observers.notice(MOMENT)
    observers.notice(LanesChanged(owner="relay-1", held=4, gained=4, lost=0))

    assert one.moments == other.moments == [MOMENT, LanesChanged(owner="relay-1", held=4, gained=4, lost=0)]


def test_a_faulty_observer_breaks_neither_the_main_line_nor_the_others(caplog: pytest.LogCaptureFixture) -> None:
    """A collector that is down must not stop a relay; and somebody must be able to find out."""
    notes = Notes()

    with caplog.at_level(logging.ERROR):
        Observers([Faulty(), notes]).notice(MOMENT)

    assert notes.moments == [MOMENT]
    [record] = caplog.records
    assert (record.__dict__["action"], record.__dict__["observer"]) == ("observer_failed", "Faulty")
    assert record.exc_info is not None


def test_the_end_of_the_process_passes_through() -> None:
    """Only faults of the observer are kept back."""

    class Interrupted:
        def notice(self, moment: Moment) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Observers([Interrupted()]).notice(MOMENT)


def test_it_can_be_asked_whether_anybody_watches() -> None:
    """Where nobody does, moments are not even made."""
    assert Observers([Notes()])
    assert not Observers()
