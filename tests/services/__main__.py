"""python -m tests.services up|down|env|status|check [postgres] [mariadb] [kafka]"""

import argparse
import sys
from collections.abc import Iterable

from tests.services.kafka import KafkaServer
from tests.services.mariadb import MariaDbServer
from tests.services.postgres import PostgresServer
from tests.services.server import MissingServerError, Server
from tests.services.shared import SERVERS, attach, end_shared, start_shared


def main() -> int:
    arguments = _parser().parse_args()
    kinds = [SERVERS[name] for name in arguments.names or SERVERS]
    try:
        return _VERBS[arguments.verb](kinds)
    except MissingServerError as error:
        print(error, file=sys.stderr)
        return 1


def _up(kinds: Iterable[type[Server]]) -> int:
    for kind in kinds:
        server = start_shared(kind)
        print(f"{kind.name}: 127.0.0.1:{server.port} (pid {server.pid}, {server.directory})")
    return 0


def _down(kinds: Iterable[type[Server]]) -> int:
    for kind in kinds:
        print(f"{kind.name}: {'ended, its data is deleted' if end_shared(kind) else 'was not running'}")
    return 0


def _env(kinds: Iterable[type[Server]]) -> int:
    for server in filter(None, map(attach, kinds)):
        for name, value in _variables(server).items():
            print(f"export {name}={value}")
    return 0


def _status(kinds: Iterable[type[Server]]) -> int:
    for kind in kinds:
        server = attach(kind)
        print(f"{kind.name}: {f'127.0.0.1:{server.port}' if server else 'not running'}")
    return 0


def _check(kinds: Iterable[type[Server]]) -> int:
    """Say what is missing, all at once; fetch what can be fetched without asking."""
    missing = [problem for kind in kinds if (problem := _problem(kind))]
    print(*missing, sep="\n", end="\n" if missing else "", file=sys.stderr)
    return 1 if missing else 0


_VERBS = {"up": _up, "down": _down, "env": _env, "status": _status, "check": _check}


def _variables(server: Server) -> dict[str, str]:
    match server:
        case PostgresServer():
            return {"POSTGRES_URL": server.url()}
        case MariaDbServer():
            return {"MARIADB_URL": server.url()}
        case KafkaServer():
            return {"KAFKA_URL": server.url(), "KAFKA_BOOTSTRAP": server.bootstrap}
        case _:
            raise AssertionError(f"No variables are known for {server.name}.")


def _problem(kind: type[Server]) -> str | None:
    try:
        kind.check_installed()
    except MissingServerError as error:
        return str(error)
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.services", description=__doc__)
    parser.add_argument("verb", choices=sorted(_VERBS))
    parser.add_argument("names", nargs="*", metavar="server", help=f"of {', '.join(SERVERS)}; all when none is named")
    return parser


if __name__ == "__main__":
    sys.exit(main())
