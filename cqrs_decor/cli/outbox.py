"""`cqrs-decor outbox`: records on their way to the broker, and those that are parked."""

from dataclasses import replace
from functools import partial
from typing import Any

import anyio
import typer
from rich.console import Group

from cqrs_decor._text import counted
from cqrs_decor.app import App
from cqrs_decor.cli.answers import Answer
from cqrs_decor.cli.listing import Listing, facts
from cqrs_decor.cli.location import find_app
from cqrs_decor.cli.options import (
    AllOption,
    AppOption,
    BodyOption,
    IdOption,
    IdsArgument,
    JsonOption,
    KeyOption,
    LimitOption,
    OptionalIdsArgument,
    OutboxState,
    OutboxStateOption,
    TopicOption,
    WhoOption,
    YesOption,
)
from cqrs_decor.cli.records import (
    MOST,
    Action,
    carry_out,
    confirm,
    envelope_facts,
    left_alone,
    missing,
    moment,
    opened_store,
    operator,
    pairs,
    require_choice,
    same_process_note,
)
from cqrs_decor.errors import UnknownRecordError
from cqrs_decor.outbox import OutboxFilter, OutboxStore, StoredRecord

verbs = typer.Typer(help="List, show, retry and discard records of the outbox.")

_COLUMNS = ("id", "state", "topic", "key", "type", "attempts", "written (UTC)", "error")
_FITTING = {"retry": (OutboxState.PARKED,), "discard": (OutboxState.PARKED, OutboxState.RESCHEDULED)}


@verbs.command("list")
def list_records(
    app: AppOption = None,
    json: JsonOption = False,
    state: OutboxStateOption = None,
    topic: TopicOption = None,
    key: KeyOption = None,
    id: IdOption = None,
    limit: LimitOption = 100,
) -> Answer:
    """List records that are not delivered yet, oldest first."""
    wanted = _filter(state, topic, key, id, limit)
    found = find_app(app)
    return anyio.run(_list, found, wanted)


@verbs.command("show")
def show(ids: IdsArgument, app: AppOption = None, json: JsonOption = False, body: BodyOption = False) -> Answer:
    """Show all that is known of records; their bodies only with --body."""
    found = find_app(app)
    return anyio.run(_show, found, ids, body)


@verbs.command("retry")
def retry(
    ids: OptionalIdsArgument = None,
    app: AppOption = None,
    json: JsonOption = False,
    everything: AllOption = False,
    state: OutboxStateOption = None,
    topic: TopicOption = None,
    key: KeyOption = None,
    who: WhoOption = None,
) -> Answer:
    """Put parked records back in their old place in the order of their key; a relay publishes them next."""
    wanted = _chosen(ids, everything, state, topic, key)
    action = Action(kind="outbox", verb="retry", done="retried", noun="record", who=operator(who))
    found = find_app(app)
    return anyio.run(_change, found, action, wanted, True, json)


@verbs.command("discard")
def discard(
    ids: OptionalIdsArgument = None,
    app: AppOption = None,
    json: JsonOption = False,
    everything: AllOption = False,
    state: OutboxStateOption = None,
    topic: TopicOption = None,
    key: KeyOption = None,
    who: WhoOption = None,
    yes: YesOption = False,
) -> Answer:
    """Give parked or rescheduled records up for good, so that their key goes on. Asks first."""
    wanted = _chosen(ids, everything, state, topic, key)
    action = Action(kind="outbox", verb="discard", done="discarded", noun="record", who=operator(who))
    found = find_app(app)
    return anyio.run(_change, found, action, wanted, yes, json)


def _chosen(
    ids: list[int] | None, everything: bool, state: OutboxState | None, topic: str | None, key: str | None
) -> OutboxFilter:
    require_choice(ids or (), everything, any(given is not None for given in (state, topic, key)))
    return _filter(state, topic, key, ids, MOST)


def _filter(
    state: OutboxState | None, topic: str | None, key: str | None, ids: list[int] | None, limit: int
) -> OutboxFilter:
    return OutboxFilter(
        ids=tuple(ids or ()), state=None if state is None else state.value, topic=topic, key=key, limit=limit
    )


async def _list(app: App, wanted: OutboxFilter) -> Answer:
    async with opened_store(app) as store:
        found = await store.outbox.find(replace(wanted, limit=wanted.limit + 1))
        backlog = await store.outbox.backlog()
        note = same_process_note(store)
    records, more = found[: wanted.limit], len(found) > wanted.limit
    total = f"{counted(len(records), 'record')} shown; in all {backlog.pending:,} waiting, {backlog.parked:,} parked."
    return Answer(
        document={
            "records": [_document(record, body=False) for record in records],
            "more": more,
            "pending": backlog.pending,
            "parked": backlog.parked,
        },
        page=Group(Listing(_COLUMNS, [_cells(record) for record in records], empty="No record matches.")),
        note="\n".join(filter(None, (total, "There are more: raise --limit." if more else "", note))),
    )


async def _show(app: App, ids: list[int], body: bool) -> Answer:
    async with opened_store(app) as store:
        records = await store.outbox.find(OutboxFilter(ids=tuple(ids), limit=len(ids)))
    absent = [str(number) for number in ids if number not in {record.id for record in records}]
    if absent:
        raise UnknownRecordError("outbox", absent)
    documents = [_document(record, body=body) for record in records]
    return Answer(
        document={"records": documents}, page=Group(*(part for each in documents for part in (facts(pairs(each)), "")))
    )


async def _change(app: App, action: Action, wanted: OutboxFilter, yes: bool, json: bool) -> Answer:
    async with opened_store(app) as store:
        found = await _found(store.outbox, wanted, action)
        fitting = [record.id for record in found if record.state in _FITTING[action.verb]]
        unfit = [*missing(wanted.ids, {record.id for record in found}), *_unfit(found, action)]
        question = f"Discard {counted(len(fitting), 'record')} of {store.name} for good?"
        if fitting and not confirm(question, yes=yes, json=json):
            return left_alone(action)
        act = store.outbox.retry if action.verb == "retry" else store.outbox.discard
        return await carry_out(action, partial(act, who=action.who), fitting, unfit, same_process_note(store))


async def _found(outbox: OutboxStore, wanted: OutboxFilter, action: Action) -> list[StoredRecord]:
    """Of a filter without a state only those that the action is for: the others may be very many."""
    if wanted.ids or wanted.state is not None:
        return list(await outbox.find(wanted))
    return [
        record for state in _FITTING[action.verb] for record in await outbox.find(replace(wanted, state=state.value))
    ]


def _unfit(found: list[StoredRecord], action: Action) -> list[str]:
    fitting = _FITTING[action.verb]
    states = " or ".join(fitting)
    return [
        f"Left alone: {record.id} is {record.state}, not {states}." for record in found if record.state not in fitting
    ][:20]


def _document(record: StoredRecord, *, body: bool) -> dict[str, Any]:
    return {
        "id": record.id,
        "state": record.state,
        "attempts": record.attempts,
        "error": record.error,
        "written_at": record.written_at,
        "due_at": record.due_at,
        "lane": record.lane,
        **envelope_facts(record.envelope, body=body),
    }


def _cells(record: StoredRecord) -> tuple[str, ...]:
    envelope = record.envelope
    return (
        str(record.id),
        record.state,
        envelope.topic,
        envelope.key or "",
        envelope.type,
        str(record.attempts),
        moment(record.written_at),
        record.error or "",
    )
