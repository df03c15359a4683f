"""Every exit code of the command line, and which error ends in which."""

import signal
from typing import Final

from cqrs_decor.errors import BrokerError, CqrsDecorError, StoreError, UnknownRecordError

OK: Final = 0
"""Done, and nothing is wrong."""

FINDINGS: Final = 1
"""Done, and the answer is no: a check found an error, nothing matched, or the question was answered with no."""

USAGE: Final = 2
"""Asked, declared or configured in a way that cannot work. Trying again cannot help before somebody changes it."""

NOT_READY: Final = 3
"""The database or the broker cannot be reached or used as it is. Trying again may help."""

FAULT: Final = 70
"""Something raised what nobody expected; its traceback is on standard error."""


def of_signal(number: int) -> int:
    """Left at once because of a signal, by a shell's convention: 130 for SIGINT, 143 for SIGTERM."""
    return 128 + number


INTERRUPTED: Final = of_signal(signal.SIGINT)


def of_error(error: CqrsDecorError) -> int:
    if isinstance(error, UnknownRecordError):
        return FINDINGS
    return NOT_READY if isinstance(error, StoreError | BrokerError) else USAGE
