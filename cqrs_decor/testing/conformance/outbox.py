"""The kit for outbox stores."""

from collections.abc import Callable, Collection, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from typing import Any, ClassVar, TypeVar

import anyio
import pytest

from cqrs_decor.envelope import Envelope
from cqrs_decor.errors import LaneLostError
from cqrs_decor.lanes import HeldLane
from cqrs_decor.outbox import ClaimedRecord, FailedRecord, OutboxFilter, Settlement
from cqrs_decor.store import Store, StoreCard
from cqrs_decor.testing.conformance.kit import Kit, as_test, full_sample, ids_by_key, ids_of, require, sample

K = TypeVar("K", bound="OutboxStoreConformance")

_LEASE = timedelta(minutes=5)


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

        one = await store.outbox.acquire("one", _LEASE, count // 2)
        two = await store.outbox.acquire("two", _LEASE, count)
        three = await store.outbox.acquire("three", _LEASE, count)

        assert len(one) == count // 2
        assert sorted(lane.number for lane in [*one, *two]) == list(range(count))
        assert list(three) == []

    @_store_test
    async def test_lanes_taken_at_the_same_time_do_not_overlap(self, store: Store) -> None:
        """After a deployment all relays come up at once."""
        taken: dict[str, Sequence[HeldLane]] = {}

        async def acquire(owner: str) -> None:
            taken[owner] = await store.outbox.acquire(owner, _LEASE, store.outbox.lane_count // 4)

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

        at_once = await store.outbox.acquire("heir", _LEASE, store.outbox.lane_count)
        await self.advance(self.short)
        later = await store.outbox.acquire("heir", _LEASE, store.outbox.lane_count)

        assert (len(at_once), len(later)) == (0, store.outbox.lane_count)

    @_store_test
    async def test_a_renewed_lease_is_kept(self, store: Store) -> None:
        """A relay that is alive and slow must not lose its lanes to one that is idle."""
        lanes = await self._hold(store, "alive", self.short)

        renewed = await store.outbox.renew("alive", lanes, _LEASE)
        await self.advance(self.short)

        assert sorted(renewed, key=_lane_number) == sorted(lanes, key=_lane_number)
        assert list(await store.outbox.acquire("idle", _LEASE, store.outbox.lane_count)) == []

    @_store_test
    async def test_renewing_returns_only_what_is_still_held(self, store: Store) -> None:
        """It is how a relay learns that it was taken for dead."""
        lanes = await self._hold(store, "slow", self.short)
        await self.advance(self.short)
        lost = await store.outbox.acquire("heir", _LEASE, 3)

        renewed = await store.outbox.renew("slow", lanes, _LEASE)

        gone = {lane.number for lane in lost}
        assert {lane.number for lane in renewed} == {lane.number for lane in lanes} - gone
        assert len(await store.outbox.renew("heir", lost, _LEASE)) == 3

    @_store_test
    async def test_released_lanes_are_free_at_once(self, store: Store) -> None:
        """A relay that stops in good order must not make the next one wait for its leases."""
        lanes = await self._hold(store, "one")
        await store.outbox.release("one", lanes[:5])

        taken = await store.outbox.acquire("two", _LEASE, store.outbox.lane_count)

        assert {lane.number for lane in taken} == {lane.number for lane in lanes[:5]}

    @_store_test
    async def test_releasing_a_lost_lane_leaves_its_new_owner_alone(self, store: Store) -> None:
        """A frozen relay that wakes up to its own shutdown must not free what another one works on."""
        lanes = await self._hold(store, "frozen", self.short)
        await self.advance(self.short)
        await self._hold(store, "heir")

        await store.outbox.release("frozen", lanes)

        assert list(await store.outbox.acquire("third", _LEASE, store.outbox.lane_count)) == []

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
        lost = await store.outbox.acquire("heir", _LEASE, 1)

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
        lanes = await store.outbox.acquire(owner, lease, store.outbox.lane_count)
        assert len(lanes) == store.outbox.lane_count
        return lanes

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
