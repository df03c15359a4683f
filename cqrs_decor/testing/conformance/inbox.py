"""The kit for inbox stores."""

from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, TypeVar

import anyio

from cqrs_decor.envelope import Envelope
from cqrs_decor.inbox import InboxFilter, ParkedMessage
from cqrs_decor.store import Store
from cqrs_decor.testing.conformance.kit import Kit, as_test, full_sample, ids_of, sample
from cqrs_decor.unit_of_work import Transaction

K = TypeVar("K", bound="InboxStoreConformance")

_A_WHILE_S = 0.3
_PARKED_AT = datetime(2024, 2, 29, 12, 0, 0, tzinfo=UTC)


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

        assert [await self._record(store, message) for _ in range(3)] == [True, False, False]

    @_store_test
    async def test_a_second_record_in_the_same_transaction_is_not_new(self, store: Store) -> None:
        """A batch that holds a message twice must handle it once."""
        transaction = await store.begin()
        message = sample("orders")

        first = await store.inbox.record(transaction, "mail", message)
        second = await store.inbox.record(transaction, "mail", message)
        await transaction.commit()

        assert (first, second) == (True, False)

    @_store_test
    async def test_each_consumer_has_a_message_for_itself(self, store: Store) -> None:
        """Two handlers of one service both need it: the first must not take it from the second."""
        message = sample("orders")

        assert [await self._record(store, message, consumer) for consumer in ("mail", "stock", "mail")] == [
            True,
            True,
            False,
        ]

    @_store_test
    async def test_the_same_id_of_another_source_is_another_message(self, store: Store) -> None:
        """CloudEvents ids are unique within their source only."""
        message = sample("orders")
        other = replace(message, source="other")

        assert [await self._record(store, each) for each in (message, other, other)] == [True, True, False]

    @_store_test
    async def test_ids_are_told_apart_exactly(self, store: Store) -> None:
        """Some databases compare text without regard to case, accents or trailing blanks."""
        message = sample("orders")
        ids = ["Order-é", "order-é", "order-e", "order-e ", "ORDER-E"]

        assert [await self._record(store, replace(message, id=each)) for each in ids] == [True] * 5

    @_store_test
    async def test_a_rolled_back_record_leaves_nothing(self, store: Store) -> None:
        """A handler that failed must be able to run again: a row that stays would lose its message."""
        message = sample("orders")
        transaction = await store.begin()
        await store.inbox.record(transaction, "mail", message)
        await transaction.rollback()

        assert await self._record(store, message)

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

        assert (new, pending_after_rollback) == (True, 0)
        assert (await store.outbox.backlog()).pending == 1
        assert not await self._record(store, message)

    @_store_test
    async def test_a_copy_waits_for_the_first_and_is_not_new_when_it_commits(self, store: Store) -> None:
        """Two workers have the same message after a rebalance: the copy must never run beside the first."""
        message, early, answers = sample("orders"), list[bool](), list[bool]()
        first = await store.begin()
        await store.inbox.record(first, "mail", message)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._record_into, answers, store, message)
            await anyio.sleep(_A_WHILE_S)
            early.extend(answers)
            await first.commit()

        assert (early, answers) == ([], [False])

    @_store_test
    async def test_a_copy_waits_for_the_first_and_is_new_when_it_rolls_back(self, store: Store) -> None:
        """The first one failed: now the copy is the one that counts."""
        message, early, answers = sample("orders"), list[bool](), list[bool]()
        first = await store.begin()
        await store.inbox.record(first, "mail", message)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._record_into, answers, store, message)
            await anyio.sleep(_A_WHILE_S)
            early.extend(answers)
            await first.rollback()

        assert (early, answers) == ([], [True])

    @_store_test
    async def test_of_many_copies_at_once_one_is_new(self, store: Store) -> None:
        """A broker that repeats itself ten times, on all workers at once."""
        message, answers = sample("orders"), list[bool]()

        async with anyio.create_task_group() as tasks:
            for _ in range(8):
                tasks.start_soon(self._record_into, answers, store, message)

        assert sorted(answers) == [False] * 7 + [True]

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

    # --- operators ---

    @_store_test
    async def test_a_retry_is_asked_for_and_left_to_the_worker(self, store: Store) -> None:
        """The worker that owns the partition carries it out, else it would race new arrivals of the same key."""
        first, second, other = sample("orders"), sample("orders"), sample("orders")
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

    async def _record(self, store: Store, envelope: Envelope, consumer: str = "mail") -> bool:
        return await self._in_transaction(store, lambda each: store.inbox.record(each, consumer, envelope))

    async def _record_into(self, answers: list[bool], store: Store, envelope: Envelope) -> None:
        answers.append(await self._record(store, envelope))

    async def _in_transaction(self, store: Store, work: Callable[[Transaction], Coroutine[Any, Any, bool]]) -> bool:
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

    async def _parked_id(self, store: Store, envelope: Envelope) -> int:
        [found] = [each for each in await store.inbox.find(InboxFilter()) if each.envelope == envelope]
        return found.id


def _parked(envelope: Envelope, consumer: str = "mail") -> ParkedMessage:
    return ParkedMessage(
        consumer=consumer, envelope=envelope, error="ValueError: refused", attempts=3, parked_at=_PARKED_AT
    )
