"""What a victim tells the harness while it lives: lines of JSON, its log, and the sink."""

import asyncio
import json
import logging
import os
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from cqrs_decor import Moment
from cqrs_decor.lanes import lane_of
from cqrs_decor.observers import BatchPublished, MessageConsumed, MessageDispatched
from tests.fault.oracle import Sink


def say(**facts: Any) -> None:
    """One write for a line: a kill leaves no half of it."""
    os.write(1, json.dumps(facts).encode() + b"\n")


class SayMoments:
    """All but those that come with each message."""

    def notice(self, moment: Moment) -> None:
        if isinstance(moment, MessageDispatched) or (isinstance(moment, MessageConsumed) and moment.outcome == "done"):
            return
        if isinstance(moment, BatchPublished):
            say(published=moment.delivered)
        say(moment={"name": type(moment).__name__, **asdict(moment)})


class NotesBatches:
    """Notes at the sink which lanes are on their way to the broker, from when to when; says what was called away."""

    def __init__(self, broker: Any, sink: Sink) -> None:
        self._broker = broker
        self._sink = sink

    def __getattr__(self, name: str) -> Any:
        return getattr(self._broker, name)

    async def publish(self, envelopes: Any) -> Any:
        lanes = Counter(lane_of(envelope.topic, envelope.key, envelope.id) for envelope in envelopes)
        with ExitStack() as spans:
            for lane, count in lanes.items():
                spans.enter_context(self._sink.span("publish", str(lane), count))
            try:
                return await self._broker.publish(envelopes)
            except asyncio.CancelledError:
                say(called_away=len(envelopes))
                raise


class WithActions(logging.Formatter):
    """The `action=` that a line of the log carries is what alerts are made of: it must be seen (I9)."""

    def format(self, record: logging.LogRecord) -> str:
        action = getattr(record, "action", None)
        return super().format(record) + (f" action={action}" if action else "")
