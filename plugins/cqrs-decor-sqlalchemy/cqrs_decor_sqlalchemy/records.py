"""An envelope as a row, and back. What has no column of its own stands as JSON in `headers`."""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from datetime import datetime
from itertools import repeat
from typing import Any, TypeVar, cast

import orjson

from cqrs_decor.envelope import Envelope, envelope_from_attributes
from cqrs_decor.errors import UnsupportedError
from cqrs_decor.lanes import lane_of
from cqrs_decor.outbox import ClaimedRecord
from cqrs_decor_sqlalchemy.columns import NAME_LENGTH
from cqrs_decor_sqlalchemy.tables import RECORD_COLUMNS

T = TypeVar("T")


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


def claimed_records(rows: Sequence[Any], crashes: Iterable[int] | None = None) -> list[ClaimedRecord]:
    """The records of the rows of a claim: id, `RECORD_COLUMNS`, attempts; without crashes unless they are given."""
    if not rows:
        return []
    ids, lanes, *kept, attempts = zip(*rows, strict=True)
    envelopes, faults = _readable_or_not(ids, *kept)
    columns = {"id": ids, "lane": lanes, "envelope": envelopes, "attempts": attempts, "unreadable": faults}
    return _made(ClaimedRecord, len(rows), {**columns, "crashes": crashes or repeat(0)})


def envelope_of(row: Any) -> Envelope:
    """The envelope of a row with those columns among others, with the record's id as its sequence; of a row that is no
    message, what could be read of it.
    """
    envelopes, _ = _readable_or_not((row.id,), *((getattr(row, name),) for name in RECORD_COLUMNS[1:]))
    return envelopes[0]


def _readable_or_not(ids: Sequence[int], *kept: Sequence[Any]) -> tuple[list[Envelope], Iterable[str | None]]:
    """Envelopes, and why each row is no message, if it is none. Only where one is none are they read one by one."""
    try:
        return _envelopes(ids, *kept), repeat(None)
    except (KeyError, TypeError, ValueError, AttributeError):
        return _one_by_one(ids, kept)


def _one_by_one(ids: Sequence[int], kept: Sequence[Sequence[Any]]) -> tuple[list[Envelope], list[str | None]]:
    envelopes: list[Envelope] = []
    faults: list[str | None] = []
    for record_id, *columns in zip(ids, *kept, strict=True):
        row = dict(zip(RECORD_COLUMNS[1:], columns, strict=True))
        fault = _fault_in(row["headers"], row["body"])
        if fault is not None:
            row |= _NOTHING_TO_READ
        envelopes += _envelopes((record_id,), *((value,) for value in row.values()))
        faults.append(fault)
    return envelopes, faults


_NOTHING_TO_READ = {"headers": '{"time": "1970-01-01T00:00:00Z"}', "body": b""}
"""In place of what cannot be read."""


def _fault_in(headers: str, body: object) -> str | None:
    """What is wrong with these columns of a row, in words without their values; None if nothing is."""
    if isinstance(body, str):
        return "its body is text where bytes are expected"  # SQLite keeps whatever is written
    try:
        rest: Any = orjson.loads(headers)
    except ValueError:
        return "its headers are no JSON"
    if not isinstance(rest, dict):
        return "its headers are no JSON object"
    if "time" not in rest:
        return "its headers have no time"
    try:
        _read_rests([cast("dict[str, Any]", rest)])
    except (TypeError, ValueError, AttributeError):
        return "its headers have a value of a wrong type"
    return None


def _envelopes(
    ids: Sequence[int],
    message_ids: Iterable[str],
    sources: Iterable[str],
    types: Iterable[str],
    versions: Iterable[int],
    topics: Iterable[str],
    keys: Iterable[str | None],
    content_types: Iterable[str],
    headers: Iterable[str],
    bodies: Iterable[bytes],
) -> list[Envelope]:
    times, correlations, causations, traceparents, own = _read_rests([orjson.loads(text) for text in headers])
    return _made(
        Envelope,
        len(ids),
        {
            "id": message_ids,
            "source": sources,
            "type": types,
            "version": versions,
            "topic": topics,
            "key": keys,
            "content_type": content_types,
            "data": map(bytes, bodies),
            "time": times,
            "correlation_id": correlations,
            "causation_id": causations,
            "traceparent": traceparents,
            "headers": own,
            "sequence": ids,
        },
    )


def _read_rests(
    rests: Sequence[Mapping[str, Any]],
) -> tuple[list[datetime], list[str | None], list[str | None], list[str | None], list[dict[str, str]]]:
    """The columns of what stands in `headers`: time, correlation id, causation id, traceparent, the user's headers.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: One of them is not as `_rest` writes it.
    """
    times = [datetime.fromisoformat(rest["time"]) for rest in rests]
    correlations, causations, traceparents = (
        [rest.get(name) for rest in rests] for name in ("correlationid", "causationid", "traceparent")
    )
    own: list[dict[str, str]] = [rest.get("headers") or {} for rest in rests]
    texts = set(map(type, correlations + causations + traceparents)) - {type(None)}
    texts.update(kind for headers in own if headers for kind in map(type, headers.values()))
    if not texts <= {str}:
        raise TypeError("something is no text that should be")
    return times, correlations, causations, traceparents, own


def _made(kind: type[T], count: int, columns: Mapping[str, Iterable[object]]) -> list[T]:
    """So many of a frozen, slotted dataclass, from the values of all its fields, field by field.

    Making them is most of what a relay's claim costs. Their own constructor goes through `object.__setattr__` for each
    field; slots filled by `map` never come back to the interpreter: 2 us instead of 7 for a record.
    """
    if columns.keys() != {field.name for field in fields(kind)}:  # type: ignore[arg-type]  # T is a dataclass
        raise TypeError(f"{kind.__name__} has other fields than {', '.join(columns)}")
    made = [kind.__new__(kind) for _ in range(count)]
    for name, values in columns.items():
        fill: Callable[[T, object], None] = getattr(kind, name).__set__
        deque(map(fill, made, values), maxlen=0)
    return made


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
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)
