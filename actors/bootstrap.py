"""The wiring of a shard: the real clock, journal, directory and links. Everywhere else they are arguments."""

import asyncio
import gc
import logging
import logging.handlers
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, NoReturn

import asyncpg
import msgspec

from actors.clock import Clock
from actors.directory import Directory
from actors.journal import PostgresJournal
from actors.link import LinkServer
from actors.shard import Shard
from engine.limits import CLOCK_SYNC_MS, DATABASE_TIMEOUT_MS, SECOND_MS

logger = logging.getLogger(__name__)

_READERS_MAX: Final = 4
_CONNECT_RETRY_S: Final = 0.2
_COLLECT_AFTER: Final = 50_000
"""So many more new objects than freed ones begin a collection."""
_LOG_BYTES_MAX: Final = 10 * 1024 * 1024
# A plan compiled for each of many short statements costs more than it saves.
_SERVER_SETTINGS: Final = {"application_name": "gavel", "jit": "off"}


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


def set_up_logging(place: Place, name: str) -> None:
    """Log to a file of this process's own, which does not grow for ever."""
    handler = logging.handlers.RotatingFileHandler(
        Path(place.log_dir) / f"{name}.log", maxBytes=_LOG_BYTES_MAX, backupCount=3
    )
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=place.log_level.upper(), handlers=[handler], force=True)
    logging.getLogger("picows").setLevel(logging.WARNING)


def settle_memory() -> None:
    """Have the garbage collector leave alone what is there for good once a process has started.

    Its full collections would walk through all of it again and again, and stop every auction for 0.1 s and more.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER, 20, 100)


async def connect(database_url: str, readers: int = _READERS_MAX) -> asyncpg.Pool:
    """A pool of connections to Postgres, which may be just starting."""
    while True:
        try:
            return await asyncpg.create_pool(
                database_url,
                min_size=1,
                max_size=readers,
                command_timeout=DATABASE_TIMEOUT_MS / SECOND_MS,
                server_settings=_SERVER_SETTINGS,
            )
        except (OSError, asyncpg.CannotConnectNowError, asyncpg.TooManyConnectionsError) as error:
            logger.warning("Postgres cannot be reached: %s", error)
            await asyncio.sleep(_CONNECT_RETRY_S)


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
        pool: asyncpg.Pool,
        writer: asyncpg.Connection,
        clock_task: asyncio.Task[NoReturn],
    ) -> None:
        self.shard = shard
        self._server = server
        self._directory = directory
        self._pool = pool
        self._writer = writer
        self._clock_task = clock_task

    async def stop(self) -> None:
        """Commit and answer what was taken, keep snapshots, and hand the shard back."""
        await self.shard.stop()
        self._server.close()
        self._clock_task.cancel()
        await self._directory.retire(self._server.number, self._server.epoch)
        await self._writer.close()
        await self._pool.close()


async def start_shard(place: Place, number: int, die: Callable[[str], NoReturn]) -> RunningShard:
    """Take the shard over, read what it must know, and take links. Waits while another process owns it."""
    pool = await connect(place.database_url)
    writer = await asyncpg.connect(place.database_url, server_settings=_SERVER_SETTINGS)
    clock = Clock()
    await clock.synchronise(pool)
    directory = Directory(pool)
    epoch = await directory.take_over(number, writer.get_server_pid())
    owned = [slot for slot, shard in enumerate(await directory.slots()) if shard == number]
    shard = Shard(slots=owned, clock=clock, journal=PostgresJournal(writer, pool, number, epoch), die=die)
    await shard.start()
    server = LinkServer(shard, number, epoch, place.secret())
    address = await server.listen(place.link_host)
    if not await directory.announce(number, epoch, address):
        die("a newer incarnation of this shard has taken over")
    logger.info("shard %d serves %d slots in epoch %d at %s", number, len(owned), epoch, address)
    settle_memory()
    clock_task = asyncio.get_running_loop().create_task(keep_synchronised(clock, pool))
    return RunningShard(
        shard=shard, server=server, directory=directory, pool=pool, writer=writer, clock_task=clock_task
    )
