"""The pytest plugin: the fixture `cqrs_app`. Loaded by every pytest run, so it imports the harness only when asked."""

from typing import Any

import pytest

_REAL = "cqrs_decor_real"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("cqrs_decor").addoption(
        "--cqrs-decor-real",
        dest=_REAL,
        action="store_true",
        default=None,
        help="run apps under test on the broker and the database that they name, instead of temporary ones",
    )
    parser.addini(_REAL, "as --cqrs-decor-real", type="bool", default=False)


@pytest.fixture
def cqrs_app(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Opens an app for a test: `async with cqrs_app(shop.cqrs, overrides={...}) as app:`; see `OpenApp`.

    A plain fixture, so that it works with any plugin for asynchronous tests.
    """
    from cqrs_decor.testing.harness import open_app_with

    real = request.config.getoption(_REAL) or request.config.getini(_REAL)
    return open_app_with(lambda: tmp_path_factory.mktemp("cqrs_decor"), real=bool(real))
