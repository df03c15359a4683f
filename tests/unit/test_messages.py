"""What message classes say about themselves, and what is refused where they are defined."""

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import pytest
from pydantic import BaseModel, ValidationError

from cqrs_decor.errors import MessageDefinitionError
from cqrs_decor.messages import (
    NOT_SAID,
    Command,
    DomainEvent,
    ECSTEvent,
    IntegrationEvent,
    NotificationEvent,
    Query,
    Returns,
    StreamQuery,
    integration_event_types,
    is_message_type,
    message,
    message_spec,
)

T = TypeVar("T")


class PlaceOrder(Command[int]):
    sku: str


class OrderPlaced(IntegrationEvent, topic="orders", key="order_id", name="shop.order-placed", version=3):
    order_id: int


@dataclass(frozen=True)
class Plain:
    sku: str


def test_class_arguments_are_kept_as_one_description() -> None:
    """Everything that is known of a message is in one place, read when the class is made."""
    spec = message_spec(OrderPlaced)

    assert (spec.type, spec.kind, spec.name, spec.version) == (OrderPlaced, "integration event", "shop.order-placed", 3)
    assert (spec.topic, spec.key, spec.compacted, spec.leaves_the_process) == ("orders", "order_id", False, True)


def test_the_wire_name_is_the_class_name_unless_given() -> None:
    """The shortest class that works."""
    spec = message_spec(PlaceOrder)

    assert (spec.name, spec.version, spec.topic, spec.key) == ("PlaceOrder", 1, None, None)


@pytest.mark.parametrize(
    ("base", "kind"),
    [
        (Command[int], "command"),
        (Query[int], "query"),
        (StreamQuery[int], "stream query"),
        (DomainEvent, "domain event"),
        (IntegrationEvent, "integration event"),
        (NotificationEvent, "integration event"),
        (ECSTEvent, "integration event"),
    ],
)
def test_the_base_class_says_the_kind(base: Any, kind: str) -> None:
    """The kind decides what a message may be given to, and whether it leaves the process."""

    class Something(base):
        pass

    assert message_spec(Something).kind == kind
    assert message_spec(Something).leaves_the_process == (kind == "integration event")


def test_event_carried_state_transfer_may_be_compacted() -> None:
    """Only an event with the whole state may be kept as the newest of its key alone."""

    class StockLevel(ECSTEvent, topic="stock", key="sku"):
        sku: str

    assert message_spec(StockLevel).compacted
    assert not message_spec(OrderPlaced).compacted


@pytest.mark.parametrize("result", [int, str | None, list[int], Plain])
@pytest.mark.parametrize("base", [Command, Query, StreamQuery])
def test_the_type_argument_is_the_result(base: Any, result: Any) -> None:
    """It is checked against the handler at start-up."""
    holder: Any = base[result]

    class Something(holder):
        pass

    assert message_spec(Something).result == result


def test_a_result_of_none_is_said() -> None:
    """A command that returns nothing is the most common one."""

    class Forget(Command[None]):
        pass

    assert message_spec(Forget).result is None


def test_a_command_without_type_argument_says_nothing_of_its_result() -> None:
    """Nothing to check is not the same as None."""

    class Bare(Command):  # type: ignore[type-arg]
        pass

    assert message_spec(Bare).result is NOT_SAID
    assert repr(NOT_SAID) == "NOT_SAID"


def test_the_result_is_found_through_a_generic_base_of_the_users() -> None:
    """Teams have base classes of their own."""

    class Audited(Command[T], Generic[T]):
        by: str

    class Below(Audited[int]):
        pass

    class FurtherBelow(Below):
        pass

    assert message_spec(Below).result is int
    assert message_spec(FurtherBelow).result is int


def test_a_subclass_inherits_topic_and_key_but_not_the_wire_name() -> None:
    """Two classes of one wire name and version could not be told apart on the way in."""

    class OrderPlacedLoudly(OrderPlaced):
        pass

    spec = message_spec(OrderPlacedLoudly)
    assert (spec.topic, spec.key, spec.name, spec.version) == ("orders", "order_id", "OrderPlacedLoudly", 1)


def test_fields_may_be_called_as_the_class_arguments_are() -> None:
    """Users have fields named topic, name, key and version, and those are theirs."""

    class Renamed(IntegrationEvent, topic="names", key="name"):
        topic: str
        name: str
        key: str
        version: int

    renamed = Renamed(topic="t", name="n", key="k", version=9)

    assert renamed.model_dump() == {"topic": "t", "name": "n", "key": "k", "version": 9}
    assert (message_spec(Renamed).topic, message_spec(Renamed).version) == ("names", 1)


def test_messages_are_frozen_and_ignore_what_they_do_not_know() -> None:
    """A handler must not change what the next one gets; a producer may be newer than its reader."""
    event = OrderPlaced.model_validate({"order_id": 1, "colour": "green"})

    assert event == OrderPlaced(order_id=1)
    with pytest.raises(ValidationError):
        event.order_id = 2  # type: ignore[misc]


def test_a_misspelt_class_argument_is_refused_where_the_class_is_defined() -> None:
    """An event without its topic would be noticed in production, by nobody."""
    with pytest.raises(MessageDefinitionError, match="unknown class argument 'topik'"):

        class Misspelt(IntegrationEvent, topik="orders"):  # type: ignore[call-arg]
            pass


def test_pydantics_own_class_arguments_pass() -> None:
    """Messages are pydantic models with all that this gives."""

    class Strict(Command[int], strict=True):
        number: int

    with pytest.raises(ValidationError):
        Strict(number="1")  # type: ignore[arg-type]


def test_a_key_that_is_no_field_is_refused_and_the_fields_are_named() -> None:
    """The partition key is read from the event each time it is emitted."""
    with pytest.raises(MessageDefinitionError, match=r"key='id' is none of its fields\.\nFix: name one of sku, count"):

        class Wrong(IntegrationEvent, topic="orders", key="id"):
            sku: str
            count: int


def test_a_key_without_any_field_says_so() -> None:
    """An empty list of names would read as a mistake of the library."""
    with pytest.raises(MessageDefinitionError, match=r"\(it has no fields\)"):

        class Empty(IntegrationEvent, topic="orders", key="id"):
            pass


def test_an_inherited_key_must_be_a_field_as_well() -> None:
    """A base class may promise a field that only its subclasses have."""
    with pytest.raises(MessageDefinitionError, match="key='order_id'"):

        class Base(IntegrationEvent, topic="orders", key="order_id"):
            pass


def test_versions_count_from_one() -> None:
    """Upcasters step from one version to the next."""
    with pytest.raises(MessageDefinitionError, match="version=0 is less than 1"):

        class Zero(IntegrationEvent, topic="orders", version=0):
            pass


@pytest.mark.parametrize("base", [Command[int], Query[int], StreamQuery[int], DomainEvent])
def test_what_stays_in_the_process_has_no_topic(base: Any) -> None:
    """Whoever writes a topic there expects the message to be published."""
    with pytest.raises(MessageDefinitionError, match="has no topic"):

        class Wrong(base, topic="orders"):
            pass


def test_a_dataclass_becomes_an_integration_event_by_its_topic() -> None:
    """Messages need not be pydantic models."""

    @message(topic="orders", key="order_id", name="shop.order-paid", version=2, compacted=True)
    @dataclass(frozen=True)
    class OrderPaid:
        order_id: int

    spec = message_spec(OrderPaid)
    assert (spec.kind, spec.topic, spec.key, spec.name) == (
        "integration event",
        "orders",
        "order_id",
        "shop.order-paid",
    )
    assert (spec.version, spec.compacted, spec.type) == (2, True, OrderPaid)


def test_a_dataclass_without_topic_is_what_its_handler_makes_of_it() -> None:
    """@command_handler says that it is a command."""
    spec = message_spec(message(name="plain")(Plain))

    assert (spec.kind, spec.name, spec.leaves_the_process) == ("message", "plain", False)


def test_a_dataclass_gives_its_result_by_returns() -> None:
    """`send` is typed for dataclasses as well."""

    @dataclass(frozen=True)
    class Ping(Returns[int]):
        text: str

    assert message_spec(Ping).result is int
    assert message_spec(type("Silent", (Returns,), {})).result is NOT_SAID


def test_what_is_no_dataclass_cannot_be_declared_a_message() -> None:
    """It would have no fields to write or to read."""
    with pytest.raises(
        MessageDefinitionError, match=r"@message is for dataclasses\.\nFix: put @dataclass\(frozen=True\)"
    ):

        @message(topic="orders")
        class Wrong:
            pass


def test_a_dataclass_with_a_wrong_key_is_refused() -> None:
    """The same check as for models."""
    with pytest.raises(MessageDefinitionError, match="key='id' is none of its fields"):
        message(topic="orders", key="id")(Plain)


def test_a_class_that_declares_nothing_is_known_by_its_name() -> None:
    """A bare dataclass is a fine command."""

    @dataclass
    class Bare:
        pass

    spec = message_spec(Bare)
    assert (spec.type, spec.kind, spec.name, spec.topic) == (Bare, "message", "Bare", None)


def test_a_subclass_of_a_declared_dataclass_is_not_declared() -> None:
    """Its own wire name would be its parent's."""

    @message(topic="orders", name="shop.parent")
    @dataclass(frozen=True)
    class Parent:
        pass

    class Child(Parent):
        pass

    assert message_spec(Child).name == "Child"


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (PlaceOrder, True),
        (OrderPlaced, True),
        (Plain, True),
        (type("Ping", (Returns,), {}), True),
        (int, False),
        (BaseModel, False),
        (PlaceOrder | OrderPlaced, False),
        ("PlaceOrder", False),
        (Plain(sku="a"), False),
    ],
)
def test_only_message_classes_may_be_a_handlers_first_parameter(annotation: Any, expected: bool) -> None:
    """A handler that takes its database first has a mistake that is named at start-up."""
    assert is_message_type(annotation) is expected


def test_events_with_a_topic_are_found_handled_or_not() -> None:
    """`topics plan` lists what this service publishes too."""

    class Unhandled(NotificationEvent, topic="orders"):
        pass

    class Homeless(IntegrationEvent):
        pass

    found = integration_event_types()
    assert Unhandled in found
    assert OrderPlaced in found
    assert Homeless not in found
    assert IntegrationEvent not in found


@pytest.mark.parametrize("options", [{"slots": True}, {"slots": True, "frozen": True}])
def test_a_decorator_that_makes_a_second_class_is_refused(options: dict[str, bool]) -> None:
    """It would have another wire name: what its producers send would be acknowledged with no handler called."""
    with pytest.raises(MessageDefinitionError, match="a decorator makes a second class of it"):

        @dataclass(**options)
        class OrderShipped(IntegrationEvent, topic="orders", key="order_id", name="shop.order-shipped"):
            order_id: int


def test_a_dataclass_with_slots_is_a_message_by_its_decorator() -> None:
    """The way that the error names."""

    @message(topic="orders", key="order_id", name="shop.order-shipped")
    @dataclass(frozen=True, slots=True)
    class OrderShipped:
        order_id: int

    assert message_spec(OrderShipped).name == "shop.order-shipped"
