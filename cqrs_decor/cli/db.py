"""`cqrs-decor db`: the library's own tables in the app's database."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import anyio
import typer

from cqrs_decor._text import counted
from cqrs_decor.app import App
from cqrs_decor.cli.answers import Answer, exit_code_of, finding_document
from cqrs_decor.cli.location import find_app
from cqrs_decor.cli.options import AppOption, JsonOption
from cqrs_decor.cli.screen import listed
from cqrs_decor.errors import UnsupportedError
from cqrs_decor.parts import open_store
from cqrs_decor.store import SchemaAdmin

verbs = typer.Typer(help="Look at the library's own tables in the app's database, and create or change them.")


@verbs.command("plan")
def plan(app: AppOption = None, json: JsonOption = False) -> Answer:
    """Print the SQL that `upgrade` would run, and nothing else: pipe it into a migration. Changes nothing."""
    found = find_app(app)
    return anyio.run(_plan, found)


@verbs.command("upgrade")
def upgrade(app: AppOption = None, json: JsonOption = False) -> Answer:
    """Create or change what is missing. Safe to run twice, and side by side; drops nothing."""
    found = find_app(app)
    return anyio.run(_upgrade, found)


@verbs.command("check")
def check(app: AppOption = None, json: JsonOption = False) -> Answer:
    """Compare the tables in the database with what is needed; exits with 1 when they differ."""
    found = find_app(app)
    return anyio.run(_check, found)


async def _plan(app: App) -> Answer:
    async with _schema(app) as (name, schema):
        statements = list(await schema.plan())
    return Answer(
        document={"database": name, "statements": statements},
        page="".join(f"{statement.rstrip().rstrip(';')};\n\n" for statement in statements),
        note="" if statements else f"Nothing to do: {name} has every table.",
    )


async def _upgrade(app: App) -> Answer:
    async with _schema(app) as (name, schema):
        statements = list(await schema.upgrade())
    done = f"{counted(len(statements), 'statement')} run in {name}." if statements else f"{name} was up to date."
    return Answer(document={"database": name, "statements": statements}, page=f"{done}\n")


async def _check(app: App) -> Answer:
    async with _schema(app) as (name, schema):
        findings = list(await schema.check())
    return Answer(
        document={"database": name, "findings": [finding_document(finding) for finding in findings]},
        page=listed(findings),
        exit_code=exit_code_of(findings),
    )


@asynccontextmanager
async def _schema(app: App) -> AsyncGenerator[tuple[str, SchemaAdmin], None]:
    """The tables of the app's store, which is not opened: opening may already refuse what is to be mended here."""
    store = open_store(app.configuration.database)
    if store.schema is None:
        raise UnsupportedError(
            f"The store {store.name}",
            "be planned, upgraded or checked: it has no tables",
            'name a database: bootstrap(database="sqlite+aiosqlite:///app.db") or CQRS_DECOR_DATABASE',
        )
    try:
        yield store.name, store.schema
    finally:
        with anyio.CancelScope(shield=True):
            await store.close()
