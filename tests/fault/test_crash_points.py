"""The places where victims are frozen and killed."""

from pathlib import Path

from sqlalchemy.ext.asyncio import AsyncSession

from cqrs_decor import Command, IntegrationEvent, Registry, bootstrap, emit
from cqrs_decor.crash_points import CRASH_POINTS
from cqrs_decor.testing.faults import recording

registry = Registry("crash points")


class Begin(Command[None]):
    pass


class Begun(IntegrationEvent, topic="crash-points"):
    pass


@registry.command_handler
async def begin(command: Begin, session: AsyncSession) -> None:
    emit(Begun())


@registry.event_handler
async def follow(event: Begun, session: AsyncSession) -> None:
    pass


async def test_every_crash_point_is_passed(tmp_path: Path) -> None:
    """A point that no code reaches would let each test that kills there wait in vain, or prove nothing."""
    app = bootstrap(database=f"sqlite+aiosqlite:///{tmp_path / 'test.db'}", registry=registry, discover=False)
    async with app:
        with recording() as reached:
            await app.send(Begin())
            await app.drain()

    assert set(reached) == set(CRASH_POINTS)
    assert reached[:3] == ["uow.before_commit", "outbox.rows_written", "uow.after_commit"]
