"""Where the app is found, and what is said when it is not."""

from pathlib import Path

import pytest

from tests.unit.cli.conftest import Cli


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, on the path for as long as the test lasts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_the_app_of_the_environment_is_used(cli: Cli) -> None:
    """A container sets it once for every verb."""
    assert cli("handlers").code == 0


def test_the_option_stands_before_the_environment(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is typed is nearer than what is set."""
    monkeypatch.setenv("CQRS_DECOR_APP", "nowhere:cqrs")

    assert cli("handlers", "--app", "tests.unit.cli.sample:cqrs").code == 0


def test_no_app_is_an_error_that_says_both_ways_to_name_one(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the first thing that a new user meets."""
    monkeypatch.delenv("CQRS_DECOR_APP")

    outcome = cli("doctor")

    assert outcome.code == 2
    assert "CD711  No app is named." in outcome.err
    assert "--app module:attribute" in outcome.err
    assert "CQRS_DECOR_APP" in outcome.err
    assert outcome.out == ""


@pytest.mark.parametrize("location", ["shop", "shop:", ":cqrs", "shop.main.cqrs"])
def test_a_location_without_both_halves_is_refused(cli: Cli, location: str) -> None:
    """It cannot be guessed which part is the module."""
    outcome = cli("doctor", "--app", location)

    assert outcome.code == 2
    assert f"{location!r} does not name an app." in outcome.err


def test_a_missing_module_suggests_the_one_beside_it(cli: Cli, here: Path) -> None:
    """Misspelt is likelier than absent."""
    (here / "cli_shop_one.py").write_text("")

    outcome = cli("doctor", "--app", "cli_shop_onne:cqrs")

    assert outcome.code == 2
    assert "CD712" in outcome.err
    assert "did you mean 'cli_shop_one'" in outcome.err


def test_a_broken_module_shows_its_own_error_and_line(cli: Cli, here: Path) -> None:
    """A missing driver inside it must not look like a missing module."""
    (here / "cli_shop_two.py").write_text("import os\nimport not_installed_anywhere\n")

    outcome = cli("doctor", "--app", "cli_shop_two:cqrs")

    assert outcome.code == 2
    assert "ModuleNotFoundError: No module named 'not_installed_anywhere'" in outcome.err
    assert "cli_shop_two.py:2" in outcome.err


def test_a_syntax_error_is_shown_with_its_line(cli: Cli, here: Path) -> None:
    """Python knows the place, so it is told."""
    (here / "cli_shop_three.py").write_text("x = 1\ndef\n")

    outcome = cli("doctor", "--app", "cli_shop_three:cqrs")

    assert outcome.code == 2
    assert "cli_shop_three.py:2" in outcome.err


def test_a_module_that_exits_is_an_error(cli: Cli, here: Path) -> None:
    """A script without a main guard would otherwise end the command line in silence."""
    (here / "cli_shop_four.py").write_text("raise SystemExit(0)")

    outcome = cli("doctor", "--app", "cli_shop_four:cqrs")

    assert outcome.code == 2
    assert "SystemExit: 0" in outcome.err


def test_an_error_of_the_library_passes_as_it_is(cli: Cli, here: Path) -> None:
    """The module's own bootstrap() already says what is wrong and how to mend it."""
    (here / "cli_shop_five.py").write_text(
        "from cqrs_decor import Settings, bootstrap\ncqrs = bootstrap(settings=Settings(lease_s=0))\n"
    )

    outcome = cli("doctor", "--app", "cli_shop_five:cqrs")

    assert outcome.code == 2
    assert "CD705" in outcome.err


def test_values_of_a_validation_error_are_not_shown(cli: Cli, here: Path) -> None:
    """A module that validates its own settings would leak a password into a log."""
    (here / "cli_shop_six.py").write_text(
        "from pydantic import BaseModel\nclass Own(BaseModel):\n    port: int\nOwn(port='hunter2')\n"
    )

    outcome = cli("doctor", "--app", "cli_shop_six:cqrs")

    assert outcome.code == 2
    assert "ValidationError of Own: port:" in outcome.err
    assert "hunter2" not in outcome.err


def test_a_missing_attribute_names_the_apps_of_the_module(cli: Cli) -> None:
    """The answer can be copied from the error."""
    outcome = cli("doctor", "--app", "tests.unit.cli.sample:cqr")

    assert outcome.code == 2
    assert "CD713" in outcome.err
    assert "Did you mean 'cqrs'?" in outcome.err
    assert "--app tests.unit.cli.sample:cqrs" in outcome.err


@pytest.mark.parametrize(
    ("attribute", "description"),
    [("NOT_AN_APP", "an object of int"), ("PlaceOrder", "the class PlaceOrder"), ("make_app", "the function make_app")],
)
def test_something_that_is_no_app_is_described(cli: Cli, attribute: str, description: str) -> None:
    """`shop:create_app` is what other frameworks take."""
    outcome = cli("doctor", "--app", f"tests.unit.cli.sample:{attribute}")

    assert outcome.code == 2
    assert "CD714" in outcome.err
    assert f"is {description}, not an App" in outcome.err
