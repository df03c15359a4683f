"""Apache Kafka as a broker."""

from cqrs_decor_kafka.broker import KafkaBroker
from cqrs_decor_kafka.errors import TopicNotCreatedError
from cqrs_decor_kafka.settings import KafkaSettings, KafkaSettingsError

__all__ = ["KafkaBroker", "KafkaSettings", "KafkaSettingsError", "TopicNotCreatedError"]
