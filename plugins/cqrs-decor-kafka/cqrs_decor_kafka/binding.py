"""Envelopes as Kafka records and back, in the CloudEvents binding for Kafka.

Written in binary mode: each attribute is a header `ce_NAME`, the content type is the header `content-type`, the key of
the record is the partition key, its value is the body. Read in binary and in structured mode.

Source: CloudEvents 1.0.2, Kafka Protocol Binding, sections 3.2 and 3.3; JSON Event Format, section 3.
"""

import base64
import binascii
import json
from collections.abc import Sequence
from typing import Any, cast

from cqrs_decor.envelope import Envelope, envelope_from_attributes
from cqrs_decor.errors import MalformedEnvelopeError, UndecodableBodyError, WireError

PREFIX = "ce_"
CONTENT_TYPE = "content-type"
_STRUCTURED = "application/cloudevents"
_STRUCTURED_JSON = "application/cloudevents+json"

Headers = Sequence[tuple[str, bytes | None]]


def headers_of(envelope: Envelope) -> list[tuple[str, bytes]]:
    """The record's headers: the CloudEvents attributes, then the user's own under their plain names."""
    headers = [(CONTENT_TYPE, envelope.content_type.encode())]
    headers += [(PREFIX + name, value.encode()) for name, value in envelope.attributes().items()]
    if envelope.headers:
        headers += [(name, value.encode()) for name, value in envelope.headers.items()]
    return headers


def reserved_header(envelope: Envelope) -> str | None:
    """A header of the user's own that readers would take for an attribute; such a record is refused, not renamed."""
    for name in envelope.headers:
        lowered = name.lower()
        if lowered.startswith(PREFIX) or lowered == CONTENT_TYPE:
            return name
    return None


def key_text(key: bytes | None) -> str | None:
    """The record's key as text. What is not UTF-8 stays distinct, so that it can still keep an order."""
    return None if key is None else key.decode("utf-8", "backslashreplace")


def content_of(topic: str, key: bytes | None, value: bytes, headers: Headers) -> Envelope | WireError:
    """The envelope of a record; the reason where it has none that can be read. Never raises for what is in a record."""
    try:
        return _read(topic, key, value, headers)
    except WireError as error:
        return error


def _read(topic: str, key: bytes | None, value: bytes, headers: Headers) -> Envelope:
    attributes: dict[str, str] = {}
    own: dict[str, str] = {}
    content_type: str | None = None
    for name, raw in headers:
        lowered = name.lower()
        if lowered.startswith(PREFIX):
            attributes[lowered[len(PREFIX) :]] = _text(name, raw)
        elif lowered == CONTENT_TYPE:
            content_type = _text(name, raw)
        else:
            own[name] = (raw or b"").decode("utf-8", "backslashreplace")
    if content_type is not None and content_type.lower().startswith(_STRUCTURED):
        return _read_structured(topic, key, value, content_type, own)
    if not attributes:
        raise MalformedEnvelopeError("the record has no CloudEvents headers (ce_id, ce_source, ce_type)")
    return envelope_from_attributes(
        attributes, topic=topic, data=value, content_type=content_type, key=key_text(key), headers=own
    )


def _text(name: str, raw: bytes | None) -> str:
    try:
        return (raw or b"").decode()
    except UnicodeDecodeError:
        raise MalformedEnvelopeError(f"header {name!r} is not UTF-8") from None


def _read_structured(topic: str, key: bytes | None, value: bytes, content_type: str, own: dict[str, str]) -> Envelope:
    if content_type.partition(";")[0].strip().lower() != _STRUCTURED_JSON:
        raise MalformedEnvelopeError(f"content type {content_type!r} is not one that can be read")
    event = _json_object(value)
    data = event.pop("data", None)
    encoded = event.pop("data_base64", None)
    attributes = {name: _attribute(name, attribute) for name, attribute in event.items() if attribute is not None}
    return envelope_from_attributes(
        attributes,
        topic=topic,
        data=_data(attributes, data) if encoded is None else _decoded(attributes, encoded),
        content_type=attributes.get("datacontenttype"),
        key=key_text(key),
        headers=own,
    )


def _json_object(value: bytes) -> dict[str, Any]:
    try:
        event = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise MalformedEnvelopeError(f"the structured event is not JSON: {error}") from None
    if not isinstance(event, dict):
        raise MalformedEnvelopeError("the structured event is not a JSON object")
    return cast(dict[str, Any], event)


def _attribute(name: str, value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int):
        return str(value)
    raise MalformedEnvelopeError(f"attribute {name!r} is neither text, number nor boolean")


def _data(attributes: dict[str, str], data: object) -> bytes:
    """JSON stands in the event as it is; text of another content type stands there as a string."""
    if data is None:
        return b""
    if isinstance(data, str) and not _is_json(attributes.get("datacontenttype")):
        return data.encode("utf-8", "surrogatepass")
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def _is_json(content_type: str | None) -> bool:
    if content_type is None:
        return True
    media_type = content_type.partition(";")[0].strip().lower()
    return media_type.endswith(("/json", "+json"))


def _decoded(attributes: dict[str, str], encoded: object) -> bytes:
    try:
        return base64.b64decode(cast(str, encoded), validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise UndecodableBodyError(attributes.get("type", "unknown"), f"data_base64: {error}") from None
