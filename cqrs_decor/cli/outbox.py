"""`cqrs-decor outbox`: records on their way to the broker, those that are parked, and the history of delivered ones."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta

import anyio
import typer

from cqrs_decor.app import App
from cqrs_decor.cli.answers import Answer
from cqrs_decor.cli.location import find_app
from cqrs_decor.cli.options import (
    AppOption,
    BodyOption,
    How,
    IdOption,
    IdsArgument,
    JsonOption,
    LimitOption,
    MaxRetriesOption,
    OlderThanOption,
    OptionalIdsArgument,
    OutboxState,
    OutboxStateOption,
    Where,
)
from cqrs_decor.cli.parked import (
    Change,
    Entry,
    Selection,
    Shelf,
    change,
    list_entries,
    require_choice,
    selection,
    show_entries,
)
from cqrs_decor.cli.purging import purge_kept
from cqrs_decor.cli.records import moment, opened_store, same_process_note
from cqrs_decor.cli.spreading import spread
from cqrs_decor.outbox import OutboxFilter, StoredRecord
from cqrs_decor.store import Retention, Store

verbs = typer.Typer(help="List, show, retry, replay, discard and purge records of the outbox.")

_COLUMNS = ("id", "state", "topic", "key", "type", "attempts", "retries", "written (UTC)", "error")


@verbs.command("list")
@spread
def list_records(
    where: Where,
    app: AppOption = None,
    json: JsonOption = False,
    state: OutboxStateOption = None,
    id: IdOption = None,
    limit: LimitOption = 100,
) -> Answer:
    """List records, oldest first; delivered ones only with --state delivered, where a history is kept."""
    wanted = replace(selection(where, ids=id, state=state), limit=limit)
    found = find_app(app)
    return anyio.run(_list, found, wanted)


@verbs.command("show")
def show(ids: IdsArgument, app: AppOption = None, json: JsonOption = False, body: BodyOption = False) -> Answer:
    """Show all that is known of records; their bodies only with --body."""
    found = find_app(app)
    return anyio.run(_show, found, ids, body)


@verbs.command("retry")
@spread
def retry(
    where: Where,
    how: How,
    ids: OptionalIdsArgument = None,
    app: AppOption = None,
    most_retries: MaxRetriesOption = 3,
) -> Answer:
    """Put parked records back in their old place in the order of their key; a relay publishes them next."""
    wanted = selection(where, ids=ids, state=None if ids else OutboxState.PARKED)
    require_choice(replace(wanted, state=None), how)
    found = find_app(app)
    return anyio.run(_retry, found, wanted, how, most_retries)


@verbs.command("replay")
@spread
def replay(where: Where, how: How, ids: OptionalIdsArgument = None, app: AppOption = None) -> Answer:
    """Publish delivered records of the history again, as new ones at the end of the order, under their own message ids:
    a consumer that had one drops it."""
    wanted = selection(where, ids=ids, state=OutboxState.DELIVERED)
    require_choice(replace(wanted, state=None), how)
    found = find_app(app)
    return anyio.run(_replay, found, wanted, how)


@verbs.command("discard")
@spread
def discard(
    where: Where,
    how: How,
    ids: OptionalIdsArgument = None,
    app: AppOption = None,
    state: OutboxStateOption = None,
) -> Answer:
    """Give parked or rescheduled records up for good, so that their key goes on. A filter means parked ones, unless it
    names a state."""
    require_choice(selection(where, ids=ids, state=state), how)
    wanted = selection(where, ids=ids, state=None if ids else (state or OutboxState.PARKED))
    found = find_app(app)
    return anyio.run(_discard, found, wanted, how)


@verbs.command("purge")
@spread
def purge(how: How, app: AppOption = None, older_than: OlderThanOption = None) -> Answer:
    """Delete delivered records from the history: those older than --older-than or, without it, than the history is
    kept; --all deletes every one."""
    found = find_app(app)
    age = timedelta(0) if how.everything else timedelta(days=found.settings.history_days)
    return anyio.run(_purge, found, older_than, age, how)


async def _list(app: App, wanted: Selection) -> Answer:
    async with opened_store(app) as store:
        backlog = await store.outbox.backlog()
        totals = {"pending": backlog.pending, "parked": backlog.parked}
        return await list_entries(_shelf(store), wanted, totals, [same_process_note(store)])


async def _show(app: App, ids: list[int], body: bool) -> Answer:
    async with opened_store(app) as store:
        return await show_entries(_shelf(store), ids, body=body)


async def _retry(app: App, wanted: Selection, how: How, most_retries: int) -> Answer:
    async with opened_store(app) as store:
        asked = Change(
            verb="retry",
            done="retried",
            act=store.outbox.retry,
            fitting={OutboxState.PARKED},
            most_retries=most_retries,
        )
        return await change(_shelf(store), asked, wanted, how, note=same_process_note(store))


async def _replay(app: App, wanted: Selection, how: How) -> Answer:
    async with opened_store(app) as store:
        asked = Change(verb="replay", done="replayed", act=store.outbox.replay, fitting={OutboxState.DELIVERED})
        return await change(_shelf(store), asked, wanted, how, note=same_process_note(store))


async def _discard(app: App, wanted: Selection, how: How) -> Answer:
    async with opened_store(app) as store:
        asked = Change(
            verb="discard",
            done="discarded",
            act=store.outbox.discard,
            fitting={OutboxState.PARKED, OutboxState.RESCHEDULED},
            for_good=True,
        )
        return await change(_shelf(store), asked, wanted, how, note=same_process_note(store))


async def _purge(app: App, older_than: str | None, age: timedelta, how: How) -> Answer:
    async with opened_store(app) as store:
        return await purge_kept(
            store, "outbox", "delivered record", older_than, age, lambda kept: Retention(history=kept), how
        )


def _shelf(store: Store) -> Shelf:
    async def find(wanted: Selection, /) -> Sequence[Entry]:
        return [_entry(record) for record in await store.outbox.find(_filter(wanted))]

    return Shelf(kind="outbox", noun="record", store=store.name, columns=_COLUMNS, find=find)


def _filter(wanted: Selection) -> OutboxFilter:
    return OutboxFilter(
        ids=tuple(wanted.ids),
        state=wanted.state,
        topic=wanted.topic,
        key=wanted.key,
        error=wanted.error,
        older_than=wanted.older_than,
        after=wanted.after,
        limit=wanted.limit,
    )


def _entry(record: StoredRecord) -> Entry:
    envelope = record.envelope
    return Entry(
        id=record.id,
        state=record.state,
        retries=record.retries,
        envelope=envelope,
        cells=(
            str(record.id),
            record.state,
            envelope.topic,
            envelope.key or "",
            envelope.type,
            str(record.attempts),
            str(record.retries or ""),
            moment(record.written_at),
            record.error or "",
        ),
        known={
            "id": record.id,
            "state": record.state,
            "attempts": record.attempts,
            "retries": record.retries,
            "error": record.error,
            "written_at": record.written_at,
            "due_at": record.due_at,
            "lane": record.lane,
        },
    )
