"""Outbox, inbox, unit of work and log-table broker on SQLAlchemy."""
