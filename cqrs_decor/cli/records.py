"""What verbs on records stand on: the app's store, who acts, a question, and an envelope as facts."""

import getpass
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from typing import Any

import anyio
import orjson
import typer

from cqrs_decor.app import App
from cqrs_decor.cli.errors import CommandLineError
from cqrs_decor.envelope import Envelope
from cqrs_decor.parts import open_store
from cqrs_decor.store import Store


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


def operator(given: str | None) -> str:
    """Who acts: as given, or the user of the operating system at this machine."""
    if given:
        return given
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


def confirm(question: str, *, yes: bool, json: bool) -> bool:
    """Ask, unless the answer was given beforehand.

    Raises:
        CommandLineError: Nobody can be asked.
    """
    if yes:
        return True
    if json or not sys.stdin.isatty():
        raise CommandLineError(f"{question} Nobody can be asked here.", fix="add --yes")
    with _interruptible():
        return typer.confirm(question, err=True)


@contextmanager
def _interruptible() -> Generator[None, None, None]:
    """Under an event loop the first SIGINT would only cancel a task, which a question does not notice."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


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
