"""Ages as they are written on a command line: `90s`, `30m`, `2h`, `7d`, `1h30m`."""

import re
from datetime import timedelta

from cqrs_decor.cli.errors import CommandLineError

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_PART = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")


def parsed_age(text: str) -> timedelta:
    """
    Raises:
        CommandLineError: It is not an age.
    """
    compact = text.strip().lower()
    if not compact or _PART.sub("", compact):
        raise CommandLineError(f"{text!r} is no age.", fix="write it like 90s, 30m, 2h, 7d or 1h30m")
    parts = {_UNITS[unit]: float(number) for number, unit in _PART.findall(compact)}
    try:
        return timedelta(**parts)
    except OverflowError:
        raise CommandLineError(f"{text!r} is longer than anything lasts.", fix="write it like 7d or 52w") from None
