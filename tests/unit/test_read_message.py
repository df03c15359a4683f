"""What comes in from outside is validated before any handler runs."""

from dataclasses import dataclass

import pytest

from cqrs_decor import Command, Returns, read_message
from cqrs_decor.errors import MessageValidationError


class Pay(Command[None]):
    number: int
    lines: list[int]


@dataclass(frozen=True)
class Ping(Returns[str]):
    host: str


@pytest.mark.feature("M15")
def test_what_does_not_fit_names_the_paths_of_its_fields() -> None:
    """The caller must be able to mend the input from the error alone."""
    with pytest.raises(MessageValidationError) as caught:
        read_message(Pay, {"number": "many", "lines": [1, "two"]})

    assert [path for path, _ in caught.value.faults] == ["number", "lines.1"]


@pytest.mark.feature("M15")
def test_the_error_holds_no_value() -> None:
    """Errors reach logs; payloads must not."""
    with pytest.raises(MessageValidationError) as caught:
        read_message(Pay, b'{"number": "s3cret", "lines": []}')

    assert "s3cret" not in str(caught.value)


def test_json_and_fields_give_the_same_message() -> None:
    """Both ways in end in the same class."""
    assert read_message(Pay, '{"number": 1, "lines": [2]}') == read_message(Pay, {"number": 1, "lines": [2]})


def test_a_dataclass_is_validated_too() -> None:
    """Dataclasses validate nothing by themselves."""
    assert read_message(Ping, {"host": "a"}) == Ping("a")
    with pytest.raises(MessageValidationError):
        read_message(Ping, {})
