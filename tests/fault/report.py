"""What each run came to, as lines of JSON: what the page of a long run is drawn from."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.fault.nursery import ROOT
from tests.fault.world import World

FACTS = Path(os.environ.get("FAULT_FACTS") or ROOT / ".cache" / "fault" / "facts.jsonl")
"""Every run appends a line; `make fault` begins with an empty file."""


def note(world: World, scenario: tuple[str, str, bool], *, failed: str | None) -> None:
    number, name, negative_control = scenario
    course = world.course
    _append(
        {
            "fault": number,
            "scenario": name,
            "negative_control": negative_control,
            "setup": world.setup.name,
            "seed": world.setup.seed,
            "failed": failed,
            "violations": course.violations,
            "blows": [{**asdict(blow), "at": blow.at - course.began} for blow in course.blows],
            "recovery_s": course.recovery_s,
            "committed": course.committed,
            "delivered": course.delivered,
            "samples": [
                [round(sample.at - course.began, 2), sample.pending, sample.delivered]
                for sample in world.sampler.samples
            ],
        }
    )


def _append(facts: dict[str, Any]) -> None:
    FACTS.parent.mkdir(parents=True, exist_ok=True)
    with FACTS.open("a") as file:
        file.write(json.dumps(facts) + "\n")
