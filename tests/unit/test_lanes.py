"""Which lane a record is in: a matter of the tables, so it may never change."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cqrs_decor.lanes import LANES, HeldLane, lane_of


@given(topic=st.text(), key=st.text(), one=st.text(), other=st.text())
def test_all_records_of_a_topic_and_key_are_in_one_lane(topic: str, key: str, one: str, other: str) -> None:
    """One relay holds a lane at a time: that is what keeps the order of a key."""
    assert lane_of(topic, key, one) == lane_of(topic, key, other)


@given(topic=st.text(), key=st.none() | st.text(), message_id=st.text(), lanes=st.integers(1, 100))
def test_a_lane_is_one_of_those_that_are_there(topic: str, key: str | None, message_id: str, lanes: int) -> None:
    """A record in a lane that nobody holds would wait for ever."""
    assert 0 <= lane_of(topic, key, message_id, lanes) < lanes


@pytest.mark.parametrize(
    ("topic", "key", "message_id", "lane"),
    [("orders", "17", "a", 9), ("orders", "", "a", 15), ("orders", None, "a", 3), ("żółć", "🍵", "a", 20)],
)
def test_the_lane_of_a_record_never_changes(topic: str, key: str | None, message_id: str, lane: int) -> None:
    """Rows of an older version and processes of an older version are side by side during a deployment."""
    assert (LANES, lane_of(topic, key, message_id)) == (32, lane)


def test_topic_and_key_are_told_apart() -> None:
    """ "ab" + "c" and "a" + "bc" are different keys; most of such pairs are in different lanes."""
    pairs = [(lane_of(f"t{n}", "x", ""), lane_of("t", f"{n}x", "")) for n in range(100)]

    assert sum(one == other for one, other in pairs) < 20


def test_keys_and_records_without_key_spread_over_all_lanes() -> None:
    """A lane that gets most of the work is the limit of all relays together."""
    by_key = Counter(lane_of("orders", str(n), "") for n in range(3_200))
    by_id = Counter(lane_of("orders", None, str(n)) for n in range(3_200))

    for spread in (by_key, by_id):
        assert len(spread) == LANES
        assert max(spread.values()) < 200


def test_lanes_in_hand_are_compared_by_number_and_fence() -> None:
    """The same lane under a newer fence is somebody else's."""
    assert HeldLane(1, 2) == HeldLane(1, 2)
    assert HeldLane(1, 2) != HeldLane(1, 3)
