"""Commands, queries and events by decorated functions, with a transactional outbox and inbox.

Each name is loaded when it is first used. What there is, with its types, stands in `__init__.pyi`.
"""

from cqrs_decor._lazy import lazily

__version__ = "0.1.0"

__getattr__, __all__ = lazily(
    __name__,
    {
        "cqrs_decor.app": ("App", "bootstrap"),
        "cqrs_decor.broker": ("Broker",),
        "cqrs_decor.codec": ("read_message",),
        "cqrs_decor.container": ("Container", "Provider"),
        "cqrs_decor.context": ("MessageContext",),
        "cqrs_decor.decorators": (
            "command_handler",
            "event_handler",
            "middleware",
            "on_shutdown",
            "on_startup",
            "provider",
            "query_handler",
        ),
        "cqrs_decor.envelope": ("Envelope",),
        "cqrs_decor.errors": ("CqrsDecorError", "Park", "RetryLater", "StartupError"),
        "cqrs_decor.events": ("emit",),
        "cqrs_decor.findings": ("Finding",),
        "cqrs_decor.messages": (
            "Command",
            "DomainEvent",
            "ECSTEvent",
            "IntegrationEvent",
            "NotificationEvent",
            "Query",
            "Returns",
            "message",
        ),
        "cqrs_decor.observers": ("Moment", "Observer"),
        "cqrs_decor.outbox": ("Drained",),
        "cqrs_decor.pipeline": ("CallNext", "Middleware"),
        "cqrs_decor.registry": ("Registry",),
        "cqrs_decor.retry": ("Retry",),
        "cqrs_decor.settings": ("Settings",),
        "cqrs_decor.store": ("Store",),
        "cqrs_decor.unit_of_work": ("UnitOfWork",),
    },
    "__version__",
)
