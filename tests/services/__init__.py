"""Real PostgreSQL (also behind PgBouncer), MariaDB and Apache Kafka on loopback, for tests, benchmarks and examples.

Each server has a port, a data directory and a life of its own: `start`, `stop`, `kill` (SIGKILL, nothing is flushed),
`restart` on the same port and data, `pause` and `resume` (it hangs, connections stay open), `discard` (gone, data and
all).

    with running(PostgresServer) as server:
        server.create_database("shop")
        engine = create_async_engine(server.url(driver="asyncpg", database="shop"))

In pytest use the fixtures of `tests.services.fixtures`. `python -m tests.services up postgres kafka` leaves servers
running between runs; `running` and the fixtures then use those.
"""

from tests.services.kafka import KafkaServer
from tests.services.mariadb import MariaDbServer
from tests.services.pgbouncer import PgBouncerServer
from tests.services.postgres import PostgresServer
from tests.services.server import MissingServerError, Server, ServerFailedError, wait_until
from tests.services.shared import SERVERS, running

__all__ = [
    "SERVERS",
    "KafkaServer",
    "MariaDbServer",
    "MissingServerError",
    "PgBouncerServer",
    "PostgresServer",
    "Server",
    "ServerFailedError",
    "running",
    "wait_until",
]
