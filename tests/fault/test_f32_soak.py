"""F32: a random mix of faults for as long as MINUTES says, on processes that go on and are started again.

make soak MINUTES=30 SEED=7
"""

import os
import time
from collections.abc import Awaitable, Callable, Mapping

import anyio
import pytest

from tests.fault.processes import Victim, until
from tests.fault.proxy import Proxy
from tests.fault.setups import wide
from tests.fault.world import World

MINUTES = float(os.environ.get("MINUTES", "0.3"))
AFTER_EACH = 15
"""So many entries must be handled after each fault: nothing is broken for good."""


@pytest.mark.long
@pytest.mark.timeout(MINUTES * 60 * 2 + 240, func_only=True)
@pytest.mark.parametrize("world", ["postgres-kafka", *wide("postgres-log", "mariadb-log")], indirect=True)
async def test_nothing_is_lost_doubled_or_stranded_whatever_happens_when(world: World) -> None:
    """What one fault leaves behind may be what the next one breaks. The seed says which come, and when."""
    soak = Soak(world)
    await soak.begin()
    ends_at = time.monotonic() + MINUTES * 60
    while time.monotonic() < ends_at:
        await soak.goes_on()
        await soak.strike()

    await soak.end()
    await world.check()
    soak.was_visible()


class Soak:
    """The processes of a soak, and what may happen to them. Two of them die, stop and freeze; the steady one only loses
    whom it speaks to, and must neither grow over that (I8) nor keep it to itself (I9).
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._database = world.proxy_to_database()
        self._broker: Proxy | None = None if world.setup.kafka is None else world.proxy_to_broker()
        self._steady = world.start("all")
        self._running: list[Victim] = []
        self._sender: Victim | None = None
        self._faults: Mapping[str, Callable[[], Awaitable[None]]] = {
            "kill": self._kill,
            "stop": self._stop,
            "freeze": self._freeze,
            "database cut": self._cut_database,
            "database away": self._refuse_database,
            "database silent": self._silence_database,
            "database killed": self._kill_database,
            **(self._faults_of_the_broker() if self._broker else {}),
        }

    async def begin(self) -> None:
        self._running = [self._world.start("all"), self._world.start("all")]
        for victim in [self._steady, *self._running]:
            await victim.says("started")
        await self.keep_sending()
        await self._world.handles(AFTER_EACH * 10)
        await self._world.watch(self._steady)

    async def goes_on(self) -> None:
        """Wait for some effects more. A sender may be at its end: entries that it could not write are gone."""
        wanted = len(await self._world.ledger.effects()) + AFTER_EACH

        async def there() -> bool:
            await self.keep_sending()
            return len(await self._world.ledger.effects()) >= wanted

        await until(there, f"{wanted} entries were handled", 90, self._world.logs)

    async def keep_sending(self) -> None:
        """A sender ends when it has written its entries; then comes the next one."""
        if self._sender is not None and self._sender.is_alive:
            return
        if self._sender is not None:
            await self._sender.ends_well()
        self._sender = self._world.start_sending(400, pause_s=0.05)
        await self._sender.says("committed")

    async def strike(self) -> None:
        """One fault, from beginning to end."""
        name = self._world.chance.choice(sorted(self._faults))
        await self._world.has_work_in_hand()
        await self._faults[name]()
        self._world.fault_is_over()

    async def end(self) -> None:
        self._database.heal()
        if self._broker is not None:
            self._broker.heal()
        if self._sender is not None:
            await self._sender.ends_well(limit_s=120)
        await self._world.quiet_or_stuck()
        assert all(each.is_alive for each in [self._steady, *self._running]), "a process ended by itself"

    def was_visible(self) -> None:
        if any(blow.what.startswith(("database", "broker")) for blow in self._world.course.blows):
            self._world.shows(self._steady, "ConnectionChanged", "connection_lost", up=False)
            self._world.shows(self._steady, "ConnectionChanged", "connection_back", up=True)

    def _one(self) -> int:
        return self._world.chance.randrange(len(self._running))

    async def _kill(self) -> None:
        chosen = self._one()
        self._world.kill(self._running[chosen])
        await self._start_again(chosen)

    async def _stop(self) -> None:
        chosen = self._one()
        await self._world.stop(self._running[chosen])
        await self._start_again(chosen)

    async def _start_again(self, place: int) -> None:
        """A process that cannot reach its database when it starts ends with that error, as it should: so it is waited
        for, and the next fault meets one that runs.
        """
        self._running[place] = self._world.start("all")
        await self._running[place].says("started")

    async def _freeze(self) -> None:
        victim = self._running[self._one()]
        await self._world.freeze(victim)
        await anyio.sleep(self._some_seconds())
        victim.resume()

    async def _cut_database(self) -> None:
        self._world.deal("database cut", cuts_off=3)
        self._database.cut()

    async def _refuse_database(self) -> None:
        await self._for_a_while("database away", self._database, self._database.refuse)

    async def _silence_database(self) -> None:
        await self._for_a_while("database silent", self._database, self._database.half_open)

    async def _kill_database(self) -> None:
        await self._world.kill_database()
        await anyio.sleep(self._some_seconds() / 2)
        await self._world.start_database()

    def _faults_of_the_broker(self) -> Mapping[str, Callable[[], Awaitable[None]]]:
        broker = self._broker
        assert broker is not None

        async def cut() -> None:
            self._world.deal("broker cut", cuts_off=3)
            broker.cut()

        async def silent() -> None:
            await self._for_a_while("broker silent", broker, broker.half_open)

        async def lost() -> None:
            await self._for_a_while("acknowledgements lost", broker, broker.lose_replies)

        async def killed() -> None:
            await self._world.kill_broker()
            await self._world.start_broker()

        return {"broker cut": cut, "broker silent": silent, "acknowledgements lost": lost, "broker killed": killed}

    async def _for_a_while(self, what: str, proxy: Proxy, misbehave: Callable[[], None]) -> None:
        self._world.deal(what, cuts_off=3)
        misbehave()
        await anyio.sleep(self._some_seconds())
        proxy.heal()

    def _some_seconds(self) -> float:
        return self._world.chance.uniform(1.0, 4.0)
