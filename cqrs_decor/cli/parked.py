"""The verbs that `outbox` and `inbox` have in common: list, show, and change what an operator selects.

A change goes through what is selected in order of age, a part at a time, each part in a transaction of the store's own.
So it may run beside everything else, be interrupted after any part, and go on from there with `--after`.
"""

from collections.abc import AsyncGenerator, Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Protocol

from rich.console import Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cqrs_decor._text import counted
from cqrs_decor.cli.ages import parsed_age
from cqrs_decor.cli.answers import Answer
from cqrs_decor.cli.errors import CommandLineError
from cqrs_decor.cli.exits import FINDINGS, OK, of_signal
from cqrs_decor.cli.listing import Listing, facts
from cqrs_decor.cli.options import How, Where
from cqrs_decor.cli.records import confirm, envelope_facts, operator, pairs
from cqrs_decor.cli.screen import Screen
from cqrs_decor.cli.signals import StopSignals
from cqrs_decor.clock import Clock, SystemClock
from cqrs_decor.envelope import Envelope
from cqrs_decor.errors import UnknownRecordError

PART = 500
"""So many are changed in one transaction; databases also limit how many ids one statement may name."""

COUNTED = 10_000
"""Before a question is asked, no more than so many are counted."""

_NAMED = 20
"""Of those that were left alone, so many are named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which records are meant; what is not given does not narrow."""

    ids: Sequence[int] = ()
    state: str | None = None
    consumer: str | None = None
    topic: str | None = None
    key: str | None = None
    error: str | None = None
    older_than: timedelta | None = None
    after: int = 0
    limit: int = 100

    @property
    def narrows(self) -> bool:
        given = (self.state, self.consumer, self.topic, self.key, self.error, self.older_than)
        return any(value is not None for value in given)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A record of the outbox or a parked message of the inbox, as operators see it.

    Attributes:
        retries: How often operators have retried it already.
        cells: One for each column of its shelf.
        known: What a document says of it besides its envelope.
    """

    id: int
    state: str
    retries: int
    cells: tuple[str, ...]
    known: dict[str, Any]
    envelope: Envelope

    def document(self, *, body: bool) -> dict[str, Any]:
        return {**self.known, **envelope_facts(self.envelope, body=body)}


class Finder(Protocol):
    """What is selected, lowest id first."""

    async def __call__(self, wanted: Selection, /) -> Sequence[Entry]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Shelf:
    """Where entries are kept: the outbox or the inbox of a store.

    Attributes:
        kind: outbox or inbox.
        noun: What an entry is called.
        store: The store's name.
        columns: Of a listing.
        find: Looks on it.
    """

    kind: str
    noun: str
    store: str
    columns: tuple[str, ...]
    find: Finder


class Act(Protocol):
    """What is done to a part; how many it was done to."""

    async def __call__(self, ids: Collection[int], *, who: str) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What an operator asks for.

    Attributes:
        verb: As on the command line.
        done: The verb for what happened.
        act: Does it.
        fitting: Only entries in one of these states.
        for_good: It cannot be undone: asks even when ids were named.
        most_retries: What has been retried so often is left alone, unless it was named; None for no such limit.
    """

    verb: str
    done: str
    act: Act
    fitting: Collection[str]
    for_good: bool = False
    most_retries: int | None = None

    def reason_against(self, entry: Entry, *, named: bool) -> str:
        """Why the entry is left alone, or nothing."""
        if entry.state not in self.fitting:
            return f"{_STATES.get(entry.state, entry.state)}, not {' or '.join(sorted(self.fitting))}"
        if not named and self.most_retries is not None and entry.retries >= self.most_retries:
            return f"failed again although it was retried {counted(self.most_retries, 'time')}"
        return ""


_STATES = {"retry-requested": "asked to be retried already"}


@dataclass(slots=True)
class Tally:
    """What came of a change so far.

    Attributes:
        fitted: Entries that it was meant for.
        changed: Those that it was done to: somebody else may have been there first.
        left: Ids of those that were left alone, by reason.
        seen: Ids that were named and found.
        after: The last id that was dealt with.
        signal: The signal that ended it early.
    """

    fitted: int = 0
    changed: int = 0
    left: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    seen: set[int] = field(default_factory=set[int])
    after: int = 0
    signal: int | None = None

    @property
    def looked_at(self) -> int:
        return self.fitted + sum(len(ids) for ids in self.left.values())

    @property
    def lines(self) -> list[str]:
        return [f"Left alone {len(ids):,}, {reason}: {_named(ids)}." for reason, ids in self.left.items()]

    @property
    def skipped(self) -> list[dict[str, Any]]:
        return [{"reason": reason, "count": len(ids), "ids": ids[:100]} for reason, ids in self.left.items()]


def _named(ids: Sequence[int]) -> str:
    """In their own order, which is not that of their digits."""
    more = f" and {len(ids) - _NAMED:,} more" if len(ids) > _NAMED else ""
    return ", ".join(map(str, ids[:_NAMED])) + more


# --- what is meant --------------------------------------------------------------------------------------------------


def selection(where: Where, *, ids: Sequence[int] | None, state: str | None, consumer: str | None = None) -> Selection:
    """
    Raises:
        CommandLineError: The age cannot be read.
    """
    return Selection(
        ids=tuple(dict.fromkeys(ids or ())),
        state=state,
        consumer=consumer,
        topic=where.topic,
        key=where.key,
        error=where.error,
        older_than=None if where.older_than is None else parsed_age(where.older_than),
        after=where.after,
    )


def require_choice(wanted: Selection, how: How) -> None:
    """A change names its entries, or a filter, or says that everything is meant.

    Raises:
        CommandLineError: None of them, or ids and one of the others.
    """
    if wanted.ids and (how.everything or wanted.narrows or wanted.after):
        raise CommandLineError("Ids and a filter were both given.", fix="give ids, or a filter, or --all")
    if not wanted.ids and not how.everything and not wanted.narrows:
        raise CommandLineError("Nothing was named.", fix="give ids, or a filter, e.g. --topic orders, or --all")


# --- list and show --------------------------------------------------------------------------------------------------


async def list_entries(shelf: Shelf, wanted: Selection, totals: dict[str, int], notes: Sequence[str]) -> Answer:
    """A page of entries.

    Args:
        shelf: Where they are.
        wanted: Which, and how many.
        totals: How many there are in all, by state.
        notes: Whatever else is to be said.
    """
    found = await shelf.find(replace(wanted, limit=wanted.limit + 1))
    entries, more = found[: wanted.limit], len(found) > wanted.limit
    in_all = ", ".join(f"{number:,} {name}" for name, number in totals.items())
    said = [
        f"{counted(len(entries), shelf.noun)} shown; in all {in_all}.",
        f"There are more: raise --limit, or go on with --after {entries[-1].id}." if more else "",
        *notes,
    ]
    return Answer(
        document={
            f"{shelf.noun}s": [entry.document(body=False) for entry in entries],
            "more": more,
            "after": entries[-1].id if entries else wanted.after,
            **totals,
        },
        page=Listing(shelf.columns, [entry.cells for entry in entries], empty=f"No {shelf.noun} matches."),
        note="\n".join(filter(None, said)),
    )


async def show_entries(shelf: Shelf, ids: Sequence[int], *, body: bool) -> Answer:
    """All that is known of these.

    Raises:
        UnknownRecordError: One is not there.
    """
    found = await shelf.find(Selection(ids=ids, limit=len(ids)))
    absent = [str(number) for number in ids if number not in {entry.id for entry in found}]
    if absent:
        raise UnknownRecordError(shelf.kind, absent)
    documents = [entry.document(body=body) for entry in found]
    return Answer(
        document={f"{shelf.noun}s": documents},
        page=Group(*(part for each in documents for part in (facts(pairs(each)), ""))),
    )


# --- change ---------------------------------------------------------------------------------------------------------


async def change(
    shelf: Shelf, asked: Change, wanted: Selection, how: How, *, note: str = "", clock: Clock | None = None
) -> Answer:
    """Carry a change out, or say what it would do.

    Raises:
        CommandLineError: It is not for entries of the state that was named, or nobody can be asked.
    """
    if wanted.state is not None and wanted.state not in asked.fitting:
        states = " or ".join(f"--state {state}" for state in sorted(asked.fitting))
        raise CommandLineError(f"A {shelf.noun} that is {wanted.state} cannot be {asked.done}.", fix=f"write {states}")
    who, total = operator(how.who), len(wanted.ids) or None
    tally = Tally(after=wanted.after)
    if how.dry_run:
        await _look(shelf, asked, wanted, tally, clock or SystemClock())
        _note_absent(wanted, tally)
        return _answer(shelf, asked, tally, how, who, note)
    if (asked.for_good or not wanted.ids) and not how.yes:
        counting = Tally(after=wanted.after)
        await _look(shelf, asked, wanted, counting, clock or SystemClock(), most=COUNTED)
        if not counting.fitted:
            _note_absent(wanted, counting)
            return _answer(shelf, asked, counting, how, who, note)
        if not confirm(_question(shelf, asked, counting.fitted), yes=False, json=how.json):
            return Answer(page=f"Nothing was {asked.done}.\n", exit_code=FINDINGS)
        total = counting.looked_at if counting.fitted < COUNTED else None
    await _carry_out(shelf, asked, wanted, tally, who, how, clock or SystemClock(), total)
    _note_absent(wanted, tally)
    return _answer(shelf, asked, tally, how, who, note)


def _question(shelf: Shelf, asked: Change, count: int) -> str:
    number = counted(count, shelf.noun) if count < COUNTED else f"more than {COUNTED:,} {shelf.noun}s"
    return f"{asked.verb.capitalize()} {number} of {shelf.store}{' for good' if asked.for_good else ''}?"


def _note_absent(wanted: Selection, tally: Tally) -> None:
    absent = [number for number in wanted.ids if number not in tally.seen]
    if absent and tally.signal is None:
        tally.left["not there"] = absent


async def _look(
    shelf: Shelf, asked: Change, wanted: Selection, tally: Tally, clock: Clock, *, most: int | None = None
) -> None:
    async for part in _parts(shelf, wanted, clock):
        tally.fitted += len(_sorted_out(part, asked, wanted, tally))
        if most is not None and tally.fitted >= most:
            return


async def _carry_out(
    shelf: Shelf, asked: Change, wanted: Selection, tally: Tally, who: str, how: How, clock: Clock, total: int | None
) -> None:
    """Signals are looked at between parts: a part is done or not, and what was done is known."""
    with StopSignals() as signals, progress_bar(json=how.json) as progress:
        task = progress.add_task(asked.done, total=total)
        async for part in _parts(shelf, wanted, clock):
            ids = _sorted_out(part, asked, wanted, tally)
            tally.fitted += len(ids)
            if ids:
                tally.changed += await asked.act(ids, who=who)
            tally.after = max((entry.id for entry in part), default=tally.after)
            progress.advance(task, len(part))
            if signals.received is not None:
                tally.signal = signals.received
                return


async def _parts(shelf: Shelf, wanted: Selection, clock: Clock) -> AsyncGenerator[Sequence[Entry], None]:
    """What is selected, a part at a time. By a filter only what was there when it began: `replay` would else find what
    it has written itself, without end.
    """
    if wanted.ids:
        for start in range(0, len(wanted.ids), PART):
            ids = wanted.ids[start : start + PART]
            yield await shelf.find(replace(wanted, ids=ids, limit=len(ids)))
        return
    began, cursor = clock.elapsed(), wanted.after
    while True:
        age = wanted.older_than
        if cursor > wanted.after:
            age = (age or timedelta(0)) + timedelta(seconds=clock.elapsed() - began)
        found = await shelf.find(replace(wanted, after=cursor, older_than=age, limit=PART))
        part = [entry for entry in found if entry.id > cursor]
        if not part:
            return
        yield part
        cursor = part[-1].id


def _sorted_out(part: Sequence[Entry], asked: Change, wanted: Selection, tally: Tally) -> list[int]:
    """Ids of the entries that the change is for; the others are noted with the reason."""
    fitting: list[int] = []
    if wanted.ids:
        tally.seen.update(entry.id for entry in part)
    for entry in part:
        reason = asked.reason_against(entry, named=bool(wanted.ids))
        if reason:
            tally.left.setdefault(reason, []).append(entry.id)
        else:
            fitting.append(entry.id)
    return fitting


def _answer(shelf: Shelf, asked: Change, tally: Tally, how: How, who: str, note: str) -> Answer:
    return Answer(
        document={
            "action": f"{shelf.kind} {asked.verb}",
            "who": who,
            "dry_run": how.dry_run,
            "matched": tally.fitted,
            "changed": tally.changed,
            "skipped": tally.skipped,
            "interrupted": tally.signal is not None,
            "after": tally.after,
        },
        page="".join(f"{line}\n" for line in [_sentence(shelf, asked, tally, how, who), *tally.lines]),
        note="\n".join(filter(None, (_how_to_go_on(tally), note))),
        exit_code=_exit_code(tally, how),
    )


def _sentence(shelf: Shelf, asked: Change, tally: Tally, how: How, who: str) -> str:
    if not tally.fitted:
        return f"There is nothing to {asked.verb}."
    if how.dry_run:
        return f"Would {asked.verb} {counted(tally.fitted, shelf.noun)}. Nothing was changed."
    return f"{asked.done.capitalize()} {counted(tally.changed, shelf.noun)} as {who}."


def _how_to_go_on(tally: Tally) -> str:
    if tally.signal is None:
        return ""
    return f"Stopped by a signal. Go on from there with --after {tally.after}."


def _exit_code(tally: Tally, how: How) -> int:
    if tally.signal is not None:
        return of_signal(tally.signal)
    return OK if tally.changed or (how.dry_run and tally.fitted) else FINDINGS


def progress_bar(*, json: bool) -> Progress:
    """How far it is, on standard error; only for somebody who looks."""
    console = Screen(json=json).err
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=json or not console.is_terminal)
