"""Commands, queries and events by decorated functions, with a transactional outbox and inbox."""

__version__ = "0.1.0"
