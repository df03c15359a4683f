"""How lanes and batches are divided: arithmetic that every reader does for itself."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cqrs_decor_sqlalchemy.log_shares import fair_counts, share_of

readers = st.sets(st.text(min_size=1, max_size=8), min_size=1, max_size=24)


@given(readers=readers, topic=st.text(max_size=8))
def test_shares_add_up_to_all_lanes_and_differ_by_one_at_most(readers: set[str], topic: str) -> None:
    """A lane above the sum would be fought for, one below it never read."""
    shares = [share_of(reader, readers, topic, 16) for reader in readers]

    assert sum(shares) == 16
    assert max(shares) - min(shares) <= 1


def test_a_stranger_has_no_share() -> None:
    """Who is not counted by the others must not take from them."""
    assert share_of("stranger", {"one", "two"}, "orders", 16) == 0


def test_who_gets_one_more_differs_from_topic_to_topic() -> None:
    """With many readers, one that came first everywhere would do most of the work."""
    shares = [share_of("one", {"one", "two", "three"}, f"topic-{n}", 16) for n in range(20)]

    assert set(shares) == {5, 6}


@pytest.mark.parametrize(
    ("waiting", "limit", "expected"),
    [
        ([5, 5], 4, [2, 2]),
        ([1, 100, 3], 10, [1, 6, 3]),
        ([100, 100, 100], 2, [1, 1]),
        ([1, 1], 50, [1, 1]),
        ([], 50, []),
    ],
)
def test_what_one_lane_does_not_need_goes_to_the_others(waiting: list[int], limit: int, expected: list[int]) -> None:
    """A lane with a long queue must neither starve the others nor leave half of a batch unused."""
    counts = fair_counts({("orders", lane): count for lane, count in enumerate(waiting)}, limit)

    assert [counts[lane] for lane in sorted(counts)] == expected


@given(waiting=st.lists(st.integers(1, 1000), max_size=30), limit=st.integers(1, 600))
def test_a_batch_is_as_large_as_it_can_be(waiting: list[int], limit: int) -> None:
    """Throughput: a batch that is smaller than what waits costs another round trip."""
    counts = fair_counts({("orders", lane): count for lane, count in enumerate(waiting)}, limit)

    assert sum(counts.values()) == min(limit, sum(waiting))
    assert all(0 < count <= waiting[lane] for (_, lane), count in counts.items())
