"""The kit for idempotency keys against stores that have one fault each."""

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import pytest

from cqrs_decor.idempotency import IdempotencyStore, KeptResult
from cqrs_decor.memory import MemoryStore
from cqrs_decor.memory.idempotency import MemoryIdempotency
from cqrs_decor.memory.transaction import MemoryTransaction
from cqrs_decor.store import Store
from cqrs_decor.testing.conformance import IdempotencyStoreConformance
from cqrs_decor.unit_of_work import Transaction
from tests.conformance.kit_catches.test_kit_catches import NOT_LONG, fails

pytestmark = pytest.mark.feature("U9")


class ForgetsKeys(MemoryIdempotency):
    async def begin(self, transaction: Transaction, key: str, fingerprint: str) -> KeptResult | None:
        return await super().begin(transaction, f"{key} {id(transaction)}", fingerprint)

    async def keep(self, transaction: Transaction, key: str, result: bytes | None) -> None:
        await super().keep(transaction, f"{key} {id(transaction)}", result)


class KeepsText(MemoryIdempotency):
    async def keep(self, transaction: Transaction, key: str, result: bytes | None) -> None:
        await super().keep(transaction, key, (result or b"").decode(errors="replace").encode())


class TakesTheLastFingerprint(MemoryIdempotency):
    async def begin(self, transaction: Transaction, key: str, fingerprint: str) -> KeptResult | None:
        kept = await super().begin(transaction, key, fingerprint)
        return None if kept is None else KeptResult(fingerprint=fingerprint, result=kept.result)


class ComparesWithoutCase(MemoryIdempotency):
    async def begin(self, transaction: Transaction, key: str, fingerprint: str) -> KeptResult | None:
        return await super().begin(transaction, key.lower(), fingerprint)

    async def keep(self, transaction: Transaction, key: str, result: bytes | None) -> None:
        await super().keep(transaction, key.lower(), result)


class CutsLongKeys(MemoryIdempotency):
    async def begin(self, transaction: Transaction, key: str, fingerprint: str) -> KeptResult | None:
        return await super().begin(transaction, key[:255], fingerprint)

    async def keep(self, transaction: Transaction, key: str, result: bytes | None) -> None:
        await super().keep(transaction, key[:255], result)


class KeepsOutsideTheTransaction(MemoryIdempotency):
    async def keep(self, transaction: Transaction, key: str, result: bytes | None) -> None:
        await super().keep(transaction, key, result)
        self._kept[key] = self._taken[key].result


class WaitsForItself(MemoryIdempotency):
    async def begin(self, transaction: Transaction, key: str, fingerprint: str) -> KeptResult | None:
        if key in self._taken:
            await self._taken[key].ended.wait()
        return await super().begin(transaction, key, fingerprint)


class RunsBesideTheFirst(MemoryIdempotency):
    async def begin(self, transaction: Transaction, key: str, fingerprint: str) -> KeptResult | None:
        if key in self._taken and self._taken[key].by is not transaction:
            return None
        return await super().begin(transaction, key, fingerprint)

    async def keep(self, transaction: Transaction, key: str, result: bytes | None) -> None:
        if self._taken[key].by is transaction:
            await super().keep(transaction, key, result)


class TellsOfWhatIsNotCommitted(MemoryIdempotency):
    async def begin(self, transaction: Transaction, key: str, fingerprint: str) -> KeptResult | None:
        taken = self._taken.get(key)
        return await super().begin(transaction, key, fingerprint) if taken is None else taken.result


class CommitsNothingElse(MemoryIdempotency):
    async def keep(self, transaction: Transaction, key: str, result: bytes | None) -> None:
        await super().keep(transaction, key, result)
        assert isinstance(transaction, MemoryTransaction)
        transaction.at_commit(transaction._envelopes.clear)


FAULTY: dict[type[MemoryIdempotency], str] = {
    ForgetsKeys: "test_a_key_is_taken_once",
    KeepsText: "test_results_are_kept_byte_by_byte",
    TakesTheLastFingerprint: "test_the_first_fingerprint_stays",
    ComparesWithoutCase: "test_keys_are_told_apart_exactly",
    CutsLongKeys: "test_keys_are_told_apart_exactly",
    KeepsOutsideTheTransaction: "test_a_rollback_gives_the_key_back",
    CommitsNothingElse: "test_key_and_outbox_rows_are_one_transaction",
    WaitsForItself: "test_the_own_transaction_sees_its_key",
    RunsBesideTheFirst: "test_of_many_at_once_one_has_its_turn",
    TellsOfWhatIsNotCommitted: "test_a_second_one_waits_and_has_its_turn_when_the_first_rolls_back",
}


class Stores(IdempotencyStoreConformance):
    patience, time_limit = NOT_LONG, NOT_LONG * 2

    def __init__(self, make: Callable[[], IdempotencyStore]) -> None:
        self.make = make

    @asynccontextmanager
    async def open_store(self) -> AsyncGenerator[Store]:
        store = MemoryStore()
        store.idempotency = self.make()
        yield store


@pytest.mark.parametrize(("faulty", "test"), FAULTY.items(), ids=lambda it: getattr(it, "__name__", "caught by"))
def test_a_faulty_store_of_keys_is_caught(faulty: type[MemoryIdempotency], test: str) -> None:
    """Each of these runs a command twice, or gives one the result of another."""
    assert not fails(Stores(MemoryIdempotency), test)
    assert fails(Stores(faulty), test)
