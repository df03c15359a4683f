"""F16: an old message is replayed when the inbox has forgotten it."""

import pytest

from cqrs_decor import Registry, Settings, StartupError, bootstrap
from tests.fault.invariants import InvariantBrokenError
from tests.fault.world import World


async def test_an_app_does_not_start_with_an_inbox_that_forgets_too_soon() -> None:
    """A restored backup or a reset offset brings old messages back: the one thing that knows them must still be there.
    Both numbers are said by the one who runs the app, so that the contradiction can be found before any harm.
    """
    contradiction: dict[str, float] = {"inbox_retention_days": 1, "replay_horizon_days": 14}

    with pytest.raises(StartupError) as refusal:
        await _start(contradiction)
    assert any("the inbox forgets after 1 days" in str(fault) for fault in refusal.value.exceptions)


@pytest.mark.parametrize("world", ["postgres-log"], indirect=True)
async def test_what_the_inbox_remembers_may_be_replayed_as_often_as_one_likes(world: World) -> None:
    """Within the horizon a replay has no second effect."""
    await _handle_and_replay(world)
    await world.quiet()

    await world.check(ordered=False, at_most_repeats=30)


@pytest.mark.negative_control
@pytest.mark.parametrize("world", ["postgres-log"], indirect=True)
async def test_what_the_inbox_has_forgotten_is_found_to_take_effect_twice(world: World) -> None:
    """That is what the refusal protects from."""
    await _handle_and_replay(world, forget=True)
    await world.handles(60)
    await world.quiet()

    with pytest.raises(InvariantBrokenError, match="I3 doubled"):
        await world.check(ordered=False, at_most_repeats=30)


async def _start(settings: dict[str, float]) -> None:
    async with bootstrap(registry=Registry("f16"), discover=False, settings=Settings(**settings)):
        pass


async def _handle_and_replay(world: World, *, forget: bool = False) -> None:
    sender = world.start_sending(30)
    await sender.ends_well()
    async with world.open_broker() as broker:
        envelopes = await world.take_outbox()
        await broker.publish(envelopes)
        world.start("work")
        await world.handles(30)
        if forget:
            await world.ledger.run("DELETE FROM cqrs_inbox")
        await broker.publish(envelopes)
        await world.delivers(60)
