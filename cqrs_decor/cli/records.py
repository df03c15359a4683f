"""What `outbox` and `inbox` have in common: which records are meant, who acts on them, and what came of it."""

import getpass
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import anyio
import orjson
import typer

from cqrs_decor._text import counted, listed
from cqrs_decor.app import App
from cqrs_decor.cli.answers import Answer
from cqrs_decor.cli.errors import CommandLineError
from cqrs_decor.cli.exits import FINDINGS, OK
from cqrs_decor.envelope import Envelope
from cqrs_decor.parts import open_store
from cqrs_decor.store import Store

MOST = 100_000
"""`--all` acts on so many at most; the answer says when more are left."""

_AT_ONCE = 500
"""Ids in one statement: databases limit them."""

Act = Callable[[Collection[int]], Awaitable[int]]


@asynccontextmanager
async def opened_store(app: App) -> AsyncGenerator[Store, None]:
    """The app's store, without its handlers and loops."""
    store = open_store(app.configuration.database)
    try:
        await store.open()
        yield store
    finally:
        with anyio.CancelScope(shield=True):
            await store.close()


def same_process_note(store: Store) -> str:
    """Nothing of another process can be seen in a store that lives in this one."""
    return "" if store.card.shared else f"{store.name} lives in its process: what another one keeps is not seen here."


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """A change that an operator asks for.

    Attributes:
        kind: outbox or inbox.
        verb: retry or discard.
        done: The verb for what happened.
        noun: What it is done to.
        who: Recorded with it.
    """

    kind: str
    verb: str
    done: str
    noun: str
    who: str


def operator(given: str | None) -> str:
    """Who acts: as given, or the user of the operating system."""
    if given:
        return given
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


def require_choice(ids: Collection[int], everything: bool, narrowed: bool) -> None:
    """A change names its records, or says that everything is meant that a filter matches.

    Raises:
        CommandLineError: Neither, or both.
    """
    if ids and (everything or narrowed):
        raise CommandLineError("Ids and a filter were both given.", fix="give ids only, or a filter and --all")
    if everything and not narrowed:
        raise CommandLineError("--all needs a filter, so that it is never everything by accident.", fix=_FIX)
    if not ids and not everything:
        problem = "A filter alone is not enough to change what it matches." if narrowed else "Nothing was named."
        raise CommandLineError(problem, fix=_FIX)


_FIX = "give ids, or a filter and --all, e.g. --state parked --all"


def confirm(question: str, *, yes: bool, json: bool) -> bool:
    """Ask, unless the answer was given beforehand.

    Raises:
        CommandLineError: Nobody can be asked.
    """
    if yes:
        return True
    if json or not sys.stdin.isatty():
        raise CommandLineError(f"{question} Nobody can be asked here.", fix="add --yes")
    return typer.confirm(question, err=True)


async def carry_out(action: Action, act: Act, fitting: Sequence[int], unfit: Sequence[str], note: str = "") -> Answer:
    """Act on those that fit, a part at a time, and say what came of it."""
    count = 0
    for start in range(0, len(fitting), _AT_ONCE):
        count += await act(fitting[start : start + _AT_ONCE])
    more = f"\nMore are left: {action.verb} again." if len(fitting) == MOST else ""
    done = f"{action.done.capitalize()} {counted(count, action.noun)} as {action.who}.{more}"
    lines = [done if fitting else f"There is nothing to {action.verb}.", *unfit]
    return Answer(
        document={
            "action": f"{action.kind} {action.verb}",
            "matched": len(fitting),
            "changed": count,
            "who": action.who,
            "skipped": list(unfit),
        },
        page="".join(f"{line}\n" for line in lines),
        note=note,
        exit_code=OK if count else FINDINGS,
    )


def left_alone(action: Action) -> Answer:
    return Answer(page=f"Nothing was {action.done}.\n", exit_code=FINDINGS)


def missing(ids: Iterable[int], found: Collection[int]) -> list[str]:
    """A line for those ids that are not there."""
    absent = [str(number) for number in dict.fromkeys(ids) if number not in found]
    return [f"Not there: {listed(absent, limit=20)}."] if absent else []


def moment(when: datetime | None) -> str:
    if when is None:
        return ""
    aware = when if when.tzinfo else when.replace(tzinfo=UTC)
    return aware.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


def envelope_facts(envelope: Envelope, *, body: bool) -> dict[str, Any]:
    """The envelope as a document; its body only when asked for."""
    facts = {
        "message_id": envelope.id,
        "source": envelope.source,
        "type": envelope.type,
        "version": envelope.version,
        "topic": envelope.topic,
        "key": envelope.key,
        "time": envelope.time,
        "correlation_id": envelope.correlation_id,
        "causation_id": envelope.causation_id,
        "traceparent": envelope.traceparent,
        "headers": dict(envelope.headers),
        "content_type": envelope.content_type,
        "body_bytes": len(envelope.data),
    }
    return {**facts, "body": _body(envelope)} if body else facts


def _body(envelope: Envelope) -> Any:
    """As JSON where it is JSON, else as text, else as hexadecimal digits."""
    if "json" in envelope.content_type:
        try:
            return orjson.loads(envelope.data)
        except orjson.JSONDecodeError:
            pass  # it is shown as what it is
    try:
        return envelope.data.decode()
    except UnicodeDecodeError:
        return envelope.data.hex()


def pairs(document: dict[str, Any]) -> list[tuple[str, str]]:
    """A document as names and texts for a page."""
    return [(name.replace("_", " "), _text(value)) for name, value in document.items()]


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, datetime):
        return f"{moment(value)}Z"
    if isinstance(value, dict | list):
        return orjson.dumps(value, option=orjson.OPT_INDENT_2).decode() if value else ""
    return str(value)
