"""The channel on which the processes of one outbox wake each other, and what is said on it."""

import hashlib

from cqrs_decor_sqlalchemy.tables import Tables

WORK = "work"
"""Records were committed."""

_LONGEST = 63
"""Bytes of a name in PostgreSQL."""


def channel_of(tables: Tables) -> str:
    """One for each set of tables, also where several share a database."""
    name = ".".join(part for part in (tables.schema, f"{tables.prefix}outbox") if part is not None)
    if len(name.encode()) <= _LONGEST:
        return name
    return f"cqrs_{hashlib.sha256(name.encode()).hexdigest()[:40]}"


def echo_of(owner: str) -> str:
    """What a renewal says, to be heard by its owner."""
    return f"echo:{owner}"
