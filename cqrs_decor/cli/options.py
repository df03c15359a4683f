"""Options that several verbs have."""

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
IdOption = Annotated[list[int] | None, typer.Option("--id", metavar="ID", help="Only this one; can be repeated.")]
LimitOption = Annotated[int, typer.Option("--limit", min=1, metavar="NUMBER", help="At most so many.")]
IdsArgument = Annotated[list[int], typer.Argument(metavar="ID...", help="Ids, as `list` shows them.")]
OptionalIdsArgument = Annotated[
    list[int] | None, typer.Argument(metavar="[ID]...", help="Ids, as `list` shows them; or a filter and --all.")
]
BodyOption = Annotated[bool, typer.Option("--body", help="Show the body too; it may hold personal data.")]
AllOption = Annotated[bool, typer.Option("--all", help="Everything that the filter matches.")]
WhoOption = Annotated[
    str | None, typer.Option("--who", metavar="NAME", help="Who is recorded to have done it; the OS user otherwise.")
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


class OutboxState(StrEnum):
    PENDING = "pending"
    RESCHEDULED = "rescheduled"
    HELD = "held"
    PARKED = "parked"


class InboxState(StrEnum):
    PARKED = "parked"
    RETRY_REQUESTED = "retry-requested"


OutboxStateOption = Annotated[OutboxState | None, typer.Option("--state", help="Only those in this state.")]
InboxStateOption = Annotated[InboxState | None, typer.Option("--state", help="Only those in this state.")]
