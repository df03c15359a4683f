"""Results of commands by their idempotency key, in one database."""

from sqlalchemy import Connection, bindparam, select, update
from sqlalchemy.dialects import mysql
from sqlalchemy.exc import IntegrityError

from cqrs_decor.idempotency import KeptResult
from cqrs_decor.unit_of_work import Transaction
from cqrs_decor_sqlalchemy.columns import DatabaseNow
from cqrs_decor_sqlalchemy.database import Database
from cqrs_decor_sqlalchemy.errors import code_of
from cqrs_decor_sqlalchemy.inbox_queries import INSERTS
from cqrs_decor_sqlalchemy.records import fitted
from cqrs_decor_sqlalchemy.tables import Tables
from cqrs_decor_sqlalchemy.transaction import in_transaction

_DUPLICATE_ENTRY = 1062


class IdempotencyQueries:
    """Built once per store. All by primary key."""

    def __init__(self, tables: Tables, dialect: str) -> None:
        kept = tables.idempotency.c
        taken = INSERTS[dialect](tables.idempotency).values(created_at=DatabaseNow())
        # A plain INSERT on MySQL, as for the inbox; elsewhere an error would spoil the transaction.
        self.take = taken if isinstance(taken, mysql.Insert) else taken.on_conflict_do_nothing()
        self.take = self.take.execution_options(preserve_rowcount=True)
        its_key = bindparam("its_key", type_=kept.key.type)
        # Locked: without it MySQL looks into a snapshot that may be older than the row.
        self.kept = select(kept.fingerprint, kept.result).where(kept.key == its_key).with_for_update(read=True)
        self.keep = update(tables.idempotency).where(kept.key == its_key).values(result=bindparam("result"))


class SqlAlchemyIdempotency:
    """Keys and results in the table `idempotency`; by its primary key a second one waits for the end of the first."""

    def __init__(self, database: Database) -> None:
        self._queries = IdempotencyQueries(database.tables, database.dialect)

    async def begin(self, transaction: Transaction, key: str, fingerprint: str) -> KeptResult | None:
        row = {"key": fitted(key), "fingerprint": fingerprint}

        def work(connection: Connection) -> KeptResult | None:
            while not self._taken(connection, row):
                kept = connection.execute(self._queries.kept, {"its_key": row["key"]}).first()
                if kept is not None:  # else it was cleaned up in between
                    return KeptResult(fingerprint=kept.fingerprint, result=_bytes(kept.result))
            return None

        return await in_transaction(transaction, work)

    async def keep(self, transaction: Transaction, key: str, result: bytes | None) -> None:
        values = {"its_key": fitted(key), "result": result}
        await in_transaction(transaction, lambda connection: connection.execute(self._queries.keep, values))

    def _taken(self, connection: Connection, row: dict[str, str]) -> bool:
        try:
            return connection.execute(self._queries.take, row).rowcount == 1
        except IntegrityError as error:
            if code_of(error) != _DUPLICATE_ENTRY:
                raise
            return False


def _bytes(value: bytes | None) -> bytes | None:
    return None if value is None else bytes(value)
