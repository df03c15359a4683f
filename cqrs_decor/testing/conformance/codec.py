"""The kit for codecs."""

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum
from typing import Any, Literal
from uuid import UUID

import pytest
from pydantic import BaseModel, Field

from cqrs_decor.codec import Codec
from cqrs_decor.errors import PayloadInvalidError, UndecodableBodyError
from cqrs_decor.messages import IntegrationEvent
from cqrs_decor.testing.conformance.kit import Kit

_SECRET = "s3cret-7f"  # noqa: S105 - stands for what must not be in the text of an error

TEXTS = (
    "",
    " ",
    "plain",
    "żółć",
    "日本語",
    "🍵👩‍👩‍👧",
    "e\u0301",
    "\u202eright to left",
    'quotes " and \\ backslashes',
    "line\nbreak\ttab\r",
    "nul \x00 inside",
    "\u2028\u2029",
    "</script>",
    "x" * 100_000,
)


class Colour(Enum):
    GREEN = "green"
    BLACK = "black"


class Line(BaseModel):
    sku: str
    count: int
    price: Decimal


class OrderPlaced(IntegrationEvent, topic="kit"):
    id: UUID
    placed_at: datetime
    due: date
    patience: timedelta
    total: Decimal
    colour: Colour
    lines: list[Line]
    notes: dict[str, str]
    gift: bool | None = None


class Noted(IntegrationEvent, topic="kit"):
    text: str
    number: int = 0
    ratio: float = 0.0


class Tea(BaseModel):
    kind: Literal["tea"]


class Coffee(BaseModel):
    kind: Literal["coffee"]


class Served(IntegrationEvent, topic="kit"):
    drink: Tea | Coffee = Field(discriminator="kind")


class Address(BaseModel):
    street: str
    number: int


class Moved(IntegrationEvent, topic="kit"):
    addresses: list[Address]


@dataclass(frozen=True)
class Weighed:
    """A message that is a plain dataclass."""

    id: UUID
    at: datetime
    weights: list[float]
    label: str | None = None


@dataclass(frozen=True)
class Priced:
    sku: str
    price: Decimal


@dataclass(frozen=True)
class Parcel:
    content: list[Priced]


class CodecConformance(Kit):
    """Holds a codec to the contract of `cqrs_decor.codec`."""

    def make_codec(self) -> Codec:
        """A codec. Called once for each test."""
        raise NotImplementedError(f"{type(self).__name__} must say how its codec is made: make_codec()")

    @pytest.mark.parametrize("text", TEXTS, ids=ascii)
    def test_any_text_comes_back(self, text: str) -> None:
        """Users write in every script, and a log or a browser may be fed with what comes out."""
        self._comes_back(Noted(text=text))

    @pytest.mark.parametrize("number", [0, -1, 2**31, 2**53 + 1, -(2**63), 2**63 - 1])
    def test_any_64_bit_number_comes_back(self, number: int) -> None:
        """Ids of databases go beyond what a float can hold."""
        self._comes_back(Noted(text="", number=number))

    @pytest.mark.parametrize("ratio", [0.1, 1e-300, 1.7976931348623157e308, -0.0])
    def test_floats_come_back_exactly(self, ratio: float) -> None:
        """A sum that changes on its way makes two services disagree."""
        self._comes_back(Noted(text="", ratio=ratio))

    def test_a_nested_message_comes_back(self) -> None:
        """Models within models, dates, decimals, identifiers, enumerations: what events are made of."""
        self._comes_back(
            OrderPlaced(
                id=UUID("0190d0a0-0000-7000-8000-00000000abcd"),
                placed_at=datetime(2024, 2, 29, 23, 59, 59, 123456, tzinfo=UTC),
                due=date(2024, 3, 1),
                patience=timedelta(days=2, seconds=3, microseconds=4),
                total=Decimal("12345678901234567890.1200"),
                colour=Colour.GREEN,
                lines=[Line(sku="tea 🍵", count=2, price=Decimal("3.10")), Line(sku="", count=0, price=Decimal(0))],
                notes={"żółć": "ü", "": ""},
            )
        )

    def test_decimals_keep_their_digits(self) -> None:
        """3.10 and 3.1 are the same number and not the same price tag; and neither is a float."""
        line = Line(sku="tea", count=1, price=Decimal("3.10"))
        body = self.make_codec().encode(line)

        assert str(self.make_codec().decode(Line, body).price) == "3.10"

    def test_a_moment_keeps_its_instant_in_any_zone(self) -> None:
        """Services run in different zones; microseconds and the instant must survive."""
        zone = timezone(timedelta(hours=5, minutes=45))
        weighed = Weighed(UUID(int=1), datetime(2024, 2, 29, 1, 2, 3, 4, tzinfo=zone), [0.5])

        assert self._again(weighed).at == weighed.at

    def test_a_dataclass_comes_back(self) -> None:
        """Messages need not be pydantic models."""
        self._comes_back(Weighed(UUID(int=7), datetime(2024, 2, 29, tzinfo=UTC), [1.5, 0.1], "żółć 🍵"))
        self._comes_back(Weighed(UUID(int=7), datetime(2024, 2, 29, tzinfo=UTC), []))

    def test_a_dataclass_with_nested_decimals_comes_back(self) -> None:
        """What a model may hold, a dataclass may hold."""
        self._comes_back(Parcel([Priced("tea", Decimal("3.10")), Priced("🍵", Decimal("-0.01"))]))

    def test_fields_that_are_not_known_are_left_out(self) -> None:
        """The producer may be newer than its readers."""
        codec = self.make_codec()
        body = codec.encode(Line(sku="tea", count=1, price=Decimal("1.5")))

        assert codec.decode(_Sku, body) == _Sku(sku="tea")

    def test_what_is_not_there_takes_its_default(self) -> None:
        """The producer may be older than its readers."""
        codec = self.make_codec()

        assert codec.decode(Noted, codec.encode(_Text(text="a"))) == Noted(text="a")

    def test_the_same_message_has_the_same_body(self) -> None:
        """A repeat must not look like another message to those who compare bodies."""
        message = OrderPlaced(
            id=UUID(int=1),
            placed_at=datetime(2024, 2, 29, tzinfo=UTC),
            due=date(2024, 3, 1),
            patience=timedelta(seconds=1),
            total=Decimal(1),
            colour=Colour.BLACK,
            lines=[],
            notes={"b": "1", "a": "2"},
        )

        assert self.make_codec().encode(message) == self.make_codec().encode(message)

    @pytest.mark.parametrize("body", [b"", b"{", b"\x00\xff\xfe", b'{"text": "a"', b"not at all"], ids=repr)
    def test_broken_bytes_are_undecodable(self, body: bytes) -> None:
        """The operator is told that the producer is broken, not that a field is missing."""
        with pytest.raises(UndecodableBodyError, match="Noted"):
            self.make_codec().decode(Noted, body)

    def test_a_misfit_names_the_path_of_the_field(self) -> None:
        """In an event with fifty fields, the operator needs to know which one."""
        with pytest.raises(PayloadInvalidError) as caught:
            self._decode_as(Moved, {"addresses": [{"street": "a", "number": 1}, {"street": "b"}]})

        assert [path for path, _ in caught.value.faults] == ["addresses.1.number"]
        assert "addresses.1.number" in str(caught.value)
        assert "Moved" in str(caught.value)

    def test_every_misfit_is_named(self) -> None:
        """One round of mending, not one for each field."""
        with pytest.raises(PayloadInvalidError) as caught:
            self._decode_as(Moved, {"addresses": [{"street": 1, "number": "x"}]})

        assert sorted(path for path, _ in caught.value.faults) == ["addresses.0.number", "addresses.0.street"]

    @pytest.mark.parametrize(
        ("message_type", "content"),
        [
            (Noted, {"text": {"password": _SECRET}}),
            (Noted, {"text": "a", "number": _SECRET}),
            (Served, {"drink": {"kind": _SECRET}}),
            (Moved, {"addresses": [{"street": "a", "number": _SECRET}]}),
            (Moved, {"addresses": _SECRET}),
        ],
        ids=["nested", "number", "tag", "in a list", "instead of a list"],
    )
    def test_an_error_never_shows_the_value(self, message_type: type[Any], content: dict[str, Any]) -> None:
        """Errors go to logs and tables that more people may read than the events themselves."""
        with pytest.raises(PayloadInvalidError) as caught:
            self._decode_as(message_type, content)

        assert _SECRET not in str(caught.value)
        assert _SECRET not in repr(caught.value.faults)
        assert caught.value.__cause__ is None or _SECRET not in str(caught.value.__cause__)

    def test_what_cannot_be_written_is_an_error_of_the_message(self) -> None:
        """It is raised where the event is emitted, inside the transaction, so that nothing is committed."""
        with pytest.raises(PayloadInvalidError, match="_Unwritable"):
            self.make_codec().encode(_Unwritable(thing=object()))

    def test_it_names_its_content_type(self) -> None:
        """Readers in other systems choose by it how to read the body."""
        assert "/" in self.make_codec().content_type

    # --- the words of the tests above ---

    def _comes_back(self, message: object) -> None:
        assert self._again(message) == message

    def _again(self, message: Any) -> Any:
        codec, message_type = self.make_codec(), message.__class__
        return codec.decode(message_type, codec.encode(message))

    def _decode_as(self, message_type: type[Any], content: dict[str, Any]) -> Any:
        codec = self.make_codec()
        return codec.decode(message_type, codec.encode(_Loose(**content)))


class _Loose(BaseModel, extra="allow"):
    """Anything: what a producer with other ideas may send."""


class _Sku(BaseModel):
    sku: str


class _Text(BaseModel):
    text: str


class _Unwritable(BaseModel, arbitrary_types_allowed=True):
    thing: object
