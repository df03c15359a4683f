"""Tests of applications: the harness behind the fixture `cqrs_app`, and a clock that a test moves.

Faults are in `cqrs_decor.testing.faults`, the kits for plugin authors in `cqrs_decor.testing.conformance`.
"""

from cqrs_decor.testing.clock import FakeClock
from cqrs_decor.testing.failures import NoSuchConsumerError, NotPublishedError, ParkedError
from cqrs_decor.testing.harness import AppUnderTest, OpenApp
from cqrs_decor.testing.published import Published

__all__ = [
    "AppUnderTest",
    "FakeClock",
    "NoSuchConsumerError",
    "NotPublishedError",
    "OpenApp",
    "ParkedError",
    "Published",
]
