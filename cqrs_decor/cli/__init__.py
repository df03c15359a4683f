"""The command line `cqrs-decor`. Needs the extra `cli`; importing the library never imports what it stands on."""

import sys
from collections.abc import Sequence

from cqrs_decor.cli.exits import USAGE

_NEEDED = ("typer", "rich")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code (see `cqrs_decor.cli.exits`).

    Args:
        arguments: Those of the process unless given.
    """
    try:
        from cqrs_decor.cli.program import perform  # here, since it needs what may not be installed
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _NEEDED:
            raise
        print("The command line needs more than the library: pip install 'cqrs-decor[cli]'", file=sys.stderr)
        return USAGE
    return perform(sys.argv[1:] if arguments is None else list(arguments))
