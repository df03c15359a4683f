"""Options that several verbs have."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

import typer

from cqrs_decor.cli.errors import APP_VARIABLE

AppOption = Annotated[
    str | None,
    typer.Option("--app", metavar="MODULE:ATTRIBUTE", help=f"Where the app is; {APP_VARIABLE} otherwise."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, errors as well.")]
TimeoutOption = Annotated[
    float, typer.Option("--timeout-s", min=0.1, metavar="SECONDS", help="How long a part may take to answer.")
]

TopicOption = Annotated[str | None, typer.Option("--topic", metavar="NAME", help="Only those of this topic.")]
KeyOption = Annotated[str | None, typer.Option("--key", metavar="KEY", help="Only those with this partition key.")]
ConsumerOption = Annotated[
    str | None, typer.Option("--consumer", metavar="NAME", help="Only those of this consumer: service.handler.")
]
ErrorOption = Annotated[
    str | None, typer.Option("--error", metavar="TEXT", help="Only those with this in the text of their error.")
]
OlderThanOption = Annotated[
    str | None,
    typer.Option("--older-than", metavar="AGE", help="Only those from longer ago: 90s, 30m, 2h, 7d, 1h30m."),
]
AfterOption = Annotated[
    int, typer.Option("--after", min=0, metavar="ID", help="Only those with a higher id: where the last run stopped.")
]
IdOption = Annotated[list[int] | None, typer.Option("--id", metavar="ID", help="Only this one; can be repeated.")]
LimitOption = Annotated[int, typer.Option("--limit", min=1, metavar="NUMBER", help="At most so many.")]
IdsArgument = Annotated[list[int], typer.Argument(metavar="ID...", help="Ids, as `list` shows them.")]
OptionalIdsArgument = Annotated[
    list[int] | None, typer.Argument(metavar="[ID]...", help="Ids, as `list` shows them; or a filter; or --all.")
]
BodyOption = Annotated[bool, typer.Option("--body", help="Show the body too; it may hold personal data.")]
AllOption = Annotated[bool, typer.Option("--all", help="Everything; where a filter is given, all that it matches.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
MaxRetriesOption = Annotated[
    int,
    typer.Option(
        "--max-retries",
        min=1,
        metavar="NUMBER",
        help="Leave alone what has failed again after so many retries; ids that are named are always retried.",
    ),
]
WhoOption = Annotated[
    str | None, typer.Option("--who", metavar="NAME", help="Who is recorded to have done it; user@host otherwise.")
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


class OutboxState(StrEnum):
    PENDING = "pending"
    RESCHEDULED = "rescheduled"
    HELD = "held"
    PARKED = "parked"
    DELIVERED = "delivered"


class InboxState(StrEnum):
    PARKED = "parked"
    HELD = "held"
    RETRY_REQUESTED = "retry-requested"


OutboxStateOption = Annotated[OutboxState | None, typer.Option("--state", help="Only those in this state.")]
InboxStateOption = Annotated[InboxState | None, typer.Option("--state", help="Only those in this state.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """What narrows, for every kind of record."""

    topic: TopicOption = None
    key: KeyOption = None
    error: ErrorOption = None
    older_than: OlderThanOption = None
    after: AfterOption = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """How a change is made."""

    everything: AllOption = False
    dry_run: DryRunOption = False
    who: WhoOption = None
    yes: YesOption = False
    json: JsonOption = False
