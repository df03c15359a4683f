"""`cqrs-decor inbox`: messages that a consumer could not handle."""

from collections.abc import Sequence
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
    ConsumerOption,
    IdOption,
    IdsArgument,
    InboxState,
    InboxStateOption,
    JsonOption,
    KeyOption,
    LimitOption,
    OptionalIdsArgument,
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
from cqrs_decor.inbox import InboxFilter, InboxStore, ParkedMessage

verbs = typer.Typer(help="List, show, retry and discard messages that a consumer could not handle.")

_COLUMNS = ("id", "state", "consumer", "topic", "key", "type", "attempts", "parked (UTC)", "error")


@verbs.command("list")
def list_messages(
    app: AppOption = None,
    json: JsonOption = False,
    state: InboxStateOption = None,
    consumer: ConsumerOption = None,
    topic: TopicOption = None,
    key: KeyOption = None,
    id: IdOption = None,
    limit: LimitOption = 100,
) -> Answer:
    """List parked messages, oldest first."""
    wanted = InboxFilter(ids=tuple(id or ()), consumer=consumer, topic=topic, key=key, limit=limit)
    found = find_app(app)
    return anyio.run(_list, found, wanted, state)


@verbs.command("show")
def show(ids: IdsArgument, app: AppOption = None, json: JsonOption = False, body: BodyOption = False) -> Answer:
    """Show all that is known of parked messages; their bodies only with --body."""
    found = find_app(app)
    return anyio.run(_show, found, ids, body)


@verbs.command("retry")
def retry(
    ids: OptionalIdsArgument = None,
    app: AppOption = None,
    json: JsonOption = False,
    everything: AllOption = False,
    state: InboxStateOption = None,
    consumer: ConsumerOption = None,
    topic: TopicOption = None,
    key: KeyOption = None,
    who: WhoOption = None,
) -> Answer:
    """Ask for another try of parked messages; the worker of their consumer carries it out."""
    wanted = _chosen(ids, everything, state, consumer, topic, key)
    action = Action(kind="inbox", verb="retry", done="asked to retry", noun="message", who=operator(who))
    found = find_app(app)
    return anyio.run(_change, found, action, wanted, state, True, json)


@verbs.command("discard")
def discard(
    ids: OptionalIdsArgument = None,
    app: AppOption = None,
    json: JsonOption = False,
    everything: AllOption = False,
    state: InboxStateOption = None,
    consumer: ConsumerOption = None,
    topic: TopicOption = None,
    key: KeyOption = None,
    who: WhoOption = None,
    yes: YesOption = False,
) -> Answer:
    """Give parked messages up for good. Asks first."""
    wanted = _chosen(ids, everything, state, consumer, topic, key)
    action = Action(kind="inbox", verb="discard", done="discarded", noun="message", who=operator(who))
    found = find_app(app)
    return anyio.run(_change, found, action, wanted, state, yes, json)


def _chosen(
    ids: list[int] | None,
    everything: bool,
    state: InboxState | None,
    consumer: str | None,
    topic: str | None,
    key: str | None,
) -> InboxFilter:
    require_choice(ids or (), everything, any(given is not None for given in (state, consumer, topic, key)))
    return InboxFilter(ids=tuple(ids or ()), consumer=consumer, topic=topic, key=key, limit=MOST)


async def _found(inbox: InboxStore, wanted: InboxFilter, state: InboxState | None) -> list[ParkedMessage]:
    """The store knows no state of a parked message, so those of the other one are left out here."""
    if state is None:
        return list(await inbox.find(wanted))
    every = await inbox.find(replace(wanted, limit=MOST))
    return [parked for parked in every if _state(parked) == state][: wanted.limit]


def _state(parked: ParkedMessage) -> InboxState:
    return InboxState.RETRY_REQUESTED if parked.retry_requested else InboxState.PARKED


async def _list(app: App, wanted: InboxFilter, state: InboxState | None) -> Answer:
    async with opened_store(app) as store:
        found = await _found(store.inbox, replace(wanted, limit=wanted.limit + 1), state)
        count = await store.inbox.parked_count()
        note = same_process_note(store)
    messages, more = found[: wanted.limit], len(found) > wanted.limit
    total = f"{counted(len(messages), 'message')} shown; in all {count:,} parked."
    return Answer(
        document={"messages": [_document(each, body=False) for each in messages], "more": more, "parked": count},
        page=Listing(_COLUMNS, [_cells(each) for each in messages], empty="No parked message matches."),
        note="\n".join(filter(None, (total, "There are more: raise --limit." if more else "", note))),
    )


async def _show(app: App, ids: list[int], body: bool) -> Answer:
    async with opened_store(app) as store:
        messages = await store.inbox.find(InboxFilter(ids=tuple(ids), limit=len(ids)))
    absent = [str(number) for number in ids if number not in {parked.id for parked in messages}]
    if absent:
        raise UnknownRecordError("inbox", absent)
    documents = [_document(parked, body=body) for parked in messages]
    return Answer(
        document={"messages": documents}, page=Group(*(part for each in documents for part in (facts(pairs(each)), "")))
    )


async def _change(
    app: App, action: Action, wanted: InboxFilter, state: InboxState | None, yes: bool, json: bool
) -> Answer:
    async with opened_store(app) as store:
        found = await _found(store.inbox, wanted, state)
        fitting = [parked.id for parked in found if action.verb == "discard" or not parked.retry_requested]
        unfit = [*missing(wanted.ids, {parked.id for parked in found}), *_unfit(found, fitting)]
        question = f"Discard {counted(len(fitting), 'message')} of {store.name} for good?"
        if fitting and not confirm(question, yes=yes, json=json):
            return left_alone(action)
        act = store.inbox.retry if action.verb == "retry" else store.inbox.discard
        return await carry_out(action, partial(act, who=action.who), fitting, unfit, same_process_note(store))


def _unfit(found: Sequence[ParkedMessage], fitting: Sequence[int]) -> list[str]:
    asked = [parked.id for parked in found if parked.id not in set(fitting)]
    return [f"Left alone: {number} is asked to be retried already." for number in asked][:20]


def _document(parked: ParkedMessage, *, body: bool) -> dict[str, Any]:
    return {
        "id": parked.id,
        "state": _state(parked).value,
        "consumer": parked.consumer,
        "attempts": parked.attempts,
        "error": parked.error,
        "parked_at": parked.parked_at,
        **envelope_facts(parked.envelope, body=body),
    }


def _cells(parked: ParkedMessage) -> tuple[str, ...]:
    envelope = parked.envelope
    return (
        str(parked.id),
        _state(parked).value,
        parked.consumer,
        envelope.topic,
        envelope.key or "",
        envelope.type,
        str(parked.attempts),
        moment(parked.parked_at),
        parked.error,
    )
