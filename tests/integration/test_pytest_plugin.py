"""The fixture `cqrs_app` under each plugin for asynchronous tests, and the flag that runs tests on real parts."""

import pytest

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.feature("U3")

SHOP = """
from cqrs_decor import Command, IntegrationEvent, Registry, bootstrap, emit

class PlaceOrder(Command[int]):
    sku: str

class OrderPlaced(IntegrationEvent, topic="orders", key="sku", name="plugin.order-placed"):
    sku: str

sales = Registry("sales")
seen = []

@sales.command_handler
async def place_order(command: PlaceOrder) -> int:
    emit(OrderPlaced(sku=command.sku))
    return 1

@sales.event_handler
async def bill(event: OrderPlaced) -> None:
    seen.append(event.sku)

cqrs = bootstrap(registry=sales, discover=False, service="shop", broker="memory://")
"""

TEST = """
import pytest
import shop
{imports}

{mark}
async def test_an_order(cqrs_app):
    async with cqrs_app(shop.cqrs) as app:
        assert await app.send(shop.PlaceOrder(sku="tea")) == 1
        assert app.published.one(shop.OrderPlaced).sku == "tea"
        assert (await app.drain()).handled == 1
        assert await app.deliver(shop.OrderPlaced(sku="milk"), message_id="1") == 1
        assert await app.deliver(shop.OrderPlaced(sku="milk"), message_id="1") == 0
    assert shop.seen == ["tea", "milk"]
{more}
"""

IN_AN_ASYNC_FIXTURE = """
{decorator}
async def running(cqrs_app):
    async with cqrs_app(shop.cqrs) as app:
        yield app

{mark}
async def test_in_a_fixture(running):
    await running.send(shop.PlaceOrder(sku="tea"))
    running.published.one(shop.OrderPlaced)
    await running.drain()
"""


def write(pytester: pytest.Pytester, *, imports: str = "", mark: str = "", decorator: str = "") -> None:
    more = IN_AN_ASYNC_FIXTURE.format(mark=mark, decorator=decorator)
    pytester.makepyfile(shop=SHOP, test_shop=TEST.format(imports=imports, mark=mark, more=more))


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    asyncio = () if "no:asyncio" in arguments else ("-o", "asyncio_default_fixture_loop_scope=function")
    return pytester.runpytest_subprocess("-W", "error", *asyncio, *arguments, timeout=120)


def test_it_works_under_pytest_asyncio_in_auto_mode(pytester: pytest.Pytester) -> None:
    """The mode most new projects choose."""
    write(pytester, decorator="@pytest.fixture")

    run(pytester, "-o", "asyncio_mode=auto", "-p", "no:anyio").assert_outcomes(passed=2)


def test_it_works_under_pytest_asyncio_in_strict_mode(pytester: pytest.Pytester) -> None:
    """The default: an async fixture of ours would not be awaited there, so ours is a plain one."""
    write(
        pytester,
        imports="import pytest_asyncio",
        mark="@pytest.mark.asyncio",
        decorator="@pytest_asyncio.fixture",
    )

    run(pytester, "-o", "asyncio_mode=strict", "-p", "no:anyio").assert_outcomes(passed=2)


def test_it_works_under_the_plugin_of_anyio(pytester: pytest.Pytester) -> None:
    """The one that comes with a library that everybody has installed."""
    write(
        pytester,
        imports="@pytest.fixture\ndef anyio_backend():\n    return 'asyncio'",
        mark="@pytest.mark.anyio",
        decorator="@pytest.fixture",
    )

    run(pytester, "-p", "no:asyncio").assert_outcomes(passed=2)


def test_it_works_without_any_plugin(pytester: pytest.Pytester) -> None:
    """A plain test function with a loop of its own."""
    body = """
import asyncio
import shop

def test_an_order(cqrs_app):
    async def main():
        async with cqrs_app(shop.cqrs) as app:
            await app.send(shop.PlaceOrder(sku="tea"))
            app.published.one(shop.OrderPlaced)
    asyncio.run(main())
"""
    pytester.makepyfile(shop=SHOP, test_shop=body)

    run(pytester, "-p", "no:asyncio", "-p", "no:anyio").assert_outcomes(passed=1)


REAL = '''
import shop
from cqrs_decor.memory import MemoryBroker, MemoryStore

class NamedBroker(MemoryBroker):
    """The one that the app names."""

class NamedStore(MemoryStore):
    """The one that the app names."""

real = shop.cqrs.configured(broker=NamedBroker(), database=NamedStore())

async def test_an_order(cqrs_app):
    async with cqrs_app(real, broker=MemoryBroker()) as app:
        await app.send(shop.PlaceOrder(sku="tea"))
        await app.drain()
        app.published.one(shop.OrderPlaced)
        print("parts:", type(app.broker).__name__, type(app.store).__name__, type(app.clock).__name__)
'''


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((), "parts: MemoryBroker MemoryStore FakeClock"),
        (("--cqrs-decor-real",), "parts: NamedBroker NamedStore SystemClock"),
        (("-o", "cqrs_decor_real=true"), "parts: NamedBroker NamedStore SystemClock"),
        (("-o", "cqrs_decor_real=false"), "parts: MemoryBroker MemoryStore FakeClock"),
    ],
)
def test_the_flag_runs_the_same_tests_on_the_parts_that_the_app_names(
    pytester: pytest.Pytester, arguments: tuple[str, ...], parts: str
) -> None:
    """A nightly run on real servers needs no second suite."""
    pytester.makepyfile(shop=SHOP, test_shop=REAL)

    result = run(pytester, "-s", "-o", "asyncio_mode=auto", *arguments)

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines([f"*{parts}"])


def test_what_was_on_the_real_parts_before_is_not_of_this_test(pytester: pytest.Pytester) -> None:
    """A database that other tests have used holds their rows."""
    body = """
import shop
from cqrs_decor.memory import MemoryStore
from cqrs_decor.testing import NotPublishedError

real = shop.cqrs.configured(database=MemoryStore())

async def test_an_order(cqrs_app):
    for sku in ("tea", "milk"):
        async with cqrs_app(real) as app:
            await app.send(shop.PlaceOrder(sku=sku))
            assert app.published.one(shop.OrderPlaced).sku == sku
"""
    pytester.makepyfile(shop=SHOP, test_shop=body)

    run(pytester, "-o", "asyncio_mode=auto", "--cqrs-decor-real").assert_outcomes(passed=1)


def test_a_failing_test_shows_the_handlers_own_line(pytester: pytest.Pytester) -> None:
    """Parked is what happened; why is what its author needs."""
    body = """
import shop

@shop.sales.event_handler
async def mail(event: shop.OrderPlaced) -> None:
    raise ZeroDivisionError("no postage")

async def test_an_order(cqrs_app):
    async with cqrs_app(shop.cqrs) as app:
        await app.deliver(shop.OrderPlaced(sku="tea"))
"""
    pytester.makepyfile(shop=SHOP, test_shop=body)

    result = run(pytester, "-o", "asyncio_mode=auto")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*raise ZeroDivisionError(*", "*ParkedError: Parked: 1.*"])


def test_the_plugin_loads_no_other_plugin_of_ours(pytester: pytest.Pytester) -> None:
    """It is part of every pytest run of everybody who has the library installed."""
    pytester.makepyfile(
        """
        import sys

        def test_nothing():
            assert "cqrs_decor.testing.pytest_plugin" in sys.modules
            heavy = ("sqlalchemy", "aiokafka", "pydantic_settings", "typer", "cqrs_decor_", "cqrs_decor.testing.conf")
            assert [name for name in sys.modules if name.startswith(heavy)] == []
        """
    )

    run(pytester).assert_outcomes(passed=1)
