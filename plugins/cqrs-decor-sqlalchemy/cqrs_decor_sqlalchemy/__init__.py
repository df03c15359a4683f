"""Outbox, inbox, unit of work and log-table broker on SQLAlchemy."""

from cqrs_decor_sqlalchemy.dialects import prepare_sqlite_engine
from cqrs_decor_sqlalchemy.log_broker import LogTableBroker
from cqrs_decor_sqlalchemy.log_settings import LogSettings
from cqrs_decor_sqlalchemy.settings import StoreSettings
from cqrs_decor_sqlalchemy.store import SqlAlchemyStore
from cqrs_decor_sqlalchemy.tables import Tables, leave_out_our_tables

__all__ = [
    "LogSettings",
    "LogTableBroker",
    "SqlAlchemyStore",
    "StoreSettings",
    "Tables",
    "leave_out_our_tables",
    "prepare_sqlite_engine",
]
