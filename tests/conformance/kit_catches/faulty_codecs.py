"""Codecs with one fault each."""

import json
from datetime import datetime
from decimal import Decimal
from typing import Any, TypeVar

import orjson
from pydantic import TypeAdapter, ValidationError

from cqrs_decor.codec import JsonCodec
from cqrs_decor.errors import PayloadInvalidError, UndecodableBodyError

M = TypeVar("M")


class WritesAscii(JsonCodec):
    def encode(self, message: Any) -> bytes:
        return super().encode(message).decode().encode("ascii", errors="replace")


class WritesNumbersAsFloats(JsonCodec):
    def encode(self, message: Any) -> bytes:
        return json.dumps(json.loads(super().encode(message), parse_int=float)).encode()


class WritesDecimalsAsFloats(JsonCodec):
    def encode(self, message: Any) -> bytes:
        return orjson.dumps(message.model_dump(), default=lambda value: float(Decimal(value)))


class LeavesTheZoneOut(JsonCodec):
    def encode(self, message: Any) -> bytes:
        return orjson.dumps(
            {**vars(message), "at": datetime.fromisoformat(message.at.isoformat()).replace(tzinfo=None)},
            option=orjson.OPT_NAIVE_UTC,
        )


class RefusesUnknownFields(JsonCodec):
    def decode(self, message_type: type[M], body: bytes) -> M:
        unknown = set(json.loads(body)) - set(getattr(message_type, "model_fields", {}))
        if unknown:
            raise PayloadInvalidError(message_type.__name__, [(name, "unknown") for name in unknown])
        return super().decode(message_type, body)


class CallsEverythingUndecodable(JsonCodec):
    def decode(self, message_type: type[M], body: bytes) -> M:
        try:
            return super().decode(message_type, body)
        except PayloadInvalidError as error:
            raise UndecodableBodyError(message_type.__name__, str(error)) from None


class CallsEverythingInvalid(JsonCodec):
    def decode(self, message_type: type[M], body: bytes) -> M:
        try:
            return super().decode(message_type, body)
        except UndecodableBodyError as error:
            raise PayloadInvalidError(message_type.__name__, [("", error.reason)]) from None


class ShowsTheValue(JsonCodec):
    def decode(self, message_type: type[M], body: bytes) -> M:
        try:
            return TypeAdapter(message_type).validate_json(body)
        except ValidationError as error:
            faults = [(str(each["loc"]), f"{each['msg']}: {each['input']!r}") for each in error.errors()]
            raise PayloadInvalidError(message_type.__name__, faults) from None


class LetsAnyErrorOut(JsonCodec):
    def encode(self, message: Any) -> bytes:
        return message.model_dump_json().encode()
