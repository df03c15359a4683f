"""The message as it travels: CloudEvents 1.0 attributes around a body of bytes.

Source: CloudEvents 1.0.2 specification, with the extensions partitioning (`partitionkey`), sequence and distributed
tracing (`traceparent`). Broker plugins write the attributes in their own binding (Kafka `ce_`, AMQP `cloudEvents:`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import orjson

from cqrs_decor.errors import MalformedEnvelopeError

JSON = "application/json"
SEQUENCE_WIDTH = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """One message on its way, decoded no further than its attributes.

    Attributes:
        id: Unique within `source`; stays the same over every repeat.
        source: The service that produced it.
        type: Wire name of the event.
        version: Schema version, the extension `dataversion`.
        topic: Destination; not a CloudEvents attribute.
        key: Partition key; None for no order.
        time: When it was emitted, UTC.
        data: The body.
        content_type: How the body is encoded.
        sequence: Rises per key; None until the relay has claimed the record.
        headers: The user's own, ASCII names; never with the broker's CloudEvents prefix.
    """

    id: str
    source: str
    type: str
    topic: str
    data: bytes
    time: datetime
    version: int = 1
    key: str | None = None
    content_type: str = JSON
    correlation_id: str | None = None
    causation_id: str | None = None
    sequence: int | None = None
    traceparent: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])

    def attributes(self) -> dict[str, str]:
        """The CloudEvents attributes as text, without prefix, `datacontenttype` left to the binding."""
        attributes = {
            "specversion": "1.0",
            "id": self.id,
            "source": self.source,
            "type": self.type,
            "time": _timestamp(self.time),
            "dataversion": str(self.version),
        }
        if self.key is not None:
            attributes["partitionkey"] = self.key
        if self.correlation_id is not None:
            attributes["correlationid"] = self.correlation_id
        if self.causation_id is not None:
            attributes["causationid"] = self.causation_id
        if self.sequence is not None:
            attributes["sequence"] = str(self.sequence).zfill(SEQUENCE_WIDTH)
        if self.traceparent is not None:
            attributes["traceparent"] = self.traceparent
        return attributes

    def with_sequence(self, sequence: int) -> "Envelope":
        return replace(self, sequence=sequence)


def envelope_from_attributes(
    attributes: Mapping[str, str],
    *,
    topic: str,
    data: bytes,
    content_type: str | None = None,
    key: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Envelope:
    """Read an envelope back from CloudEvents attributes.

    Args:
        attributes: Names without prefix, values as text.
        topic: Where it came from.
        data: The body.
        content_type: From the binding; JSON when it is silent.
        key: The broker's own key, used where `partitionkey` is absent.
        headers: What else came along.

    Raises:
        MalformedEnvelopeError: A required attribute is missing or unreadable.
    """
    missing = [name for name in ("id", "source", "type") if not attributes.get(name)]
    if missing:
        raise MalformedEnvelopeError(f"attributes missing: {', '.join(missing)}")
    specversion = attributes.get("specversion", "1.0")
    if not specversion.startswith("1."):
        raise MalformedEnvelopeError(f"specversion {specversion!r} is not 1.x")
    return Envelope(
        id=attributes["id"],
        source=attributes["source"],
        type=attributes["type"],
        topic=topic,
        data=data,
        time=_time(attributes.get("time")),
        version=_integer("dataversion", attributes.get("dataversion"), default=1),
        key=attributes.get("partitionkey", key),
        content_type=content_type or attributes.get("datacontenttype") or JSON,
        correlation_id=attributes.get("correlationid"),
        causation_id=attributes.get("causationid"),
        sequence=_sequence(attributes.get("sequence")),
        traceparent=attributes.get("traceparent"),
        headers=dict(headers or {}),
    )


def _timestamp(moment: datetime) -> str:
    """RFC 3339 in UTC, ending in Z. By orjson, which takes a quarter of the time of `isoformat`."""
    if moment.tzinfo is not UTC:
        moment = moment.astimezone(UTC)
    return orjson.dumps(moment, option=orjson.OPT_UTC_Z)[1:-1].decode()


def _time(text: str | None) -> datetime:
    if text is None:
        return datetime.now(UTC)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise MalformedEnvelopeError(f"time {text!r} is not RFC 3339") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _integer(name: str, text: str | None, *, default: int) -> int:
    if text is None:
        return default
    try:
        return int(text)
    except ValueError:
        raise MalformedEnvelopeError(f"{name} {text!r} is not a whole number") from None


def _sequence(text: str | None) -> int | None:
    """Other producers may put anything that sorts as text here: only numbers are kept."""
    return int(text) if text is not None and text.isdecimal() else None
