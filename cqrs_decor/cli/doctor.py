"""`cqrs-decor doctor`: is everything wired, reachable, current and safe?"""

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import anyio
from rich.console import Group, RenderableType
from rich.text import Text

from cqrs_decor._text import counted
from cqrs_decor.app import App
from cqrs_decor.assembly import Parts
from cqrs_decor.broker import Broker
from cqrs_decor.checks import setting_faults
from cqrs_decor.cli.answers import Answer, exit_code_of, finding_document
from cqrs_decor.cli.configured import Configured, configured
from cqrs_decor.cli.listing import Listing
from cqrs_decor.cli.location import find_app
from cqrs_decor.cli.needed_topics import consumed_topics, emitted_topics
from cqrs_decor.cli.options import AppOption, JsonOption, TimeoutOption
from cqrs_decor.cli.relays import relay_findings
from cqrs_decor.cli.screen import listed
from cqrs_decor.clock import SystemClock
from cqrs_decor.errors import (
    BrokerUnavailableError,
    CqrsDecorError,
    SettingError,
    StoreUnavailableError,
    TopicMissingError,
)
from cqrs_decor.findings import Finding
from cqrs_decor.settings import Settings
from cqrs_decor.store import Store

Check = Callable[[], Awaitable[Sequence[Finding]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """What was found, by subject."""

    settings: list[Configured]
    findings: dict[str, list[Finding]]

    def every(self) -> list[Finding]:
        return [finding for some in self.findings.values() for finding in some]

    def document(self) -> dict[str, Any]:
        counts = Counter(finding.severity for finding in self.every())
        return {
            "findings": [
                {"subject": subject, **finding_document(finding)}
                for subject, findings in self.findings.items()
                for finding in findings
            ],
            "settings": [asdict(setting) for setting in self.settings],
            "summary": {severity: counts[severity] for severity in ("ok", "warning", "error")},
        }

    def page(self) -> RenderableType:
        settings = [(setting.name, setting.value, setting.source) for setting in self.settings]
        parts: list[RenderableType] = [Listing(("setting", "value", "from"), settings, empty="")]
        for subject, findings in self.findings.items():
            if not findings:
                continue
            parts += ["", Text(subject, style="bold"), listed(findings)]
        counts = Counter(finding.severity for finding in self.every())
        return Group(
            *parts,
            "",
            Text(f"{counted(counts['error'], 'error')}, {counted(counts['warning'], 'warning')}, {counts['ok']} ok."),
        )


def doctor(app: AppOption = None, json: JsonOption = False, timeout_s: TimeoutOption = 10.0) -> Answer:
    """Check handlers, settings, database, tables, relays, wake-ups, broker and topics. Starts nothing; exits with 1 on
    errors."""
    found = find_app(app)
    examination = anyio.run(_examine, found, timeout_s)
    return Answer(document=examination.document(), page=examination.page(), exit_code=exit_code_of(examination.every()))


async def _examine(app: App, timeout_s: float) -> Examination:
    parts = app.parts()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(parts.store.close)
        stack.push_async_callback(parts.broker.close)
        return Examination(
            settings=configured(app, parts),
            findings={
                "handlers": _wiring(parts),
                "settings": _setting_findings(app.settings, parts),
                "database": (database := await _database_findings(parts.store, timeout_s)),
                "relays": await _relay_findings(parts.store, app.settings, database, timeout_s),
                "broker": await _broker_findings(parts.broker, parts, timeout_s),
            },
        )


def _wiring(parts: Parts) -> list[Finding]:
    faults = [Finding.from_error(fault) for fault in parts.faults if not isinstance(fault, SettingError)]
    handlers = counted(len(parts.examined.specs()), "handler")
    return faults or [Finding.ok(f"{handlers}, everything they ask for is there")]


def _setting_findings(settings: Settings, parts: Parts) -> list[Finding]:
    """What stops a start is an error; what would stop a process that runs all loops, a warning."""
    errors = [Finding.from_error(fault) for fault in parts.faults if isinstance(fault, SettingError)]
    known = {finding.problem for finding in errors}
    everywhere = [Finding.from_error(fault) for fault in setting_faults(settings, parts.store, "all")]
    warnings = [replace(finding, severity="warning") for finding in everywhere if finding.problem not in known]
    return [*errors, *warnings] or [Finding.ok("nothing contradicts anything else")]


async def _relay_findings(
    store: Store, settings: Settings, database: Sequence[Finding], timeout_s: float
) -> list[Finding]:
    """Asked only where another process could relay, and where the database can be asked at all."""
    if not store.card.shared or any(finding.severity == "error" for finding in database):
        return []
    late = StoreUnavailableError(store.name, f"it did not answer within {timeout_s:g} s")

    async def ask() -> Sequence[Finding]:
        await store.open()
        return await relay_findings(store.outbox, settings, SystemClock())

    return await _asked(ask, timeout_s, late)


async def _database_findings(store: Store, timeout_s: float) -> list[Finding]:
    schema = store.schema
    late = StoreUnavailableError(store.name, f"it did not answer within {timeout_s:g} s")
    findings = await _asked(store.check, timeout_s, late)
    if schema is not None:
        findings += await _asked(schema.check, timeout_s, late)
    return [*_once(findings), *_store_card(store)]


async def _broker_findings(broker: Broker, parts: Parts, timeout_s: float) -> list[Finding]:
    """A topic that is only emitted to stops no start-up, and may be another deployment's to make: a warning."""
    late = BrokerUnavailableError(broker.name, f"it did not answer within {timeout_s:g} s")
    findings = await _asked(lambda: broker.check(consumed_topics(parts)), timeout_s, late)
    if not any(finding.severity == "error" and finding.code != TopicMissingError.code for finding in findings):
        emitted = await _asked(lambda: broker.check(emitted_topics(parts)), timeout_s, late)
        findings += [_milder(finding) for finding in emitted if finding not in findings]
    return [*_once(findings), *_broker_card(broker)]


def _milder(finding: Finding) -> Finding:
    return replace(finding, severity="warning") if finding.code == TopicMissingError.code else finding


async def _asked(check: Check, timeout_s: float, late: CqrsDecorError) -> list[Finding]:
    try:
        with anyio.fail_after(timeout_s):
            return list(await check())
    except TimeoutError:
        return [Finding.from_error(late)]
    except CqrsDecorError as error:
        return [Finding.from_error(error)]


def _once(findings: Sequence[Finding]) -> list[Finding]:
    return list(dict.fromkeys(findings))


def _store_card(store: Store) -> list[Finding]:
    if store.card.durable:
        return [Finding.ok(f"a crash may lose: {store.card.crash_may_lose}")]
    fix = 'name a database: bootstrap(database="sqlite+aiosqlite:///app.db") or CQRS_DECOR_DATABASE'
    return [_lossy(f"{store.name} keeps nothing over the end of the process: {store.card.crash_may_lose}", fix)]


def _broker_card(broker: Broker) -> list[Finding]:
    card = broker.capabilities
    findings = [
        Finding.ok(f"a crash may repeat: {card.crash_may_repeat}"),
        Finding.ok(f"a crash may reorder: {card.crash_may_reorder}"),
    ]
    if card.durable:
        return [Finding.ok(f"a crash may lose: {card.crash_may_lose}"), *findings]
    fix = "leave the broker out, so that the database is the broker, or name a real one"
    return [
        _lossy(f"{broker.name} keeps nothing over the end of the process: {card.crash_may_lose}", fix),
        *findings,
    ]


def _lossy(problem: str, fix: str) -> Finding:
    return Finding(code="CD715", severity="warning", problem=problem, fix=fix)
