"""What is known about topics, kept off the publishing path; and making them."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import anyio

from cqrs_decor.broker import TopicPlan
from cqrs_decor.errors import BrokerAccessError, BrokerUnavailableError, TopicMissingError
from cqrs_decor_kafka.driver import AdminClient, TopicState
from cqrs_decor_kafka.errors import KafkaError, TopicNotCreatedError, kafka_errors, reason_of, unavailable
from cqrs_decor_kafka.settings import KafkaSettings

# Where the topic's limit may not be read: what brokers come with.
_USUAL_MAX_MESSAGE_BYTES = 1_048_588
_COMPACT = {"cleanup.policy": "compact"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicFacts:
    """A topic that is there."""

    max_message_bytes: int
    compacted: bool
    read_at: float


class Topics:
    """The cluster's topics, as far as they were asked for."""

    def __init__(self, admin: AdminClient, settings: KafkaSettings) -> None:
        self._admin = admin
        self._settings = settings
        self._facts: dict[str, TopicFacts] = {}

    async def facts(self, names: Iterable[str]) -> dict[str, TopicFacts]:
        """Those of the named topics that are there. Asks the cluster only for what is new or has become old.

        Raises:
            BrokerUnavailableError: Nothing can be said.
        """
        stale = time.monotonic() - self._settings.metadata_max_age_s
        names = list(names)
        unknown = [name for name in names if name not in self._facts or self._facts[name].read_at < stale]
        if unknown:
            await self._look_up(unknown)
        return {name: self._facts[name] for name in names if name in self._facts}

    def forget(self, name: str) -> None:
        """Look it up again at the next use: what was known about it proved wrong."""
        self._facts.pop(name, None)

    async def missing(self, plans: Sequence[TopicPlan]) -> Sequence[TopicPlan]:
        states = await self.states([plan.name for plan in plans])
        return [plan for plan in plans if not is_there(states.get(plan.name))]

    async def partitions(self, names: Sequence[str]) -> dict[str, int]:
        """How many partitions each has.

        Raises:
            TopicMissingError: Names all that are not there.
            BrokerUnavailableError: Nothing can be said.
        """
        states = await self.states(names)
        missing = [name for name in names if not is_there(states.get(name))]
        if missing:
            raise TopicMissingError(self._settings.address, missing)
        return {name: len(states[name].replicas) for name in names}

    async def create(self, plans: Sequence[TopicPlan]) -> None:
        """Make those that are not there, and return when the cluster knows all of them.

        Raises:
            BrokerAccessError: We may not.
            TopicNotCreatedError: The cluster will not have it so.
            BrokerUnavailableError: Some may have been made; doing it again is safe.
        """
        for plan in await self.missing(plans):
            await self._create(plan)
        await self._wait_for([plan.name for plan in plans])

    async def states(self, names: Sequence[str]) -> dict[str, TopicState]:
        if not names:
            return {}
        try:
            return await self._admin.topics(names)
        except (KafkaError, OSError) as error:
            raise unavailable(self._settings.address, error) from error

    async def configs(self, names: Sequence[str]) -> dict[str, dict[str, str]]:
        """The settings of topics that are there, as far as they may be read."""
        if not names:
            return {}
        try:
            return await self._admin.topic_configs(names)
        except (KafkaError, OSError) as error:
            raise unavailable(self._settings.address, error) from error

    async def _look_up(self, names: Sequence[str]) -> None:
        states = await self.states(names)
        there = [name for name in names if is_there(states.get(name))]
        configs = await self.configs(there)
        for name in names:
            self.forget(name)
        for name in there:
            config = configs.get(name, {})
            self._facts[name] = TopicFacts(
                max_message_bytes=int(config.get("max.message.bytes", _USUAL_MAX_MESSAGE_BYTES)),
                compacted="compact" in config.get("cleanup.policy", ""),
                read_at=time.monotonic(),
            )

    async def _create(self, plan: TopicPlan) -> None:
        settings = self._settings
        try:
            error, words = await self._admin.create_topic(
                plan.name,
                partitions=settings.topic_partitions,
                replication=settings.topic_replication,
                configs=_COMPACT if plan.compacted else {},
            )
        except (KafkaError, OSError) as failure:
            raise unavailable(settings.address, failure) from failure
        if error in (kafka_errors.NoError, kafka_errors.TopicAlreadyExistsError):
            return
        reason = words.rstrip(".") or reason_of(error())
        if error in (kafka_errors.TopicAuthorizationFailedError, kafka_errors.ClusterAuthorizationFailedError):
            raise BrokerAccessError(settings.address, f"we may not make topic {plan.name!r} ({reason})")
        raise TopicNotCreatedError(settings.address, plan.name, reason)

    async def _wait_for(self, names: Sequence[str]) -> None:
        """A topic that was made is known to all brokers a little later; the cluster sends no word of it."""
        with anyio.move_on_after(self._settings.connect_timeout_s):
            while True:
                states = await self.states(names)
                if all(is_there(states.get(name)) for name in names):
                    return
                await anyio.sleep(0.05)
        raise BrokerUnavailableError(self._settings.address, "it does not show the topics that it has just made")


def is_there(state: TopicState | None) -> bool:
    """A topic whose leader is being chosen is there; one that we may not see counts as there, and is refused later."""
    if state is None:
        return False
    if state.error is None:
        return bool(state.replicas)
    return state.error not in (kafka_errors.UnknownTopicOrPartitionError, kafka_errors.InvalidTopicError)
