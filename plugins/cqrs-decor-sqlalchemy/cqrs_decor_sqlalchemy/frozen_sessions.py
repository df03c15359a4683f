"""Ends transactions of the store's own that stand still in the middle of a statement, on PostgreSQL.

asyncpg asks the server what a statement looks like, and executes it when it knows. A process that stands still between
the two (or whose connection is half open) is not idle in its transaction to the server, but active, waiting for the
rest: no idle limit ends that, and no statement limit either. `transaction_timeout` would, from PostgreSQL 17 on.
"""

from sqlalchemy import text

IDLE_LIMIT = "idle_in_transaction_session_timeout"
"""PostgreSQL's own name of it; in milliseconds."""

_SIGN = " (cqrs_decor)"


def limits(idle_limit_ms: int) -> str:
    """The statement that a transaction of the store's own begins with: it may idle for so long, and can be told from
    others by the name of its application. Until it ends: behind a pooler the session is not ours.
    """
    name = f"left(current_setting('application_name'), {63 - len(_SIGN)}) || '{_SIGN}'"
    return f"SELECT set_config('{IDLE_LIMIT}', '{idle_limit_ms}', true), set_config('application_name', {name}, true)"


end_frozen_sessions = text(
    """
    SELECT pg_terminate_backend(pid)
    FROM pg_stat_activity
    WHERE datname = current_database()
        AND usename = current_user
        AND right(application_name, length(:sign)) = :sign
        AND state = 'active'
        AND wait_event = 'ClientRead'
        AND state_change < clock_timestamp() - make_interval(secs => :seconds)
    """
).bindparams(sign=_SIGN)
"""Those that have waited for the rest of a statement for longer than `seconds`."""
