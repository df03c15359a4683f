"""Seeds that once found something, each with what it found: they are run for ever."""

FOUND: dict[int, str] = {}
"""By seed, with the messages of `MESSAGES`."""

MESSAGES = 5_000

ALWAYS = (1, 2, 3)
"""Run with every change, whether they ever found anything or not."""
