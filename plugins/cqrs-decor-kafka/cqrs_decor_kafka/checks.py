"""What `doctor` says about a Kafka cluster and its topics."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from cqrs_decor.broker import TopicPlan
from cqrs_decor.errors import BrokerAccessError, BrokerVersionError, TopicMissingError
from cqrs_decor.findings import Finding
from cqrs_decor_kafka.driver import TopicState
from cqrs_decor_kafka.errors import kafka_errors
from cqrs_decor_kafka.settings import KafkaSettings
from cqrs_decor_kafka.topics import Topics, is_there

# Requests without which nothing works here: InitProducerId (for idempotence) and DescribeConfigs.
_NEEDED_REQUESTS = {22: "idempotent producers", 32: "reading topic settings"}
_PRODUCE = 0


def cluster_findings(
    settings: KafkaSettings, nodes: Sequence[str], api_versions: Mapping[int, tuple[int, int]]
) -> Iterator[Finding]:
    """Reachable, with which security, and not too old."""
    newest = api_versions.get(_PRODUCE, (0, 0))[1]
    yield Finding.ok(
        f"{settings.address} answers: {len(nodes)} broker(s), security {settings.security}, "
        f"Produce up to version {newest}"
    )
    lacking = [what for request, what in _NEEDED_REQUESTS.items() if api_versions and request not in api_versions]
    if lacking:
        yield Finding.from_error(BrokerVersionError(settings.address, f"it has no {' and no '.join(lacking)}"))
    if settings.security == "sasl_plain":
        yield Finding(
            code="CD514",
            severity="warning",
            problem="The password goes over the network without TLS.",
            where=settings.address,
            fix="use a listener with TLS: security=sasl_tls",
        )


async def topic_findings(settings: KafkaSettings, topics: Topics, plans: Sequence[TopicPlan]) -> Sequence[Finding]:
    """There, permitted, kept as their events need it, with enough copies.

    Raises:
        BrokerUnavailableError: Nothing can be said.
    """
    states = await topics.states([plan.name for plan in plans])
    missing = [plan.name for plan in plans if not is_there(states.get(plan.name))]
    refused = [name for name, state in states.items() if state.error is kafka_errors.TopicAuthorizationFailedError]
    usable = [plan for plan in plans if plan.name not in missing and plan.name not in refused]
    configs = await topics.configs([plan.name for plan in usable])

    findings: list[Finding] = []
    if missing:
        findings.append(Finding.from_error(TopicMissingError(settings.address, missing)))
    if refused:
        error = BrokerAccessError(settings.address, f"we may not use the topics {', '.join(sorted(refused))}")
        findings.append(Finding.from_error(error))
    for plan in usable:
        topic = _Topic(plan, states[plan.name], configs.get(plan.name, {}))
        found = list(_findings_of(settings, topic))
        findings += found or [Finding.ok(f"topic {plan.name}: {topic.summary}")]
    return findings


@dataclass(frozen=True, slots=True)
class _Topic:
    plan: TopicPlan
    state: TopicState
    config: Mapping[str, str]

    @property
    def copies(self) -> int:
        return min(self.state.replicas, default=0)

    @property
    def summary(self) -> str:
        limit = int(self.config["max.message.bytes"])
        return f"{len(self.state.replicas)} partitions, {self.copies} copies, records up to {limit:,} bytes"


def _findings_of(settings: KafkaSettings, topic: _Topic) -> Iterator[Finding]:
    if not topic.config:
        yield _warning(
            "CD513",
            topic,
            "its settings may not be read, so records that are too large are found out by trial",
            "allow DescribeConfigs on it",
        )
        return
    yield from _retention_findings(topic)
    yield from _memory_findings(topic)
    yield from _copies_findings(topic)
    limit = int(topic.config["max.message.bytes"])
    if settings.max_record_bytes is not None and settings.max_record_bytes > limit:
        yield _warning(
            "CD513",
            topic,
            f"it takes records up to {limit:,} bytes, max_record_bytes says {settings.max_record_bytes:,}",
            "raise its max.message.bytes, or lower max_record_bytes",
        )


def _retention_findings(topic: _Topic) -> Iterator[Finding]:
    policy = topic.config.get("cleanup.policy", "")
    if topic.plan.compacted and "compact" not in policy:
        yield _warning(
            "CD511",
            topic,
            f"its events carry state, but cleanup.policy={policy} deletes the last state of a key after a while",
            "set cleanup.policy=compact",
        )
    if not topic.plan.compacted and "compact" in policy:
        yield _warning(
            "CD511",
            topic,
            "it is compacted: earlier events of a key vanish before a slow service has read them",
            "set cleanup.policy=delete, or declare its events as ECSTEvent",
        )


def _memory_findings(topic: _Topic) -> Iterator[Finding]:
    """A group that starts over reads everything that the topic keeps: what the inbox has forgotten is handled twice."""
    if topic.plan.remembered is None or "delete" not in topic.config.get("cleanup.policy", ""):
        return
    kept_ms = int(topic.config.get("retention.ms", "0"))
    if 0 <= kept_ms <= topic.plan.remembered.total_seconds() * 1000:
        return
    kept = "for ever" if kept_ms < 0 else f"for {timedelta(milliseconds=kept_ms) / timedelta(days=1):g} days"
    remembered = topic.plan.remembered / timedelta(days=1)
    yield _warning(
        "CD511",
        topic,
        f"it keeps messages {kept}, and the inbox remembers them for {remembered:g} days: older ones that are "
        "read again are handled again",
        "make inbox_retention_days longer than the topic's retention.ms, or lower that",
    )


def _copies_findings(topic: _Topic) -> Iterator[Finding]:
    in_sync = int(topic.config.get("min.insync.replicas", "1"))
    if topic.copies < 2:
        yield _warning(
            "CD512", topic, "it has a single copy: what its broker loses is lost", "give it a replication factor of 3"
        )
    elif in_sync < 2:
        yield _warning(
            "CD512",
            topic,
            "min.insync.replicas=1: an event counts as published while only one broker has it",
            "set min.insync.replicas=2",
        )
    elif in_sync >= topic.copies:
        yield _warning(
            "CD512",
            topic,
            f"min.insync.replicas={in_sync} with {topic.copies} copies: no broker may be away",
            "raise the replication factor, or lower min.insync.replicas",
        )


def _warning(code: str, topic: _Topic, problem: str, fix: str) -> Finding:
    return Finding(code=code, severity="warning", problem=f"Topic {topic.plan.name}: {problem}.", fix=fix)
