"""Storage parameters of tables on PostgreSQL (`postgresql_with`), also for SQLAlchemy 2.0, which does not know them."""

from typing import Any

from sqlalchemy import Connection, MetaData, Table, TextClause, text
from sqlalchemy.exc import ArgumentError


def _knows_storage_parameters() -> bool:
    try:
        Table("probe", MetaData(), postgresql_with={})
    except ArgumentError:
        Table.argument_for("postgresql", "with", None)
        return False
    return True


IN_CREATE_TABLE = _knows_storage_parameters()
"""Whether SQLAlchemy writes them into CREATE TABLE; else `storage_statements` are needed."""


def storage_statements(table: Table, connection: Connection) -> list[TextClause]:
    """What sets the parameters of a table that was made without them."""
    options: dict[str, Any] | None = table.dialect_options["postgresql"]["with"]
    if IN_CREATE_TABLE or not options or connection.dialect.name != "postgresql":
        return []
    name = connection.dialect.identifier_preparer.format_table(table)
    settings = ", ".join(f"{key} = {value}" for key, value in options.items())
    return [text(f"ALTER TABLE {name} SET ({settings})")]


def set_storage(table: Table, connection: Connection, **_: object) -> None:
    """For the event `after_create` of a table."""
    for statement in storage_statements(table, connection):
        connection.execute(statement)
