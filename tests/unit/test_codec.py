"""JSON there and back, for whatever values a message may hold. The rest is in the kit for codecs."""

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from cqrs_decor.codec import JsonCodec
from cqrs_decor.errors import MessageDefinitionError, PayloadInvalidError, UndecodableBodyError
from cqrs_decor.messages import IntegrationEvent

CODEC = JsonCodec()


class Colour(Enum):
    GREEN = "green"
    BLACK = "black"


class Line(BaseModel):
    sku: str
    price: Decimal
    notes: dict[str, str]


class Everything(IntegrationEvent):
    text: str
    number: int
    ratio: float
    flag: bool | None
    uuid: UUID
    moment: datetime
    day: date
    span: timedelta
    colour: Colour
    lines: list[Line]


@dataclass(frozen=True)
class Inner:
    text: str
    tags: list[str]


@dataclass(frozen=True)
class Outer:
    uuid: UUID
    moment: datetime
    day: date
    colour: Colour
    ratio: float
    inner: list[Inner]


texts = st.text(st.characters(exclude_categories=["Cs"]))
floats = st.floats(allow_nan=False, allow_infinity=False)
numbers = st.integers(-(2**63), 2**63 - 1)
moments = st.datetimes(timezones=st.just(UTC))
lines = st.builds(
    Line,
    sku=texts,
    price=st.decimals(allow_nan=False, allow_infinity=False),
    notes=st.dictionaries(texts, texts, max_size=3),
)
everything = st.builds(
    Everything,
    text=texts,
    number=numbers,
    ratio=floats,
    flag=st.none() | st.booleans(),
    uuid=st.uuids(),
    moment=moments,
    day=st.dates(),
    span=st.timedeltas(timedelta(days=-10_000), timedelta(days=10_000)),
    colour=st.sampled_from(Colour),
    lines=st.lists(lines, max_size=3),
)
outers = st.builds(
    Outer,
    uuid=st.uuids(),
    moment=moments,
    day=st.dates(),
    colour=st.sampled_from(Colour),
    ratio=floats,
    inner=st.lists(st.builds(Inner, text=texts, tags=st.lists(texts, max_size=3)), max_size=3),
)


@given(everything)
def test_any_model_comes_back(message: Everything) -> None:
    """What was emitted is what is handled."""
    assert CODEC.decode(Everything, CODEC.encode(message)) == message


@given(outers)
def test_any_dataclass_comes_back(message: Outer) -> None:
    """Messages need not be pydantic models."""
    assert CODEC.decode(Outer, CODEC.encode(message)) == message


@given(everything)
def test_the_body_is_json_for_everybody(message: Everything) -> None:
    """Other systems read it with whatever JSON parser they have."""
    assert orjson.loads(CODEC.encode(message))["text"] == message.text


@given(st.binary(max_size=50))
def test_any_bytes_are_a_message_or_an_error_of_ours(body: bytes) -> None:
    """Whatever a broker holds, the worker can park it; nothing else may be raised."""
    try:
        CODEC.decode(Everything, body)
    except (UndecodableBodyError, PayloadInvalidError) as error:
        assert "Everything" in str(error)  # noqa: PT017 - not every body is an error


@given(
    st.recursive(st.none() | st.booleans() | numbers | texts, lambda inner: st.dictionaries(texts, inner, max_size=3))
)
def test_any_json_is_a_message_or_a_misfit(content: Any) -> None:
    """JSON that does not fit is told from what is no JSON at all."""
    with pytest.raises(PayloadInvalidError):
        CODEC.decode(Everything, orjson.dumps(content))


def test_a_dataclass_that_cannot_be_read_is_an_error_of_its_definition() -> None:
    """No body could ever fit it: that is not the producer's fault."""

    class Odd:
        pass

    @dataclass
    class Unreadable:
        odd: Odd

    with pytest.raises(MessageDefinitionError, match=r"Unreadable.*cannot be read from JSON"):
        CODEC.decode(Unreadable, b"{}")


def test_a_model_is_written_by_its_own_class_and_read_by_the_readers() -> None:
    """A consumer has its own, smaller class for somebody's event."""

    class Produced(BaseModel):
        sku: str
        count: int

    class Wanted(BaseModel):
        sku: str

    assert CODEC.decode(Wanted, CODEC.encode(Produced(sku="tea", count=1))) == Wanted(sku="tea")


def test_one_codec_serves_many_types() -> None:
    """Encoders and decoders are kept by type; one must not be taken for another."""
    inner = Inner(text="a", tags=[])
    line = Line(sku="a", price=Decimal(1), notes={})

    for _ in range(2):
        assert CODEC.decode(Inner, CODEC.encode(inner)) == inner
        assert CODEC.decode(Line, CODEC.encode(line)) == line
