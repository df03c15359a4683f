"""Results by idempotency key, in memory."""

import anyio

from cqrs_decor.idempotency import KeptResult
from cqrs_decor.memory.transaction import MemoryTransaction
from cqrs_decor.unit_of_work import Transaction


class MemoryIdempotency:
    """A key is locked from the moment a transaction takes it until that ends, as a row of a database is."""

    def __init__(self) -> None:
        self._kept: dict[str, KeptResult] = {}
        self._taken: dict[str, _Taken] = {}

    async def begin(self, transaction: Transaction, key: str, fingerprint: str) -> KeptResult | None:
        mine = _mine(transaction)
        while taken := self._taken.get(key):
            if taken.by is mine:
                return taken.result
            await taken.ended.wait()
        if key in self._kept:
            return self._kept[key]
        self._taken[key] = taken = _Taken(mine, fingerprint)
        mine.at_commit(lambda: self._kept.update({key: taken.result}))
        mine.at_end(lambda: self._give_back(key))
        return None

    async def keep(self, transaction: Transaction, key: str, result: bytes | None) -> None:
        taken = self._taken[key]
        taken.result = KeptResult(fingerprint=taken.result.fingerprint, result=result)

    def _give_back(self, key: str) -> None:
        self._taken.pop(key).ended.set()


class _Taken:
    """A key in the hand of a transaction."""

    def __init__(self, by: MemoryTransaction, fingerprint: str) -> None:
        self.by = by
        self.result = KeptResult(fingerprint=fingerprint, result=None)
        self.ended = anyio.Event()


def _mine(transaction: Transaction) -> MemoryTransaction:
    if not isinstance(transaction, MemoryTransaction):
        raise TypeError(f"{transaction!r} is no transaction of the store in memory")
    return transaction
