"""What can be wrong with a command line itself."""

from collections.abc import Iterable

from cqrs_decor._text import did_you_mean, listed, near_misses
from cqrs_decor.errors import ConfigurationError

APP_VARIABLE = "CQRS_DECOR_APP"


class CommandLineError(ConfigurationError):
    """The command line cannot be followed as it was written."""

    code = "CD710"


class AppNotNamedError(ConfigurationError):
    code = "CD711"

    def __init__(self, given: str | None = None) -> None:
        self.given = given
        said = "No app is named." if not given else f"{given!r} does not name an app."
        super().__init__(
            said, fix=f"write --app module:attribute, e.g. --app shop.main:cqrs, or set {APP_VARIABLE} to it"
        )


class AppModuleError(ConfigurationError):
    code = "CD712"

    def __init__(self, module: str, reason: str, fix: str, *, where: str = "") -> None:
        self.module, self.reason = module, reason
        super().__init__(f"Module {module!r} with the app cannot be imported: {reason}.", where=where, fix=fix)


class AppAttributeError(ConfigurationError):
    code = "CD713"

    def __init__(self, module: str, attribute: str, known: Iterable[str], apps: Iterable[str], where: str) -> None:
        self.module, self.attribute, self.apps = module, attribute, sorted(apps)
        near = did_you_mean(attribute, self.apps) or did_you_mean(attribute, known)
        best = next(iter([*near_misses(attribute, self.apps), *self.apps]), None)
        super().__init__(
            f"Module {module!r} has no {attribute!r}.{near}\nApps in it: {listed(self.apps)}.",
            where=where,
            fix=f"write --app {module}:{best}" if best else "assign what bootstrap(...) returns to it",
        )


class NotAnAppError(ConfigurationError):
    code = "CD714"

    def __init__(self, location: str, found: str, apps: Iterable[str], where: str) -> None:
        self.location, self.found, self.apps = location, found, sorted(apps)
        module = location.partition(":")[0]
        super().__init__(
            f"{location!r} is {found}, not an App.\nApps in that module: {listed(self.apps)}.",
            where=where,
            fix=f"write --app {module}:{self.apps[0]}" if self.apps else "name what bootstrap(...) returned",
        )
