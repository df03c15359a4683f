"""`cqrs-decor topics`: make the topics that the app needs."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated

import anyio
import typer

from cqrs_decor._text import counted, did_you_mean, listed
from cqrs_decor.app import App
from cqrs_decor.assembly import Parts
from cqrs_decor.broker import Broker, TopicPlan
from cqrs_decor.cli.answers import Answer
from cqrs_decor.cli.errors import CommandLineError
from cqrs_decor.cli.listing import Listing
from cqrs_decor.cli.location import find_app
from cqrs_decor.cli.needed_topics import consumed_topics, needed_topics
from cqrs_decor.cli.options import AppOption, JsonOption
from cqrs_decor.errors import StartupError

verbs = typer.Typer(help="Look at the topics that the app needs, and create them.")

OnlyOption = Annotated[
    list[str] | None, typer.Option("--topic", metavar="NAME", help="Only this one; can be repeated.")
]


@verbs.command("plan")
def plan(app: AppOption = None, json: JsonOption = False, topic: OnlyOption = None) -> Answer:
    """List the topics that the app reads or may write, and whether each is there. Changes nothing."""
    found = find_app(app)
    return anyio.run(_plan, found, topic or [])


@verbs.command("create")
def create(app: AppOption = None, json: JsonOption = False, topic: OnlyOption = None) -> Answer:
    """Create the topics that are missing; those that are there are left as they are."""
    found = find_app(app)
    return anyio.run(_create, found, topic or [])


async def _plan(app: App, only: list[str]) -> Answer:
    parts = _parts(app)
    needed = _chosen(parts, only)
    async with _opened(app, parts) as broker:
        missing = {topic.name for topic in await broker.missing_topics(needed)}
    read = {topic.name for topic in consumed_topics(parts)}
    rows = [_row(topic, missing, read) for topic in needed]
    return Answer(
        document={"broker": broker.name, "topics": [dict(zip(_COLUMNS, row, strict=True)) for row in rows]},
        page=Listing(_COLUMNS, rows, empty="The app needs no topics."),
        note=_made_by_itself(broker, missing),
    )


_COLUMNS = ("topic", "state", "use", "compacted")


def _row(topic: TopicPlan, missing: set[str], read: set[str]) -> tuple[str, ...]:
    return (
        topic.name,
        "missing" if topic.name in missing else "there",
        "read" if topic.name in read else "written",
        "yes" if topic.compacted else "no",
    )


def _made_by_itself(broker: Broker, missing: set[str]) -> str:
    if missing and broker.capabilities.creates_topics:
        return f"{broker.name} makes a topic when it is first published to."
    return ""


async def _create(app: App, only: list[str]) -> Answer:
    parts = _parts(app)
    needed = _chosen(parts, only)
    async with _opened(app, parts) as broker:
        missing = await broker.missing_topics(needed)
        if missing:
            await broker.create_topics(missing)
    names = [topic.name for topic in missing]
    there = len(needed) - len(names)
    return Answer(
        document={"broker": broker.name, "created": names, "there_before": there},
        page=f"Created {listed(names)}; {counted(there, 'topic')} there before.\n",
    )


def _parts(app: App) -> Parts:
    parts = app.parts()
    if parts.faults:
        raise StartupError(f"The app cannot say which topics it needs: {len(parts.faults)} problems.", parts.faults)
    return parts


def _chosen(parts: Parts, only: list[str]) -> list[TopicPlan]:
    known = [topic.name for topic in needed_topics(parts)]
    for name in only:
        if name not in known:
            raise CommandLineError(
                f"The app needs no topic {name!r}.{did_you_mean(name, known)}\nIt needs: {listed(known)}.",
                fix="name one of them, or leave --topic out for all",
            )
    return needed_topics(parts, only)


@asynccontextmanager
async def _opened(app: App, parts: Parts) -> AsyncGenerator[Broker, None]:
    """The broker, connected. Where the database is the broker, it stands on the store's tables and connections."""
    try:
        if app.configuration.broker is None:
            await parts.store.open()
        await parts.broker.open()
        yield parts.broker
    finally:
        with anyio.CancelScope(shield=True):
            await parts.broker.close()
            await parts.store.close()
