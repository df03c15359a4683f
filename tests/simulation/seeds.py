"""Seeds that found something, each with what it found: they are run for ever.

A seed is one run of one state of the code: a call more, and its run is another one. That is why each fault that was
found here also has a test of its own where it was mended, and these stay as a sample of rough weather.
"""

MESSAGES = 5_000

ALWAYS = (6, 7)
"""Run with every change, though they never found anything."""

FOUND = {
    1: "a suspect whose partition went to another reader while it waited to be alone: the worker's loop failed",
    3: "after the last single step, what waited had been given up: the worker went round for ever without waiting",
}
