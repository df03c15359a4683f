"""The kit for outbox stores."""

from collections.abc import Callable, Collection, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from typing import Any, ClassVar, TypeVar

import anyio
import pytest

from cqrs_decor.envelope import Envelope
from cqrs_decor.errors import LaneLostError
from cqrs_decor.lanes import HeldLane, Suspicion, TakenLane, lane_of
from cqrs_decor.outbox import ClaimedRecord, Ear, FailedRecord, Heard, OutboxFilter, Settlement, WakeUps
from cqrs_decor.store import Retention, Store, StoreCard
from cqrs_decor.testing.conformance.kit import Kit, as_test, full_sample, ids_by_key, ids_of, require, sample

K = TypeVar("K", bound="OutboxStoreConformance")

_LEASE = timedelta(minutes=5)

_IN_HAND = 1_000

_FAR = 2**62
"""An id that no record has yet."""


def _store_test(test: Callable[[K, Store], Coroutine[Any, Any, None]]) -> Callable[[K], None]:
    def run(self: K) -> None:
        __tracebackhide__ = True
        self.run(self.open_store, lambda store: test(self, store))

    return as_test(run, test)


class OutboxStoreConformance(Kit):
    """Holds the outbox of a store to the contract of `cqrs_decor.outbox`.

    Attributes:
        short: A delay, and a lease, that the tests let pass by `advance`. Longer than one call to the store may take.
    """

    short: ClassVar[timedelta] = timedelta(milliseconds=500)

    def open_store(self) -> AbstractAsyncContextManager[Store]:
        """An open store whose tables are empty; write it as an `@asynccontextmanager`. Called once for each test."""
        raise NotImplementedError(f"{type(self).__name__} must say how its store is opened: open_store()")

    async def advance(self, delay: timedelta) -> None:
        """Let `delay` pass on the store's clock. Waits for it, unless a plugin knows a faster way."""
        await anyio.sleep(delay.total_seconds() * 1.1)

    # --- writing ---

    @_store_test
    async def test_records_of_a_committed_transaction_can_be_claimed(self, store: Store) -> None:
        """Guarantee 1, first half: a command that commits has its events in the outbox."""
        transaction = await store.begin()
        transaction.add([first := sample("orders")])
        transaction.add([second := sample("orders"), third := sample("stock")])
        await transaction.commit()

        assert sorted(_ids(await self._claim_all(store))) == sorted([first.id, second.id, third.id])

    @_store_test
    async def test_records_of_a_rolled_back_transaction_do_not_exist(self, store: Store) -> None:
        """Guarantee 1, second half: nobody may be told of what did not happen."""
        transaction = await store.begin()
        transaction.add([sample("orders")])
        await transaction.rollback()
        await transaction.rollback()

        assert list(await self._claim_all(store)) == []
        assert list(await store.outbox.find(OutboxFilter())) == []

    @_store_test
    async def test_records_of_an_open_transaction_cannot_be_claimed(self, store: Store) -> None:
        """A claim that sees uncommitted rows publishes what may still be rolled back."""
        require(store, store.card, "concurrent_writers")
        transaction = await store.begin()
        transaction.add([sample("orders")])

        before = await self._claim_all(store)
        await transaction.rollback()

        assert list(before) == []

    @_store_test
    async def test_an_envelope_is_claimed_with_every_attribute_and_header(self, store: Store) -> None:
        """The relay publishes what it claims: what the table does not keep, no consumer will ever see."""
        envelope = full_sample("orders")
        await self._write(store, envelope)

        [record] = await self._claim_all(store)

        assert record.envelope == envelope.with_sequence(record.id)

    @_store_test
    async def test_attributes_that_are_not_given_stay_absent(self, store: Store) -> None:
        """An empty text is not the same as nothing, as some databases think."""
        envelope = sample("orders", None)
        await self._write(store, envelope)

        [record] = await self._claim_all(store)

        assert record.envelope == envelope.with_sequence(record.id)

    @_store_test
    async def test_any_key_and_any_body_are_kept(self, store: Store) -> None:
        """Bodies may be empty, compressed or a megabyte long, and keys are the users' own."""
        written = [
            sample("orders", "", data=b""),
            sample("orders", "🍵", data=bytes(range(256))),
            sample("orders", "a b/ü", data=b"x" * 1_000_000),
            sample("orders", "k" * 200),
        ]
        await self._write(store, *written)

        claimed = {record.envelope.id: record.envelope for record in await self._claim_all(store)}

        assert [(claimed[each.id].key, claimed[each.id].data) for each in written] == [
            (each.key, each.data) for each in written
        ]

    @_store_test
    async def test_the_sequence_rises_within_each_key(self, store: Store) -> None:
        """Consumers tell old from new by it, on brokers that keep no order as well."""
        for _ in range(3):
            await self._write(store, *(sample("orders", f"key-{n % 4}") for n in range(12)))

        claimed = await self._claim_all(store)

        for key in {record.envelope.key for record in claimed}:
            sequences = [record.envelope.sequence or 0 for record in claimed if record.envelope.key == key]
            assert sequences == sorted(set(sequences))
        assert [record.envelope.sequence for record in claimed] == [record.id for record in claimed]

    @_store_test
    async def test_many_transactions_may_commit_at_once(self, store: Store) -> None:
        """A web service under load: each of its requests has an outbox row of its own."""
        written = [sample("orders", f"key-{n}") for n in range(40)]

        async with anyio.create_task_group() as tasks:
            for envelope in written:
                tasks.start_soon(self._write, store, envelope)

        assert sorted(_ids(await self._claim_all(store))) == sorted(ids_of(written))

    # --- order ---

    @_store_test
    async def test_each_lane_is_claimed_in_the_order_of_writing(self, store: Store) -> None:
        """Order per key rests on it: all records of a key are in one lane."""
        written = [sample("orders", f"key-{n % 17}") for n in range(170)]
        for start in range(0, 170, 34):
            await self._write(store, *written[start : start + 34])

        claimed = await self._claim_all(store)

        assert ids_by_key(record.envelope for record in claimed) == ids_by_key(written)
        for lane in {record.lane for record in claimed}:
            ids = [record.id for record in claimed if record.lane == lane]
            assert ids == sorted(set(ids))

    @_store_test
    async def test_all_records_of_a_key_are_in_one_lane(self, store: Store) -> None:
        """Two relays hold different lanes: a key that is in two lanes would be published by both at once."""
        await self._write(store, *(sample("orders", f"key-{n % 40}") for n in range(120)))

        claimed = await self._claim_all(store)

        lanes = {(record.envelope.key, record.lane) for record in claimed}
        assert len(lanes) == 40
        assert len({lane for _, lane in lanes}) > 1

    @_store_test
    async def test_records_without_key_are_spread_over_lanes(self, store: Store) -> None:
        """They have no order to keep, so one relay must not get them all."""
        await self._write(store, *(sample("orders", None) for _ in range(100)))

        assert len({record.lane for record in await self._claim_all(store)}) > 1

    @_store_test
    async def test_two_transactions_one_after_another_come_in_the_order_of_their_commits(self, store: Store) -> None:
        """Guarantee 3: as when both lock the same aggregate. Which of them began first is of no account."""
        require(store, store.card, "concurrent_writers")
        early, late = await store.begin(), await store.begin()
        late.add([first := sample("orders", "a")])
        await late.commit()
        early.add([second := sample("orders", "a")])
        await early.commit()

        assert _ids(await self._claim_all(store)) == [first.id, second.id]

    @_store_test
    async def test_a_record_that_is_committed_late_is_still_claimed(self, store: Store) -> None:
        """Paging by the last id seen would skip it for ever: its id may be lower than what was claimed before."""
        require(store, store.card, "concurrent_writers")
        lanes = await self._hold(store)
        slow, fast = await store.begin(), await store.begin()
        slow.add([late := sample("orders", "a")])
        fast.add([early := sample("orders", "a")])

        await fast.commit()
        first = await store.outbox.claim(lanes, 10)
        await store.outbox.settle(Settlement(lanes=lanes, delivered=first))
        await slow.commit()
        second = await store.outbox.claim(lanes, 10)

        assert (_ids(first), _ids(second)) == ([early.id], [late.id])

    @_store_test
    async def test_commits_during_claims_lose_nothing(self, store: Store) -> None:
        """A relay at work beside a service at work: the ordinary case, in which late commits happen by themselves."""
        written = [[sample("orders", f"key-{n}") for _ in range(10)] for n in range(6)]
        lanes = await self._hold(store)
        published: list[Envelope] = []

        async def write(envelopes: Sequence[Envelope]) -> None:
            for envelope in envelopes:
                await self._write(store, envelope)

        async def relay() -> None:
            while len(published) < 60:
                batch = await store.outbox.claim(lanes, 7)
                await store.outbox.settle(Settlement(lanes=lanes, delivered=batch))
                published.extend(record.envelope for record in batch)
                await anyio.sleep(0.001)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(relay)
            for envelopes in written:
                tasks.start_soon(write, envelopes)

        assert ids_by_key(published) == {envelopes[0].key: ids_of(envelopes) for envelopes in written}
        assert len(published) == 60

    # --- lanes ---

    @_store_test
    async def test_a_lane_has_one_owner_at_a_time(self, store: Store) -> None:
        """Two relays on one lane would publish a key's events side by side."""
        count = store.outbox.lane_count

        one = await self._acquire(store, "one", limit=count // 2)
        two = await self._acquire(store, "two")
        three = await self._acquire(store, "three")

        assert len(one) == count // 2
        assert sorted(lane.number for lane in [*one, *two]) == list(range(count))
        assert list(three) == []

    @_store_test
    async def test_lanes_taken_at_the_same_time_do_not_overlap(self, store: Store) -> None:
        """After a deployment all relays come up at once."""
        taken: dict[str, Sequence[HeldLane]] = {}

        async def acquire(owner: str) -> None:
            taken[owner] = await self._acquire(store, owner, limit=store.outbox.lane_count // 4)

        async with anyio.create_task_group() as tasks:
            for n in range(4):
                tasks.start_soon(acquire, f"relay-{n}")

        numbers = [lane.number for lanes in taken.values() for lane in lanes]
        assert len(numbers) == len(set(numbers))

    @_store_test
    async def test_the_fence_rises_with_each_change_of_owner(self, store: Store) -> None:
        """A fencing number that repeats cannot tell a late write from a current one."""
        fences: list[int] = []
        for owner in ("one", "two", "one"):
            lanes = await self._hold(store, owner)
            fences.append(next(lane.fence for lane in lanes if lane.number == 0))
            await store.outbox.release(owner, lanes)

        assert fences == sorted(set(fences))

    @_store_test
    async def test_a_lease_that_has_ended_is_taken_over(self, store: Store) -> None:
        """A relay that was killed gives nothing back: its lanes must not stand still for ever."""
        await self._hold(store, "killed", self.short)

        at_once = await self._acquire(store, "heir")
        await self.advance(self.short)
        later = await self._acquire(store, "heir")

        assert (len(at_once), len(later)) == (0, store.outbox.lane_count)

    @_store_test
    async def test_a_renewed_lease_is_kept(self, store: Store) -> None:
        """A relay that is alive and slow must not lose its lanes to one that is idle."""
        lanes = await self._hold(store, "alive", self.short)

        renewed = await store.outbox.renew("alive", lanes, _LEASE)
        await self.advance(self.short)

        assert sorted(renewed.held, key=_lane_number) == sorted(lanes, key=_lane_number)
        assert list(await self._acquire(store, "idle")) == []

    @_store_test
    async def test_renewing_returns_only_what_is_still_held(self, store: Store) -> None:
        """It is how a relay learns that it was taken for dead."""
        lanes = await self._hold(store, "slow", self.short)
        await self.advance(self.short)
        lost = await self._acquire(store, "heir", limit=3)

        renewed = await store.outbox.renew("slow", lanes, _LEASE)

        gone = {lane.number for lane in lost}
        assert {lane.number for lane in renewed.held} == {lane.number for lane in lanes} - gone
        assert len((await store.outbox.renew("heir", lost, _LEASE)).held) == 3

    @_store_test
    async def test_released_lanes_are_free_at_once(self, store: Store) -> None:
        """A relay that stops in good order must not make the next one wait for its leases."""
        lanes = await self._hold(store, "one")
        await store.outbox.release("one", lanes[:5])

        taken = await self._acquire(store, "two")

        assert {lane.number for lane in taken} == {lane.number for lane in lanes[:5]}

    @_store_test
    async def test_releasing_a_lost_lane_leaves_its_new_owner_alone(self, store: Store) -> None:
        """A frozen relay that wakes up to its own shutdown must not free what another one works on."""
        lanes = await self._hold(store, "frozen", self.short)
        await self.advance(self.short)
        await self._hold(store, "heir")

        await store.outbox.release("frozen", lanes)

        assert list(await self._acquire(store, "third")) == []

    @_store_test
    async def test_a_renewal_counts_the_relays_that_take_part(self, store: Store) -> None:
        """Fair shares are worked out from it; a newcomer that holds nothing yet must be counted, or it gets nothing."""
        lanes = await self._hold(store, "old")

        alone = await store.outbox.renew("old", lanes, _LEASE)
        newcomer = await store.outbox.renew("new", [], _LEASE)
        both = await store.outbox.renew("old", lanes, _LEASE)

        assert (alone.relays, newcomer.relays, both.relays) == (1, 2, 2)
        assert (len(alone.held), len(newcomer.held), len(both.held)) == (len(lanes), 0, len(lanes))

    @_store_test
    async def test_a_relay_that_shows_no_life_is_counted_no_more(self, store: Store) -> None:
        """The share of one that was killed must come back to the others."""
        await store.outbox.renew("killed", [], self.short)
        before = await store.outbox.renew("alive", [], _LEASE)
        await self.advance(self.short)
        after = await store.outbox.renew("alive", [], _LEASE)

        assert (before.relays, after.relays) == (2, 1)

    @_store_test
    async def test_a_relay_that_leaves_is_counted_no_more_at_once(self, store: Store) -> None:
        """A relay that stops hands over now, not when its lease would have ended; one that gives back a few stays."""
        lanes = await self._hold(store, "leaving")
        await store.outbox.renew("leaving", lanes, _LEASE)

        await store.outbox.release("leaving", lanes[:5])
        still_there = await store.outbox.renew("other", [], _LEASE)
        await store.outbox.release("leaving", lanes[5:], leaving=True)
        gone = await store.outbox.renew("other", [], _LEASE)

        assert (still_there.relays, gone.relays) == (2, 1)
        assert len(await self._acquire(store, "other")) == len(lanes)

    @_store_test
    async def test_a_renewal_tells_whether_anything_waits(self, store: Store) -> None:
        """An idle relay asks for nothing else. A record that is due later counts."""
        lanes = await self._hold(store)
        empty = await store.outbox.renew("kit", lanes, _LEASE)
        await self._write(store, first := sample("orders", "a"), sample("orders", "a"))
        pending = await store.outbox.renew("kit", lanes, _LEASE)
        of_others = await store.outbox.renew("idle", [], _LEASE)
        await self._settle_failed(store, lanes, _LEASE, only=[first.id])
        rescheduled = await store.outbox.renew("kit", lanes, _LEASE)

        assert [each.waiting for each in (empty, pending, of_others, rescheduled)] == [False, True, False, True]

    @_store_test
    async def test_what_is_parked_does_not_wait(self, store: Store) -> None:
        """A relay that looked for it again and again would never be quiet."""
        first, second = sample("orders", "a"), sample("orders", "a")
        lanes = await self._park(store, [first, second], parked=[first])
        parked = await store.outbox.renew("kit", lanes, _LEASE)
        await store.outbox.retry(await self._record_ids(store, first), who="kit")
        retried = await store.outbox.renew("kit", lanes, _LEASE)

        assert (parked.waiting, retried.waiting) == (False, True)

    @_store_test
    async def test_holders_are_told_apart_by_their_leases(self, store: Store) -> None:
        """`doctor` says from it that lanes stand still since nobody took them over."""
        nobody = await store.outbox.holders()
        await self._acquire(store, "vanished", self.short, limit=3)
        await self.advance(self.short)
        ended = await store.outbox.holders()
        lanes = await self._hold(store, "alive")
        await store.outbox.renew("alive", lanes, _LEASE)
        held = await store.outbox.holders()

        count = store.outbox.lane_count
        assert [(list(each.relays), each.held, each.free, each.ended) for each in (nobody, ended, held)] == [
            ([], 0, count, 0),
            ([], 0, count - 3, 3),
            (["alive"], count, 0, 0),
        ]
        assert (nobody.longest_ended, held.longest_ended) == (None, None)
        assert ended.longest_ended is not None
        assert timedelta(0) <= ended.longest_ended < _LEASE
        assert nobody.now.tzinfo is not None

    @_store_test
    async def test_a_claim_under_an_old_fence_is_refused(self, store: Store) -> None:
        """A relay that lost its lane must find out before it publishes."""
        await self._write(store, sample("orders"))
        lanes = await self._hold(store, "frozen", self.short)
        await self.advance(self.short)
        await self._hold(store, "heir")

        with pytest.raises(LaneLostError):
            await store.outbox.claim(lanes, 10)

    @_store_test
    async def test_a_late_delivery_report_is_refused_and_writes_nothing(self, store: Store) -> None:
        """A frozen relay wakes up and settles: the record is the new owner's now."""
        lanes, record = await self._claim_one_and_lose_its_lane(store)

        with pytest.raises(LaneLostError):
            await store.outbox.settle(Settlement(lanes=lanes, delivered=[record]))

        assert [each.id for each in await store.outbox.find(OutboxFilter())] == [record.id]

    @_store_test
    async def test_a_late_failure_report_is_refused_and_writes_nothing(self, store: Store) -> None:
        """A late "rescheduled" would hold back a key whose events the new owner is publishing."""
        lanes, record = await self._claim_one_and_lose_its_lane(store)

        for delay in (timedelta(0), None):
            with pytest.raises(LaneLostError):
                await store.outbox.settle(Settlement(lanes=lanes, failed=[_failed(record, delay)]))

        [stored] = await store.outbox.find(OutboxFilter())
        assert (stored.state, stored.attempts, stored.error) == ("pending", 0, None)

    @_store_test
    async def test_one_lost_lane_refuses_the_whole_settlement(self, store: Store) -> None:
        """A settlement is one transaction: half of it on record would be a third kind of outcome."""
        await self._write(store, *(sample("orders", f"key-{n}") for n in range(40)))
        lanes = await self._hold(store, "slow", self.short)
        records = await store.outbox.claim(lanes, 100)
        await self.advance(self.short)
        lost = await self._acquire(store, "heir", limit=1)

        with pytest.raises(LaneLostError) as refused:
            await store.outbox.settle(Settlement(lanes=lanes, delivered=records))

        assert refused.value.lanes == tuple(lane.number for lane in lost)
        assert (await store.outbox.backlog()).pending == 40

    # --- claiming ---

    @_store_test
    async def test_a_claim_takes_no_more_than_its_limit_and_only_from_its_lanes(self, store: Store) -> None:
        """The limit bounds a relay's memory, the lanes keep it out of the others' way."""
        await self._write(store, *(sample("orders", f"key-{n}") for n in range(60)))
        lanes = await self._hold(store)

        some = await store.outbox.claim(lanes, 7)
        of_one_lane = await store.outbox.claim(lanes[:4], 100)

        assert len(some) == 7
        assert {record.lane for record in of_one_lane} <= {lane.number for lane in lanes[:4]}
        assert list(await store.outbox.claim([], 100)) == []

    @_store_test
    async def test_records_in_flight_are_not_claimed_again(self, store: Store) -> None:
        """The next claim runs while the last batch is on its way: taking it again would publish everything twice."""
        written = [sample("orders", "a") for _ in range(10)]
        await self._write(store, *written)
        lanes = await self._hold(store)

        first = await store.outbox.claim(lanes, 4)
        second = await store.outbox.claim(lanes, 4, in_flight=[record.id for record in first])
        third = await store.outbox.claim(lanes, 4, in_flight=[record.id for record in [*first, *second]])

        assert _ids([*first, *second, *third]) == ids_of(written)

    @_store_test
    async def test_what_was_claimed_and_not_settled_is_claimed_again(self, store: Store) -> None:
        """A relay that dies between claim and settle has written nothing, so its heir finds everything."""
        await self._write(store, *(sample("orders", "a") for _ in range(3)))
        lanes = await self._hold(store)
        before = await store.outbox.claim(lanes, 10)
        await store.outbox.release("kit", lanes)

        assert _ids(await self._claim_all(store, "heir")) == _ids(before)

    @_store_test
    async def test_thousands_of_records_come_in_pieces(self, store: Store) -> None:
        """A burst is claimed in bounded batches, with several of them in flight; nothing is skipped at the seams."""
        written = [sample("orders", f"key-{n % 50}") for n in range(2_000)]
        await self._write(store, *written)
        lanes = await self._hold(store)

        claimed: list[ClaimedRecord] = []
        before: Sequence[ClaimedRecord] = []
        while batch := await store.outbox.claim(lanes, 300, in_flight=[record.id for record in before]):
            await store.outbox.settle(Settlement(lanes=lanes, delivered=before))
            claimed.extend(batch)
            before = batch
        await store.outbox.settle(Settlement(lanes=lanes, delivered=before))

        assert len(claimed) == 2_000
        assert ids_by_key(record.envelope for record in claimed) == ids_by_key(written)
        assert (await store.outbox.backlog()).pending == 0

    # --- crashes ---

    @_store_test
    async def test_lanes_that_were_given_back_are_above_suspicion(self, store: Store) -> None:
        """A stop is no crash: after a deployment nothing must go in single steps."""
        await self._write(store, *(sample("orders", f"key-{n}") for n in range(10)))
        lanes = await self._hold(store, "stopped")
        await store.outbox.claim(lanes, 10)
        await store.outbox.step(lanes, until=_FAR)
        await store.outbox.release("stopped", lanes)

        assert await self._suspicions(store) == {}

    @_store_test
    async def test_an_empty_lane_is_above_suspicion(self, store: Store) -> None:
        """A relay that vanished with nothing in hand vanished for another reason."""
        await self._vanish(store, "killed")

        assert await self._suspicions(store) == {}

    @_store_test
    async def test_what_a_vanished_relay_may_have_had_in_hand_is_suspected(self, store: Store) -> None:
        """Up to the last record that it can have claimed, and no further: single steps are slow."""
        written = [sample("orders", "a") for _ in range(5)]
        await self._write(store, *written)
        ids = await self._record_ids(store, *written)
        await self._vanish(store, "killed")

        [suspicion] = (await self._suspicions(store, in_hand=3)).values()

        assert suspicion == Suspicion(until=ids[2])

    @_store_test
    async def test_the_records_in_hand_are_those_of_all_its_lanes(self, store: Store) -> None:
        """None that it may have had in hand is left out, whichever lane it is in."""
        written = [sample("orders", f"key-{n % 4}") for n in range(20)]
        await self._write(store, *written)
        lanes = await self._hold(store, "killed", self.short)
        in_hand = await store.outbox.claim(lanes, 12)
        await self.advance(self.short)

        suspicions = await self._suspicions(store, in_hand=12)

        assert [each.id for each in in_hand if each.id > suspicions[each.lane].until] == []

    @_store_test
    async def test_what_waits_in_one_lane_does_not_stand_for_what_is_in_hand_of_another(self, store: Store) -> None:
        """A relay claims from no lane that is under suspicion, or that it is about to give away."""
        key = next(f"key-{n}" for n in range(10_000) if lane_of("orders", f"key-{n}", "") != lane_of("orders", "a", ""))
        await self._write(store, *(sample("orders", "a") for _ in range(5)), sample("orders", key))
        lanes = await self._hold(store, "killed", self.short)
        waiting = lane_of("orders", "a", "")
        [record] = await store.outbox.claim([lane for lane in lanes if lane.number != waiting], 3)
        await self.advance(self.short)

        suspicions = await self._suspicions(store, in_hand=3)

        assert suspicions[record.lane].until >= record.id

    @_store_test
    async def test_a_step_takes_the_first_due_record_of_each_lane(self, store: Store) -> None:
        """One record per lane in hand: the smallest circle of suspects that still gets on."""
        written = [sample("orders", f"key-{n % 10}") for n in range(30)]
        await self._write(store, *written)
        lanes = await self._hold(store)
        claimed = await store.outbox.claim(lanes, 100)

        stepped = await store.outbox.step(lanes, until=_FAR)

        firsts = {each.lane: each for each in reversed(claimed)}
        assert sorted(each.id for each in stepped) == sorted(each.id for each in firsts.values())
        assert {each.crashes for each in stepped} == {0}
        assert [each.envelope for each in stepped] == [firsts[each.lane].envelope for each in stepped]

    @_store_test
    async def test_a_step_goes_no_further_than_until(self, store: Store) -> None:
        """What lies beyond was in nobody's hand, and goes in batches."""
        written = [sample("orders", "a") for _ in range(3)]
        await self._write(store, *written)
        ids = await self._record_ids(store, *written)
        lanes = await self._hold(store)

        steps: list[list[int]] = []
        for _ in range(3):
            stepped = await store.outbox.step(lanes, until=ids[1])
            await store.outbox.settle(Settlement(lanes=lanes, delivered=stepped, stepped=True))
            steps.append([each.id for each in stepped])

        assert steps == [[ids[0]], [ids[1]], []]

    @_store_test
    async def test_a_step_passes_over_what_is_held_back(self, store: Store) -> None:
        """A parked record at the head of a lane must not end the search behind it."""
        first, second, other = sample("orders", "a"), sample("orders", "a"), _in_lane_of("orders", "a")
        lanes = await self._park(store, [first, second, other], parked=[first])

        assert _ids(await store.outbox.step(lanes, until=_FAR)) == [other.id]

    @_store_test
    async def test_a_step_under_an_old_fence_is_refused_and_marks_nothing(self, store: Store) -> None:
        """A relay that was taken for dead must not lay blame at its successor's door."""
        await self._write(store, sample("orders", "a"))
        lanes = await self._hold(store, "frozen", self.short)
        await self.advance(self.short)
        heir = await self._hold(store, "heir", self.short)

        with pytest.raises(LaneLostError):
            await store.outbox.step(lanes, until=_FAR)

        [record] = await store.outbox.step(heir, until=_FAR)
        assert record.crashes == 0

    @_store_test
    async def test_the_record_of_a_step_is_named_when_its_relay_vanishes(self, store: Store) -> None:
        """The mark is committed before the record is published: what kills a relay leaves its name behind."""
        await self._write(store, poison := sample("orders", "a"), sample("orders", "a"))
        [poison_id] = await self._record_ids(store, poison)
        await self._vanish(store, "killed", poison)

        [suspicion] = (await self._suspicions(store)).values()

        assert (suspicion.record, suspicion.crashes) == (poison_id, 1)
        assert suspicion.until >= poison_id

    @_store_test
    async def test_crashes_in_a_row_are_counted_before_the_record_is_published(self, store: Store) -> None:
        """Counted at settle, a record that kills every relay would never be counted at all."""
        await self._write(store, poison := sample("orders", "a"), sample("orders", "a"))
        for n in range(3):
            await self._vanish(store, f"killed-{n}", poison)

        lanes = await self._hold(store, "heir")
        [record] = await store.outbox.step(lanes, until=_FAR)

        assert (record.envelope.id, record.crashes) == (poison.id, 3)

    @_store_test
    async def test_a_relay_that_vanishes_before_its_step_adds_no_crash(self, store: Store) -> None:
        """It took the lane over and died of something else: the record was not in its hand."""
        await self._write(store, suspect := sample("orders", "a"))
        await self._vanish(store, "killed", suspect)
        await self._vanish(store, "unlucky")

        [suspicion] = (await self._suspicions(store)).values()

        assert suspicion.crashes == 1

    @_store_test
    async def test_what_comes_due_before_it_does_not_acquit_the_marked_record(self, store: Store) -> None:
        """A record that is tried again now and then would else keep one that kills relays from being found."""
        first, killer = sample("orders", "a"), _in_lane_of("orders", "a")
        await self._write(store, first, killer)
        lanes = await self._hold(store, "killed", self.short)
        [refused] = await store.outbox.step(lanes, until=_FAR)
        await store.outbox.settle(Settlement(lanes=lanes, failed=[_failed(refused, self.short)], stepped=True))
        [accused] = await store.outbox.step(lanes, until=_FAR)
        await self.advance(self.short)
        lanes = await self._hold(store, "heir")

        [again] = await store.outbox.step(lanes, until=_FAR)

        assert accused.envelope.id == killer.id
        assert (again.id, again.crashes) == (accused.id, 1)

    @_store_test
    async def test_a_settled_step_takes_the_mark_off(self, store: Store) -> None:
        """The record has been published and nobody vanished: it is cleared."""
        await self._write(store, *(sample("orders", "a") for _ in range(3)))
        lanes = await self._hold(store, "killed", self.short)
        [first] = await store.outbox.step(lanes, until=_FAR)
        await store.outbox.settle(Settlement(lanes=lanes, delivered=[first], stepped=True))
        [second] = await store.outbox.step(lanes, until=_FAR)
        await store.outbox.settle(Settlement(lanes=lanes, failed=[_failed(second, timedelta(0))], stepped=True))
        await self.advance(self.short)

        [suspicion] = (await self._suspicions(store)).values()

        assert (suspicion.record, suspicion.crashes) == (None, 0)

    @_store_test
    async def test_the_mark_of_another_record_is_replaced(self, store: Store) -> None:
        """The count belongs to one record: the next one begins at 0."""
        first, second = sample("orders", "a"), sample("orders", "a")
        await self._write(store, first, second)
        await self._vanish(store, "killed", first)
        lanes = await self._hold(store, "heir", self.short)
        [record] = await store.outbox.claim(lanes, 1)
        await store.outbox.settle(Settlement(lanes=lanes, delivered=[record]))
        [stepped] = await store.outbox.step(lanes, until=_FAR)
        await self.advance(self.short)

        [suspicion] = (await self._suspicions(store, "next")).values()

        assert (stepped.envelope.id, stepped.crashes) == (second.id, 0)
        assert (suspicion.record, suspicion.crashes) == (stepped.id, 1)

    @_store_test
    async def test_a_mark_that_was_taken_off_blames_nobody(self, store: Store) -> None:
        """The broker was away while the step was in hand: an outage is no crash."""
        await self._write(store, sample("orders", "a"))
        lanes = await self._hold(store, "killed", self.short)
        await store.outbox.step(lanes, until=_FAR)
        await store.outbox.unmark(lanes)
        [again] = await store.outbox.step(lanes, until=_FAR)
        await store.outbox.unmark(lanes)
        await self.advance(self.short)

        [suspicion] = (await self._suspicions(store)).values()

        assert again.crashes == 0
        assert (suspicion.record, suspicion.crashes) == (None, 0)

    @_store_test
    async def test_neither_an_outage_nor_a_stop_forgets_crashes(self, store: Store) -> None:
        """Deployments and outages between them would else let a record kill relays for ever."""
        await self._write(store, poison := sample("orders", "a"), sample("orders", "a"))
        for n in range(2):
            await self._vanish(store, f"killed-{n}", poison)
        lanes = await self._hold(store, "stopped")
        await store.outbox.step(lanes, until=_FAR)
        await store.outbox.unmark(lanes)
        [again] = await store.outbox.step(lanes, until=_FAR)
        await store.outbox.release("stopped", lanes, leaving=True)

        taken = await self._take(store, "heir")
        [suspicion] = [each.suspicion for each in taken if each.suspicion is not None]
        [record] = await store.outbox.step([each.lane for each in taken], until=_FAR)

        assert again.crashes == 2
        assert (suspicion.record, suspicion.until, suspicion.crashes) == (again.id, again.id, 2)
        assert (record.id, record.crashes) == (again.id, 2)

    @_store_test
    async def test_a_late_unmark_leaves_the_mark_of_the_new_owner(self, store: Store) -> None:
        """A relay that was frozen wakes up to the outage that it was in: its lane is another one's now."""
        await self._write(store, suspect := sample("orders", "a"))
        frozen = await self._hold(store, "frozen", self.short)
        await self.advance(self.short)
        await self._vanish(store, "killed", suspect)

        await store.outbox.unmark(frozen)

        [suspicion] = (await self._suspicions(store)).values()
        assert suspicion.crashes == 1

    @_store_test
    async def test_a_release_takes_the_mark_off(self, store: Store) -> None:
        """A relay that is told to stop in the middle of a step has not crashed."""
        await self._write(store, sample("orders", "a"))
        lanes = await self._hold(store, "stopped")
        await store.outbox.step(lanes, until=_FAR)
        await store.outbox.release("stopped", lanes, leaving=True)

        heir = await self._hold(store, "heir")
        [record] = await store.outbox.step(heir, until=_FAR)

        assert record.crashes == 0

    @_store_test
    async def test_a_late_step_settles_nothing(self, store: Store) -> None:
        """Its fence is checked as in every settlement, and the mark of the new owner stays."""
        await self._write(store, suspect := sample("orders", "a"))
        frozen = await self._hold(store, "frozen", self.short)
        stepped = await store.outbox.step(frozen, until=_FAR)
        await self.advance(self.short)
        await self._vanish(store, "killed", suspect)

        with pytest.raises(LaneLostError):
            await store.outbox.settle(Settlement(lanes=frozen, delivered=stepped, stepped=True))

        [suspicion] = (await self._suspicions(store)).values()
        assert (suspicion.record, suspicion.crashes) == (stepped[0].id, 2)

    @_store_test
    async def test_the_crashes_of_a_retried_record_start_again(self, store: Store) -> None:
        """The operator has mended the cause: the next step must not park it at once."""
        await self._write(store, poison := sample("orders", "a"))
        for n in range(3):
            await self._vanish(store, f"killed-{n}", poison)
        lanes = await self._hold(store, "heir")
        [record] = await store.outbox.step(lanes, until=_FAR)
        await store.outbox.settle(Settlement(lanes=lanes, failed=[_failed(record, None)], stepped=True))

        await store.outbox.retry([record.id], who="kit")

        [again] = await store.outbox.step(lanes, until=_FAR)
        assert (again.id, again.crashes) == (record.id, 0)

    # --- settling ---

    @_store_test
    async def test_delivered_records_are_gone(self, store: Store) -> None:
        """The hot table stays small, and no relay publishes them again."""
        await self._write(store, sample("orders", "a"), kept := sample("orders", "b"))
        lanes = await self._hold(store)
        delivered = [each for each in await store.outbox.claim(lanes, 10) if each.envelope.key == "a"]

        await store.outbox.settle(Settlement(lanes=lanes, delivered=delivered))
        await store.outbox.settle(Settlement(lanes=lanes, delivered=delivered))

        assert _ids(await store.outbox.claim(lanes, 10)) == [kept.id]
        assert [each.envelope.id for each in await store.outbox.find(OutboxFilter())] == [kept.id]

    @_store_test
    async def test_one_settlement_holds_every_kind_of_outcome(self, store: Store) -> None:
        """A batch is settled in one step, whatever became of its parts."""
        await self._write(store, *(sample("orders", key) for key in ("delivered", "later", "parked", "untouched")))
        lanes = await self._hold(store)
        records = {str(each.envelope.key): each for each in await store.outbox.claim(lanes, 10)}

        await store.outbox.settle(
            Settlement(
                lanes=lanes,
                delivered=[records["delivered"]],
                failed=[_failed(records["later"], _LEASE), _failed(records["parked"], None)],
            )
        )

        assert await self._states(store) == {"later": "rescheduled", "parked": "parked", "untouched": "pending"}

    @_store_test
    async def test_a_rescheduled_record_is_due_after_its_delay(self, store: Store) -> None:
        """Trying again at once would hammer a broker that has just refused."""
        await self._write(store, envelope := sample("orders", "a"))
        lanes = await self._hold(store)
        await self._settle_failed(store, lanes, self.short)

        at_once = await store.outbox.claim(lanes, 10)
        await self.advance(self.short)
        later = await store.outbox.claim(lanes, 10)

        assert (_ids(at_once), _ids(later)) == ([], [envelope.id])

    @_store_test
    async def test_a_rescheduled_record_holds_back_its_own_key_only(self, store: Store) -> None:
        """Guarantee 3: an event that fails is not overtaken by the later ones of its key, and stops nobody else."""
        first, second = sample("orders", "a"), sample("orders", "a")
        other_key, other_topic = sample("orders", "b"), sample("stock", "a")
        await self._write(store, first, second, other_key, other_topic)
        lanes = await self._hold(store)
        await self._settle_failed(store, lanes, self.short, only=[first.id])
        await self._write(store, third := sample("orders", "a"))

        at_once = await store.outbox.claim(lanes, 10)
        await self.advance(self.short)
        later = await store.outbox.claim(lanes, 10)

        assert sorted(_ids(at_once)) == sorted([other_key.id, other_topic.id])
        assert [each for each in _ids(later) if each not in _ids(at_once)] == [first.id, second.id, third.id]

    @_store_test
    async def test_a_parked_record_holds_back_its_own_key_only(self, store: Store) -> None:
        """Guarantee 5: until an operator decides, however long that takes."""
        first, second = sample("orders", "a"), sample("orders", "a")
        other_key, other_topic = sample("orders", "b"), sample("stock", "a")
        await self._write(store, first, second, other_key, other_topic)
        lanes = await self._hold(store)
        await self._settle_failed(store, lanes, None, only=[first.id])
        await self._write(store, sample("orders", "a"))
        await self.advance(self.short)

        assert sorted(_ids(await store.outbox.claim(lanes, 10))) == sorted([other_key.id, other_topic.id])

    @_store_test
    async def test_a_held_back_key_does_not_use_up_the_limit(self, store: Store) -> None:
        """A thousand records behind a parked one must not fill every claim and starve the healthy keys."""
        await self._write(store, poison := sample("orders", "a"), *(sample("orders", "a") for _ in range(50)))
        lanes = await self._hold(store)
        await self._settle_failed(store, lanes, None, only=[poison.id])
        healthy = [sample("orders", f"healthy-{n}") for n in range(5)]
        await self._write(store, *healthy)

        assert sorted(_ids(await store.outbox.claim(lanes, 5))) == sorted(ids_of(healthy))

    @_store_test
    async def test_records_without_key_hold_back_nothing(self, store: Store) -> None:
        """They have no order, so a failed one has nothing to protect."""
        await self._write(store, first := sample("orders", None), second := sample("orders", None))
        lanes = await self._hold(store)
        await self._settle_failed(store, lanes, None, only=[first.id])
        await self._write(store, third := sample("orders", None))

        assert sorted(_ids(await store.outbox.claim(lanes, 10))) == sorted([second.id, third.id])

    @_store_test
    async def test_the_empty_key_is_a_key(self, store: Store) -> None:
        """The user has asked for order; a test for truth in the wrong place would lose it."""
        await self._write(store, first := sample("orders", ""), sample("orders", ""))
        lanes = await self._hold(store)
        await self._settle_failed(store, lanes, None, only=[first.id])

        assert list(await store.outbox.claim(lanes, 10)) == []

    @_store_test
    async def test_attempts_and_the_last_error_are_kept(self, store: Store) -> None:
        """Parking after so many attempts depends on the count, and the operator on the reason."""
        await self._write(store, sample("orders", "a"))
        lanes = await self._hold(store)

        counts: list[int] = []
        for error in ("first", "second"):
            [record] = await store.outbox.claim(lanes, 10)
            counts.append(record.attempts)
            failed = FailedRecord(record=record, error=f"{error} ü", delay=timedelta(0))
            await store.outbox.settle(Settlement(lanes=lanes, failed=[failed]))
        [record] = await store.outbox.claim(lanes, 10)
        await store.outbox.settle(Settlement(lanes=lanes, failed=[_failed(record, None)]))

        [stored] = await store.outbox.find(OutboxFilter())
        assert ([*counts, record.attempts], stored.attempts, stored.error) == ([0, 1, 2], 3, "refused")

    # --- operators ---

    @_store_test
    async def test_a_retried_record_comes_in_its_old_place(self, store: Store) -> None:
        """Guarantee 5: "in order". At the end of the line, it would be overtaken by what it held back."""
        written = [sample("orders", "a") for _ in range(4)]
        await self._write(store, *written[:3])
        lanes = await self._hold(store)
        await self._settle_failed(store, lanes, None, only=[written[0].id])
        await self._write(store, written[3])
        [parked] = await store.outbox.find(OutboxFilter(state="parked"))

        count = await store.outbox.retry([parked.id], who="kit")
        again = await store.outbox.retry([parked.id], who="kit")

        assert (count, again) == (1, 0)
        assert _ids(await store.outbox.claim(lanes, 10)) == ids_of(written)
        assert (await store.outbox.backlog()).parked == 0

    @_store_test
    async def test_the_attempts_of_a_retried_record_start_again(self, store: Store) -> None:
        """The operator has mended the cause: one more stumble must not park it again at once."""
        lanes = await self._park(store, [envelope := sample("orders", "a")], parked=[envelope])

        await store.outbox.retry(await self._record_ids(store, envelope), who="kit")
        [record] = await store.outbox.claim(lanes, 10)

        assert record.attempts == 0

    @_store_test
    async def test_of_two_parked_records_of_a_key_the_first_can_be_retried_alone(self, store: Store) -> None:
        """The second is still parked, and what is behind it still waits."""
        first, second, third = (sample("orders", "a") for _ in range(3))
        lanes = await self._park(store, [first, second, third], parked=[first, second])

        await store.outbox.retry(await self._record_ids(store, first), who="kit")

        assert _ids(await store.outbox.claim(lanes, 10)) == [first.id]

    @_store_test
    async def test_of_two_parked_records_of_a_key_the_second_waits_for_the_first(self, store: Store) -> None:
        """An operator who retries them in the wrong order must not turn the key's order round."""
        first, second, third = (sample("orders", "a") for _ in range(3))
        lanes = await self._park(store, [first, second, third], parked=[first, second])

        await store.outbox.retry(await self._record_ids(store, second), who="kit")
        held = await store.outbox.claim(lanes, 10)
        await store.outbox.retry(await self._record_ids(store, first), who="kit")

        assert list(held) == []
        assert _ids(await store.outbox.claim(lanes, 10)) == [first.id, second.id, third.id]

    @_store_test
    async def test_discarding_a_parked_record_sets_its_key_free(self, store: Store) -> None:
        """What is given up must not hold back the rest for ever."""
        first, second, third = (sample("orders", "a") for _ in range(3))
        lanes = await self._park(store, [first, second, third], parked=[first])
        ids = await self._record_ids(store, first)

        count = await store.outbox.discard(ids, who="kit")
        again = await store.outbox.discard(ids, who="kit")

        assert (count, again) == (1, 0)
        assert _ids(await store.outbox.claim(lanes, 10)) == [second.id, third.id]

    @_store_test
    async def test_what_is_behind_a_parked_record_follows_a_retry_in_order(self, store: Store) -> None:
        """Also what was written after the parking, and after the retry."""
        written = [sample("orders", "a") for _ in range(6)]
        lanes = await self._park(store, written[:3], parked=written[:1])
        await self._write(store, *written[3:5])
        await store.outbox.claim(lanes, 10)
        await store.outbox.retry(await self._record_ids(store, written[0]), who="kit")
        await self._write(store, written[5])

        assert _ids(await store.outbox.claim(lanes, 10)) == ids_of(written)

    @_store_test
    async def test_what_is_behind_a_parked_record_stays_visible(self, store: Store) -> None:
        """Operators see how much one record holds up; out of the way is not out of sight."""
        written = [sample("orders", "a") for _ in range(4)]
        lanes = await self._park(store, written[:3], parked=written[:1])
        await self._write(store, written[3])
        await store.outbox.claim(lanes, 10)

        held = await store.outbox.find(OutboxFilter(state="held"))
        everything = await store.outbox.find(OutboxFilter())

        assert [each.envelope.id for each in held] == ids_of(written[1:])
        assert [each.envelope.id for each in everything] == ids_of(written)
        assert (await store.outbox.backlog()).parked == 1

    @_store_test
    async def test_what_is_behind_a_parked_record_survives_a_change_of_owner(self, store: Store) -> None:
        """The next relay knows nothing but what the tables say."""
        written = [sample("orders", "a") for _ in range(3)]
        lanes = await self._park(store, written[:2], parked=written[:1])
        await store.outbox.release("kit", lanes)
        heir = await self._hold(store, "heir")
        await self._write(store, written[2])

        held_back = await store.outbox.claim(heir, 10)
        await store.outbox.discard(await self._record_ids(store, written[0]), who="kit")
        released = await store.outbox.claim(heir, 10)

        assert (_ids(held_back), _ids(released)) == ([], ids_of(written[1:]))

    @_store_test
    async def test_of_two_parked_records_of_a_key_discarding_the_first_leaves_the_second(self, store: Store) -> None:
        """What is between them is free, what is behind the second still waits."""
        written = [sample("orders", "a") for _ in range(4)]
        lanes = await self._park(store, written, parked=[written[0], written[2]])

        await store.outbox.discard(await self._record_ids(store, written[0]), who="kit")

        assert _ids(await store.outbox.claim(lanes, 10)) == [written[1].id]

    @_store_test
    async def test_a_rescheduled_record_can_be_discarded_and_a_pending_one_cannot(self, store: Store) -> None:
        """A pending record may be on its way to the broker at this moment: giving it up would promise too much."""
        await self._write(store, first := sample("orders", "a"), second := sample("orders", "a"))
        lanes = await self._hold(store)
        await self._settle_failed(store, lanes, _LEASE, only=[first.id])
        ids = await self._record_ids(store, first, second)

        assert await store.outbox.discard(ids, who="kit") == 1
        assert _ids(await store.outbox.claim(lanes, 10)) == [second.id]

    @_store_test
    async def test_operators_may_name_records_that_are_gone(self, store: Store) -> None:
        """Between their look and their command a relay has gone on."""
        assert await store.outbox.retry([987_654_321], who="kit") == 0
        assert await store.outbox.discard([987_654_321], who="kit") == 0
        assert await store.outbox.retry([], who="kit") == 0
        assert await store.outbox.discard([], who="kit") == 0

    @_store_test
    async def test_settling_a_record_that_was_discarded_meanwhile_is_harmless(self, store: Store) -> None:
        """Operators act while relays work; neither may break the other."""
        await self._write(store, sample("orders", "a"))
        lanes = await self._hold(store)
        await self._settle_failed(store, lanes, timedelta(0))
        [record] = await store.outbox.claim(lanes, 10)
        await store.outbox.discard([record.id], who="kit")

        await store.outbox.settle(Settlement(lanes=lanes, failed=[_failed(record, timedelta(0))]))
        await store.outbox.settle(Settlement(lanes=lanes, delivered=[record]))

        assert list(await store.outbox.find(OutboxFilter())) == []

    @_store_test
    async def test_records_are_shown_with_their_states(self, store: Store) -> None:
        """`outbox list` is what an operator has at three in the morning."""
        envelopes = [sample("orders", key) for key in ("later", "parked", "free")]
        await self._write(store, *envelopes)
        lanes = await self._hold(store)
        await self._settle_failed(store, lanes, _LEASE, only=[envelopes[0].id])
        await self._settle_failed(store, lanes, None, only=[envelopes[1].id])
        await self._write(store, behind := sample("orders", "parked"))

        found = {each.envelope.id: each for each in await store.outbox.find(OutboxFilter())}

        assert [found[each].state for each in ids_of([*envelopes, behind])] == [
            "rescheduled",
            "parked",
            "pending",
            "held",
        ]
        later = found[envelopes[0].id]
        assert later.due_at is not None
        assert later.due_at > later.written_at
        assert later.due_at.tzinfo is not None
        assert later.written_at.tzinfo is not None
        assert (later.attempts, later.error) == (1, "refused")
        assert later.envelope.data == envelopes[0].data

    @_store_test
    async def test_records_are_found_by_what_operators_know(self, store: Store) -> None:
        """Each filter narrows, together they narrow further, and the oldest comes first."""
        a, b, c, d = (
            sample("orders", "a"),
            sample("orders", "b"),
            sample("stock", "a"),
            sample("stock", None),
        )
        lanes = await self._park(store, [a, b, c, d], parked=[c])
        [id_of_a] = await self._record_ids(store, a)

        async def found(**wanted: Any) -> list[str]:
            return [each.envelope.id for each in await store.outbox.find(OutboxFilter(**wanted))]

        assert await found() == ids_of([a, b, c, d])
        assert await found(limit=2) == ids_of([a, b])
        assert await found(topic="stock") == ids_of([c, d])
        assert await found(key="a") == ids_of([a, c])
        assert await found(topic="stock", key="a") == ids_of([c])
        assert await found(state="parked") == ids_of([c])
        assert await found(state="pending") == ids_of([a, b, d])
        assert await found(ids=[id_of_a]) == ids_of([a])
        assert await found(ids=[id_of_a], topic="stock") == []
        assert lanes

    @_store_test
    async def test_records_are_found_by_error_and_age_and_page_by_page(self, store: Store) -> None:
        """Thousands are parked after a bad deployment: those of one reason, of before, and not all at once."""
        old, older = sample("orders", "a"), sample("orders", "b")
        lanes = await self._park(store, [old, older], parked=[older])
        await self.advance(self.short)
        await self._write(store, new := sample("orders", "c"))

        async def found(**wanted: Any) -> list[str]:
            return [each.envelope.id for each in await store.outbox.find(OutboxFilter(**wanted))]

        [first_id, second_id] = await self._record_ids(store, old, older)
        assert await found(error="fus") == ids_of([older])
        assert await found(error="no such reason") == []
        assert await found(error="%") == []
        assert await found(older_than=self.short, limit=2) == ids_of([old, older])
        assert await found(older_than=timedelta(days=1)) == []
        assert await found(limit=1) == ids_of([old])
        assert await found(limit=1, after=first_id) == ids_of([older])
        assert await found(after=second_id) == ids_of([new])
        assert lanes

    # --- history ---

    @_store_test
    async def test_delivered_records_are_kept_when_asked(self, store: Store) -> None:
        """The history: out of the way of everything, and shown only when asked for by its state."""
        envelope = full_sample("orders")
        await self._write(store, envelope, gone := sample("orders", "b"))
        lanes = await self._hold(store)
        records = {each.envelope.id: each for each in await store.outbox.claim(lanes, 10)}
        await store.outbox.settle(Settlement(lanes=lanes, delivered=[records[gone.id]]))
        await store.outbox.settle(Settlement(lanes=lanes, delivered=[records[envelope.id]], keep=True))

        [kept] = await store.outbox.find(OutboxFilter(state="delivered"))

        assert kept.envelope == records[envelope.id].envelope
        assert (kept.id, kept.state) == (records[envelope.id].id, "delivered")
        assert list(await store.outbox.find(OutboxFilter())) == []
        assert list(await store.outbox.find(OutboxFilter(ids=[kept.id]))) == []
        assert (await store.outbox.backlog()).pending == 0
        assert list(await store.outbox.claim(lanes, 10)) == []

    @_store_test
    async def test_the_history_is_found_by_every_filter(self, store: Store) -> None:
        """What went out about this order, and when?"""
        written = [sample("orders", "a"), sample("orders", "b"), sample("stock", "a")]
        lanes = await self._keep(store, *written)

        async def found(**wanted: Any) -> list[str]:
            return [each.envelope.id for each in await store.outbox.find(OutboxFilter(state="delivered", **wanted))]

        [first, *_] = await store.outbox.find(OutboxFilter(state="delivered"))
        assert await found() == ids_of(written)
        assert await found(key="a") == ids_of([written[0], written[2]])
        assert await found(topic="stock") == ids_of([written[2]])
        assert await found(after=first.id, limit=1) == ids_of([written[1]])
        assert lanes

    @_store_test
    async def test_a_settlement_that_is_repeated_keeps_a_record_once(self, store: Store) -> None:
        """The answer to the first one was lost on the way."""
        await self._write(store, sample("orders", "a"))
        lanes = await self._hold(store)
        delivered = await store.outbox.claim(lanes, 10)

        for _ in range(2):
            await store.outbox.settle(Settlement(lanes=lanes, delivered=delivered, keep=True))

        assert len(await store.outbox.find(OutboxFilter(state="delivered"))) == 1

    @_store_test
    async def test_replayed_records_come_at_the_end_under_their_own_ids(self, store: Store) -> None:
        """A consumer that had one drops it by its id; the sequence is new, or readers would refuse a step back."""
        first, second, third = sample("orders", "a"), sample("orders", "a"), sample("orders", "a")
        lanes = await self._keep(store, first, second)
        await self._write(store, third)
        kept = await store.outbox.find(OutboxFilter(state="delivered"))

        count = await store.outbox.replay([*(each.id for each in kept), 987_654_321], who="kit")
        claimed = await store.outbox.claim(lanes, 10)

        assert count == 2
        assert _ids(claimed) == ids_of([third, first, second])
        assert [each.envelope.sequence for each in claimed] == [each.id for each in claimed]
        assert len(await store.outbox.find(OutboxFilter(state="delivered"))) == 2
        assert await store.outbox.replay([], who="kit") == 0

    @_store_test
    async def test_the_history_is_cleaned_up_in_pieces(self, store: Store) -> None:
        """What retention says is done with goes, oldest first and never all at once; what is younger stays."""
        written = [sample("orders", "a") for _ in range(5)]
        lanes = await self._keep(store, *written)

        young = await store.clean_up(Retention(history=_LEASE), 10)
        for_ever = await store.clean_up(Retention(), 10)
        await self.advance(self.short)
        pieces = [await store.clean_up(Retention(history=self.short), 3)]
        left = await store.outbox.find(OutboxFilter(state="delivered"))
        pieces += [await store.clean_up(Retention(history=self.short), 3) for _ in range(2)]

        assert (young, for_ever, pieces) == (0, 0, [3, 2, 0])
        assert [each.envelope.id for each in left] == ids_of(written[3:])
        assert list(await store.outbox.find(OutboxFilter(state="delivered"))) == []
        assert lanes

    # --- wake-ups ---

    @_store_test
    async def test_a_wake_up_reaches_every_relay_that_listens(self, store: Store) -> None:
        """The process that committed knows nothing of who holds the lane."""
        wake_ups = self._wake_ups_of(store)
        async with wake_ups.listen("one") as one, wake_ups.listen("two") as two:
            await wake_ups.send()

            assert await self._hears(one, "work")
            assert await self._hears(two, "work")

    @_store_test
    async def test_a_renewal_echoes_to_its_owner(self, store: Store) -> None:
        """Listening that silently stopped working is found only by a sound that must come, on another connection."""
        wake_ups = self._wake_ups_of(store)
        async with wake_ups.listen("one") as one, wake_ups.listen("two") as two:
            await store.outbox.renew("one", [], _LEASE)

            assert await self._hears(one, "echo")
            await store.outbox.renew("two", [], _LEASE)
            await wake_ups.send()
            # Sounds come in order: had "one" heard the echo of "two", it would come before the wake-up.
            assert await one.hear() == "work"
            assert await self._hears(two, "echo")

    @_store_test
    async def test_wake_ups_that_nobody_waited_for_are_kept(self, store: Store) -> None:
        """A relay is busy when they come; it looks again before it sleeps."""
        wake_ups = self._wake_ups_of(store)
        async with wake_ups.listen("one") as ear:
            for _ in range(50):
                await wake_ups.send()

            assert await self._hears(ear, "work")

    @_store_test
    async def test_sending_without_a_listener_is_harmless(self, store: Store) -> None:
        """A web process does not know whether a relay is up."""
        wake_ups = self._wake_ups_of(store)
        async with wake_ups.listen("one"):
            pass

        await wake_ups.send()
        async with wake_ups.listen("one") as ear:
            await wake_ups.send()

            assert await self._hears(ear, "work")

    def _wake_ups_of(self, store: Store) -> WakeUps:
        if store.outbox.wake_ups is None:
            pytest.skip(f"{type(store).__name__} has no wake-ups: its relays look for work at intervals")
        return store.outbox.wake_ups

    async def _hears(self, ear: Ear, sound: Heard) -> bool:
        """Whether this sound comes within patience; others before it are passed over."""
        with anyio.move_on_after(self.patience.total_seconds()):
            while await ear.hear() != sound:
                pass
            return True
        return False

    async def _keep(self, store: Store, *envelopes: Envelope) -> Sequence[HeldLane]:
        """Write, deliver and keep them, one after the other."""
        await self._write(store, *envelopes)
        lanes = await self._hold(store)
        for _ in envelopes:
            delivered = await store.outbox.claim(lanes, 1)
            await store.outbox.settle(Settlement(lanes=lanes, delivered=delivered, keep=True))
        return lanes

    @_store_test
    async def test_the_backlog_counts_what_waits(self, store: Store) -> None:
        """The one figure that is watched: whether the relay keeps up, and whether somebody must look."""
        empty = await store.outbox.backlog()
        await self._park(store, [sample("orders", "a"), poison := sample("orders", "b")], parked=[poison])
        await self.advance(self.short)
        some = await store.outbox.backlog()

        assert (empty.pending, empty.parked, empty.oldest) == (0, 0, None)
        assert (some.pending, some.parked) == (1, 1)
        assert some.oldest is not None
        assert timedelta(0) < some.oldest < timedelta(hours=1)

    # --- the store around it ---

    @_store_test
    async def test_a_store_can_be_closed_twice_and_opened_again(self, store: Store) -> None:
        """Shutdowns run twice when they are interrupted, and an app can be entered again."""
        await store.close()
        await store.close()
        await store.open()
        await self._write(store, envelope := sample("orders"))

        assert _ids(await self._claim_all(store)) == [envelope.id]

    @_store_test
    async def test_a_check_answers_with_findings(self, store: Store) -> None:
        """`doctor` prints what it is given; a check that raises hides all other findings."""
        assert [finding for finding in await store.check() if finding.severity == "error"] == []
        if store.schema is not None:
            assert list(await store.schema.plan()) == []
            assert [finding for finding in await store.schema.check() if finding.severity == "error"] == []

    @_store_test
    async def test_the_card_says_in_words_what_a_crash_may_lose(self, store: Store) -> None:
        """The docs and `doctor` print the card; an empty field would promise what nobody checked."""
        assert isinstance(type(store).card, StoreCard)
        assert store.card.crash_may_lose
        assert store.name

    @_store_test
    async def test_plain_code_runs_in_the_transaction_without_blocking_the_loop(self, store: Store) -> None:
        """A `def` handler with a database works in the very transaction of its outbox rows."""
        transaction = await store.begin()
        result = await transaction.run_sync(lambda: 6 * 7)
        transaction.add([envelope := sample("orders")])
        await transaction.commit()

        assert result == 42
        assert _ids(await self._claim_all(store)) == [envelope.id]

    @_store_test
    async def test_an_error_of_the_user_says_nothing_about_the_database(self, store: Store) -> None:
        """A worker that takes a bug in a handler for an outage would retry it for ever."""
        assert not store.is_unavailable(ValueError("a bug"))
        assert not store.is_transient(ValueError("a bug"))

    # --- the words of the tests above ---

    async def _write(self, store: Store, *envelopes: Envelope) -> None:
        transaction = await store.begin()
        transaction.add(envelopes)
        await transaction.commit()

    async def _hold(self, store: Store, owner: str = "kit", lease: timedelta = _LEASE) -> Sequence[HeldLane]:
        """All lanes."""
        lanes = await self._acquire(store, owner, lease)
        assert len(lanes) == store.outbox.lane_count
        return lanes

    async def _acquire(
        self, store: Store, owner: str, lease: timedelta = _LEASE, *, limit: int | None = None
    ) -> Sequence[HeldLane]:
        return [each.lane for each in await self._take(store, owner, lease, limit=limit)]

    async def _take(
        self,
        store: Store,
        owner: str,
        lease: timedelta = _LEASE,
        *,
        limit: int | None = None,
        in_hand: int = _IN_HAND,
    ) -> Sequence[TakenLane]:
        """Up to `limit` lanes (all that can be had unless given), with their suspicions."""
        wanted = store.outbox.lane_count if limit is None else limit
        return await store.outbox.acquire(owner, lease, wanted, in_hand=in_hand)

    async def _vanish(self, store: Store, owner: str, *envelopes: Envelope) -> None:
        """A relay that takes all lanes, has these records in hand in single steps, and is never heard of again.
        Without records: one that claims a batch.
        """
        lanes = await self._hold(store, owner, self.short)
        if envelopes:
            stepped = await store.outbox.step(lanes, until=_FAR)
            assert sorted(_ids(stepped)) == sorted(ids_of(envelopes))
        else:
            await store.outbox.claim(lanes, 10)
        await self.advance(self.short)

    async def _suspicions(self, store: Store, owner: str = "heir", *, in_hand: int = _IN_HAND) -> dict[int, Suspicion]:
        """By lane, after taking all that can be had."""
        taken = await self._take(store, owner, in_hand=in_hand)
        return {each.lane.number: each.suspicion for each in taken if each.suspicion is not None}

    async def _claim_all(self, store: Store, owner: str = "kit") -> Sequence[ClaimedRecord]:
        lanes = await self._hold(store, owner)
        records = await store.outbox.claim(lanes, 10_000)
        await store.outbox.release(owner, lanes)
        return records

    async def _claim_one_and_lose_its_lane(self, store: Store) -> tuple[Sequence[HeldLane], ClaimedRecord]:
        await self._write(store, sample("orders"))
        lanes = await self._hold(store, "frozen", self.short)
        [record] = await store.outbox.claim(lanes, 10)
        await self.advance(self.short)
        await self._hold(store, "heir")
        return lanes, record

    async def _settle_failed(
        self,
        store: Store,
        lanes: Sequence[HeldLane],
        delay: timedelta | None,
        *,
        only: Collection[str] | None = None,
    ) -> None:
        """Claim, and report those of the envelope ids in `only` (all unless given) as refused."""
        records = await store.outbox.claim(lanes, 10_000)
        failed = [_failed(record, delay) for record in records if only is None or record.envelope.id in only]
        await store.outbox.settle(Settlement(lanes=lanes, failed=failed))

    async def _park(
        self, store: Store, envelopes: Sequence[Envelope], *, parked: Sequence[Envelope]
    ) -> Sequence[HeldLane]:
        await self._write(store, *envelopes)
        lanes = await self._hold(store)
        await self._settle_failed(store, lanes, None, only=ids_of(parked))
        return lanes

    async def _record_ids(self, store: Store, *envelopes: Envelope) -> list[int]:
        by_envelope = {each.envelope.id: each.id for each in await store.outbox.find(OutboxFilter())}
        return [by_envelope[each.id] for each in envelopes]

    async def _states(self, store: Store) -> dict[str | None, str]:
        return {each.envelope.key: each.state for each in await store.outbox.find(OutboxFilter())}


def _failed(record: ClaimedRecord, delay: timedelta | None) -> FailedRecord:
    return FailedRecord(record=record, error="refused", delay=delay)


def _ids(records: Sequence[ClaimedRecord]) -> list[str]:
    return ids_of(record.envelope for record in records)


def _lane_number(lane: HeldLane) -> int:
    return lane.number


def _in_lane_of(topic: str, key: str) -> Envelope:
    """A record of another key in the same lane."""
    lane = lane_of(topic, key, "")
    other = next(f"other-{n}" for n in range(10_000) if lane_of(topic, f"other-{n}", "") == lane)
    return sample(topic, other)
