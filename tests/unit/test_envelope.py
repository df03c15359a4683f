"""The envelope and its CloudEvents attributes, there and back."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from cloudevents.core.v1.event import CloudEvent
from hypothesis import given
from hypothesis import strategies as st

from cqrs_decor.envelope import Envelope, envelope_from_attributes
from cqrs_decor.errors import MalformedEnvelopeError

MOMENT = datetime(2024, 2, 29, 23, 59, 59, 123456, tzinfo=UTC)
FULL = Envelope(
    id="0190",
    source="shop",
    type="shop.order-placed",
    topic="orders",
    data=b"{}",
    time=MOMENT,
    version=2,
    key="17",
    content_type="application/avro",
    correlation_id="c",
    causation_id="d",
    sequence=42,
    traceparent="00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    headers={"tenant": "a"},
)

texts = st.text(min_size=1)
maybe_texts = st.none() | st.text()
envelopes = st.builds(
    Envelope,
    id=texts,
    source=texts,
    type=texts,
    topic=texts,
    data=st.binary(),
    time=st.datetimes(timezones=st.just(UTC)),
    version=st.integers(1, 1_000_000),
    key=maybe_texts,
    content_type=texts,
    correlation_id=maybe_texts,
    causation_id=maybe_texts,
    sequence=st.none() | st.integers(0, 2**63 - 1),
    traceparent=maybe_texts,
    headers=st.dictionaries(texts, st.text()),
)


def read_back(envelope: Envelope) -> Envelope:
    return envelope_from_attributes(
        envelope.attributes(),
        topic=envelope.topic,
        data=envelope.data,
        content_type=envelope.content_type,
        headers=envelope.headers,
    )


def test_the_attributes_are_those_of_cloudevents() -> None:
    """Any other system can read them."""
    assert FULL.attributes() == {
        "specversion": "1.0",
        "id": "0190",
        "source": "shop",
        "type": "shop.order-placed",
        "time": "2024-02-29T23:59:59.123456Z",
        "dataversion": "2",
        "partitionkey": "17",
        "correlationid": "c",
        "causationid": "d",
        "sequence": "00000000000000000042",
        "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    }


def test_the_official_library_takes_the_attributes() -> None:
    """The specification has rules for names and values; its own library knows them best."""
    attributes = {**FULL.attributes(), "time": MOMENT, "datacontenttype": FULL.content_type}

    event = CloudEvent(attributes, FULL.data)

    assert (event.get_id(), event.get_source(), event.get_type()) == ("0190", "shop", "shop.order-placed")


def test_what_is_not_given_is_no_attribute() -> None:
    """CloudEvents has no empty attributes."""
    plain = Envelope(id="1", source="shop", type="t", topic="orders", data=b"", time=MOMENT)

    assert set(plain.attributes()) == {"specversion", "id", "source", "type", "time", "dataversion"}


def test_the_empty_key_is_an_attribute() -> None:
    """It is a key like any other; only None means no order."""
    plain = Envelope(id="1", source="shop", type="t", topic="orders", data=b"", time=MOMENT, key="")

    assert plain.attributes()["partitionkey"] == ""
    assert read_back(plain).key == ""


@given(envelopes)
def test_an_envelope_comes_back_from_its_attributes(envelope: Envelope) -> None:
    """Whatever is written can be read."""
    assert read_back(envelope) == envelope


@given(st.lists(st.integers(0, 2**63 - 1), min_size=2))
def test_sequences_sort_as_text_as_they_do_as_numbers(sequences: list[int]) -> None:
    """The CloudEvents extension compares them as text."""
    written = [FULL.with_sequence(each).attributes()["sequence"] for each in sequences]

    assert sorted(written) == [FULL.with_sequence(each).attributes()["sequence"] for each in sorted(sequences)]


def test_a_time_in_another_zone_is_written_in_utc() -> None:
    """Readers compare times as text, too."""
    zone = timezone(timedelta(hours=5, minutes=45))
    envelope = Envelope(id="1", source="s", type="t", topic="o", data=b"", time=MOMENT.astimezone(zone))

    assert envelope.attributes()["time"] == "2024-02-29T23:59:59.123456Z"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2024-02-29T23:59:59Z", datetime(2024, 2, 29, 23, 59, 59, tzinfo=UTC)),
        ("2024-02-29T23:59:59.5Z", datetime(2024, 2, 29, 23, 59, 59, 500_000, tzinfo=UTC)),
        ("2024-02-29T23:59:59.123456789Z", datetime(2024, 2, 29, 23, 59, 59, 123_456, tzinfo=UTC)),
        ("2024-03-01T05:44:59+05:45", datetime(2024, 2, 29, 23, 59, 59, tzinfo=UTC)),
        ("2024-02-29T23:59:59", datetime(2024, 2, 29, 23, 59, 59, tzinfo=UTC)),
    ],
)
def test_times_of_other_producers_are_read(text: str, expected: datetime) -> None:
    """RFC 3339 allows any number of digits and any offset; without one it is taken for UTC."""
    envelope = envelope_from_attributes({"id": "1", "source": "s", "type": "t", "time": text}, topic="o", data=b"")

    assert envelope.time == expected


def test_what_other_producers_leave_out_has_a_default() -> None:
    """Only four attributes are required by the specification."""
    envelope = envelope_from_attributes(
        {"specversion": "1.0", "id": "1", "source": "s", "type": "t"}, topic="orders", data=b"x", key="17"
    )

    assert (envelope.version, envelope.key, envelope.content_type) == (1, "17", "application/json")
    assert (envelope.correlation_id, envelope.causation_id, envelope.sequence, envelope.traceparent) == (None,) * 4
    assert envelope.headers == {}
    assert envelope.time.tzinfo is not None


def test_the_partition_key_of_the_envelope_comes_before_that_of_the_broker() -> None:
    """A broker may have to change the key; the producer's is in the envelope."""
    attributes = {"id": "1", "source": "s", "type": "t", "partitionkey": "mine"}

    assert envelope_from_attributes(attributes, topic="o", data=b"", key="brokers").key == "mine"


def test_the_content_type_of_the_binding_comes_first() -> None:
    """In binary mode it travels in the broker's own property."""
    attributes = {"id": "1", "source": "s", "type": "t", "datacontenttype": "text/plain"}

    assert envelope_from_attributes(attributes, topic="o", data=b"").content_type == "text/plain"
    assert envelope_from_attributes(attributes, topic="o", data=b"", content_type="a/b").content_type == "a/b"


@pytest.mark.parametrize("missing", ["id", "source", "type"])
def test_a_missing_attribute_is_named(missing: str) -> None:
    """Without one of these a message can be neither told from others nor handled."""
    attributes = {name: "x" for name in ("id", "source", "type") if name != missing}

    for wrong in (attributes, {**attributes, missing: ""}):
        with pytest.raises(MalformedEnvelopeError, match=f"attributes missing: {missing}"):
            envelope_from_attributes(wrong, topic="o", data=b"")


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("specversion", "0.3", "specversion '0.3' is not 1.x"),
        ("time", "yesterday", "time 'yesterday' is not RFC 3339"),
        ("dataversion", "two", "dataversion 'two' is not a whole number"),
    ],
)
def test_an_unreadable_attribute_is_named_with_its_value(name: str, value: str, reason: str) -> None:
    """The message is parked with this text; attributes are no payload."""
    with pytest.raises(MalformedEnvelopeError) as caught:
        envelope_from_attributes({"id": "1", "source": "s", "type": "t", name: value}, topic="o", data=b"")

    assert caught.value.reason == reason


@pytest.mark.parametrize("sequence", ["a0", "", "-1", "1.5"])
def test_a_sequence_that_is_no_number_is_left_out(sequence: str) -> None:
    """The extension allows any text that sorts; ours are numbers, and others' do not matter."""
    attributes = {"id": "1", "source": "s", "type": "t", "sequence": sequence}

    assert envelope_from_attributes(attributes, topic="o", data=b"").sequence is None


def test_headers_are_copied() -> None:
    """A driver may reuse its dictionary for the next message."""
    headers = {"tenant": "a"}
    envelope = envelope_from_attributes({"id": "1", "source": "s", "type": "t"}, topic="o", data=b"", headers=headers)
    headers["tenant"] = "b"

    assert envelope.headers == {"tenant": "a"}


def test_a_sequence_is_given_without_touching_the_rest() -> None:
    """The relay gives it when it has claimed the record."""
    assert FULL.with_sequence(7).sequence == 7
    assert FULL.with_sequence(42) == FULL
