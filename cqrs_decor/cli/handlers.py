"""`cqrs-decor handlers`: what the app would run, and for which message."""

from dataclasses import dataclass
from typing import Annotated, Any

import anyio
import typer
from rich.console import Group, RenderableType
from rich.text import Text

from cqrs_decor.app import App
from cqrs_decor.assembly import Parts
from cqrs_decor.cli.answers import Answer, finding_document
from cqrs_decor.cli.exits import FINDINGS, OK
from cqrs_decor.cli.listing import Listing
from cqrs_decor.cli.location import find_app
from cqrs_decor.cli.options import AppOption, JsonOption
from cqrs_decor.cli.screen import listed
from cqrs_decor.findings import Finding
from cqrs_decor.handlers import HandlerSpec
from cqrs_decor.messages import message_spec
from cqrs_decor.pipeline import Plan

_COLUMNS = ("kind", "message", "handler", "place", "topic", "consumer", "stages")


@dataclass(frozen=True, slots=True, kw_only=True)
class HandlerLine:
    """One handler of one message; `source` only where it was asked for."""

    kind: str
    message: str
    handler: str
    place: str
    topic: str | None
    consumer: str | None
    stages: tuple[str, ...]
    source: str | None = None

    def document(self) -> dict[str, Any]:
        names = ("kind", "message", "handler", "place", "topic", "consumer", "stages", "source")
        return {name: getattr(self, name) for name in names if name != "source" or self.source is not None}

    def cells(self) -> tuple[str, ...]:
        """Stages as they are run, the outermost first."""
        place = self.place.rpartition("(")[2].rstrip(")")
        return (
            self.kind,
            self.message,
            self.handler,
            place,
            self.topic or "",
            self.consumer or "",
            " > ".join(self.stages),
        )


def handlers(
    app: AppOption = None,
    json: JsonOption = False,
    source: Annotated[
        bool, typer.Option("--source", help="Show the compiled call of each; app-scoped dependencies are made for it.")
    ] = False,
) -> Answer:
    """List the handlers: kind, message, place, topic, consumer and the stages around each.

    Connects to nothing. Exits with 1 when something is wrong with them (see `cqrs-decor doctor`).
    """
    found = find_app(app)
    parts = found.parts()
    if source:
        lines = [_of_plan(plan, found) for plan in anyio.run(found.compiled)]
    else:
        lines = _of_parts(found, parts)
    every = sorted((line for some in lines for line in some), key=lambda line: (line.kind, line.message, line.handler))
    faults = [Finding.from_error(fault) for fault in parts.faults]
    return Answer(
        document={
            "handlers": [line.document() for line in every],
            "errors": [finding_document(fault) for fault in faults],
        },
        page=_page(every, faults),
        exit_code=FINDINGS if faults else OK,
    )


def _of_parts(app: App, parts: Parts) -> list[list[HandlerLine]]:
    return [_lines(app, spec, stages) for spec, stages in app.stages(parts)]


def _of_plan(plan: Plan, app: App) -> list[HandlerLine]:
    return _lines(app, plan.spec, plan.order, plan.source)


def _lines(app: App, spec: HandlerSpec, stages: tuple[str, ...], source: str | None = None) -> list[HandlerLine]:
    return [_line(app, spec, message_type, stages, source) for message_type in spec.message_types]


def _line(
    app: App, spec: HandlerSpec, message_type: type[Any], stages: tuple[str, ...], source: str | None
) -> HandlerLine:
    message = message_spec(message_type)
    return HandlerLine(
        kind=spec.kind if spec.kind != "event" else message.kind,
        message=message.name,
        handler=spec.name,
        place=spec.where,
        topic=message.topic,
        consumer=f"{app.service}.{spec.name}" if message.leaves_the_process else None,
        stages=stages,
        source=source,
    )


def _page(lines: list[HandlerLine], faults: list[Finding]) -> RenderableType:
    parts: list[RenderableType] = []
    if any(line.source for line in lines):
        for line in lines:
            parts += [Text(f"# {line.kind} {line.message}: {line.place}", style="bold"), Text(line.source or ""), ""]
    else:
        parts.append(Listing(_COLUMNS, [line.cells() for line in lines], empty="The app has no handlers."))
    if faults:
        parts += [Text(""), listed(faults)]
    return Group(*parts)
