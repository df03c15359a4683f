"""The kit for brokers."""

from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from typing import Any, TypeVar

import anyio
import anyio.lowlevel
import pytest

from cqrs_decor._ids import new_id
from cqrs_decor.broker import (
    Broker,
    Capabilities,
    Delivery,
    Partition,
    Revoked,
    Start,
    Subscription,
    TopicPlan,
    worth_retrying,
)
from cqrs_decor.envelope import Envelope
from cqrs_decor.errors import TopicMissingError
from cqrs_decor.testing.conformance.kit import Kit, as_test, full_sample, ids_by_key, ids_of, require, sample

K = TypeVar("K", bound="BrokerConformance")

_POLL = timedelta(milliseconds=200)


def _broker_test(test: Callable[[K, Broker], Coroutine[Any, Any, None]]) -> Callable[[K], None]:
    def run(self: K) -> None:
        __tracebackhide__ = True
        self.run(self.open_broker, lambda broker: test(self, broker))

    return as_test(run, test)


class BrokerConformance(Kit):
    """Holds a broker to the contract of `cqrs_decor.broker`.

    The topics that `create_topics` makes must have two partitions or more. Every test uses topics and groups of its
    own, so brokers may be used that hold other messages.
    """

    def open_broker(self) -> AbstractAsyncContextManager[Broker]:
        """An open broker; write it as an `@asynccontextmanager`.

        Called once for a test; twice, for two brokers side by side on the same server, where the card says `shared`.
        """
        raise NotImplementedError(f"{type(self).__name__} must say how its broker is opened: open_broker()")

    def oversized_envelope(self, topic: str, key: str) -> Envelope | None:
        """An envelope that the broker refuses because of its size; None where it has no limit."""
        return None

    # --- what is published arrives ---

    @_broker_test
    async def test_an_envelope_arrives_with_every_attribute_and_header(self, broker: Broker) -> None:
        """Deduplication, tracing and routing depend on attributes that come through unchanged."""
        envelope = full_sample(await self._topic(broker))

        assert await self._there_and_back(broker, envelope) == [envelope]

    @_broker_test
    async def test_attributes_that_are_not_given_stay_absent(self, broker: Broker) -> None:
        """An empty text is not the same as nothing: a correlation id of "" would correlate everything."""
        envelope = sample(await self._topic(broker), None)

        assert await self._there_and_back(broker, envelope) == [envelope]

    @_broker_test
    async def test_an_empty_body_arrives(self, broker: Broker) -> None:
        """A body of no bytes is a valid message; a broker may take it for a deletion mark."""
        envelope = sample(await self._topic(broker), data=b"")

        assert await self._there_and_back(broker, envelope) == [envelope]

    @_broker_test
    async def test_a_body_of_any_bytes_arrives(self, broker: Broker) -> None:
        """The body may be compressed or encrypted: nothing may read it as text on its way."""
        envelope = sample(await self._topic(broker), data=bytes(range(256)))

        assert await self._there_and_back(broker, envelope) == [envelope]

    @_broker_test
    async def test_a_body_of_a_megabyte_arrives(self, broker: Broker) -> None:
        """Event-carried state transfer makes large bodies; a megabyte is what users may expect to pass anywhere."""
        envelope = sample(await self._topic(broker), data=b"x" * 1_000_000)

        arrived = await self._there_and_back(broker, envelope)

        assert [len(each.data) for each in arrived] == [1_000_000]
        assert arrived == [envelope]

    @_broker_test
    async def test_any_key_arrives(self, broker: Broker) -> None:
        """No key, the empty key and a key of emoji are three different things to the order of messages."""
        topic = await self._topic(broker)
        envelopes = [sample(topic, key) for key in (None, "", "🍵", "a b/ü", "0")]

        arrived = await self._there_and_back(broker, *envelopes)

        assert {each.id: each.key for each in arrived} == {each.id: each.key for each in envelopes}

    @_broker_test
    async def test_a_delivery_holds_the_body_and_key_as_they_came(self, broker: Broker) -> None:
        """What cannot be read as an envelope is parked with these two, so they must be there for every message."""
        topic = await self._topic(broker)
        await self._publish(broker, sample(topic, "k", data=b'{"n":1}'))

        async with broker.subscribe(new_id(), [topic]) as subscription:
            [delivery] = await self._read(subscription, 1)

        assert (delivery.raw, delivery.key, delivery.partition.topic) == (b'{"n":1}', "k", topic)

    @_broker_test
    async def test_publishing_answers_one_outcome_for_each_envelope(self, broker: Broker) -> None:
        """The relay pairs outcomes with records by their place: one too few would settle the wrong record."""
        topic = await self._topic(broker)

        outcomes = await broker.publish([sample(topic, str(n % 7)) for n in range(50)])

        assert list(outcomes) == [None] * 50
        assert list(await broker.publish([])) == []

    @_broker_test
    async def test_the_order_of_each_key_is_kept_over_many_batches(self, broker: Broker) -> None:
        """Order per key is what lets a consumer apply "changed" after "created"."""
        require(broker, broker.capabilities, "ordered_by_key")
        topic = await self._topic(broker)
        published = [sample(topic, f"key-{n % 23}") for n in range(460)]

        for start in range(0, len(published), 115):
            await self._publish(broker, *published[start : start + 115])
        arrived = await self._read_all(broker, topic, len(published))

        assert ids_by_key(arrived) == ids_by_key(published)

    @_broker_test
    async def test_positions_rise_within_a_partition(self, broker: Broker) -> None:
        """The worker acknowledges by position: one that repeats or falls would lose messages."""
        topic = await self._topic(broker)
        await self._publish(broker, *(sample(topic, f"key-{n % 20}") for n in range(100)))

        async with broker.subscribe(new_id(), [topic]) as subscription:
            deliveries = await self._read(subscription, 100)

        for positions in _positions(deliveries).values():
            assert positions == sorted(set(positions))

    @_broker_test
    async def test_messages_of_one_key_share_a_partition(self, broker: Broker) -> None:
        """Two partitions may be read by two workers at once: a key that is in both has no order."""
        require(broker, broker.capabilities, "ordered_by_key")
        topic = await self._topic(broker)
        await self._publish(broker, *(sample(topic, f"key-{n % 20}") for n in range(100)))

        async with broker.subscribe(new_id(), [topic]) as subscription:
            deliveries = await self._read(subscription, 100)

        places = {(delivery.key, delivery.partition.number) for delivery in deliveries}
        assert len(places) == 20
        assert len({number for _, number in places}) > 1, "make the topics of the tests with two partitions or more"

    @_broker_test
    async def test_publishing_the_same_ids_again_is_allowed(self, broker: Broker) -> None:
        """A relay that was killed before it settled publishes again; that must never be refused."""
        topic = await self._topic(broker)
        envelopes = [sample(topic, "a") for _ in range(5)]

        await self._publish(broker, *envelopes)
        await self._publish(broker, *envelopes)
        await self._publish(broker, last := sample(topic, "a"))
        arrived = await self._read_up_to(broker, topic, last)

        assert list(dict.fromkeys(ids_of(arrived))) == [*ids_of(envelopes), last.id]

    @_broker_test
    async def test_a_publish_that_was_cancelled_can_be_repeated_in_order(self, broker: Broker) -> None:
        """A relay that lost its lane breaks off anywhere: what it left behind may repeat, and never overtake."""
        topic = await self._topic(broker)
        published = [sample(topic, f"key-{n % 3}") for n in range(60)]

        for n in range(5):
            with anyio.move_on_after(0.002 * n):
                await broker.publish(published)
        await self._publish(broker, *published)
        await self._publish(broker, *(last := [sample(topic, f"key-{n}") for n in range(3)]))
        arrived = await self._read_up_to(broker, topic, *last)

        assert ids_by_key(arrived) == ids_by_key([*published, *last])

    # --- who receives ---

    @_broker_test
    async def test_each_group_receives_everything(self, broker: Broker) -> None:
        """Every service is a group of its own: one must not eat what another needs."""
        topic = await self._topic(broker)
        published = [sample(topic, f"key-{n % 5}") for n in range(20)]
        await self._publish(broker, *published)

        received: list[list[str]] = []
        for group in (new_id(), new_id()):
            async with broker.subscribe(group, [topic]) as subscription:
                deliveries = await self._read(subscription, 20)
                await subscription.ack(deliveries)
                received.append(sorted(ids_of(_envelopes(deliveries))))

        assert received == [sorted(ids_of(published))] * 2

    @_broker_test
    async def test_groups_read_side_by_side(self, broker: Broker) -> None:
        """What one group acknowledges says nothing about the others, also while both are reading."""
        topic = await self._topic(broker)
        published = [sample(topic, f"key-{n % 5}") for n in range(20)]

        async with _reading(broker, new_id(), topic) as one, _reading(broker, new_id(), topic) as other:
            one.acknowledges = other.acknowledges = True
            await self._publish(broker, *published)
            everything = set(ids_of(published))
            await self.eventually(lambda: one.ids == other.ids == everything, "both groups received everything")

    @_broker_test
    async def test_one_subscription_reads_several_topics(self, broker: Broker) -> None:
        """A service subscribes once to all the topics that its handlers need."""
        topics = [await self._topic(broker) for _ in range(3)]
        published = [sample(topic, "a") for topic in topics]
        await self._publish(broker, *published)

        async with broker.subscribe(new_id(), topics) as subscription:
            arrived = _envelopes(await self._read(subscription, 3))

        assert {each.id: each.topic for each in arrived} == {each.id: each.topic for each in published}

    @_broker_test
    async def test_readers_of_a_group_share_and_the_one_that_leaves_hands_its_work_over(self, broker: Broker) -> None:
        """Scaling out must not run a handler twice, and a worker that dies must not take messages along."""
        topic, group = await self._topic(broker), new_id()
        published = [sample(topic, f"key-{n % 40}") for n in range(200)]
        wanted = set(ids_of(published))

        async with _reading(broker, group, topic) as stays:
            async with _reading(broker, group, topic) as leaves:
                await self._share(broker, topic, stays, leaves)
                await self._publish(broker, *published)
                await self.eventually(lambda: stays.ids | leaves.ids >= wanted, "everything reached one of two readers")

                assert not stays.ids & leaves.ids & wanted, "both readers were given the same messages"
                assert stays.ids & wanted, "the first reader was given nothing"
                assert leaves.ids & wanted, "the second reader was given nothing"
            await self.eventually(lambda: stays.ids >= wanted, "what a reader left behind reached the other one")

        arrived = [each for each in stays.envelopes if each.id in wanted]
        assert ids_by_key(arrived) == ids_by_key(published)

    @_broker_test
    async def test_a_reader_is_told_before_its_partitions_move_and_may_still_acknowledge(self, broker: Broker) -> None:
        """A worker finishes and acknowledges what it has in hand; without that, every deployment repeats messages."""
        topic, group = await self._topic(broker), new_id()
        old = [sample(topic, f"key-{n % 40}") for n in range(80)]
        await self._publish(broker, *old)
        revoked: list[Partition] = []
        readers: list[_Reader] = []

        async def finish(partitions: Collection[Partition]) -> None:
            revoked.extend(partitions)
            in_hand = [each for each in readers[0].deliveries if each.partition in partitions]
            await readers[0].subscription.ack(in_hand)

        async with _reading(broker, group, topic, on_revoked=finish) as first:
            readers.append(first)
            await self.eventually(lambda: first.ids >= set(ids_of(old)), "the first reader received everything")
            assert revoked == []
            async with _reading(broker, group, topic) as second:
                while not second.deliveries:
                    await self._publish(broker, *(sample(topic, f"key-{n}") for n in range(40)))
                    await anyio.sleep(0.05)

        assert revoked, "partitions moved and on_revoked was not called"
        assert {place.topic for place in revoked} == {topic}
        assert not second.ids & set(ids_of(old)), "acknowledged in on_revoked, and delivered again"

    @_broker_test
    async def test_an_acknowledgement_of_a_past_assignment_is_ignored(self, broker: Broker) -> None:
        """A frozen worker wakes up and acknowledges what another works on: counting it would lose that work."""
        topic, group = await self._topic(broker), new_id()
        published = [sample(topic, f"key-{n}") for n in range(60)]
        await self._publish(broker, *published)

        async with _reading(broker, group, topic) as first:
            await self.eventually(lambda: first.ids >= set(ids_of(published)), "the first reader received everything")
            late = list(first.deliveries)
            async with _reading(broker, group, topic) as second:
                await self.eventually(lambda: bool(second.ids), "unacknowledged messages moved to the second reader")
                await first.subscription.ack(late)
                moved = set(second.ids)
                first.deliveries.clear()
            await self.eventually(lambda: first.ids >= moved, "what the second reader left came back to the first")

    # --- acknowledging ---

    @_broker_test
    async def test_what_is_not_acknowledged_comes_again_and_what_is_does_not(self, broker: Broker) -> None:
        """The heart of at-least-once: a message is given up only when its effects are on record."""
        topic, group = await self._topic(broker), new_id()
        published = [sample(topic, "a") for _ in range(10)]
        await self._publish(broker, *published)

        async with broker.subscribe(group, [topic]) as subscription:
            first = await self._read(subscription, 10)
        async with broker.subscribe(group, [topic]) as subscription:
            again = await self._read(subscription, 10)
            await subscription.ack(again)
        await self._publish(broker, last := sample(topic, "a"))
        async with broker.subscribe(group, [topic]) as subscription:
            after = await self._read(subscription, 1)

        assert ids_of(_envelopes(first)) == ids_of(published)
        assert ids_of(_envelopes(again)) == ids_of(published)
        assert ids_of(_envelopes(after)) == [last.id]

    @_broker_test
    async def test_unacknowledged_work_comes_again_each_time(self, broker: Broker) -> None:
        """A message may outlive several workers: the second crash must lose no more than the first."""
        topic, group = await self._topic(broker), new_id()
        published = [sample(topic, "a") for _ in range(3)]
        await self._publish(broker, *published)

        rounds: list[list[str]] = []
        for _ in range(3):
            async with broker.subscribe(group, [topic]) as subscription:
                rounds.append(ids_of(_envelopes(await self._read(subscription, 3))))

        assert rounds == [ids_of(published)] * 3

    @_broker_test
    async def test_acknowledging_a_prefix_keeps_the_rest(self, broker: Broker) -> None:
        """A worker acknowledges as far as it got: the rest of the batch is still its duty."""
        topic, group = await self._topic(broker), new_id()
        published = [sample(topic, "a") for _ in range(10)]
        await self._publish(broker, *published)

        async with broker.subscribe(group, [topic]) as subscription:
            deliveries = await self._read(subscription, 10)
            await subscription.ack(deliveries[:4])
        async with broker.subscribe(group, [topic]) as subscription:
            again = await self._read(subscription, 6)

        assert ids_of(_envelopes(again)) == ids_of(published[4:])

    @_broker_test
    async def test_acknowledging_one_partition_leaves_the_others(self, broker: Broker) -> None:
        """Partitions are worked on side by side, and the slow one must not be given up with the fast one."""
        topic, group = await self._topic(broker), new_id()
        await self._publish(broker, *(sample(topic, f"key-{n % 20}") for n in range(60)))

        async with broker.subscribe(group, [topic]) as subscription:
            deliveries = await self._read(subscription, 60)
            done = deliveries[0].partition.number
            await subscription.ack([each for each in deliveries if each.partition.number == done])
        rest = [each for each in deliveries if each.partition.number != done]
        async with broker.subscribe(group, [topic]) as subscription:
            again = await self._read(subscription, len(rest))

        assert sorted(ids_of(_envelopes(again))) == sorted(ids_of(_envelopes(rest)))

    @_broker_test
    async def test_acknowledging_while_receive_waits_counts(self, broker: Broker) -> None:
        """A worker fetches ahead while handlers run: their acknowledgements must not wait for the next message."""
        topic, group = await self._topic(broker), new_id()
        await self._publish(broker, *(sample(topic, "a") for _ in range(3)))

        async with broker.subscribe(group, [topic]) as subscription:
            deliveries = await self._read(subscription, 3)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(subscription.receive, 10, self.patience)
                await anyio.sleep(0.05)
                await subscription.ack(deliveries)
                await subscription.ack([])
                tasks.cancel_scope.cancel()
        await self._publish(broker, last := sample(topic, "a"))
        async with broker.subscribe(group, [topic]) as subscription:
            after = await self._read(subscription, 1)

        assert ids_of(_envelopes(after)) == [last.id]

    # --- where a group starts ---

    @_broker_test
    async def test_a_new_group_reads_from_the_earliest_message(self, broker: Broker) -> None:
        """A service that is deployed for the first time catches up with what happened before it was there."""
        require(broker, broker.capabilities, "replayable")
        topic = await self._topic(broker)
        await self._publish(broker, early := sample(topic, "a"))

        arrived = await self._read_all(broker, topic, 1, start="earliest")

        assert ids_of(arrived) == [early.id]

    @_broker_test
    async def test_a_new_group_may_start_at_the_latest_message(self, broker: Broker) -> None:
        """A service that sends mails must not start with those of the last ten years."""
        topic = await self._topic(broker)
        await self._publish(broker, *(sample(topic, "a", type="old") for _ in range(5)))

        async with broker.subscribe(new_id(), [topic], start="latest") as subscription:
            arrived: list[Delivery] = []
            while not arrived:
                await self._publish(broker, sample(topic, "a", type="new"))
                arrived.extend(await subscription.receive(10, _POLL))

        assert {each.type for each in _envelopes(arrived)} == {"new"}

    @_broker_test
    async def test_a_group_that_has_acknowledged_goes_on_where_it_was(self, broker: Broker) -> None:
        """`start` is for new groups only: after a restart it must neither skip nor repeat."""
        topic, group = await self._topic(broker), new_id()
        published = [sample(topic, "a") for _ in range(4)]
        await self._publish(broker, *published)

        async with broker.subscribe(group, [topic], start="earliest") as subscription:
            await subscription.ack((await self._read(subscription, 4))[:2])
        async with broker.subscribe(group, [topic], start="latest") as subscription:
            rest = await self._read(subscription, 2)

        assert ids_of(_envelopes(rest)) == ids_of(published[2:])

    # --- receive ---

    @_broker_test
    async def test_receive_returns_no_more_than_its_limit(self, broker: Broker) -> None:
        """The limit is how a worker bounds its memory."""
        topic = await self._topic(broker)
        published = [sample(topic, "a") for _ in range(10)]
        await self._publish(broker, *published)

        sizes: list[int] = []
        arrived: list[Delivery] = []
        async with broker.subscribe(new_id(), [topic]) as subscription:
            while len(arrived) < 10:
                batch = await subscription.receive(3, _POLL)
                sizes.append(len(batch))
                arrived.extend(batch)

        assert max(sizes) <= 3
        assert ids_of(_envelopes(arrived)) == ids_of(published)

    @_broker_test
    async def test_receive_returns_empty_when_nothing_comes(self, broker: Broker) -> None:
        """A worker looks up between two calls, for example to stop: a call that never returns hangs a shutdown."""
        topic = await self._topic(broker)

        async with broker.subscribe(new_id(), [topic]) as subscription:
            with anyio.fail_after(self.patience.total_seconds()):
                assert list(await subscription.receive(10, timedelta(milliseconds=50))) == []
                assert list(await subscription.receive(10, timedelta(0))) == []

    @_broker_test
    async def test_receive_returns_as_soon_as_something_comes(self, broker: Broker) -> None:
        """`wait` is a backstop: a message must not lie about until it is over."""
        topic = await self._topic(broker)
        arrived: list[Delivery] = []

        async def receive_one(subscription: Subscription) -> None:
            while not arrived:
                arrived.extend(await subscription.receive(10, self.time_limit))

        async with broker.subscribe(new_id(), [topic]) as subscription, anyio.create_task_group() as tasks:
            tasks.start_soon(receive_one, subscription)
            await anyio.sleep(0.05)
            await self._publish(broker, sample(topic, "a"))
            await self.eventually(lambda: bool(arrived), "receive returned when a message came")

    @_broker_test
    async def test_paused_partitions_are_left_out_and_stay(self, broker: Broker) -> None:
        """A worker that is full of one partition's messages goes on with the others, and comes back to it later."""
        topic = await self._topic(broker)
        keys = [f"key-{n}" for n in range(20)]
        await self._publish(broker, *(sample(topic, key) for key in keys))

        async with broker.subscribe(new_id(), [topic]) as subscription:
            places = {delivery.key: delivery.partition for delivery in await self._read(subscription, len(keys))}
            paused = places[keys[0]]
            published = [sample(topic, key) for key in keys * 3]
            await self._publish(broker, *published)
            held_up = [each for each in published if places[each.key] == paused]
            others = await self._read(subscription, len(published) - len(held_up), paused=[paused])
            nothing = await subscription.receive(100, _POLL, paused=[paused])
            later = await self._read(subscription, len(held_up))

        assert paused not in {delivery.partition for delivery in others}
        assert list(nothing) == []
        assert {delivery.partition for delivery in later} == {paused}, "it was taken away in between"
        assert ids_by_key(_envelopes([*others, *later])) == ids_by_key(published)

    @_broker_test
    async def test_what_was_fetched_of_a_paused_partition_is_not_lost(self, broker: Broker) -> None:
        """Pausing and going on at every turn, as a worker does at its limit: in order, and each message once."""
        topic = await self._topic(broker)
        published = [sample(topic, f"key-{n % 20}") for n in range(120)]
        await self._publish(broker, *published)
        arrived: list[Delivery] = []
        turns = 0

        async with broker.subscribe(new_id(), [topic]) as subscription:
            with anyio.move_on_after(self.patience.total_seconds()):
                while len(arrived) < len(published):
                    turns += 1
                    paused = [arrived[-1].partition] if arrived and turns % 2 else []
                    arrived.extend(await subscription.receive(3, timedelta(milliseconds=20), paused=paused))

        assert len(arrived) == len(published)
        assert ids_by_key(_envelopes(arrived)) == ids_by_key(published)

    @_broker_test
    async def test_a_reader_that_has_paused_everything_stays_a_member(self, broker: Broker) -> None:
        """A worker that waits for its database pauses all it has: that must neither fail nor cost it its share."""
        topic = await self._topic(broker)
        await self._publish(broker, *(sample(topic, f"key-{n}") for n in range(20)))

        async with broker.subscribe(new_id(), [topic]) as subscription:
            before = {delivery.partition for delivery in await self._read(subscription, 20)}
            await self._publish(broker, *(sample(topic, f"key-{n}") for n in range(20)))
            with anyio.fail_after(self.patience.total_seconds()):
                assert list(await subscription.receive(10, _POLL, paused=before)) == []
            after = {delivery.partition for delivery in await self._read(subscription, 20)}

        assert before == after

    @_broker_test
    async def test_publishing_and_receiving_run_side_by_side(self, broker: Broker) -> None:
        """One app relays and consumes on one broker object."""
        topic = await self._topic(broker)
        published = [sample(topic, f"key-{n % 10}") for n in range(400)]
        arrived: list[Delivery] = []

        async def publish() -> None:
            for start in range(0, len(published), 20):
                await self._publish(broker, *published[start : start + 20])
                await anyio.lowlevel.checkpoint()

        async with broker.subscribe(new_id(), [topic]) as subscription, anyio.create_task_group() as tasks:
            tasks.start_soon(publish)
            arrived.extend(await self._read(subscription, len(published)))

        assert ids_by_key(_envelopes(arrived)) == ids_by_key(published)

    @_broker_test
    async def test_a_cancelled_receive_loses_nothing(self, broker: Broker) -> None:
        """Timeouts and shutdowns cancel a waiting reader at any moment; what it had fetched must come the next time."""
        topic = await self._topic(broker)
        published = [sample(topic, "a") for _ in range(60)]
        arrived: list[Delivery] = []

        async def publish() -> None:
            for envelope in published:
                await self._publish(broker, envelope)

        async with broker.subscribe(new_id(), [topic]) as subscription, anyio.create_task_group() as tasks:
            tasks.start_soon(publish)
            with anyio.move_on_after(self.patience.total_seconds()):
                for n in range(1_000_000):
                    with anyio.move_on_after(0.001 * (n % 20)):
                        arrived.extend(await subscription.receive(5, self.patience))
                    if len(arrived) >= len(published):
                        break

        assert ids_of(_envelopes(arrived)) == ids_of(published)

    @_broker_test
    async def test_the_backlog_counts_down_to_zero(self, broker: Broker) -> None:
        """Operators see by it whether a service keeps up; `drain` ends by it."""
        topic = await self._topic(broker)
        await self._publish(broker, *(sample(topic, "a") for _ in range(10)))

        async with broker.subscribe(new_id(), [topic]) as subscription:
            seen = len(await self._read(subscription, 3))
            await self._expect_backlog(subscription, 10 - seen)
            await self._read(subscription, 10 - seen)
            await self._expect_backlog(subscription, 0)
            await self._publish(broker, sample(topic, "a"))
            await self._read(subscription, 1)
            await self._expect_backlog(subscription, 0)

    # --- what the broker refuses ---

    @_broker_test
    async def test_a_refused_record_takes_no_other_key_with_it(self, broker: Broker) -> None:
        """One oversized event must not stop a service from telling the rest."""
        topic = await self._topic(broker)
        big = self._oversized(topic, "big")
        before, after = sample(topic, "small"), sample(topic, "small")

        outcomes = await broker.publish([before, big, after])
        await self._publish(broker, last := sample(topic, "big"))
        arrived = await self._read_all(broker, topic, 3)

        assert [outcome is None for outcome in outcomes] == [True, False, True]
        assert sorted(ids_of(arrived)) == sorted([before.id, after.id, last.id])

    @_broker_test
    async def test_a_refused_record_holds_back_the_later_ones_of_its_key(self, broker: Broker) -> None:
        """What follows a refused event of the same key must not overtake it."""
        topic = await self._topic(broker)
        big = self._oversized(topic, "a")
        before, after, last = sample(topic, "a"), sample(topic, "a"), sample(topic, "a")

        outcomes = await broker.publish([before, big, after])
        await self._publish(broker, last)
        arrived = await self._read_all(broker, topic, 2)

        assert [outcome is None for outcome in outcomes] == [True, False, False]
        assert ids_of(arrived) == [before.id, last.id]

    @_broker_test
    async def test_a_record_that_is_too_large_is_not_worth_retrying(self, broker: Broker) -> None:
        """The relay parks it at once; what was only held back behind it is tried again."""
        topic = await self._topic(broker)

        large, behind = await broker.publish([self._oversized(topic, "a"), sample(topic, "a")])

        assert large is not None
        assert not worth_retrying(large)
        assert behind is not None
        assert worth_retrying(behind)

    # --- topics, opening and closing ---

    @_broker_test
    async def test_created_topics_are_no_longer_missing(self, broker: Broker) -> None:
        """`topics create` is run by hand and by deployments, any number of times."""
        plans = [TopicPlan(name=f"kit-{new_id()}"), TopicPlan(name=f"kit-{new_id()}", compacted=True)]

        before = await broker.missing_topics(plans)
        await broker.create_topics(plans)
        await broker.create_topics(plans)
        after = await broker.missing_topics(plans)

        assert list(before) == ([] if broker.capabilities.creates_topics else plans)
        assert list(after) == []

    @_broker_test
    async def test_a_topic_is_there_as_soon_as_it_is_published_to(self, broker: Broker) -> None:
        """With such a broker a first start needs no preparation."""
        require(broker, broker.capabilities, "creates_topics")
        envelope = sample(f"kit-{new_id()}", "a")

        assert await self._there_and_back(broker, envelope) == [envelope]

    @_broker_test
    async def test_a_missing_topic_is_an_error_of_its_own_records_only(self, broker: Broker) -> None:
        """A forgotten topic must be named, within reasonable time, and must not stop the others."""
        if broker.capabilities.creates_topics:
            pytest.skip(f"{type(broker).__name__} declares the capability 'creates_topics'")
        topic, missing = await self._topic(broker), f"kit-{new_id()}"

        with anyio.fail_after(self.patience.total_seconds()):
            lost, published = await broker.publish([sample(missing, "a"), sample(topic, "a")])

        assert isinstance(lost, TopicMissingError)
        assert lost.topics == (missing,)
        assert published is None

    @_broker_test
    async def test_subscribing_to_a_missing_topic_names_it(self, broker: Broker) -> None:
        """A worker that waits at a topic which nobody made looks healthy and does nothing."""
        if broker.capabilities.creates_topics:
            pytest.skip(f"{type(broker).__name__} declares the capability 'creates_topics'")
        missing = f"kit-{new_id()}"

        with pytest.raises(TopicMissingError, match=missing):
            async with broker.subscribe(new_id(), [missing]):
                pass

    @_broker_test
    async def test_a_check_answers_with_findings(self, broker: Broker) -> None:
        """`doctor` prints what it is given; a check that raises hides all other findings."""
        topic = await self._topic(broker)

        findings = await broker.check([TopicPlan(name=topic)])

        assert [finding for finding in findings if finding.severity == "error"] == []

    @_broker_test
    async def test_a_broker_can_be_closed_twice_and_opened_again(self, broker: Broker) -> None:
        """Shutdowns run twice when they are interrupted, and an app can be entered again."""
        topic = await self._topic(broker)

        await broker.close()
        await broker.close()
        await broker.open()
        envelope = sample(topic, "a")

        assert await self._there_and_back(broker, envelope) == [envelope]

    @_broker_test
    async def test_two_brokers_on_one_server_see_the_same_messages(self, broker: Broker) -> None:
        """The one that publishes and the one that consumes are different services."""
        require(broker, broker.capabilities, "shared")
        envelope = sample(await self._topic(broker), "a")
        await self._publish(broker, envelope)

        async with self.open_broker() as other:
            arrived = await self._read_all(other, envelope.topic, 1)

        assert arrived == [envelope]

    @_broker_test
    async def test_the_card_says_in_words_what_a_crash_may_do(self, broker: Broker) -> None:
        """The docs and `doctor` print the card; an empty field would promise what nobody checked."""
        card = type(broker).capabilities

        assert isinstance(card, Capabilities)
        assert all((card.crash_may_lose, card.crash_may_repeat, card.crash_may_reorder))
        assert broker.name

    # --- the words of the tests above ---

    async def _topic(self, broker: Broker) -> str:
        topic = f"kit-{new_id()}"
        await broker.create_topics([TopicPlan(name=topic)])
        return topic

    async def _publish(self, broker: Broker, *envelopes: Envelope) -> None:
        outcomes = await broker.publish(envelopes)
        assert list(outcomes) == [None] * len(envelopes)

    async def _read(
        self, subscription: Subscription, count: int, *, paused: Collection[Partition] = ()
    ) -> list[Delivery]:
        deliveries: list[Delivery] = []
        with anyio.move_on_after(self.patience.total_seconds()):
            while len(deliveries) < count:
                deliveries.extend(await subscription.receive(count - len(deliveries), _POLL, paused=paused))
        assert len(deliveries) == count, f"{len(deliveries)} messages came, not {count}"
        return deliveries

    async def _read_all(self, broker: Broker, topic: str, count: int, *, start: Start = "earliest") -> list[Envelope]:
        async with broker.subscribe(new_id(), [topic], start=start) as subscription:
            return _envelopes(await self._read(subscription, count))

    async def _read_up_to(self, broker: Broker, topic: str, *last: Envelope) -> list[Envelope]:
        arrived: list[Envelope] = []
        async with broker.subscribe(new_id(), [topic]) as subscription:
            while not set(ids_of(last)) <= set(ids_of(arrived)):
                arrived.extend(_envelopes(await self._read(subscription, 1)))
        return arrived

    async def _there_and_back(self, broker: Broker, *envelopes: Envelope) -> list[Envelope]:
        await self._publish(broker, *envelopes)
        return await self._read_all(broker, envelopes[0].topic, len(envelopes))

    async def _share(self, broker: Broker, topic: str, *readers: "_Reader") -> None:
        """Publish until each reader has had a part of the same round, so that their shares are settled."""
        for reader in readers:
            reader.acknowledges = True
        while True:
            warm_up = [sample(topic, f"key-{n}") for n in range(40)]
            fresh = set(ids_of(warm_up))
            await self._publish(broker, *warm_up)
            await self.eventually(lambda: set[str]().union(*(r.ids for r in readers)) >= fresh, "a round arrived")  # noqa: B023
            if all(reader.ids & fresh for reader in readers):
                break
        for reader in readers:
            reader.acknowledges = False

    async def _expect_backlog(self, subscription: Subscription, expected: int) -> None:
        backlog = -1
        with anyio.move_on_after(self.patience.total_seconds()):
            while (backlog := await subscription.backlog()) != expected:  # noqa: ASYNC110 - no broker tells of it
                await anyio.sleep(0.01)
        assert backlog == expected

    def _oversized(self, topic: str, key: str) -> Envelope:
        envelope = self.oversized_envelope(topic, key)
        if envelope is None:
            pytest.skip(f"{type(self).__name__} declares no limit: oversized_envelope() gives none")
        return envelope


class _Reader:
    """Reads in the background and keeps what came."""

    def __init__(self, subscription: Subscription) -> None:
        self.subscription = subscription
        self.deliveries: list[Delivery] = []
        self.acknowledges = False

    @property
    def envelopes(self) -> list[Envelope]:
        return _envelopes(self.deliveries)

    @property
    def ids(self) -> set[str]:
        return set(ids_of(self.envelopes))

    async def read_on(self) -> None:
        while True:
            fresh = await self.subscription.receive(50, _POLL)
            self.deliveries.extend(fresh)
            if self.acknowledges:
                await self.subscription.ack(fresh)


@asynccontextmanager
async def _reading(
    broker: Broker, group: str, topic: str, on_revoked: Revoked | None = None
) -> AsyncGenerator[_Reader]:
    """Leaves the group without acknowledging anything."""
    async with (
        broker.subscribe(group, [topic], on_revoked=on_revoked) as subscription,
        anyio.create_task_group() as tasks,
    ):
        reader = _Reader(subscription)
        tasks.start_soon(reader.read_on)
        yield reader
        tasks.cancel_scope.cancel()


def _envelopes(deliveries: Sequence[Delivery]) -> list[Envelope]:
    envelopes: list[Envelope] = []
    for delivery in deliveries:
        assert isinstance(delivery.content, Envelope), f"not readable: {delivery.content}"
        envelopes.append(delivery.content)
    return envelopes


def _positions(deliveries: Sequence[Delivery]) -> dict[tuple[str, int], list[int]]:
    positions: dict[tuple[str, int], list[int]] = {}
    for delivery in deliveries:
        positions.setdefault((delivery.partition.topic, delivery.partition.number), []).append(delivery.position)
    return positions
