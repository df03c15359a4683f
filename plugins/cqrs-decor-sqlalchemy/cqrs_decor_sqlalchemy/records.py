"""An envelope as a row, and back. What has no column of its own stands as JSON in `headers`."""

import hashlib
import json
from datetime import datetime
from typing import Any

import orjson

from cqrs_decor.envelope import Envelope, envelope_from_attributes
from cqrs_decor.errors import UnsupportedError
from cqrs_decor.lanes import lane_of
from cqrs_decor.outbox import ClaimedRecord
from cqrs_decor_sqlalchemy.columns import NAME_LENGTH
from cqrs_decor_sqlalchemy.tables import RECORD_COLUMNS


def record_row(envelope: Envelope) -> dict[str, object]:
    """The outbox row of an envelope.

    Raises:
        UnsupportedError: A name, key or id in it does not fit into its column.
    """
    key = envelope.key
    row: dict[str, object] = {
        "lane": lane_of(envelope.topic, key, envelope.id),
        "message_id": envelope.id,
        "source": envelope.source,
        "type": envelope.type,
        "version": envelope.version,
        "topic": envelope.topic,
        "key": key,
        "content_type": envelope.content_type,
        "headers": _rest(envelope),
        "body": envelope.data,
    }
    for column in _NAMES:
        _check_name(column, row[column])
    return row


def claimed_record(row: Any, crashes: int = 0) -> ClaimedRecord:
    """The record of a row of the claim: id, `RECORD_COLUMNS`, attempts. Taken by position, which is twice as fast."""
    record_id, lane, *kept, attempts = row
    envelope = _envelope(record_id, *kept)
    return ClaimedRecord(id=record_id, lane=lane, envelope=envelope, attempts=attempts, crashes=crashes)


def envelope_of(row: Any) -> Envelope:
    """The envelope of a row with those columns among others, with the record's id as its sequence."""
    return _envelope(row.id, *(getattr(row, name) for name in RECORD_COLUMNS[1:]))


def _envelope(
    record_id: int,
    message_id: str,
    source: str,
    type_: str,
    version: int,
    topic: str,
    key: str | None,
    content_type: str,
    headers: str,
    body: bytes,
) -> Envelope:
    rest: dict[str, Any] = orjson.loads(headers)
    return Envelope(
        id=message_id,
        source=source,
        type=type_,
        version=version,
        topic=topic,
        key=key,
        content_type=content_type,
        data=bytes(body),
        time=datetime.fromisoformat(rest["time"]),
        correlation_id=rest.get("correlationid"),
        causation_id=rest.get("causationid"),
        traceparent=rest.get("traceparent"),
        headers=rest.get("headers") or {},
        sequence=record_id,
    )


def parked_row(consumer: str, envelope: Envelope) -> dict[str, object]:
    """The columns of a parked message. Parking must not fail by what came in, so that names are made to fit."""
    return {
        "consumer": fitted(consumer),
        "source": fitted(envelope.source),
        "message_id": fitted(envelope.id),
        "topic": fitted(envelope.topic),
        "key": None if envelope.key is None else fitted(envelope.key),
        "type": fitted(envelope.type),
        "headers": json.dumps(
            {
                "attributes": envelope.attributes(),
                "topic": envelope.topic,
                "content_type": envelope.content_type,
                "headers": dict(envelope.headers),
            }
        ),
        "body": envelope.data,
    }


def parked_envelope(row: Any) -> Envelope:
    """The envelope of a parked message, as it came in."""
    whole: dict[str, Any] = json.loads(row.headers)
    return envelope_from_attributes(
        whole["attributes"],
        topic=whole["topic"],
        data=bytes(row.body),
        content_type=whole["content_type"],
        headers=whole["headers"],
    )


def fitted(text: str) -> str:
    """The text, if every database can keep it in a name column; else its beginning and a digest of the whole."""
    if len(text) <= NAME_LENGTH and "\0" not in text and not _has_lone_surrogate(text):
        return text
    whole = text.encode("utf-8", "surrogatepass")
    beginning = whole[:150].decode("utf-8", "ignore").replace("\0", "")
    return f"{beginning}~{hashlib.sha256(whole).hexdigest()}"


def stored_text(text: str) -> str:
    """Text that every database can keep; what it cannot is replaced."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()


_NAMES = ("message_id", "source", "type", "topic", "key", "content_type")


def _check_name(column: str, text: Any) -> None:
    if text is None or (len(text) <= NAME_LENGTH and "\0" not in text):
        return
    wrong = f"{len(text)} characters" if len(text) > NAME_LENGTH else "a NUL character"
    raise UnsupportedError(
        "The outbox",
        f"keep a {column} with {wrong}: {text[:60]!r}",
        f"keep it to {NAME_LENGTH} characters without NUL; a longer key can be hashed",
    )


def _rest(envelope: Envelope) -> str:
    rest: dict[str, object] = {"time": envelope.time}
    if envelope.correlation_id is not None:
        rest["correlationid"] = envelope.correlation_id
    if envelope.causation_id is not None:
        rest["causationid"] = envelope.causation_id
    if envelope.traceparent is not None:
        rest["traceparent"] = envelope.traceparent
    if envelope.headers:
        rest["headers"] = dict(envelope.headers)
    return orjson.dumps(rest).decode()


def _has_lone_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)
