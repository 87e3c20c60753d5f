"""The engine in a simulated world: the real shards and gateways, wired as in production, on simulated processes."""

from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Final
from uuid import UUID, uuid4

from actors.bootstrap import Host, RunningShard, keep_synchronised, start_shard
from actors.clock import Clock
from actors.database import ERRORS
from actors.directory import Directory
from actors.journal import Unreadable
from actors.messages import Answer, Payload
from gateway.bootstrap import connect
from gateway.fanout import Fanout
from gateway.router import Router
from gateway.session import Session
from gateway.socket import Sockets
from gateway.tokens import Identity
from tests.simulation.network import SimulatedNetwork
from tests.simulation.observer import ObservedSocket, Observer
from tests.simulation.postgres import SimulatedPostgres
from tests.simulation.world import SECOND_US, Process, World

SHARDS: Final = 2
GATEWAYS: Final = 2
_SECRET: Final = b"the secret of a simulated cluster"
_FAR_MS: Final = 4_000_000_000_000
_RESTART_US: Final = (300_000, 1_200_000)
"""How long it takes until a process that has died is started again."""


class House:
    """Postgres, shards and gateways. What dies is started again, as Ray does."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.postgres = SimulatedPostgres(world)
        self.observer = Observer(world, self.postgres)
        self._lay_out()
        self.shards: list[Process] = []
        """All processes of shards, also those that have died."""
        self.numbers: dict[Process, int] = {}
        """Which shard each of them is for."""
        self.running: dict[Process, RunningShard] = {}
        """Those that serve."""
        self.gateways: list[Gateway] = []
        self._started = 0
        for number in range(SHARDS):
            self.start_shard(number)
        for number in range(GATEWAYS):
            self.start_gateway(number)

    def _lay_out(self) -> None:
        """Deal the slots, as `gavel up` does before anything else."""
        process = Process(self.world, "setup")

        async def lay_out() -> None:
            pool = await self.postgres.database(process).pool()
            await Directory(pool).lay_out(SHARDS)
            self.world.stop()

        process.spawn(lay_out())
        self.world.run(self.world.now_us + 60 * SECOND_US)
        process.kill()

    def start_shard(self, number: int, *, is_kept: bool = True) -> Process:
        """Start a process for a shard; where another one is, it waits."""
        process = self._process(f"shard-{number}")
        self.shards.append(process)
        self.numbers[process] = number
        process.spawn(_or_die(process, self._serve_shard(process, number)))
        if is_kept:
            process.on_death.append(partial(self._again, self.start_shard, number))
        return process

    def start_gateway(self, number: int) -> None:
        """Start a gateway."""
        process = self._process(f"gateway-{number}")
        gateway = Gateway(process, self._host(process))
        self.gateways.append(gateway)
        process.spawn(_or_die(process, gateway.serve()))
        process.on_death.append(partial(self._again, self.start_gateway, number))

    def stop_shard(self, process: Process) -> None:
        """End a process in good order: it hands its shard back."""
        running = self.running.pop(process)

        async def stop() -> None:
            await running.stop()
            process.die("stopped")

        process.spawn(_or_die(process, stop()))

    def addresses(self) -> list[str]:
        """Where clients find gateways."""
        return [gateway.address for gateway in self.gateways if gateway.address and not gateway.process.is_dead]

    def living(self) -> list[Process]:
        """The processes of the engine that live."""
        return [process for process in self.world.processes if not process.is_dead and process.name != "clients"]

    def submit(self, payload: Payload, asker: Process, on_answer: Callable[[Answer], None]) -> bool:
        """Hand a command to some gateway, as a request over HTTP does; False if there is none."""
        gateways = [one for one in self.gateways if one.address and not one.process.is_dead]
        if not gateways:
            return False
        gateway = self.world.random.choice(gateways)

        def answered(answer: Answer) -> None:
            self.world.after(500, partial(asker.call_soon, on_answer, answer))

        gateway.process.call_soon(gateway.router.submit, payload, answered)
        return True

    async def _serve_shard(self, process: Process, number: int) -> None:
        self.running[process] = await start_shard(self._host(process), number, process.die)

    def _again(self, start: Callable[[int], object], number: int) -> None:
        self.world.after(self.world.random.randint(*_RESTART_US), start, number)

    def _process(self, name: str) -> Process:
        self._started += 1
        return Process(self.world, f"{name}.{self._started}")

    def _host(self, process: Process) -> Host:
        network = SimulatedNetwork(self.world, process)
        return Host(network, self.postgres.database(process), _SECRET, "", process.monotonic_ns)


class Gateway:
    """One gateway, without HTTP."""

    def __init__(self, process: Process, host: Host) -> None:
        self.process = process
        self.address = ""
        self.router: Router
        self.sockets = Sockets()
        self._host = host

    async def serve(self) -> None:
        """Open the links, then the door."""
        host = self._host
        pool = await host.database.pool()
        clock = Clock(host.monotonic_ns)
        await clock.synchronise(pool)
        router, fanout, people = await connect(host, self.process.name, pool, clock)
        self.router = router
        assert isinstance(host.network, SimulatedNetwork)
        listening = host.network.listen_now(
            lambda: ObservedSocket(router, fanout, people, Session(uuid4(), _identify, clock()), clock, self.sockets),
            auto_pong=False,
        )
        self.address = listening.address
        self.process.spawn(keep_synchronised(clock, pool))
        self._tick(clock, fanout)

    def _tick(self, clock: Clock, fanout: Fanout) -> None:
        self.sockets.tick(clock())
        fanout.tick()
        self.process.call_later(1.0, self._tick, clock, fanout)


def _identify(token: str, _now: int) -> Identity:
    """In a simulated world everybody is who they say."""
    return Identity(UUID(token), "viewer", _FAR_MS)


async def _or_die(process: Process, work: Coroutine[Any, Any, None]) -> None:
    """A start that fails for want of its surroundings ends the process, which is then started again."""
    try:
        await work
    except (*ERRORS, Unreadable) as error:
        process.die(f"could not start: {error!r}")
