"""Idempotency keys: what a command that names its wish came to, so that it need not run twice."""

from dataclasses import dataclass
from typing import Protocol

from cqrs_decor.unit_of_work import Transaction


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptResult:
    """What a command with an idempotency key came to: the digest of its content, and its encoded result."""

    fingerprint: str
    result: bytes | None


class IdempotencyStore(Protocol):
    """Remembers the results of commands by their idempotency key. All raise StoreUnavailableError."""

    async def begin(self, transaction: Transaction, key: str, fingerprint: str) -> KeptResult | None:
        """Take the key in this transaction; what is kept under it, if there is. Waits while another has it."""
        ...

    async def keep(self, transaction: Transaction, key: str, result: bytes | None) -> None:
        """Keep the result under the key that this transaction has taken."""
        ...
