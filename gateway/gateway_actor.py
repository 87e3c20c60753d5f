"""The Ray actor around a gateway, and its door: one process that serves HTTP and WebSocket on one port.

Several may share the port (`SO_REUSEPORT`); the kernel spreads connections over them.
"""

import asyncio
import os
import socket
from typing import Any, Final, NoReturn

import asyncpg
import msgspec
import uvicorn

from actors.bootstrap import Host, Place, host_of, keep_synchronised, set_up_logging, settle_memory
from actors.clock import Clock
from actors.database import ERRORS
from actors.logs import get_logger
from actors.ray_actor import begin, die_if_failed, spawn
from engine.limits import (
    BACKLOG_MAX,
    DRAIN_MS,
    HEALTH_TIMEOUT_MS,
    MEBIBYTE,
    RAISED_ADDRESSES,
    SECOND_MS,
    SOCKET_KERNEL_BYTES,
)
from gateway.api.edge import HEALTHY, Edge
from gateway.app import create_app
from gateway.bootstrap import connect
from gateway.fanout import Fanout
from gateway.origins import Origins
from gateway.people import People
from gateway.rates import Rates, networks
from gateway.room import MemoryGauge, connections_for, memory_share_bytes, raise_file_limit, sockets_for
from gateway.router import Router
from gateway.socket import Sockets, make_http_protocol, make_protocol
from gateway.suspensions import Suspensions
from gateway.tokens import Verifier

logger = get_logger(__name__)

RESOURCE: Final = "gavel_gateway"


class Door(msgspec.Struct, frozen=True, kw_only=True):
    """Where a gateway listens, whose tokens it takes, and how much of everything."""

    host: str
    port: int
    public_key: bytes
    raised_addresses: str = RAISED_ADDRESSES
    """Addresses and networks without rates, separated by commas."""
    memory_bytes_max: int | None = None
    """Over this much nobody is let in; None for this gateway's share of the machine's."""
    gateways: int = 1
    """So many share the machine."""
    origins: str = ""
    """Of whose pages sockets may be opened, beside our own: separated by commas, or `*`."""
    tls_certificate: str | None = None
    """The file of the certificate and its chain; None for no TLS. Each gateway reads it when it starts."""
    tls_key: str | None = None
    """The file of its private key: it is not passed around itself."""

    @property
    def is_tls(self) -> bool:
        """Whether all that is said here is encrypted."""
        return self.tls_certificate is not None


class RunningGateway:
    """A gateway with all that it needs, serving."""

    def __init__(self, host: Host, name: str, pool: asyncpg.Pool, clock: Clock) -> None:
        self._host = host
        self._name = name
        self._pool = pool
        self._clock = clock
        self._sockets: Sockets
        self._memory: MemoryGauge
        self._router: Router
        self._fanout: Fanout
        self._people: People
        self._server: uvicorn.Server
        self._tasks: list[asyncio.Task[None] | asyncio.Task[NoReturn]] = []

    async def serve(self, door: Door) -> None:
        """Open the links and the port; return when bids can be placed."""
        self._router, self._fanout, self._people = await connect(self._host, self._name, self._pool, self._clock)
        verifier = Verifier(door.public_key)
        suspensions = Suspensions(self._pool)
        await suspensions.read()
        rates = Rates(networks(door.raised_addresses))
        files = raise_file_limit()
        self._sockets = self._make_room(door, rates, files)
        edge = Edge(
            router=self._router,
            verifier=verifier,
            pool=self._pool,
            clock=self._clock,
            rates=rates,
            health=self._health,
            suspended=suspensions,
        )
        config = uvicorn.Config(
            create_app(edge),
            ws=make_protocol(
                self._router,
                self._fanout,
                self._people,
                verifier.verify,
                self._clock,
                self._sockets,
                Origins(door.origins, is_tls=door.is_tls),
                suspensions,
            ),
            http=make_http_protocol(connections_for(files)),
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            # Rates go by who is connected: what a header says of it anybody could write.
            proxy_headers=False,
            backlog=BACKLOG_MAX,
            ssl_certfile=door.tls_certificate,
            ssl_keyfile=door.tls_key,
            timeout_graceful_shutdown=DRAIN_MS // SECOND_MS,
        )
        self._server = uvicorn.Server(config)
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._server.serve(sockets=[_listening_socket(door.host, door.port)])),
            loop.create_task(self._tick()),
            loop.create_task(keep_synchronised(self._clock, self._pool)),
            loop.create_task(suspensions.follow(self._sockets.suspensions_changed)),
        ]
        serving = self._tasks[0]
        while not self._server.started and not serving.done():  # noqa: ASYNC110 (uvicorn has no event to wait for)
            await asyncio.sleep(0.01)
        if serving.done():
            await serving
            raise RuntimeError("the server ended before it had started")
        for task in self._tasks:
            task.add_done_callback(die_if_failed)
        logger.info("the gateway serves", gateway=self._name, host=door.host, port=door.port)

    async def stop(self) -> None:
        """Send everybody elsewhere, answer the HTTP requests that are on their way, and end."""
        self._sockets.drain()
        self._server.should_exit = True
        serving, *others = self._tasks
        await serving
        for task in others:
            task.cancel()
        await self._people.close()
        await self._router.close()
        await self._pool.close()

    def _make_room(self, door: Door, rates: Rates, files: int) -> Sockets:
        """Find out how many sockets there is room for, and say so."""
        sockets = Sockets(sockets_for(files), rates)
        bytes_max = door.memory_bytes_max or memory_share_bytes(door.gateways)
        self._memory = MemoryGauge(bytes_max)
        logger.info(
            "there is room",
            gateway=self._name,
            files=files,
            sockets=sockets.sockets_max,
            memory_mib=bytes_max // MEBIBYTE,
        )
        return sockets

    async def _tick(self) -> NoReturn:
        while True:
            await asyncio.sleep(1)
            self._look_at_memory()
            self._sockets.tick(self._clock())
            self._fanout.tick()

    def _look_at_memory(self) -> None:
        is_short = self._memory.look()
        if is_short != self._sockets.is_short_of_memory:
            self._sockets.is_short_of_memory = is_short
            logger.warning("memory is short: nobody is let in" if is_short else "there is memory again")

    async def _health(self) -> dict[str, str]:
        unreachable = self._router.unreachable()
        return {
            "shards": HEALTHY if not unreachable else f"out of reach: {', '.join(map(str, unreachable))}",
            "database": await self._database_health(),
        }

    async def _database_health(self) -> str:
        try:
            await self._pool.fetchval("SELECT 1", timeout=HEALTH_TIMEOUT_MS / SECOND_MS)
        except ERRORS:
            return "out of reach"
        return HEALTHY


async def start_gateway(place: Place, door: Door, name: str) -> RunningGateway:
    """Wire a gateway and serve. Waits for Postgres and for every shard."""
    host = host_of(place)
    pool = await host.database.pool()
    clock = Clock(host.monotonic_ns)
    await clock.synchronise(pool)
    running = RunningGateway(host, name, pool, clock)
    await running.serve(door)
    settle_memory()
    return running


class GatewayActor:
    """Starts its gateway when Ray constructs it."""

    def __init__(self, place: Place, door: Door, number: int) -> None:
        name = actor_name(number)
        set_up_logging(place, name)
        self._starting = begin(start_gateway(place, door, f"{name}/{os.getpid()}"))

    async def ready(self) -> None:
        """Return when bids can be placed through this gateway."""
        await asyncio.shield(self._starting)

    async def stop(self) -> None:
        """Send everybody elsewhere and end."""
        running = await asyncio.shield(self._starting)
        await running.stop()


def actor_name(number: int) -> str:
    """Under which name Ray knows a gateway."""
    return f"gateway-{number}"


def create(place: Place, door: Door, number: int) -> Any:  # noqa: ANN401 (Ray's handles have no type)
    """Have Ray keep this gateway running."""
    return spawn(GatewayActor, actor_name(number), RESOURCE, place, door, number)


def _listening_socket(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, the loop turns off Nagle's algorithm on what it accepts.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    # What is accepted here inherits it: what a client does not read is bounded in the kernel, too.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_KERNEL_BYTES)
    listening.bind((host, port))
    listening.listen(BACKLOG_MAX)
    return listening
