"""Apache Kafka as a broker of cqrs_decor."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import ClassVar, Self

import anyio

from cqrs_decor.broker import Capabilities, Revoked, Start, TopicPlan
from cqrs_decor.envelope import Envelope
from cqrs_decor.errors import BrokerError, BrokerUnavailableError
from cqrs_decor.findings import Finding
from cqrs_decor.observers import Observers
from cqrs_decor_kafka.checks import cluster_findings, topic_findings
from cqrs_decor_kafka.driver import AdminClient, Driver
from cqrs_decor_kafka.errors import KafkaError, connecting_failed, unavailable
from cqrs_decor_kafka.producer import Publisher
from cqrs_decor_kafka.settings import KafkaSettings
from cqrs_decor_kafka.subscription import KafkaSubscription
from cqrs_decor_kafka.topics import Topics


@dataclass(frozen=True, slots=True, kw_only=True)
class _Open:
    """What there is while the broker is open."""

    driver: Driver
    admin: AdminClient
    topics: Topics
    publisher: Publisher


class KafkaBroker:
    """Topics, partitions and consumer groups of a Kafka cluster, through aiokafka; CloudEvents on the wire.

    Runs on asyncio. Topics are not made by publishing to them; `create_topics` makes them.

    Args:
        settings: Read from the environment (`CQRS_DECOR_KAFKA_*`) when they are not given.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        durable=True,
        ordered_by_key=True,
        replayable=True,
        shared=True,
        creates_topics=False,
        crash_may_lose="nothing, while one in-sync copy of each partition is left; with a single copy, what its "
        "machine had not written to disk when the machine (not only the process) failed",
        crash_may_repeat="what was published and not yet settled, what was delivered and not yet acknowledged",
        crash_may_reorder="repeats only: the late copy of a record may come after newer records of its key",
    )

    def __init__(self, settings: KafkaSettings | None = None) -> None:
        self.settings = settings or KafkaSettings.read()
        self.name = self.settings.address
        self.observers = Observers()
        self._opened: _Open | None = None

    @classmethod
    def from_url(cls, url: str) -> Self:
        """`kafka://user:password@k1:9092,k2:9092?security=sasl_tls`; options are the attributes of `KafkaSettings`.

        Raises:
            BadUrlError: With everything that is wrong with it.
        """
        return cls(KafkaSettings.from_url(url))

    def __repr__(self) -> str:
        return f"KafkaBroker({self.name!r})"

    async def open(self) -> None:
        """See `Broker.open`. Also raises SettingError, when the certificate files cannot be used."""
        if self._opened is not None:
            return
        driver = Driver(settings=self.settings, ssl_context=self.settings.ssl_context())
        admin = driver.admin()
        try:
            await admin.start(within_s=self.settings.connect_timeout_s)
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                await admin.close()
            if isinstance(error, KafkaError | OSError):
                raise await self._why_not(driver, error) from error
            raise
        topics = Topics(admin, self.settings)
        self._opened = _Open(driver=driver, admin=admin, topics=topics, publisher=Publisher(driver, topics))

    async def close(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            await opened.publisher.close()
            await opened.admin.close()

    async def publish(self, envelopes: Sequence[Envelope]) -> Sequence[BrokerError | None]:
        return await self._open().publisher.publish(envelopes)

    @asynccontextmanager
    async def subscribe(
        self, group: str, topics: Sequence[str], *, start: Start = "earliest", on_revoked: Revoked | None = None
    ) -> AsyncGenerator[KafkaSubscription]:
        opened = self._open()
        partitions = await opened.topics.partitions(topics)
        subscription = KafkaSubscription(
            opened.driver, group, topics, start=start, on_revoked=on_revoked, observers=self.observers
        )
        try:
            await subscription.join(partitions)
            yield subscription
        finally:
            with anyio.CancelScope(shield=True):
                await subscription.leave()

    async def check(self, topics: Sequence[TopicPlan]) -> Sequence[Finding]:
        """See `Broker.check`. A broker that is not open is opened for it."""
        was_open = self._opened is not None
        try:
            await self.open()
            opened = self._open()
            return [
                *cluster_findings(self.settings, await opened.admin.nodes(), opened.admin.api_versions()),
                *await topic_findings(self.settings, opened.topics, topics),
            ]
        except BrokerError as error:
            return [Finding.from_error(error)]
        except (KafkaError, OSError) as error:
            return [Finding.from_error(unavailable(self.name, error))]
        finally:
            if not was_open:
                await self.close()

    async def missing_topics(self, topics: Sequence[TopicPlan]) -> Sequence[TopicPlan]:
        return await self._open().topics.missing(topics)

    async def create_topics(self, topics: Sequence[TopicPlan]) -> None:
        """See `Broker.create_topics`; partitions and copies come from the settings.

        Raises:
            BrokerAccessError: We may not.
            TopicNotCreatedError: The cluster will not have it so.
            BrokerUnavailableError: Some may have been made; doing it again is safe.
        """
        await self._open().topics.create(topics)

    def _open(self) -> _Open:
        if self._opened is None:
            raise BrokerUnavailableError(self.name, "it has not been opened")
        return self._opened

    async def _why_not(self, driver: Driver, error: BaseException) -> BrokerError:
        """aiokafka's clients only say that they could not connect: ask once more, in a way that gets an answer."""
        if not isinstance(error, TimeoutError):
            try:
                await driver.knock()
            except (KafkaError, OSError) as answer:
                error = answer
        return connecting_failed(self.name, error, uses_tls=self.settings.uses_tls)
