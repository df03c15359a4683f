"""Tests of applications: the harness behind the fixture `cqrs_app`, and a clock that a test moves.

Faults are in `cqrs_decor.testing.faults`, the kits for plugin authors in `cqrs_decor.testing.conformance`. Each name is
loaded when it is first used: pytest loads the plugin in this package in every run.
"""

from cqrs_decor._lazy import lazily

__getattr__, __all__ = lazily(
    __name__,
    {
        "cqrs_decor.testing.clock": ("FakeClock",),
        "cqrs_decor.testing.failures": ("NoSuchConsumerError", "NotPublishedError", "ParkedError"),
        "cqrs_decor.testing.harness": ("AppUnderTest", "OpenApp"),
        "cqrs_decor.testing.published": ("Published",),
    },
)
