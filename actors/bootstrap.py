"""The wiring of a shard: the real clock, journal, directory and links. Everywhere else they are arguments."""

import asyncio
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple, NoReturn
from uuid import uuid4

import asyncpg
import msgspec

from actors.clock import Clock
from actors.database import Database, Postgres
from actors.directory import Directory
from actors.journal import PostgresJournal, session_name
from actors.link import LinkServer
from actors.logs import get_logger, log_to_file
from actors.network import Network, WebSockets
from actors.shard import Shard
from engine.limits import CLOCK_SYNC_MS, SECOND_MS

logger = get_logger(__name__)

_COLLECT_AFTER: Final = 50_000
"""So many more new objects than freed ones begin a collection."""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where an engine lives: what each of its processes must know."""

    database_url: str
    secret_path: str
    """The file that holds the cluster's secret, where `GAVEL_SECRET` does not: it is not passed around itself."""
    log_dir: str
    log_level: str
    link_host: str = "127.0.0.1"
    """The address on which shards take links."""

    def secret(self) -> bytes:
        """The cluster's secret."""
        given = os.environ.get("GAVEL_SECRET")
        return given.encode() if given else Path(self.secret_path).read_bytes()


class Host(NamedTuple):
    """What a process stands on."""

    network: Network
    database: Database
    secret: bytes
    link_host: str
    monotonic_ns: Callable[[], int]


def host_of(place: Place) -> Host:
    """The host of a process in this place."""
    return Host(WebSockets(), Postgres(place.database_url), place.secret(), place.link_host, time.monotonic_ns)


def set_up_logging(place: Place, name: str) -> None:
    """Log to the file of the process that has this name."""
    log_to_file(Path(place.log_dir) / f"{name}.log", place.log_level, process=name)


def settle_memory() -> None:
    """Have the garbage collector leave alone what is there for good once a process has started.

    Its full collections would walk through all of it again and again, and stop every auction for 0.1 s and more.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER, 20, 100)


async def keep_synchronised(clock: Clock, pool: asyncpg.Pool) -> NoReturn:
    """Follow Postgres's clock, minute by minute."""
    while True:
        await asyncio.sleep(CLOCK_SYNC_MS / SECOND_MS)
        try:
            await clock.synchronise(pool)
        except Exception:
            logger.exception("the clock could not be set; it goes on by itself")


class RunningShard:
    """A shard with all that it needs, taking links."""

    def __init__(
        self,
        *,
        shard: Shard,
        server: LinkServer,
        directory: Directory,
        journal: PostgresJournal,
        pool: asyncpg.Pool,
        clock_task: asyncio.Task[NoReturn],
    ) -> None:
        self.shard = shard
        self._server = server
        self._directory = directory
        self._journal = journal
        self._pool = pool
        self._clock_task = clock_task

    async def stop(self) -> None:
        """Commit and answer what was taken, keep snapshots, and hand the shard back."""
        await self.shard.stop()
        self._server.close()
        self._clock_task.cancel()
        await self._directory.retire(self._server.number, self._server.owner)
        await self._journal.close()
        await self._pool.close()


async def start_shard(host: Host, number: int, die: Callable[[str], NoReturn]) -> RunningShard:
    """Take the shard over, pay back what it owes, and take links. Waits while another process owns it."""
    owner = uuid4()
    pool = await host.database.pool()
    writer = await host.database.connect(session_name(number))
    directory = Directory(pool)
    epoch, down_at = await directory.take_over(number, owner, writer.get_server_pid(), host.network.refuses)
    # Only now: until then it may have waited for days.
    clock = Clock(host.monotonic_ns)
    await clock.synchronise(pool)
    owned = [slot for slot, shard in enumerate(await directory.slots()) if shard == number]
    journal = PostgresJournal(
        database=host.database, writer=writer, readers=pool, shard=number, owner=owner, epoch=epoch
    )
    shard = Shard(slots=owned, clock=clock, journal=journal, die=die)
    await shard.start(down_at)
    server = LinkServer(shard, number, owner, lambda: journal.epoch, host.secret)
    address = await server.listen(host.network, host.link_host)
    if not await directory.announce(number, owner, address):
        die("another process has taken this shard over")
    logger.info("the shard serves", shard=number, slots=len(owned), epoch=journal.epoch, address=address)
    clock_task = asyncio.get_running_loop().create_task(keep_synchronised(clock, pool))
    return RunningShard(
        shard=shard, server=server, directory=directory, journal=journal, pool=pool, clock_task=clock_task
    )
