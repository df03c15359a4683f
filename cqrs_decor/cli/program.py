"""The command line as a whole: its verbs, those of plugins, and what becomes of whatever they return or raise."""

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup

from cqrs_decor import __version__
from cqrs_decor.cli import db, doctor, exits, handlers, inbox, outbox, plugins, run, topics
from cqrs_decor.cli.answers import Answer
from cqrs_decor.cli.errors import CommandLineError
from cqrs_decor.cli.screen import Screen
from cqrs_decor.discovery import COMMANDS, installed, load_plugin
from cqrs_decor.errors import CqrsDecorError, StartupError
from cqrs_decor.findings import Finding

_NAME = "cqrs-decor"

ParserError: type[Exception] = typer.BadParameter.__mro__[2]
"""What the parser raises for a wrong command line: `ClickException`, which each version of typer has elsewhere."""


class Verbs(TyperGroup):
    """Our verbs and those of plugins, which are loaded only when they are asked for or listed."""

    def list_commands(self, ctx: Any) -> list[str]:
        ours = super().list_commands(ctx)
        return [*ours, *sorted({point.name for point in installed(COMMANDS)} - set(ours))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        ours = super().get_command(ctx, cmd_name)
        if ours is not None or cmd_name not in {point.name for point in installed(COMMANDS)}:
            return ours
        try:
            return _command(load_plugin(COMMANDS, cmd_name), cmd_name)
        except CqrsDecorError as error:
            return _command(_raising(error), cmd_name)


program = typer.Typer(cls=Verbs, name=_NAME, pretty_exceptions_enable=False, rich_markup_mode=None)
program.command("run")(run.run)
program.command("doctor")(doctor.doctor)
program.command("handlers")(handlers.handlers)
program.command("plugins")(plugins.plugins)
program.add_typer(topics.verbs, name="topics")
program.add_typer(db.verbs, name="db")
program.add_typer(outbox.verbs, name="outbox")
program.add_typer(inbox.verbs, name="inbox")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"{_NAME} {__version__}")
        raise typer.Exit(exits.OK)


@program.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version.")
    ] = False,
) -> None:
    """Run and look after an app of cqrs_decor. Exit codes: 0 done; 1 a check found errors, or nothing matched; 2 wrong
    usage, declaration or configuration; 3 database or broker not ready; 70 unexpected error."""


def perform(arguments: list[str]) -> int:
    """Run one command line: show what its verb returns, draw what it raises; returns the exit code."""
    screen = Screen(json="--json" in arguments)
    try:
        return _conclude(_call(arguments or ["--help"]), screen)
    except ParserError as error:
        _show_usage(error, screen)
        return exits.USAGE
    except StartupError as error:
        screen.show_errors([Finding.from_error(fault) for fault in _flat(error)], title=error.message)
        return exits.USAGE
    except CqrsDecorError as error:
        screen.show_errors([Finding.from_error(error)])
        return exits.of_error(error)
    except (KeyboardInterrupt, typer.Abort):
        return exits.INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that nothing complains when Python ends
        return exits.OK
    except Exception as error:  # the user's own hooks and factories may raise anything: shown whole
        _show_fault(error, screen)
        return exits.FAULT


def _call(arguments: list[str]) -> Any:
    command = typer.main.get_command(program)
    return command.main(arguments, prog_name=_NAME, standalone_mode=False)


def _conclude(outcome: Any, screen: Screen) -> int:
    """A verb of ours returns an Answer; one of a plugin's may also return an exit code, or nothing."""
    if isinstance(outcome, Answer):
        screen.show(outcome)
        sys.stdout.flush()
        return outcome.exit_code
    return outcome if isinstance(outcome, int) else exits.OK


def _show_usage(error: Exception, screen: Screen) -> None:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else _NAME
    text = " ".join(str(cast(Any, error).format_message()).split())
    screen.show_errors([Finding.from_error(CommandLineError(text, fix=f"see `{path} --help`"))])


def _flat(group: ExceptionGroup[CqrsDecorError]) -> list[CqrsDecorError]:
    """Every error of a group and of the groups in it."""
    inner = [_flat(error) if isinstance(error, ExceptionGroup) else [error] for error in group.exceptions]
    return [error for some in inner for error in some]


def _show_fault(error: Exception, screen: Screen) -> None:
    fault = Finding(code="", severity="error", problem=f"{type(error).__name__}: {error}")
    if screen.json:
        screen.show_errors([fault])
    shown = traceback.TracebackException.from_exception(error)
    shown.stack[:] = [frame for frame in shown.stack if not _is_machinery(frame.filename)]
    sys.stderr.write("".join(shown.format()))


def _is_machinery(filename: str) -> bool:
    """Lines between the shell and the verb, which say nothing about a fault."""
    return filename == __file__ or Path(filename).is_relative_to(Path(typer.__file__).parent)


def _command(loaded: Any, name: str) -> Any:
    """What a plugin offers as a command: a `typer.Typer` or a function; anything else is taken for a command itself."""
    if isinstance(loaded, typer.Typer):
        return typer.main.get_command(loaded)
    if hasattr(loaded, "make_context"):
        return loaded
    single = typer.Typer(pretty_exceptions_enable=False)
    single.command(name)(loaded)
    return typer.main.get_command(single)


def _raising(error: CqrsDecorError) -> Any:
    def cannot_be_loaded() -> None:
        raise error

    cannot_be_loaded.__doc__ = f"(cannot be loaded: {error.problem})"
    return cannot_be_loaded
