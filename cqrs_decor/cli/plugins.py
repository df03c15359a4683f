"""`cqrs-decor plugins`: what is installed beside the library, and whether it loads."""

from collections import Counter
from dataclasses import asdict, dataclass

from cqrs_decor.cli.answers import Answer
from cqrs_decor.cli.exits import FINDINGS, OK
from cqrs_decor.cli.listing import Listing
from cqrs_decor.cli.options import JsonOption
from cqrs_decor.discovery import BROKERS, COMMANDS, HANDLERS, OBSERVERS, STORES, EntryPoint, installed

_KINDS = {
    BROKERS: "broker",
    STORES: "store",
    "cqrs_decor.codecs": "codec",
    "cqrs_decor.containers": "container",
    OBSERVERS: "observer",
    "cqrs_decor.middleware": "middleware",
    COMMANDS: "command",
    HANDLERS: "handlers",
}
_UNIQUE = (BROKERS, STORES, COMMANDS)
"""Groups in which a name is looked up: two distributions that claim it are in conflict."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugin:
    """One entry point. `state` is loads, broken or conflict; `problem` says why."""

    kind: str
    name: str
    distribution: str
    version: str
    state: str
    target: str
    problem: str

    def cells(self) -> tuple[str, ...]:
        return (self.kind, self.name, self.state, self.distribution, self.version, self.problem or self.target)


def plugins(json: JsonOption = False) -> Answer:
    """List every installed plugin with its distribution and version, and whether it loads.

    Exits with 1 when one of them is broken, or two claim one name.
    """
    found = [_plugin(group, point) for group in _KINDS for point in _sorted(group)]
    return Answer(
        document={"plugins": [asdict(plugin) for plugin in found]},
        page=Listing(
            ("kind", "name", "state", "distribution", "version", "target or problem"),
            [plugin.cells() for plugin in found],
            empty="No plugin is installed.",
        ),
        exit_code=OK if all(plugin.state == "loads" for plugin in found) else FINDINGS,
    )


def _sorted(group: str) -> list[tuple[EntryPoint, bool]]:
    """Entry points by name, each with whether another one has its name."""
    points = sorted(installed(group), key=lambda point: point.name)
    names = Counter(point.name for point in points)
    return [(point, group in _UNIQUE and names[point.name] > 1) for point in points]


def _plugin(group: str, found: tuple[EntryPoint, bool]) -> Plugin:
    point, in_conflict = found
    problem = _load_problem(point)
    state = "broken" if problem else "conflict" if in_conflict else "loads"
    return Plugin(
        kind=_KINDS[group],
        name=point.name,
        distribution=point.dist.name if point.dist else "?",
        version=point.dist.version if point.dist else "?",
        state=state,
        target=point.value,
        problem=problem or ("another distribution claims this name: uninstall one of them" if in_conflict else ""),
    )


def _load_problem(point: EntryPoint) -> str:
    try:
        point.load()
    except Exception as error:  # a plugin may raise anything while it is imported: that is what is asked for here
        return f"{type(error).__name__}: {error}"
    return ""
