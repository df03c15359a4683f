"""The kit for stores of idempotency keys."""

from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

import anyio
import anyio.lowlevel

from cqrs_decor.idempotency import KeptResult
from cqrs_decor.store import Store
from cqrs_decor.testing.conformance.kit import Kit, as_test, sample

K = TypeVar("K", bound="IdempotencyStoreConformance")

_A_WHILE_S = 0.3


def _store_test(test: Callable[[K, Store], Coroutine[Any, Any, None]]) -> Callable[[K], None]:
    def run(self: K) -> None:
        __tracebackhide__ = True
        self.run(self.open_store, lambda store: test(self, store))

    return as_test(run, test)


class IdempotencyStoreConformance(Kit):
    """Holds the idempotency keys of a store to the contract of `cqrs_decor.store`."""

    def open_store(self) -> AbstractAsyncContextManager[Store]:
        """An open store whose tables are empty; write it as an `@asynccontextmanager`. Called once for each test."""
        raise NotImplementedError(f"{type(self).__name__} must say how its store is opened: open_store()")

    @_store_test
    async def test_a_key_is_taken_once(self, store: Store) -> None:
        """Whoever comes later is told what the first one came to."""
        assert await self._handled(store, "key", "digest", b'{"number": 1}') is None

        assert await self._handled(store, "key", "digest", b"else") == KeptResult(
            fingerprint="digest", result=b'{"number": 1}'
        )

    @_store_test
    async def test_results_are_kept_byte_by_byte(self, store: Store) -> None:
        """Also those that are no text, empty, or not there."""
        results = [bytes(range(256)) * 300, b"", None]
        for number, result in enumerate(results):
            await self._handled(store, f"key-{number}", "digest", result)

        for number, result in enumerate(results):
            kept = await self._handled(store, f"key-{number}", "digest", b"else")
            same = kept is not None and kept.result == result  # pytest takes minutes to show where many bytes differ
            assert same, f"a result of {0 if result is None else len(result)} bytes came back as another"

    @_store_test
    async def test_the_first_fingerprint_stays(self, store: Store) -> None:
        """It tells a wish that is repeated from another one under the same key."""
        await self._handled(store, "key", "first", b"1")

        kept = [await self._handled(store, "key", other, b"2") for other in ("second", "first")]

        assert kept == [KeptResult(fingerprint="first", result=b"1")] * 2

    @_store_test
    async def test_keys_are_told_apart_exactly(self, store: Store) -> None:
        """Some databases compare text without regard to case, accents or trailing blanks; and keys may be long."""
        keys = ["Order-é", "order-é", "order-e", "order-e ", "ORDER-E", "x" * 5000, "x" * 4999]

        assert [await self._handled(store, key, "digest", b"1") for key in keys] == [None] * 7

    @_store_test
    async def test_a_rollback_gives_the_key_back(self, store: Store) -> None:
        """A command that failed has come to nothing: it must be able to run again."""
        transaction = await store.begin()
        await store.idempotency.begin(transaction, "key", "digest")
        await store.idempotency.keep(transaction, "key", b"1")
        await transaction.rollback()

        assert await self._handled(store, "key", "other", b"2") is None

    @_store_test
    async def test_key_and_outbox_rows_are_one_transaction(self, store: Store) -> None:
        """Either both the result and the events are there, or the command runs again."""
        transaction = await store.begin()
        await store.idempotency.begin(transaction, "key", "digest")
        await store.idempotency.keep(transaction, "key", b"1")
        transaction.add([sample("orders")])
        await transaction.commit()

        assert (await store.outbox.backlog()).pending == 1
        assert await self._handled(store, "key", "digest", b"2") is not None

    @_store_test
    async def test_the_own_transaction_sees_its_key(self, store: Store) -> None:
        """A handler sends two commands with one key: the second is told of the first, and waits for nothing."""
        transaction = await store.begin()
        first = await store.idempotency.begin(transaction, "key", "digest")
        in_hand = await store.idempotency.begin(transaction, "key", "digest")
        await store.idempotency.keep(transaction, "key", b"1")
        done = await store.idempotency.begin(transaction, "key", "digest")
        await transaction.commit()

        assert first is None
        assert in_hand == KeptResult(fingerprint="digest", result=None)
        assert done == KeptResult(fingerprint="digest", result=b"1")

    @_store_test
    async def test_a_second_one_waits_and_gets_the_result_of_the_first(self, store: Store) -> None:
        """A double click: the second request must neither run beside the first nor fail."""
        early, answers = await self._beside_another(store, commits=True)

        assert (early, answers) == ([], [KeptResult(fingerprint="digest", result=b"first")])

    @_store_test
    async def test_a_second_one_waits_and_has_its_turn_when_the_first_rolls_back(self, store: Store) -> None:
        """The first one failed: now the second is the one that counts."""
        early, answers = await self._beside_another(store, commits=False)

        assert (early, answers) == ([], [None])

    @_store_test
    async def test_of_many_at_once_one_has_its_turn(self, store: Store) -> None:
        """A client that repeats itself faster than it is answered."""
        answers: list[KeptResult | None] = []

        async with anyio.create_task_group() as tasks:
            for _ in range(6):
                tasks.start_soon(self._handle_into, answers, store)

        assert answers.count(None) == 1
        assert answers.count(KeptResult(fingerprint="digest", result=b"second")) == 5

    # --- the words of the tests above ---

    async def _beside_another(
        self, store: Store, *, commits: bool
    ) -> tuple[list[KeptResult | None], list[KeptResult | None]]:
        """What one that comes while the first has the key was told before the first ended, and after."""
        early, answers = list[KeptResult | None](), list[KeptResult | None]()
        first = await store.begin()
        await store.idempotency.begin(first, "key", "digest")
        await store.idempotency.keep(first, "key", b"first")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._handle_into, answers, store)
            await anyio.sleep(_A_WHILE_S)
            early.extend(answers)
            await (first.commit() if commits else first.rollback())
        return early, answers

    async def _handle_into(self, answers: list[KeptResult | None], store: Store) -> None:
        answers.append(await self._handled(store, "key", "digest", b"second"))

    async def _handled(self, store: Store, key: str, fingerprint: str, result: bytes | None) -> KeptResult | None:
        """What is kept; where nothing is, `result` from now on. Again after a deadlock or the like, as `send` does."""
        while True:
            transaction = await store.begin()
            try:
                kept = await store.idempotency.begin(transaction, key, fingerprint)
                await anyio.lowlevel.checkpoint()  # a handler would run here, and others come in between
                if kept is None:
                    await store.idempotency.keep(transaction, key, result)
                await transaction.commit()
            except Exception as error:
                await transaction.rollback()
                if not store.is_transient(error):
                    raise
            else:
                return kept
