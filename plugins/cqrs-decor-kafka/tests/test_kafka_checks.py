"""What `doctor` says about a cluster, and making topics."""

from datetime import timedelta

import pytest

from cqrs_decor.broker import TopicPlan
from cqrs_decor.findings import Finding
from cqrs_decor_kafka import KafkaBroker, KafkaSettings, TopicNotCreatedError
from cqrs_decor_kafka.checks import _copies_findings, _memory_findings, _Topic, cluster_findings
from cqrs_decor_kafka.driver import TopicState
from tests.services.fixtures import fresh_name


async def test_a_healthy_cluster_is_told_with_its_security(broker: KafkaBroker) -> None:
    """An operator wants to see what was looked at, not only that nothing was wrong."""
    [finding] = await broker.check([])

    assert finding.severity == "ok"
    assert "1 broker(s), security plain" in finding.problem


async def test_missing_topics_are_one_error_that_names_them(broker: KafkaBroker, topic: str) -> None:
    """Start-up shows it with the command that mends it."""
    missing = [fresh_name(), fresh_name()]

    findings = await broker.check([TopicPlan(name=name) for name in [topic, *missing]])

    [error] = [finding for finding in findings if finding.severity == "error"]
    assert error.code == "CD503"
    assert all(name in error.problem for name in missing)
    assert topic not in error.problem
    assert "cqrs-decor topics create" in error.fix


async def test_looking_for_a_topic_does_not_make_it(broker: KafkaBroker) -> None:
    """Where brokers make topics by themselves, aiokafka's own look-up would, with one partition and a typo's name."""
    plans = [TopicPlan(name=fresh_name())]

    await broker.check(plans)

    assert await broker.missing_topics(plans) == plans


async def test_a_retention_that_does_not_fit_the_events_is_a_warning(broker: KafkaBroker) -> None:
    """State that is deleted after a week, and events that vanish behind newer ones, are noticed long afterwards."""
    state, plain = fresh_name(), fresh_name()
    await broker.create_topics([TopicPlan(name=state, compacted=True), TopicPlan(name=plain)])

    fitting = await broker.check([TopicPlan(name=state, compacted=True), TopicPlan(name=plain)])
    swapped = await broker.check([TopicPlan(name=state), TopicPlan(name=plain, compacted=True)])

    assert "CD511" not in codes(fitting)
    assert codes(swapped).count("CD511") == 2


@pytest.mark.parametrize(
    ("retention_ms", "days", "text"),
    [
        ("604800000", 30, None),
        ("604800000", 7, None),
        ("3456000000", 30, "it keeps messages for 40 days, and the inbox remembers them for 30 days"),
        ("-1", 30, "it keeps messages for ever, and the inbox remembers them for 30 days"),
        ("-1", None, None),
    ],
)
def test_a_topic_that_outlives_the_memory_of_its_consumers_is_a_warning(
    retention_ms: str, days: int | None, text: str | None
) -> None:
    """A group that is reset reads everything again: what its inbox has forgotten has its effects a second time."""
    plan = TopicPlan(name="orders", remembered=None if days is None else timedelta(days=days))
    config = {"cleanup.policy": "delete", "retention.ms": retention_ms}

    problems = [finding.problem for finding in _memory_findings(_Topic(plan, TopicState(None, [3]), config))]

    assert len(problems) == (text is not None)
    assert (text or "") in "".join(problems)


async def test_the_retention_of_a_real_topic_is_looked_at(broker: KafkaBroker, topic: str) -> None:
    """Kafka keeps a week by default: an inbox that remembers for a day is too forgetful."""
    fitting = await broker.check([TopicPlan(name=topic, remembered=timedelta(days=30))])
    forgetful = await broker.check([TopicPlan(name=topic, remembered=timedelta(days=1))])

    assert (codes(fitting).count("CD511"), codes(forgetful).count("CD511")) == (0, 1)


async def test_a_single_copy_is_a_warning(broker: KafkaBroker, topic: str) -> None:
    """The usual state on a laptop, and the usual surprise in production."""
    findings = await broker.check([TopicPlan(name=topic)])

    assert "CD512" in codes(findings)


@pytest.mark.parametrize(
    ("copies", "in_sync", "problem"),
    [
        (3, "1", "counts as published while only one broker has it"),
        (3, "3", "no broker may be away"),
        (2, "2", "no broker may be away"),
        (3, "2", None),
    ],
)
def test_copies_and_acknowledgements_are_weighed_together(copies: int, in_sync: str, problem: str | None) -> None:
    """acks=all waits for min.insync.replicas only: three copies alone promise nothing."""
    topic = _Topic(TopicPlan(name="orders"), TopicState(None, [copies]), {"min.insync.replicas": in_sync})

    told = [finding.problem for finding in _copies_findings(topic)]

    assert (problem in told[0]) if problem else (told == [])


async def test_a_limit_below_ours_is_a_warning(kafka_url: str, topic: str) -> None:
    """Records between the two would be refused one by one, in production."""
    broker = KafkaBroker.from_url(f"{kafka_url}&max_record_bytes=5000000")

    findings = await broker.check([TopicPlan(name=topic)])

    assert "CD513" in codes(findings)


def test_a_password_in_clear_text_is_a_warning() -> None:
    """It works, so nobody would notice."""
    settings = KafkaSettings.from_url("kafka://a:b@k1?security=sasl_plain")

    assert "CD514" in codes(list(cluster_findings(settings, ["k1:9092"], {0: (0, 9), 22: (0, 1), 32: (0, 1)})))


def test_a_broker_that_is_too_old_is_an_error() -> None:
    """Without idempotent producers order per key cannot be kept."""
    findings = list(cluster_findings(KafkaSettings(), ["k1:9092"], {0: (0, 2)}))

    assert codes(findings) == ["", "CD506"]
    assert "idempotent producers" in findings[1].problem


async def test_topics_are_made_as_the_settings_say(broker: KafkaBroker, topic: str) -> None:
    """The number of partitions cannot be lowered later; -1 copies leave the choice to the cluster."""
    findings = await broker.check([TopicPlan(name=topic)])

    state = (await broker._open().topics.states([topic]))[topic]
    assert len(state.replicas) == 4
    assert state.replicas == [1] * 4
    assert findings


async def test_a_cluster_that_will_not_make_a_topic_says_why(kafka_url: str) -> None:
    """Three copies on one broker."""
    broker = KafkaBroker.from_url(f"{kafka_url}&topic_replication=3")
    await broker.open()

    with pytest.raises(TopicNotCreatedError) as caught:
        await broker.create_topics([TopicPlan(name=fresh_name())])
    await broker.close()

    assert "replication" in str(caught.value).lower()
    assert "topic_replication" in str(caught.value)


def codes(findings: list[Finding]) -> list[str]:
    return [finding.code for finding in findings]
