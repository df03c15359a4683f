"""Thin events and events that carry state, from the class to the broker and back."""

import pytest

from cqrs_decor import Command, ECSTEvent, NotificationEvent, Registry, bootstrap, emit
from cqrs_decor.broker import TopicPlan
from cqrs_decor.routing import Routes

sales = Registry("kinds of integration events")
handled: list[object] = []


class Rename(Command[None]):
    customer: int
    name: str


class CustomerRenamed(NotificationEvent, topic="customers.news", key="customer"):
    customer: int


class Customer(ECSTEvent, topic="customers.state", key="customer"):
    customer: int
    name: str


@sales.command_handler
async def rename(command: Rename) -> None:
    emit(CustomerRenamed(customer=command.customer))
    emit(Customer(customer=command.customer, name=command.name))


@sales.event_handler
async def hear(event: CustomerRenamed | Customer) -> None:
    handled.append(event)


@pytest.mark.feature("O3")
async def test_both_kinds_arrive_as_their_own_class() -> None:
    """A reader of state needs the fields, a reader of news only the key."""
    handled.clear()
    async with bootstrap(registry=sales, discover=False) as app:
        await app.send(Rename(customer=7, name="Ada"))
        await app.drain()

    assert sorted(handled, key=repr) == [Customer(customer=7, name="Ada"), CustomerRenamed(customer=7)]


@pytest.mark.feature("O3")
def test_only_a_topic_of_state_may_be_compacted() -> None:
    """Compaction keeps the newest event of a key: right for state, a loss for news."""
    news, state = Routes().topics([CustomerRenamed, Customer])

    assert (news, state) == (TopicPlan(name="customers.news"), TopicPlan(name="customers.state", compacted=True))
