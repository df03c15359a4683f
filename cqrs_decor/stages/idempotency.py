"""Gives back what a command with an idempotency key came to, instead of running it again.

Source: idempotency keys (Leach, "Designing robust and predictable APIs with idempotency", Stripe 2017).
"""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import anyio
from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from cqrs_decor._text import qualified_name
from cqrs_decor.codec import Codec
from cqrs_decor.context import MessageContext
from cqrs_decor.dispatch import Next
from cqrs_decor.errors import CommitOutcomeUnknownError, IdempotencyKeyReusedError, IdempotentResultError
from cqrs_decor.idempotency import IdempotencyStore
from cqrs_decor.messages import NOT_SAID, message_spec
from cqrs_decor.pipeline import Handling
from cqrs_decor.stages.retries import TRANSIENT_RETRY


class UnknownCommitStage:
    """Repeats a command with an idempotency key when the connection broke during its COMMIT: the key makes it safe.

    While the database is away in between, it is the first error that the caller needs to see in the end.
    """

    name = "unknown commits"

    def __init__(self, is_unavailable: Callable[[BaseException], bool]) -> None:
        self._is_unavailable = is_unavailable

    def wrap(self, handling: Handling, call_next: Next) -> Next:
        if not handling.keyed or handling.joined:
            return call_next

        async def run(message: Any, context: MessageContext) -> Any:
            try:
                return await call_next(message, context)
            except CommitOutcomeUnknownError as error:
                unknown = error
            for failures in range(1, TRANSIENT_RETRY.max_attempts):
                await anyio.sleep(TRANSIENT_RETRY.delay(failures).total_seconds())
                try:
                    return await call_next(message, context)
                except Exception as error:  # told apart below: what says nothing new about the outcome is no answer
                    if not isinstance(error, CommitOutcomeUnknownError) and not self._is_unavailable(error):
                        raise
            raise unknown

        return run


class IdempotencyStage:
    """Takes the key first in the handler's transaction and keeps the result last in it: they are there together.

    A failure is not kept: it gives the key back, and a repeat runs.

    Args:
        keys: Where keys and results are kept.
        service: Whose keys they are: services that share a database do not see each other's.
        codec: Says what a command holds.
    """

    name = "idempotency"

    def __init__(self, keys: IdempotencyStore, service: str, codec: Codec) -> None:
        self._keys = keys
        self._service = service
        self._codec = codec
        self._results: dict[type[Any], _Results] = {}

    def wrap(self, handling: Handling, call_next: Next) -> Next:
        if not handling.keyed:
            return call_next

        async def run(message: Any, context: MessageContext) -> Any:
            sent: Any = context.message  # a middleware may have changed the message
            given = context.kept.idempotency_key
            results = self._results_of(sent.__class__)
            key, fingerprint = f"{self._service}/{given}", self._fingerprint(sent)
            transaction = await context.unit_of_work.open()
            kept = await self._keys.begin(transaction, key, fingerprint)
            if kept is None:
                result = await call_next(message, context)
                await self._keys.keep(transaction, key, results.encode(result))
                return result
            if kept.fingerprint != fingerprint:
                raise IdempotencyKeyReusedError(results.command, str(given), "for another command or other content")
            if kept.result is None:
                raise IdempotencyKeyReusedError(results.command, str(given), "inside its own handling")
            return results.decode(kept.result)

        return run

    def _results_of(self, command_type: type[Any]) -> "_Results":
        if command_type not in self._results:
            self._results[command_type] = _Results(command_type)
        return self._results[command_type]

    def _fingerprint(self, command: Any) -> str:
        """The class with its module: taking a moved class for another one is an error, the reverse a wrong result."""
        content = json.dumps(json.loads(self._codec.encode(command)), sort_keys=True)
        return hashlib.sha256(f"{qualified_name(type(command))}\n{content}".encode()).hexdigest()


class _Results:
    """The results of one command, as bytes and back."""

    def __init__(self, command_type: type[Any]) -> None:
        """
        Raises:
            IdempotentResultError: Pydantic cannot read and write what the command returns.
        """
        spec = message_spec(command_type)
        self.command = command_type.__name__
        try:
            self._adapter: TypeAdapter[Any] = TypeAdapter(Any if spec.result is NOT_SAID else spec.result)
        except PydanticSchemaGenerationError as error:
            raise IdempotentResultError(self.command, f"pydantic does not know its type: {error.message}") from error

    def encode(self, result: Any) -> bytes:
        """
        Raises:
            IdempotentResultError: A repeat would not get the same.
        """
        try:
            body = self._adapter.dump_json(result, warnings="error")
        except (PydanticSerializationError, TypeError, ValueError) as error:
            raise IdempotentResultError(self.command, "it does not fit what the command promises") from error
        if self.decode(body) != result:
            raise IdempotentResultError(self.command, f"as JSON and back this {type(result).__name__} is not the same")
        return body

    def decode(self, body: bytes) -> Any:
        """
        Raises:
            IdempotentResultError: The class has changed since.
        """
        try:
            return self._adapter.validate_json(body)
        except ValidationError as error:
            raise IdempotentResultError(self.command, "what was kept cannot be read") from error
