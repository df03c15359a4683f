"""The kit for inbox stores."""

from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import anyio

from cqrs_decor.envelope import Envelope
from cqrs_decor.inbox import InboxFilter, Mark, Noted, ParkedMessage
from cqrs_decor.store import Store
from cqrs_decor.testing.conformance.kit import Kit, as_test, full_sample, ids_of, sample
from cqrs_decor.unit_of_work import Transaction

K = TypeVar("K", bound="InboxStoreConformance")
T = TypeVar("T")

_A_WHILE_S = 0.3
_PARKED_AT = datetime(2024, 2, 29, 12, 0, 0, tzinfo=UTC)
_ALL_MESSAGES = InboxFilter(limit=1_000)

NEW, HAD, HELD = Noted.NEW, Noted.HAD, Noted.HELD


def _store_test(test: Callable[[K, Store], Coroutine[Any, Any, None]]) -> Callable[[K], None]:
    def run(self: K) -> None:
        __tracebackhide__ = True
        self.run(self.open_store, lambda store: test(self, store))

    return as_test(run, test)


class InboxStoreConformance(Kit):
    """Holds the inbox of a store to the contract of `cqrs_decor.inbox`."""

    def open_store(self) -> AbstractAsyncContextManager[Store]:
        """An open store whose tables are empty; write it as an `@asynccontextmanager`. Called once for each test."""
        raise NotImplementedError(f"{type(self).__name__} must say how its store is opened: open_store()")

    # --- effects once ---

    @_store_test
    async def test_a_message_is_new_once(self, store: Store) -> None:
        """Guarantee 4: delivery is at least once, the effect is not."""
        message = sample("orders")

        assert [await self._record(store, message) for _ in range(3)] == [NEW, HAD, HAD]

    @_store_test
    async def test_a_second_record_in_the_same_transaction_is_not_new(self, store: Store) -> None:
        """A batch that holds a message twice must handle it once."""
        transaction = await store.begin()
        message = sample("orders")

        first = await store.inbox.record(transaction, "mail", message)
        second = await store.inbox.record(transaction, "mail", message)
        await transaction.commit()

        assert (first, second) == (NEW, HAD)

    @_store_test
    async def test_each_consumer_has_a_message_for_itself(self, store: Store) -> None:
        """Two handlers of one service both need it: the first must not take it from the second."""
        message = sample("orders")

        assert [await self._record(store, message, consumer) for consumer in ("mail", "stock", "mail")] == [
            NEW,
            NEW,
            HAD,
        ]

    @_store_test
    async def test_the_same_id_of_another_source_is_another_message(self, store: Store) -> None:
        """CloudEvents ids are unique within their source only."""
        message = sample("orders")
        other = replace(message, source="other")

        assert [await self._record(store, each) for each in (message, other, other)] == [NEW, NEW, HAD]

    @_store_test
    async def test_ids_are_told_apart_exactly(self, store: Store) -> None:
        """Some databases compare text without regard to case, accents or trailing blanks."""
        message = sample("orders")
        ids = ["Order-é", "order-é", "order-e", "order-e ", "ORDER-E"]

        assert [await self._record(store, replace(message, id=each)) for each in ids] == [NEW] * 5

    @_store_test
    async def test_a_rolled_back_record_leaves_nothing(self, store: Store) -> None:
        """A handler that failed must be able to run again: a row that stays would lose its message."""
        message = sample("orders")
        transaction = await store.begin()
        await store.inbox.record(transaction, "mail", message)
        await transaction.rollback()

        assert await self._record(store, message) is NEW

    @_store_test
    async def test_a_record_and_outbox_rows_are_one_transaction(self, store: Store) -> None:
        """Either both the effect and its events are there, or the message comes again."""
        message, event = sample("orders"), sample("mails")
        transaction = await store.begin()
        await store.inbox.record(transaction, "mail", message)
        transaction.add([event])
        await transaction.rollback()
        pending_after_rollback = (await store.outbox.backlog()).pending

        transaction = await store.begin()
        new = await store.inbox.record(transaction, "mail", message)
        transaction.add([event])
        await transaction.commit()

        assert (new, pending_after_rollback) == (NEW, 0)
        assert (await store.outbox.backlog()).pending == 1
        assert await self._record(store, message) is HAD

    @_store_test
    async def test_a_copy_waits_for_the_first_and_is_not_new_when_it_commits(self, store: Store) -> None:
        """Two workers have the same message after a rebalance: the copy must never run beside the first."""
        message, early, answers = sample("orders"), list[Noted](), list[Noted]()
        first = await store.begin()
        await store.inbox.record(first, "mail", message)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._record_into, answers, store, message)
            await anyio.sleep(_A_WHILE_S)
            early.extend(answers)
            await first.commit()

        assert (early, answers) == ([], [HAD])

    @_store_test
    async def test_a_copy_waits_for_the_first_and_is_new_when_it_rolls_back(self, store: Store) -> None:
        """The first one failed: now the copy is the one that counts."""
        message, early, answers = sample("orders"), list[Noted](), list[Noted]()
        first = await store.begin()
        await store.inbox.record(first, "mail", message)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._record_into, answers, store, message)
            await anyio.sleep(_A_WHILE_S)
            early.extend(answers)
            await first.rollback()

        assert (early, answers) == ([], [NEW])

    @_store_test
    async def test_of_many_copies_at_once_one_is_new(self, store: Store) -> None:
        """A broker that repeats itself ten times, on all workers at once."""
        message, answers = sample("orders"), list[Noted]()

        async with anyio.create_task_group() as tasks:
            for _ in range(8):
                tasks.start_soon(self._record_into, answers, store, message)

        assert (answers.count(NEW), answers.count(HAD)) == (1, 7)

    # --- many at once ---

    @_store_test
    async def test_many_are_noted_at_once_each_with_its_own_answer(self, store: Store) -> None:
        """A batch holds new ones, old ones, the same one twice, and some that wait behind a parked one."""
        new, old, parked, behind = sample("orders"), sample("orders"), sample("orders", "p"), sample("orders", "p")
        await self._record(store, old)
        await store.inbox.park(_parked(parked))

        batch = [new, old, new, parked, behind, sample("orders", None)]
        answers = await self._record_all(store, batch)

        assert list(answers) == [NEW, HAD, HAD, HAD, HELD, NEW]
        assert list(await self._record_all(store, batch)) == [HAD, HAD, HAD, HAD, HELD, HAD]
        assert list(await self._record_all(store, [])) == []

    @_store_test
    async def test_many_that_were_rolled_back_leave_nothing(self, store: Store) -> None:
        """A batch that failed is run one by one: each of its messages must be new again."""
        batch = [sample("orders") for _ in range(20)]
        transaction = await store.begin()
        await store.inbox.record_all(transaction, "mail", batch)
        await transaction.rollback()

        assert list(await self._record_all(store, batch)) == [NEW] * 20

    @_store_test
    async def test_two_batches_of_the_same_messages_do_not_lock_each_other_out(self, store: Store) -> None:
        """Two workers have the same after a rebalance, in another order: both come through, each with its share."""
        batch = [sample("orders") for _ in range(20)]
        answers: list[Noted] = []

        async def record_all(envelopes: Sequence[Envelope]) -> None:
            answers.extend(await self._record_all(store, envelopes))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(record_all, batch)
            tasks.start_soon(record_all, batch[::-1])

        assert (answers.count(NEW), answers.count(HAD)) == (20, 20)

    # --- parking ---

    @_store_test
    async def test_a_parked_message_is_kept_whole(self, store: Store) -> None:
        """It may be weeks until somebody retries it; what is not kept cannot be handled then."""
        parked = ParkedMessage(
            consumer="shop.mail",
            envelope=full_sample("orders"),
            error="ValueError: no address for żółć 🍵",
            attempts=8,
            parked_at=_PARKED_AT,
        )
        await store.inbox.park(parked)

        [found] = await store.inbox.find(InboxFilter())

        assert found == replace(parked, id=found.id)
        assert found.id > 0
        assert await store.inbox.parked_count() == 1

    @_store_test
    async def test_what_could_not_be_read_is_kept_byte_by_byte(self, store: Store) -> None:
        """A body that is no JSON, or no text at all, is what operators need to see most."""
        await store.inbox.park(_parked(sample("orders", None, data=bytes(range(256)))))

        [found] = await store.inbox.find(InboxFilter())

        assert (found.envelope.data, found.envelope.key) == (bytes(range(256)), None)

    @_store_test
    async def test_parking_again_replaces_error_and_count(self, store: Store) -> None:
        """A retry that failed is the same message with a newer reason; and nobody has asked for another retry yet."""
        envelope = sample("orders")
        await store.inbox.park(_parked(envelope))
        await store.inbox.park(_parked(sample("orders")))
        first = await self._parked_id(store, envelope)
        await store.inbox.retry([first], who="kit")

        await store.inbox.park(replace(_parked(envelope), error="TypeError: worse", attempts=9))

        found = await store.inbox.find(InboxFilter())
        assert len(found) == 2
        [again] = [each for each in found if each.envelope.id == envelope.id]
        assert (again.id, again.error, again.attempts, again.retry_requested) == (first, "TypeError: worse", 9, False)
        assert found[0] == again, "it keeps its place in the order of its key"

    @_store_test
    async def test_each_consumer_parks_a_message_for_itself(self, store: Store) -> None:
        """One handler fails and another does not: they are retried apart, and so are equal ids of two sources."""
        envelope = sample("orders")

        await store.inbox.park(_parked(envelope, "mail"))
        await store.inbox.park(_parked(envelope, "stock"))
        await store.inbox.park(_parked(replace(envelope, source="other"), "mail"))

        assert await store.inbox.parked_count() == 3

    @_store_test
    async def test_parked_messages_are_found_by_what_operators_know(self, store: Store) -> None:
        """Each filter narrows, together they narrow further, and the oldest comes first."""
        a, b, c = sample("orders", "a"), sample("orders", "b"), sample("stock", "a")
        await store.inbox.park(_parked(a, "mail"))
        await store.inbox.park(_parked(b, "stock"))
        await store.inbox.park(_parked(c, "mail"))
        first = await self._parked_id(store, a)

        async def found(**wanted: Any) -> list[str]:
            return ids_of(each.envelope for each in await store.inbox.find(InboxFilter(**wanted)))

        assert await found() == ids_of([a, b, c])
        assert await found(limit=2) == ids_of([a, b])
        assert await found(consumer="mail") == ids_of([a, c])
        assert await found(topic="orders") == ids_of([a, b])
        assert await found(key="a") == ids_of([a, c])
        assert await found(consumer="mail", topic="stock", key="a") == ids_of([c])
        assert await found(ids=[first]) == ids_of([a])
        assert await found(ids=[first], consumer="stock") == []

    # --- keys that are held ---

    @_store_test
    async def test_a_parked_message_holds_its_key(self, store: Store) -> None:
        """Order per key: what comes later must not overtake what could not be handled."""
        first, second = sample("orders"), sample("orders")
        kept = await store.inbox.park(_parked(first))

        assert kept
        assert await self._record(store, second) is HELD
        assert await self._record(store, second) is HELD, "and that left nothing behind"
        assert await self._record(store, first) is HAD, "a parked message that comes again is a repeat"

    @_store_test
    async def test_a_parked_message_holds_nothing_else(self, store: Store) -> None:
        """Another consumer, topic or key goes on; and so does what has no key."""
        await store.inbox.park(_parked(sample("orders", "a")))
        await store.inbox.park(_parked(sample("orders", None)))

        assert await self._record(store, sample("orders", "a"), "stock") is NEW
        assert await self._record(store, sample("stock", "a")) is NEW
        assert [await self._record(store, sample("orders", key)) for key in ("A", "a ", "", None)] == [NEW] * 4

    @_store_test
    async def test_the_empty_key_is_a_key(self, store: Store) -> None:
        """Some databases take empty text for nothing."""
        await store.inbox.park(_parked(sample("orders", "")))

        assert await self._record(store, sample("orders", "")) is HELD
        assert await self._record(store, sample("orders", None)) is NEW

    @_store_test
    async def test_what_was_handled_meanwhile_is_not_parked(self, store: Store) -> None:
        """A worker that lost its partition gives up on a message that the next one has handled: nothing is wrong."""
        message = sample("orders")
        await self._record(store, message)

        kept = await store.inbox.park(_parked(message))

        assert not kept
        assert await store.inbox.parked_count() == 0
        assert await self._record(store, sample("orders")) is NEW, "its key is not held"

    @_store_test
    async def test_parking_waits_for_a_copy_that_is_being_handled(self, store: Store) -> None:
        """Its outcome decides: with its success there is nothing to park."""
        message, early, answers = sample("orders"), list[bool](), list[bool]()
        transaction = await store.begin()
        await store.inbox.record(transaction, "mail", message)

        async def park() -> None:
            answers.append(await store.inbox.park(_parked(message)))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(park)
            await anyio.sleep(_A_WHILE_S)
            early.extend(answers)
            await transaction.commit()

        assert (early, answers) == ([], [False])

    @_store_test
    async def test_what_comes_later_is_kept_behind(self, store: Store) -> None:
        """It is whole, in its order, noted, and shown as one that did not fail."""
        first, second, third = (sample("orders") for _ in range(3))
        await store.inbox.park(_parked(first))

        kept = [await store.inbox.hold_back(_parked(each)) for each in (second, third)]

        found = await store.inbox.find(_ALL_MESSAGES)
        assert kept == [True, True]
        assert [(each.envelope, each.held) for each in found] == [(first, False), (second, True), (third, True)]
        assert await self._record(store, second) is HAD
        assert await store.inbox.parked_count() == 3

    @_store_test
    async def test_what_need_not_wait_is_not_kept_behind(self, store: Store) -> None:
        """Between the look and the holding back the key became free: now it is the message's turn."""
        message = sample("orders")
        await store.inbox.park(_parked(sample("orders", "b")))

        assert not await store.inbox.hold_back(_parked(message))
        assert await self._record(store, message) is NEW
        assert await store.inbox.parked_count() == 1

    @_store_test
    async def test_what_the_consumer_has_is_not_kept_behind(self, store: Store) -> None:
        """Two workers hold the same message back: it stands there once, and one of them is told to look again."""
        handled, copied = sample("orders"), sample("orders")
        await self._record(store, handled)
        await store.inbox.park(_parked(sample("orders")))

        answers = [await store.inbox.hold_back(_parked(each)) for each in (handled, copied, copied)]

        assert answers == [False, True, False]
        assert await store.inbox.parked_count() == 2

    @_store_test
    async def test_with_the_success_of_one_the_next_has_its_turn(self, store: Store) -> None:
        """An operator mends the first; those that only waited need no operator."""
        first, second, third = await self._chain(store, 3)
        await store.inbox.retry([await self._parked_id(store, first)], who="kit")
        seen: list[list[str]] = []

        while wanted := await store.inbox.retries(["mail"], 10):
            seen.append(ids_of(each.envelope for each in wanted))
            assert [each.held for each in wanted] == [False]
            assert await self._record(store, sample("orders")) is HELD
            await self._unpark(store, wanted[0].id)

        assert seen == [[first.id], [second.id], [third.id]]
        assert await self._record(store, sample("orders")) is NEW, "with the last one the key is free"
        assert [await self._record(store, each) for each in (first, second, third)] == [HAD] * 3

    @_store_test
    async def test_a_rolled_back_success_moves_nothing(self, store: Store) -> None:
        """The retry's worker died before its commit: its place, and those behind it, are as they were."""
        first, _ = await self._chain(store, 2)
        await store.inbox.retry([await self._parked_id(store, first)], who="kit")
        transaction = await store.begin()
        await store.inbox.unpark(transaction, await self._parked_id(store, first))
        await transaction.rollback()

        assert ids_of(each.envelope for each in await store.inbox.retries(["mail"], 10)) == [first.id]
        assert [each.held for each in await store.inbox.find(_ALL_MESSAGES)] == [False, True]
        assert await self._record(store, sample("orders")) is HELD

    @_store_test
    async def test_a_retry_that_failed_keeps_those_behind_it_waiting(self, store: Store) -> None:
        """It is parked again in its old place."""
        first, second = await self._chain(store, 2)
        await store.inbox.retry([await self._parked_id(store, first)], who="kit")

        kept = await store.inbox.park(replace(_parked(first), error="TypeError: worse"))

        assert kept
        assert list(await store.inbox.retries(["mail"], 10)) == []
        assert ids_of(each.envelope for each in await store.inbox.find(_ALL_MESSAGES)) == [first.id, second.id]

    @_store_test
    async def test_one_that_waited_and_then_failed_is_held_no_longer(self, store: Store) -> None:
        """An operator has to find it among those that failed, and may ask for it again."""
        first, second, _ = await self._chain(store, 3)
        await self._unpark(store, await self._parked_id(store, first))

        await store.inbox.park(_parked(second))

        assert [each.held for each in await store.inbox.find(_ALL_MESSAGES)] == [False, True]
        assert list(await store.inbox.retries(["mail"], 10)) == []
        assert await store.inbox.retry([await self._parked_id(store, second)], who="kit") == 1

    @_store_test
    async def test_of_each_key_only_the_first_is_retried(self, store: Store) -> None:
        """Two failed ones of a key: the second has to wait for the first, whatever operators ask for."""
        first, second, other = sample("orders"), sample("orders"), sample("orders", "b")
        for each in (first, second, other):
            await store.inbox.park(_parked(each))
        await store.inbox.retry([await self._parked_id(store, each) for each in (second, other)], who="kit")
        without_the_first = await store.inbox.retries(["mail"], 10)
        await store.inbox.retry([await self._parked_id(store, first)], who="kit")

        assert ids_of(each.envelope for each in without_the_first) == [other.id]
        assert ids_of(each.envelope for each in await store.inbox.retries(["mail"], 10)) == [first.id, other.id]

    @_store_test
    async def test_one_that_is_held_cannot_be_asked_for(self, store: Store) -> None:
        """It follows by itself; asking for it would show it as wanted while it cannot be had."""
        _, second = await self._chain(store, 2)

        assert await store.inbox.retry([await self._parked_id(store, second)], who="kit") == 0
        assert list(await store.inbox.retries(["mail"], 10)) == []

    @_store_test
    async def test_when_the_first_is_given_up_the_next_has_its_turn(self, store: Store) -> None:
        """A poison message is discarded: what waited behind it is handled without further ado."""
        first, second, third = await self._chain(store, 3)

        await store.inbox.discard([await self._parked_id(store, each) for each in (second, first)], who="kit")

        assert ids_of(each.envelope for each in await store.inbox.retries(["mail"], 10)) == [third.id]
        assert [await self._record(store, each) for each in (first, second, third)] == [HAD] * 3
        assert await self._record(store, sample("orders")) is HELD

    @_store_test
    async def test_giving_up_one_in_the_middle_moves_nobody(self, store: Store) -> None:
        """The first still stands in the way."""
        first, second, third = await self._chain(store, 3)

        await store.inbox.discard([await self._parked_id(store, second)], who="kit")

        assert list(await store.inbox.retries(["mail"], 10)) == []
        assert ids_of(each.envelope for each in await store.inbox.find(_ALL_MESSAGES)) == [first.id, third.id]

    @_store_test
    async def test_when_the_last_is_given_up_the_key_is_free(self, store: Store) -> None:
        """Otherwise it would be held for ever, by nothing that anybody could see."""
        [only] = await self._chain(store, 1)

        await store.inbox.discard([await self._parked_id(store, only)], who="kit")

        assert await self._record(store, sample("orders")) is NEW
        assert await self._record(store, only) is HAD

    @_store_test
    async def test_holding_back_waits_for_the_last_of_the_key(self, store: Store) -> None:
        """What is put behind one that is just leaving would wait for ever."""
        assert await self._hold_back_while_the_last_leaves(store, commits=True) == ([], [False])

    @_store_test
    async def test_holding_back_behind_one_that_does_not_leave_after_all(self, store: Store) -> None:
        """Its retry failed: it stays the first."""
        assert await self._hold_back_while_the_last_leaves(store, commits=False) == ([], [True])

    @_store_test
    async def test_operators_and_workers_at_once_lose_nothing(self, store: Store) -> None:
        """Retries, arrivals and discards of one key side by side: no deadlock, and at the end the key is free."""
        [first] = await self._chain(store, 1)
        arrivals = [sample("orders") for _ in range(12)]
        await store.inbox.retry([await self._parked_id(store, first)], who="kit")

        async def arrive(envelope: Envelope) -> None:
            while await self._record(store, envelope) is HELD:
                if await store.inbox.hold_back(_parked(envelope)):
                    return

        async def retry() -> None:
            for wanted in await store.inbox.retries(["mail"], 10):
                await self._unpark(store, wanted.id)

        async def discard() -> None:
            await store.inbox.discard([each.id for each in await store.inbox.find(InboxFilter(limit=2))], who="kit")

        async with anyio.create_task_group() as tasks:
            for number, envelope in enumerate(arrivals):
                tasks.start_soon(arrive, envelope)
                tasks.start_soon(discard if number % 4 == 0 else retry)
        while await store.inbox.retries(["mail"], 10):
            await retry()

        assert await store.inbox.parked_count() == 0
        assert [await self._record(store, each) for each in arrivals] == [HAD] * 12
        assert await self._record(store, sample("orders")) is NEW

    # --- marks ---

    @_store_test
    async def test_what_a_vanished_worker_had_in_hand_is_told_to_the_next(self, store: Store) -> None:
        """A message that kills the process leaves no other trace."""
        marks = [
            Mark(topic="orders", partition=0, until=120),
            Mark(topic="orders", partition=1, until=5_000_000_000, suspect=4_999_999_999, crashes={7: 2, 9: 1}),
        ]
        await store.inbox.mark("shop", "one", marks)

        taken = await store.inbox.take_marks("shop", "two", [("orders", 0), ("orders", 1), ("orders", 2)])

        assert sorted(taken, key=lambda each: each.partition) == marks
        assert len(await store.inbox.take_marks("shop", "three", [("orders", 1)])) == 1, "it stays until it is replaced"

    @_store_test
    async def test_a_mark_replaces_the_one_before(self, store: Store) -> None:
        """There is one reader of a partition: what the one before it had in hand is this one's to deal with now."""
        await store.inbox.mark("shop", "one", [Mark(topic="orders", partition=0, until=120, suspect=7, crashes={7: 1})])
        await store.inbox.mark("shop", "two", [Mark(topic="orders", partition=0, until=300)])

        assert list(await store.inbox.take_marks("shop", "two", [("orders", 0)])) == []
        assert list(await store.inbox.take_marks("shop", "three", [("orders", 0)])) == [
            Mark(topic="orders", partition=0, until=300)
        ]

    @_store_test
    async def test_marks_that_were_taken_off_are_gone(self, store: Store) -> None:
        """A worker that stopped in order must not be taken for one that vanished."""
        await store.inbox.mark("shop", "one", [Mark(topic="orders", partition=n, until=9) for n in range(3)])

        await store.inbox.unmark("shop", "one", [("orders", 0), ("orders", 1), ("stock", 0)])

        taken = await store.inbox.take_marks("shop", "two", [("orders", n) for n in range(3)])
        assert [each.partition for each in taken] == [2]

    @_store_test
    async def test_what_is_known_of_crashes_outlives_a_stop(self, store: Store) -> None:
        """A rebalance on the way to a message that kills must not set its count to nothing."""
        known = Mark(topic="orders", partition=0, until=9, suspect=3, crashes={7: 2})
        await store.inbox.mark("shop", "one", [known, Mark(topic="orders", partition=1, until=9, suspect=4)])

        await store.inbox.unmark("shop", "one", [("orders", 0), ("orders", 1)])

        for reader in ("one", "two"):
            assert list(await store.inbox.take_marks("shop", reader, [("orders", 0), ("orders", 1)])) == [
                Mark(topic="orders", partition=0, until=9, crashes={7: 2})
            ]

    @_store_test
    async def test_a_worker_takes_off_its_own_marks_only(self, store: Store) -> None:
        """One that lost its partition and comes to itself late must not wipe out what the new reader noted."""
        await store.inbox.mark("shop", "two", [Mark(topic="orders", partition=0, until=9)])

        await store.inbox.unmark("shop", "one", [("orders", 0)])

        assert len(await store.inbox.take_marks("shop", "three", [("orders", 0)])) == 1

    @_store_test
    async def test_each_group_has_its_own_marks(self, store: Store) -> None:
        """Two services may share a database, and read the same topics."""
        await store.inbox.mark("shop", "one", [Mark(topic="orders", partition=0, until=9)])

        assert list(await store.inbox.take_marks("mail", "two", [("orders", 0)])) == []

    # --- operators ---

    @_store_test
    async def test_parked_messages_are_found_by_what_happened_to_them(self, store: Store) -> None:
        """By a part of the reason, by age, by whether they failed themselves, and page by page."""
        failed, behind = await self._chain(store, 2)
        timed_out = replace(
            _parked(sample("orders", "b")), error="Timeout_%: 3 s", parked_at=datetime(2199, 1, 1, tzinfo=UTC)
        )
        await store.inbox.park(timed_out)
        last = timed_out.envelope
        first_id = await self._parked_id(store, failed)

        async def found(**wanted: Any) -> list[str]:
            return ids_of(each.envelope for each in await store.inbox.find(InboxFilter(**wanted)))

        assert await found(error="refused") == [failed.id, behind.id]
        assert await found(error="_%:") == [last.id], "nothing in it is a pattern"
        assert await found(older_than=timedelta(days=1)) == [failed.id, behind.id]
        assert await found(held=True) == [behind.id]
        assert await found(held=False) == [failed.id, last.id]
        assert await found(after=first_id, limit=1) == [behind.id]
        assert await found(after=first_id, held=False, error="3 s") == [last.id]

    @_store_test
    async def test_a_retry_is_asked_for_and_left_to_the_worker(self, store: Store) -> None:
        """The worker that owns the partition carries it out, else it would race new arrivals of the same key."""
        first, second, other = sample("orders", "a"), sample("orders", "b"), sample("orders", "a")
        for envelope in (first, second):
            await store.inbox.park(_parked(envelope, "mail"))
        await store.inbox.park(_parked(other, "stock"))
        everything = [each.id for each in await store.inbox.find(InboxFilter())]

        before = await store.inbox.retries(["mail", "stock"], 10)
        count = await store.inbox.retry(everything, who="kit")
        again = await store.inbox.retry(everything, who="kit")

        assert (list(before), count, again) == ([], 3, 0)
        assert ids_of(each.envelope for each in await store.inbox.retries(["mail"], 10)) == [first.id, second.id]
        assert ids_of(each.envelope for each in await store.inbox.retries(["mail"], 1)) == [first.id]
        assert len(await store.inbox.retries(["mail", "stock"], 10)) == 3
        assert list(await store.inbox.retries(["nobody"], 10)) == []
        assert list(await store.inbox.retries([], 10)) == []
        assert [each.retry_requested for each in await store.inbox.find(InboxFilter())] == [True] * 3
        assert await store.inbox.parked_count() == 3

    @_store_test
    async def test_a_message_is_taken_out_of_parking_by_a_commit(self, store: Store) -> None:
        """The retry's effects and the end of the parking are one transaction."""
        await store.inbox.park(_parked(envelope := sample("orders")))
        parked_id = await self._parked_id(store, envelope)

        transaction = await store.begin()
        mine = await store.inbox.unpark(transaction, parked_id)
        await transaction.commit()
        transaction = await store.begin()
        again = await store.inbox.unpark(transaction, parked_id)
        await transaction.rollback()

        assert (mine, again) == (True, False)
        assert await store.inbox.parked_count() == 0

    @_store_test
    async def test_a_rollback_keeps_the_message_parked(self, store: Store) -> None:
        """The retry failed, or its worker died in the middle: the message must not be lost."""
        await store.inbox.park(_parked(envelope := sample("orders")))
        parked_id = await self._parked_id(store, envelope)
        await store.inbox.retry([parked_id], who="kit")

        transaction = await store.begin()
        await store.inbox.unpark(transaction, parked_id)
        await transaction.rollback()

        [found] = await store.inbox.find(InboxFilter())
        assert (found.envelope, found.retry_requested) == (envelope, True)

    @_store_test
    async def test_of_two_workers_one_takes_a_parked_message_out(self, store: Store) -> None:
        """Both saw the operator's wish; only one may run the handler."""
        await store.inbox.park(_parked(envelope := sample("orders")))
        parked_id = await self._parked_id(store, envelope)
        answers: list[bool] = []

        async def unpark() -> None:
            answers.append(await self._in_transaction(store, lambda each: store.inbox.unpark(each, parked_id)))

        async with anyio.create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(unpark)

        assert sorted(answers) == [False, True]

    @_store_test
    async def test_discarded_messages_are_gone(self, store: Store) -> None:
        """An operator's "give it up", which may come twice."""
        await store.inbox.park(_parked(gone := sample("orders")))
        await store.inbox.park(_parked(kept := sample("orders")))
        parked_id = await self._parked_id(store, gone)

        count = await store.inbox.discard([parked_id], who="kit")
        again = await store.inbox.discard([parked_id], who="kit")

        assert (count, again) == (1, 0)
        assert ids_of(each.envelope for each in await store.inbox.find(InboxFilter())) == [kept.id]

    @_store_test
    async def test_operators_may_name_messages_that_are_gone(self, store: Store) -> None:
        """Between their look and their command a worker has gone on."""
        assert await store.inbox.retry([987_654_321], who="kit") == 0
        assert await store.inbox.discard([987_654_321], who="kit") == 0
        assert await store.inbox.retry([], who="kit") == 0
        assert await store.inbox.discard([], who="kit") == 0

    # --- the words of the tests above ---

    async def _record(self, store: Store, envelope: Envelope, consumer: str = "mail") -> Noted:
        return await self._in_transaction(store, lambda each: store.inbox.record(each, consumer, envelope))

    async def _record_into(self, answers: list[Noted], store: Store, envelope: Envelope) -> None:
        answers.append(await self._record(store, envelope))

    async def _in_transaction(self, store: Store, work: Callable[[Transaction], Coroutine[Any, Any, T]]) -> T:
        """Run `work` and commit, again after a deadlock or the like: that is what a worker does."""
        while True:
            transaction = await store.begin()
            try:
                answer = await work(transaction)
                await transaction.commit()
            except Exception as error:
                await transaction.rollback()
                if not store.is_transient(error):
                    raise
            else:
                return answer

    async def _record_all(self, store: Store, envelopes: Sequence[Envelope]) -> Sequence[Noted]:
        return await self._in_transaction(store, lambda each: store.inbox.record_all(each, "mail", envelopes))

    async def _unpark(self, store: Store, parked_id: int) -> bool:
        return await self._in_transaction(store, lambda each: store.inbox.unpark(each, parked_id))

    async def _chain(self, store: Store, length: int) -> list[Envelope]:
        """A parked message, and others of its key behind it."""
        envelopes = [sample("orders") for _ in range(length)]
        await store.inbox.park(_parked(envelopes[0]))
        for each in envelopes[1:]:
            await store.inbox.hold_back(_parked(each))
        return envelopes

    async def _hold_back_while_the_last_leaves(self, store: Store, *, commits: bool) -> tuple[list[bool], list[bool]]:
        """What holding back answers while the retry of the last one is open, and what after its end."""
        [last] = await self._chain(store, 1)
        early, answers = list[bool](), list[bool]()
        transaction = await store.begin()
        await store.inbox.unpark(transaction, await self._parked_id(store, last))

        async def hold_back() -> None:
            answers.append(await store.inbox.hold_back(_parked(sample("orders"))))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hold_back)
            await anyio.sleep(_A_WHILE_S)
            early.extend(answers)
            await (transaction.commit() if commits else transaction.rollback())
        return early, answers

    async def _parked_id(self, store: Store, envelope: Envelope) -> int:
        [found] = [each for each in await store.inbox.find(InboxFilter()) if each.envelope == envelope]
        return found.id


def _parked(envelope: Envelope, consumer: str = "mail") -> ParkedMessage:
    return ParkedMessage(
        consumer=consumer, envelope=envelope, error="ValueError: refused", attempts=3, parked_at=_PARKED_AT
    )
