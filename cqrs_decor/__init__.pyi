"""Commands, queries and events by decorated functions, with a transactional outbox and inbox."""

from cqrs_decor.app import App, bootstrap
from cqrs_decor.broker import Broker
from cqrs_decor.codec import read_message
from cqrs_decor.container import Container, Provider
from cqrs_decor.context import MessageContext
from cqrs_decor.decorators import (
    command_handler,
    event_handler,
    middleware,
    on_shutdown,
    on_startup,
    provider,
    query_handler,
)
from cqrs_decor.envelope import Envelope
from cqrs_decor.errors import CqrsDecorError, Park, RetryLater, StartupError
from cqrs_decor.events import emit
from cqrs_decor.findings import Finding
from cqrs_decor.messages import (
    Command,
    DomainEvent,
    ECSTEvent,
    IntegrationEvent,
    NotificationEvent,
    Query,
    Returns,
    message,
)
from cqrs_decor.observers import Moment, Observer
from cqrs_decor.outbox import Drained
from cqrs_decor.pipeline import CallNext, Middleware
from cqrs_decor.registry import Registry
from cqrs_decor.retry import Retry
from cqrs_decor.settings import Settings
from cqrs_decor.store import Store
from cqrs_decor.unit_of_work import UnitOfWork

__version__: str

__all__ = [
    "App",
    "Broker",
    "CallNext",
    "Command",
    "Container",
    "CqrsDecorError",
    "DomainEvent",
    "Drained",
    "ECSTEvent",
    "Envelope",
    "Finding",
    "IntegrationEvent",
    "MessageContext",
    "Middleware",
    "Moment",
    "NotificationEvent",
    "Observer",
    "Park",
    "Provider",
    "Query",
    "Registry",
    "Retry",
    "RetryLater",
    "Returns",
    "Settings",
    "StartupError",
    "Store",
    "UnitOfWork",
    "__version__",
    "bootstrap",
    "command_handler",
    "emit",
    "event_handler",
    "message",
    "middleware",
    "on_shutdown",
    "on_startup",
    "provider",
    "query_handler",
    "read_message",
]
