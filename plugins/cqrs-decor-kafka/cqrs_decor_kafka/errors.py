"""What the driver raises, as errors of ours."""

# pyright: reportMissingTypeStubs=false
import ssl
from typing import Final

from aiokafka import errors as kafka_errors

from cqrs_decor.errors import BrokerAccessError, BrokerError, BrokerUnavailableError, BrokerVersionError

__all__ = [
    "TOO_LARGE",
    "TOPIC_REFUSED",
    "KafkaError",
    "TopicNotCreatedError",
    "connecting_failed",
    "is_outage",
    "is_refused",
    "kafka_errors",
    "reason_of",
    "unavailable",
]

KafkaError = kafka_errors.KafkaError

# Raised where a connection, a group or a topic is refused for who we are; no waiting helps.
_REFUSED: Final = (
    kafka_errors.AuthenticationFailedError,
    kafka_errors.AuthenticationMethodNotSupported,
    kafka_errors.ClusterAuthorizationFailedError,
    kafka_errors.GroupAuthorizationFailedError,
    kafka_errors.IllegalSaslStateError,
    kafka_errors.SaslAuthenticationFailed,
    kafka_errors.TopicAuthorizationFailedError,
    kafka_errors.TransactionalIdAuthorizationFailed,
    kafka_errors.UnsupportedSaslMechanismError,
)

_TOO_OLD: Final = (
    kafka_errors.IncompatibleBrokerVersion,
    kafka_errors.UnrecognizedBrokerVersion,
    kafka_errors.UnsupportedVersionError,
)

# The numbering of a partition's batches broke: a new producer starts a new one.
_SEQUENCE_LOST: Final = (
    kafka_errors.InvalidProducerEpoch,
    kafka_errors.InvalidProducerIdMapping,
    kafka_errors.OutOfOrderSequenceNumber,
    kafka_errors.ProducerFenced,
    kafka_errors.UnknownProducerId,
)

TOO_LARGE: Final = (kafka_errors.MessageSizeTooLargeError, kafka_errors.RecordListTooLargeError)

# Concern every record of a topic alike, so that trying them one by one would tell nothing.
TOPIC_REFUSED: Final = (kafka_errors.InvalidTopicError, kafka_errors.TopicAuthorizationFailedError)


class TopicNotCreatedError(BrokerError):
    """The broker would not make a topic."""

    code = "CD510"

    def __init__(self, broker: str, topic: str, reason: str) -> None:
        self.broker, self.topic, self.reason = broker, topic, reason
        super().__init__(
            f"Broker {broker} did not make topic {topic!r}: {reason}.",
            fix="mend topic_partitions and topic_replication, or have an administrator make it",
        )


def is_refused(error: BaseException) -> bool:
    """Whether it is about who we are."""
    return isinstance(error, _REFUSED)


def is_outage(error: BaseException) -> bool:
    """Whether it says nothing about the record: the broker, the way to it or our numbering failed."""
    if not isinstance(error, kafka_errors.BrokerResponseError):
        return True
    return error.retriable or isinstance(error, (*_SEQUENCE_LOST, kafka_errors.ClusterAuthorizationFailedError))


def unavailable(broker: str, error: BaseException) -> BrokerUnavailableError:
    """For a connection that was open before: whatever it is, trying again is what can be done."""
    if is_refused(error):
        return BrokerUnavailableError(broker, f"it refuses access ({reason_of(error)})")
    return BrokerUnavailableError(broker, reason_of(error))


def connecting_failed(broker: str, error: BaseException, *, uses_tls: bool) -> BrokerError:
    """For a connection that could not be opened: what it says about the address, the credentials and the protocol."""
    if isinstance(error.__cause__, ssl.SSLError):  # with TLS 1.3 a refused certificate is told after the handshake
        error = error.__cause__
    if isinstance(error, (*_REFUSED, ssl.SSLCertVerificationError)):
        return BrokerAccessError(broker, reason_of(error))
    if isinstance(error, _TOO_OLD):
        return BrokerVersionError(broker, reason_of(error))
    if isinstance(error, ssl.SSLError):
        return _tls_failed(broker, error)
    if isinstance(error, TimeoutError):
        return BrokerUnavailableError(
            broker, "it does not answer in time; is it a Kafka listener, and of that security?"
        )
    if isinstance(error, kafka_errors.KafkaConnectionError):
        return BrokerUnavailableError(broker, f"it hung up at the first request; {_listener_hint(uses_tls=uses_tls)}")
    if isinstance(error, ConnectionResetError | ConnectionAbortedError | EOFError) and uses_tls:
        return BrokerUnavailableError(broker, f"it hung up in the TLS handshake; {_listener_hint(uses_tls=True)}")
    return BrokerUnavailableError(broker, reason_of(error))


def reason_of(error: BaseException) -> str:
    """The first sentence of what was said; it says more than a number."""
    description = getattr(error, "description", "") if isinstance(error, kafka_errors.BrokerResponseError) else ""
    said = " ".join(argument for argument in error.args if isinstance(argument, str))
    text = said or description or type(error).__name__
    return " ".join(text.partition(". ")[0].split()).rstrip(".")


def _tls_failed(broker: str, error: ssl.SSLError) -> BrokerError:
    reason = error.reason or str(error)
    if "CERTIFICATE" in reason or "UNKNOWN_CA" in reason or "ACCESS_DENIED" in reason:
        return BrokerAccessError(broker, f"TLS: {reason}; it may ask for a certificate (cert_file, key_file)")
    if "WRONG_VERSION_NUMBER" in reason or "RECORD_LAYER" in reason:
        return BrokerVersionError(broker, f"TLS: {reason}; the listener may be one without TLS")
    return BrokerUnavailableError(broker, f"TLS: {reason}; {_listener_hint(uses_tls=True)}")


def _listener_hint(*, uses_tls: bool) -> str:
    if uses_tls:
        return "the listener may be one without TLS (security=plain or sasl_plain)"
    return "the listener may want TLS (security=tls or sasl_tls)"
