"""Relays share the lanes of an outbox evenly, whoever comes, stops or is killed."""

from collections import Counter

import pytest

from cqrs_decor.observers import LanesChanged
from tests.unit.apps import eventually
from tests.unit.relay_bench import Bench, Node, act, of_key, pass_time, running

pytestmark = pytest.mark.feature("O4")

KEYS = "abcdefghijklmnopqrstuvwxyz"


def held(*nodes: Node) -> list[int]:
    return sorted(node.held for node in nodes)


@pytest.mark.parametrize(("count", "shares"), [(1, [32]), (2, [16, 16]), (3, [10, 11, 11]), (4, [8, 8, 8, 8])])
async def test_lanes_are_shared_evenly(count: int, shares: list[int]) -> None:
    """All come up at once after a deployment; the first one takes everything, and gives back what is not its share."""
    bench = Bench()
    nodes = [Node(bench) for _ in range(count)]

    async with running(*nodes):
        await pass_time(bench.clock, 8)

        assert held(*nodes) == shares
        assert (await bench.store.outbox.holders()).free == 0


@pytest.mark.parametrize("count", [1, 2, 3])
async def test_a_newcomer_gets_its_share_within_seconds(count: int) -> None:
    """A relay that is started to help must not wait for leases to end."""
    bench = Bench()
    nodes = [Node(bench) for _ in range(count)]
    newcomer = Node(bench)

    async with running(*nodes) as tasks:
        await pass_time(bench.clock, 8)
        tasks.start_soon(newcomer.run)
        await pass_time(bench.clock, 8)

        assert newcomer.held == 32 // (count + 1)
        assert max(held(*nodes)) - newcomer.held <= 1
        assert (await bench.store.outbox.holders()).free == 0


@pytest.mark.parametrize("count", [2, 3, 4])
async def test_the_lanes_of_one_that_was_killed_move_when_its_lease_ends(count: int) -> None:
    """And their records with them."""
    bench = Bench()
    victim, *others = nodes = [Node(bench) for _ in range(count)]

    async with running(*nodes):
        await pass_time(bench.clock, 8)
        await victim.kill()
        await bench.commit(*(f"{key}1" for key in KEYS))
        await pass_time(bench.clock, 15 + 5)

        assert sum(held(*others)) == 32
        assert max(held(*others)) - min(held(*others)) <= 1
        await eventually(lambda: sum(node.relay.published for node in others) == len(KEYS))


async def test_one_that_stops_hands_over_without_waiting_for_a_lease() -> None:
    """Rolling deployments happen daily."""
    bench = Bench()
    leaving, staying = Node(bench), Node(bench)

    async with running(leaving, staying):
        await pass_time(bench.clock, 8)
        await leaving.stop()
        await pass_time(bench.clock, 6)

        assert staying.held == 32


@pytest.mark.parametrize("count", [1, 2, 3, 4])
async def test_lanes_that_are_shared_stay_where_they_are(count: int) -> None:
    """A lane that moves back and forth costs both sides a pause."""
    bench = Bench()
    nodes = [Node(bench) for _ in range(count)]

    async with running(*nodes):
        await pass_time(bench.clock, 10)
        before = [len(node.recorder.of(LanesChanged)) for node in nodes]
        await pass_time(bench.clock, 120)

        assert [len(node.recorder.of(LanesChanged)) for node in nodes] == before


async def test_a_lane_is_given_back_only_when_nothing_of_it_flies() -> None:
    """Its next holder would publish the same records again, beside those that are under way."""
    bench = Bench()
    bench.broker.gate.clear()
    old, newcomer = Node(bench), Node(bench)
    first, second = [f"{key}1" for key in KEYS], [f"{key}2" for key in KEYS]

    async with running(old) as tasks:
        await act()
        await bench.commit(*first)
        old.relay.wake()
        await eventually(lambda: bench.broker.calls == 1)
        lanes = {each.lane for each in await bench.records()}
        await bench.commit(*second)
        tasks.start_soon(newcomer.run)
        await pass_time(bench.clock, 8)
        during = old.held
        bench.broker.gate.set()
        await pass_time(bench.clock, 8)

        assert old.relay.published + newcomer.relay.published == 2 * len(KEYS)
        assert during >= len(lanes)
        assert held(old, newcomer) == [16, 16]
    assert set(Counter(bench.broker.reached).values()) == {1}
    assert all(of_key(key, bench.broker.reached) == [f"{key}1", f"{key}2"] for key in KEYS)


async def test_shares_change_under_load_without_repeating_or_reordering_anything() -> None:
    """One comes, one goes, and records are written all the time."""
    bench = Bench()
    one, two, three = (Node(bench, batch=7) for _ in range(3))
    number = 0

    async def write(seconds: int) -> None:
        nonlocal number
        for _ in range(seconds):
            number += 1
            await bench.commit(*(f"{key}{number:03}" for key in KEYS))
            await pass_time(bench.clock, 1)

    async with running(one) as tasks:
        await write(5)
        tasks.start_soon(two.run)
        await write(10)
        tasks.start_soon(three.run)
        await write(10)
        await one.stop()
        await write(10)
        await pass_time(bench.clock, 10)

        assert await bench.states() == {}
        assert held(two, three) == [16, 16]
    names = [f"{n:03}" for n in range(1, number + 1)]
    assert all(of_key(key, bench.broker.reached) == [f"{key}{name}" for name in names] for key in KEYS)
