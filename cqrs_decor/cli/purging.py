"""`purge`: deletes what the store keeps of things that are done with, as its own clean-up does, but now."""

import logging
from collections.abc import Callable
from datetime import timedelta

from cqrs_decor._text import counted
from cqrs_decor.cli.ages import parsed_age
from cqrs_decor.cli.answers import Answer
from cqrs_decor.cli.exits import FINDINGS, OK, of_signal
from cqrs_decor.cli.options import How
from cqrs_decor.cli.parked import progress_bar
from cqrs_decor.cli.records import confirm, operator, same_process_note
from cqrs_decor.cli.signals import StopSignals
from cqrs_decor.store import Retention, Store

_logger = logging.getLogger(__name__)

_PART = 1_000
"""Rows in one transaction: a large one would hold locks for long, and undo for longer."""


async def purge_kept(
    store: Store,
    kind: str,
    noun: str,
    older_than: str | None,
    usual: timedelta,
    retention: Callable[[timedelta], Retention],
    how: How,
) -> Answer:
    """Delete rows of one kind, a part at a time, until none is left, a signal comes, or another process is at it.

    Args:
        store: Whose.
        kind: outbox or inbox.
        noun: What is deleted.
        older_than: The age beyond which it is, as on the command line.
        usual: The age where none was given.
        retention: Says to the store that this kind is kept for so long.
        how: Asked or not, and who does it.

    Raises:
        CommandLineError: The age cannot be read, or nobody can be asked.
    """
    age, who = usual if older_than is None else parsed_age(older_than), operator(how.who)
    what = f"every {noun} of {store.name} from more than {_written(age)} ago"
    if how.dry_run:
        return _answer(kind, noun, how, who, 0, None, f"Would delete {what}. Nothing was deleted.")
    if not confirm(f"Delete {what}?", yes=how.yes, json=how.json):
        return Answer(page="Nothing was deleted.\n", exit_code=FINDINGS)
    rows = 0
    with StopSignals() as signals, progress_bar(json=how.json) as progress:
        task = progress.add_task("deleted", total=None)
        while signals.received is None:
            deleted = await store.clean_up(retention(age), _PART)
            if not deleted:
                break
            rows += deleted
            progress.update(task, completed=rows)
    _logger.info("rows were purged", extra={"action": f"{kind}_purged", "who": who, "count": rows})
    sentence = f"Deleted {counted(rows, noun)} as {who}."
    return _answer(kind, noun, how, who, rows, signals.received, sentence, note=same_process_note(store))


def _answer(
    kind: str, noun: str, how: How, who: str, rows: int, signal: int | None, sentence: str, note: str = ""
) -> Answer:
    stopped = "" if signal is None else "Stopped by a signal; purge again for the rest."
    return Answer(
        document={
            "action": f"{kind} purge",
            "who": who,
            "dry_run": how.dry_run,
            "changed": rows,
            "interrupted": signal is not None,
        },
        page=f"{sentence}\n",
        note="\n".join(filter(None, (stopped, note))),
        exit_code=OK if signal is None else of_signal(signal),
    )


def _written(age: timedelta) -> str:
    hours = age.total_seconds() / 3600
    return f"{hours / 24:g} days" if hours >= 48 else f"{hours:g} hours"
