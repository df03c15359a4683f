"""The database of a log, with its errors in the words of a broker."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from cqrs_decor.clock import Clock
from cqrs_decor.errors import (
    BrokerAccessError,
    BrokerUnavailableError,
    SchemaMissingError,
    StoreAccessError,
    StoreUnavailableError,
)
from cqrs_decor.observers import Observers
from cqrs_decor_sqlalchemy.database import Database, Work
from cqrs_decor_sqlalchemy.log_queries import LogQueries
from cqrs_decor_sqlalchemy.log_settings import LogSettings
from cqrs_decor_sqlalchemy.log_signals import LogSignals

T = TypeVar("T")


class LogDatabase:
    """Short transactions on the database of a log, used concurrently."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def read(self, work: Work[T]) -> T:
        """Run `work` in a transaction that does not write.

        Raises:
            BrokerUnavailableError, BrokerAccessError, SchemaMissingError: By what the driver says.
        """
        with self.in_words_of_a_broker():
            return await self._database.read(work)

    async def write(self, work: Work[T]) -> T:
        """Run `work` in a transaction and commit it; again when the database chose it to give way to another.

        Raises:
            BrokerUnavailableError, BrokerAccessError, SchemaMissingError: By what the driver says. A commit that was
                under way may have happened.
        """
        with self.in_words_of_a_broker():
            return await self._database.write(work)

    @contextmanager
    def in_words_of_a_broker(self) -> Generator[None]:
        """Around other work on the same database."""
        try:
            yield
        except StoreUnavailableError as error:
            raise BrokerUnavailableError(self._database.name, error.reason) from error
        except StoreAccessError as error:
            raise BrokerAccessError(self._database.name, error.reason) from error
        except SchemaMissingError as error:
            names = [table.name for table in self._database.tables.log.all()]
            raise SchemaMissingError(self._database.name, names) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """What the readers and writers of one log have in common."""

    database: LogDatabase
    queries: LogQueries
    signals: LogSignals
    settings: LogSettings
    clock: Clock
    observers: Observers
