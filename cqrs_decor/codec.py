"""Bytes to message and back. A seam: plugins bring other encodings under the group `cqrs_decor.codecs`."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol, TypeVar

import orjson
from pydantic import BaseModel, PydanticSchemaGenerationError, TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from cqrs_decor._text import qualified_name
from cqrs_decor.envelope import JSON
from cqrs_decor.errors import (
    MessageDefinitionError,
    MessageValidationError,
    PayloadInvalidError,
    UndecodableBodyError,
    validation_faults,
)

M = TypeVar("M")


class Codec(Protocol):
    """Turns messages of one content type into bytes and back. Stateless, called concurrently from one loop."""

    content_type: str

    def encode(self, message: Any) -> bytes:
        """The body of a message.

        Raises:
            PayloadInvalidError: The message holds a value that cannot be written.
        """
        ...

    def decode(self, message_type: type[M], body: bytes) -> M:
        """The message that `body` holds.

        Raises:
            UndecodableBodyError: The body is not in this encoding at all.
            PayloadInvalidError: It is, but does not fit the class; names field paths, never values.
        """
        ...


class JsonCodec:
    """JSON by pydantic for models, by orjson for dataclasses (measured: pydantic's own is faster for models)."""

    content_type = JSON

    def __init__(self) -> None:
        self._encoders: dict[type[Any], Callable[[Any], bytes]] = {}
        self._decoders: dict[type[Any], Callable[[bytes], Any]] = {}

    def encode(self, message: Any) -> bytes:
        kind: type[Any] = message.__class__
        encode = self._encoders.get(kind)
        if encode is None:
            encode = self._encoders[kind] = _encoder(kind)
        try:
            return encode(message)
        except (TypeError, ValueError) as error:
            raise PayloadInvalidError(kind.__name__, [("", str(error))]) from error

    def decode(self, message_type: type[M], body: bytes) -> M:
        decode = self._decoders.get(message_type)
        if decode is None:
            decode = self._decoders[message_type] = _decoder(message_type)
        try:
            message: M = decode(body)
        except ValidationError as error:
            raise _reading_error(message_type, error) from None
        return message


def read_message(message_type: type[M], data: Mapping[str, Any] | bytes | str) -> M:
    """A message from what came in from outside: JSON text, or fields that were read already.

    Raises:
        MessageValidationError: It does not fit; names field paths, never values.
    """
    adapter = TypeAdapter(message_type)
    try:
        if isinstance(data, bytes | str):
            return adapter.validate_json(data)
        return adapter.validate_python(dict(data))
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
        raise MessageValidationError(message_type.__name__, validation_faults(faults)) from None


def _reading_error(message_type: type[Any], error: ValidationError) -> UndecodableBodyError | PayloadInvalidError:
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    if faults and faults[0]["type"] == "json_invalid":
        return UndecodableBodyError(message_type.__name__, "it is not JSON")
    return PayloadInvalidError(message_type.__name__, validation_faults(faults, quotes_nothing=True))


def _encoder(message_type: type[Any]) -> Callable[[Any], bytes]:
    if issubclass(message_type, BaseModel):
        return lambda message: message.__pydantic_serializer__.to_json(message)
    return partial(orjson.dumps, default=to_jsonable_python)  # orjson alone knows no Decimal


def _decoder(message_type: type[Any]) -> Callable[[bytes], Any]:
    if issubclass(message_type, BaseModel):
        return message_type.model_validate_json
    try:
        return TypeAdapter(message_type).validate_json
    except PydanticSchemaGenerationError as error:
        raise MessageDefinitionError(
            qualified_name(message_type),
            f"its fields cannot be read from JSON: {error.message}",
            "use types that pydantic knows",
        ) from error
