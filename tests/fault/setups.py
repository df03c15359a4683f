"""Which stores and brokers a scenario runs on: `store-broker`.

Stores: postgres, bouncer (PostgreSQL behind PgBouncer in transaction mode), mariadb, sqlite. Brokers: kafka, log (the
database is the broker as well).
"""

import os

WIDE = os.environ.get("FAULT_WIDE") == "1"
"""What `make fault` sets: more setups, and faults that last as long as they do in earnest."""

LASTS_S = float(os.environ.get("FAULT_LASTS_S", "20" if WIDE else "4"))
"""How long an outage lasts."""


def wide(*setups: str) -> list[str]:
    """Setups for long runs only."""
    return list(setups) if WIDE else []


SETUPS = ("postgres-kafka", "sqlite-log", *wide("postgres-log", "mariadb-log", "bouncer-kafka"))
"""Where a scenario runs that names no others."""
