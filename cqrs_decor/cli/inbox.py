"""`cqrs-decor inbox`: messages that a consumer could not handle, and what it remembers of those that it had."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta

import anyio
import typer

from cqrs_decor.app import App
from cqrs_decor.cli.ages import parsed_age
from cqrs_decor.cli.answers import Answer
from cqrs_decor.cli.errors import CommandLineError
from cqrs_decor.cli.location import find_app
from cqrs_decor.cli.options import (
    AppOption,
    BodyOption,
    ConsumerOption,
    How,
    IdOption,
    IdsArgument,
    InboxState,
    InboxStateOption,
    JsonOption,
    LimitOption,
    MaxRetriesOption,
    OlderThanOption,
    OptionalIdsArgument,
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
from cqrs_decor.inbox import InboxFilter, ParkedMessage
from cqrs_decor.store import Retention, Store

verbs = typer.Typer(
    help="List, show, retry, replay and discard messages that a consumer could not handle; purge the rest."
)

_COLUMNS = ("id", "state", "consumer", "topic", "key", "type", "attempts", "retries", "parked (UTC)", "error")


@verbs.command("list")
@spread
def list_messages(
    where: Where,
    app: AppOption = None,
    json: JsonOption = False,
    state: InboxStateOption = None,
    consumer: ConsumerOption = None,
    id: IdOption = None,
    limit: LimitOption = 100,
) -> Answer:
    """List parked messages, and those held behind them, oldest first."""
    wanted = replace(selection(where, ids=id, state=state, consumer=consumer), limit=limit)
    found = find_app(app)
    return anyio.run(_list, found, wanted)


@verbs.command("show")
def show(ids: IdsArgument, app: AppOption = None, json: JsonOption = False, body: BodyOption = False) -> Answer:
    """Show all that is known of parked messages; their bodies only with --body."""
    found = find_app(app)
    return anyio.run(_show, found, ids, body)


@verbs.command("retry")
@spread
def retry(
    where: Where,
    how: How,
    ids: OptionalIdsArgument = None,
    app: AppOption = None,
    consumer: ConsumerOption = None,
    most_retries: MaxRetriesOption = 3,
) -> Answer:
    """Ask for another try of parked messages; a worker of their consumer carries it out. Those that are held behind one
    follow by themselves."""
    require_choice(selection(where, ids=ids, state=None, consumer=consumer), how)
    wanted = selection(where, ids=ids, state=None if ids else InboxState.PARKED, consumer=consumer)
    found = find_app(app)
    return anyio.run(_retry, found, "retry", wanted, how, most_retries)


@verbs.command("replay")
@spread
def replay(
    where: Where,
    how: How,
    app: AppOption = None,
    consumer: ConsumerOption = None,
    most_retries: MaxRetriesOption = 3,
) -> Answer:
    """Retry parked messages in bulk, the oldest first."""
    require_choice(selection(where, ids=None, state=None, consumer=consumer), how)
    wanted = selection(where, ids=None, state=InboxState.PARKED, consumer=consumer)
    found = find_app(app)
    return anyio.run(_retry, found, "replay", wanted, how, most_retries)


@verbs.command("discard")
@spread
def discard(
    where: Where,
    how: How,
    ids: OptionalIdsArgument = None,
    app: AppOption = None,
    state: InboxStateOption = None,
    consumer: ConsumerOption = None,
) -> Answer:
    """Give parked messages up for good; the next one of their key is tried then. A filter means parked ones, unless it
    names a state."""
    require_choice(selection(where, ids=ids, state=state, consumer=consumer), how)
    wanted = selection(where, ids=ids, state=None if ids else (state or InboxState.PARKED), consumer=consumer)
    found = find_app(app)
    return anyio.run(_discard, found, wanted, how)


@verbs.command("purge")
@spread
def purge(how: How, app: AppOption = None, older_than: OlderThanOption = None) -> Answer:
    """Forget which messages consumers have had: those from longer ago than --older-than or, without it, than the inbox
    remembers. Never what may come again."""
    found = find_app(app)
    _refuse_within_horizon(found, older_than, how)
    return anyio.run(_purge, found, older_than, timedelta(days=found.settings.inbox_retention_days), how)


def _refuse_within_horizon(app: App, older_than: str | None, how: How) -> None:
    horizon = timedelta(days=app.settings.replay_horizon_days)
    if how.everything or (older_than is not None and parsed_age(older_than) <= horizon):
        raise CommandLineError(
            f"A message may come again after {app.settings.replay_horizon_days:g} days (replay_horizon_days); what the "
            "inbox has forgotten by then would have its effects twice.",
            fix="name a longer --older-than",
        )


async def _list(app: App, wanted: Selection) -> Answer:
    async with opened_store(app) as store:
        totals = {"parked": await store.inbox.parked_count()}
        return await list_entries(_shelf(store), wanted, totals, [same_process_note(store)])


async def _show(app: App, ids: list[int], body: bool) -> Answer:
    async with opened_store(app) as store:
        return await show_entries(_shelf(store), ids, body=body)


async def _retry(app: App, verb: str, wanted: Selection, how: How, most_retries: int) -> Answer:
    async with opened_store(app) as store:
        asked = Change(
            verb=verb,
            done="asked to retry",
            act=store.inbox.retry,
            fitting={InboxState.PARKED},
            most_retries=most_retries,
        )
        return await change(_shelf(store), asked, wanted, how, note=same_process_note(store))


async def _discard(app: App, wanted: Selection, how: How) -> Answer:
    async with opened_store(app) as store:
        asked = Change(
            verb="discard", done="discarded", act=store.inbox.discard, fitting=frozenset(InboxState), for_good=True
        )
        return await change(_shelf(store), asked, wanted, how, note=same_process_note(store))


async def _purge(app: App, older_than: str | None, age: timedelta, how: How) -> Answer:
    async with opened_store(app) as store:
        return await purge_kept(
            store, "inbox", "remembered message", older_than, age, lambda kept: Retention(inbox=kept), how
        )


def _shelf(store: Store) -> Shelf:
    """The store tells held ones from the others; which of those an operator has asked for is told apart here."""

    async def find(wanted: Selection, /) -> Sequence[Entry]:
        entries: list[Entry] = []
        after = wanted.after
        while len(entries) < wanted.limit:
            page = await store.inbox.find(_filter(replace(wanted, after=after)))
            entries += [entry for entry in map(_entry, page) if wanted.state in (None, entry.state)]
            if len(page) < wanted.limit or page[-1].id <= after:
                break
            after = page[-1].id
        return entries[: wanted.limit]

    return Shelf(kind="inbox", noun="message", store=store.name, columns=_COLUMNS, find=find)


def _filter(wanted: Selection) -> InboxFilter:
    return InboxFilter(
        ids=tuple(wanted.ids),
        consumer=wanted.consumer,
        topic=wanted.topic,
        key=wanted.key,
        error=wanted.error,
        older_than=wanted.older_than,
        held={InboxState.HELD.value: True, InboxState.PARKED.value: False}.get(wanted.state or ""),
        after=wanted.after,
        limit=wanted.limit,
    )


def _state(parked: ParkedMessage) -> InboxState:
    """One that is held and asked for is next in its key: the one before it has been dealt with."""
    if parked.retry_requested:
        return InboxState.RETRY_REQUESTED
    return InboxState.HELD if parked.held else InboxState.PARKED


def _entry(parked: ParkedMessage) -> Entry:
    envelope, state = parked.envelope, _state(parked)
    return Entry(
        id=parked.id,
        state=state,
        retries=parked.retries,
        envelope=envelope,
        cells=(
            str(parked.id),
            state.value,
            parked.consumer,
            envelope.topic,
            envelope.key or "",
            envelope.type,
            str(parked.attempts),
            str(parked.retries or ""),
            moment(parked.parked_at),
            parked.error,
        ),
        known={
            "id": parked.id,
            "state": state.value,
            "consumer": parked.consumer,
            "attempts": parked.attempts,
            "retries": parked.retries,
            "error": parked.error,
            "parked_at": parked.parked_at,
        },
    )
