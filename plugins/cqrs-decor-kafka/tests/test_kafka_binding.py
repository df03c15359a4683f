"""The CloudEvents binding for Kafka, against the official SDK. No server."""

import json
from datetime import UTC, datetime

import pytest
from cloudevents.core.bindings.kafka import KafkaMessage, from_binary_event, to_binary_event, to_structured_event
from cloudevents.core.v1.event import CloudEvent

from cqrs_decor.envelope import Envelope
from cqrs_decor.errors import MalformedEnvelopeError, UndecodableBodyError
from cqrs_decor_kafka.binding import content_of, headers_of, key_text, reserved_header

TIME = datetime(2024, 2, 29, 23, 59, 59, 123456, tzinfo=UTC)
OURS = Envelope(
    id="1",
    source="//shop/zürich",
    type="shop.order-placed",
    topic="orders",
    key="order-ü",
    data=b'{"sku":"tea"}',
    time=TIME,
    version=3,
    correlation_id="c",
    causation_id="b",
    sequence=12,
    traceparent="00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    headers={"tenant": "naïve"},
)
ATTRIBUTES = {
    "id": "7",
    "source": "/theirs",
    "type": "their.event",
    "specversion": "1.0",
    "time": TIME,
    "datacontenttype": "application/json",
    "partitionkey": "k",
    "dataversion": "2",
    "correlationid": "abc",
}
THEIRS = Envelope(
    id="7",
    source="/theirs",
    type="their.event",
    topic="orders",
    key="k",
    data=b'{"n": 1}',
    time=TIME,
    version=2,
    correlation_id="abc",
)


def test_what_we_write_we_read() -> None:
    """Nothing may be lost between two services of this library."""
    assert content_of("orders", b"order-\xc3\xbc", OURS.data, headers_of(OURS)) == OURS


def test_attributes_travel_as_headers_with_the_prefix() -> None:
    """Others filter and route by these names; they are fixed by the specification."""
    headers = dict(headers_of(OURS))

    assert headers["content-type"] == b"application/json"
    assert headers["ce_specversion"] == b"1.0"
    assert headers["ce_time"] == b"2024-02-29T23:59:59.123456Z"
    assert headers["ce_partitionkey"] == "order-ü".encode()
    assert headers["tenant"] == "naïve".encode()
    assert "ce_datacontenttype" not in headers


def test_the_official_sdk_reads_ours() -> None:
    """A service that is not written with this library must be able to read what it publishes."""
    event = from_binary_event(KafkaMessage(headers=dict(headers_of(OURS)), key=b"order-\xc3\xbc", value=OURS.data))

    assert (event.get_id(), event.get_source(), event.get_type()) == ("1", "//shop/zürich", "shop.order-placed")
    assert (event.get_time(), event.get_datacontenttype()) == (TIME, "application/json")
    assert event.get_data() == {"sku": "tea"}
    assert event.get_extension("partitionkey") == "order-ü"
    assert event.get_extension("sequence") == "00000000000000000012"


@pytest.mark.parametrize("write", [to_binary_event, to_structured_event], ids=["binary", "structured"])
def test_we_read_what_the_official_sdk_writes(write) -> None:
    """Both modes are in use; a consumer has to take what the producer's team has chosen."""
    message = write(CloudEvent(attributes=dict(ATTRIBUTES), data={"n": 1}))

    read = content_of("orders", b"k", message.value, list(message.headers.items()))

    assert isinstance(read, Envelope)
    assert json.loads(read.data) == {"n": 1}
    assert read == Envelope(**{**_fields(THEIRS), "data": read.data})


def test_we_read_binary_data_of_a_structured_event() -> None:
    """JSON cannot hold bytes: they come in base64, and must arrive as the bytes they were."""
    attributes = {**ATTRIBUTES, "datacontenttype": "application/octet-stream"}
    message = to_structured_event(CloudEvent(attributes=attributes, data=b"\x00\xff"))
    assert b"data_base64" in message.value

    read = content_of("orders", None, message.value, list(message.headers.items()))

    assert isinstance(read, Envelope)
    assert (read.data, read.content_type) == (b"\x00\xff", "application/octet-stream")


@pytest.mark.parametrize(
    ("event", "data"),
    [
        ({"data": {"n": 1}}, b'{"n":1}'),
        ({"data": "tea"}, b'"tea"'),
        ({"data": "<tea/>", "datacontenttype": "text/xml"}, b"<tea/>"),
        ({"data": [1, "ü"], "datacontenttype": "application/vnd.x+json; charset=utf-8"}, '[1,"ü"]'.encode()),
        ({}, b""),
    ],
    ids=["object", "json string", "text", "json suffix", "no data"],
)
def test_the_body_of_a_structured_event_depends_on_its_content_type(event: dict[str, object], data: bytes) -> None:
    """The codec behind us gets bytes as the content type says, whatever mode they came in."""
    read = content_of("t", None, _structured(event), [("content-type", b"application/cloudevents+json; charset=utf-8")])

    assert isinstance(read, Envelope)
    assert read.data == data


def test_the_records_key_stands_in_for_a_missing_partition_key() -> None:
    """Most producers set a key and no `partitionkey`; the order of their messages hangs on it."""
    headers = [("ce_id", b"1"), ("ce_source", b"s"), ("ce_type", b"t"), ("ce_specversion", b"1.0")]

    read = content_of("t", b"the-key", b"{}", headers)

    assert isinstance(read, Envelope)
    assert read.key == "the-key"


@pytest.mark.parametrize(
    ("headers", "value", "error", "reason"),
    [
        ([], b"{}", MalformedEnvelopeError, "no CloudEvents headers"),
        ([("tenant", b"x")], b"{}", MalformedEnvelopeError, "no CloudEvents headers"),
        ([("ce_id", b"1")], b"{}", MalformedEnvelopeError, "source, type"),
        ([("ce_id", b"\xff\xfe")], b"{}", MalformedEnvelopeError, "'ce_id' is not UTF-8"),
        ([("ce_id", None), ("ce_type", b"t")], b"{}", MalformedEnvelopeError, "id, source"),
        ([("content-type", b"application/cloudevents+json")], b"{", MalformedEnvelopeError, "not JSON"),
        ([("content-type", b"application/cloudevents+json")], b"\xff", MalformedEnvelopeError, "not JSON"),
        ([("content-type", b"application/cloudevents+json")], b"[" * 100_000, MalformedEnvelopeError, "not JSON"),
        ([("content-type", b"application/cloudevents+json")], b"[]", MalformedEnvelopeError, "not a JSON object"),
        ([("content-type", b"application/cloudevents+json")], b'{"id":[1]}', MalformedEnvelopeError, "'id' is neither"),
        ([("content-type", b"application/cloudevents-batch+json")], b"[]", MalformedEnvelopeError, "cannot|not one"),
        ([("content-type", b"application/cloudevents+avro")], b"", MalformedEnvelopeError, "not one that can be read"),
    ],
)
def test_what_cannot_be_read_is_a_reason_not_a_crash(
    headers, value: bytes, error: type[Exception], reason: str
) -> None:
    """One foreign record in a topic must not stop its partition: the worker parks it with this reason."""
    content = content_of("t", b"k", value, headers)

    assert type(content) is error
    assert any(part in str(content) for part in reason.split("|"))


def test_base64_that_is_none_is_a_reason_too() -> None:
    """The envelope is fine then, only its body is not."""
    content = content_of(
        "t", None, _structured({"data_base64": "%%"}), [("content-type", b"application/cloudevents+json")]
    )

    assert isinstance(content, UndecodableBodyError)
    assert content.message == "t"


def test_a_users_header_that_is_not_utf_8_does_not_spoil_the_message() -> None:
    """Agents of other vendors add binary headers of their own; they are none of the event's business."""
    headers = [*headers_of(OURS), ("x-binary", b"\xff\x00")]

    content = content_of("orders", None, OURS.data, headers)

    assert isinstance(content, Envelope)
    assert content.headers == {"tenant": "naïve", "x-binary": "\\xff\x00"}


@pytest.mark.parametrize("name", ["ce_id", "CE_ID", "Content-Type"])
def test_a_users_header_that_would_be_an_attribute_is_noticed(name: str) -> None:
    """Written as it is, it would silently replace the event's id or type at every reader."""
    assert reserved_header(Envelope(**{**_fields(OURS), "headers": {"tenant": "x", name: "1"}})) == name
    assert reserved_header(OURS) is None


def test_keys_that_are_not_text_stay_distinct() -> None:
    """Messages that cannot be read are parked by key: two keys that look alike would be held back together."""
    assert key_text(b"\xff") != key_text(b"\xfe")
    assert key_text(None) is None
    assert key_text(b"") == ""


def _structured(event: dict[str, object]) -> bytes:
    return json.dumps({"specversion": "1.0", "id": "1", "source": "s", "type": "t", **event}).encode()


def _fields(envelope: Envelope) -> dict[str, object]:
    return {name: getattr(envelope, name) for name in Envelope.__dataclass_fields__}
