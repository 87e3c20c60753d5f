"""Who owns what: slots, shards and their epochs, in Postgres.

An entity's slot is fixed (`slot_of`); which shard serves a slot, which process is that shard's newest incarnation and
where its links end stands here. Taking over raises the epoch, in a transaction of its own, before anything is read.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple
from uuid import UUID
from zlib import crc32

import asyncpg

from engine.limits import OWNER_SILENT_MS, SLOTS

_PROBE_TIMEOUT_S: Final = 0.5
_CLAIM_INTERVAL_S: Final = 0.1


def slot_of(entity_id: UUID) -> int:
    """The slot of an entity, for ever."""
    return crc32(entity_id.bytes) % SLOTS


class Owner(NamedTuple):
    """The newest incarnation of a shard; `address` (`host:port`) is None until it takes links."""

    shard: int
    epoch: int
    address: str | None


# Slots are dealt out in turn. When they are dealt anew every shard's epoch is raised: nobody serves an old deal.
_LAY_OUT = """
WITH dealt AS (
    INSERT INTO slots SELECT slot, slot % $1 FROM generate_series(0, $2 - 1) AS slot
    ON CONFLICT (slot) DO UPDATE SET shard_id = excluded.shard_id WHERE slots.shard_id <> excluded.shard_id
    RETURNING 1
)
SELECT count(*) FROM dealt"""
_ADD_SHARDS = "INSERT INTO shards (shard_id) SELECT generate_series(0, $1 - 1) ON CONFLICT DO NOTHING"
_FENCE_ALL = "UPDATE shards SET epoch = epoch + 1, address = NULL"
_SLOTS = "SELECT shard_id FROM slots ORDER BY slot"
_OWNERS = "SELECT shard_id, epoch, address FROM shards WHERE shard_id IN (SELECT shard_id FROM slots)"
_OWNER = """
SELECT epoch, address, clock_timestamp() - alive_at > $2 * interval '1 millisecond' AS is_silent
FROM shards WHERE shard_id = $1"""
# The condition on the epoch lets only one of several claimants win.
_TAKE_OVER = """
UPDATE shards
SET epoch = epoch + 1, address = NULL, alive_at = clock_timestamp(), backend_pid = $3
WHERE shard_id = $1 AND epoch = $2 RETURNING epoch"""
_ANNOUNCE = (
    "UPDATE shards SET address = $3, alive_at = clock_timestamp() WHERE shard_id = $1 AND epoch = $2 RETURNING 1"
)
_RETIRE = "UPDATE shards SET address = NULL, alive_at = '-infinity' WHERE shard_id = $1 AND epoch = $2"


class Directory:
    """The tables `slots` and `shards`."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def lay_out(self, shards: int) -> None:
        """Deal the slots to this many shards. Only while no shard runs: any that does is fenced."""
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute(_ADD_SHARDS, shards)
            if await connection.fetchval(_LAY_OUT, shards, SLOTS):
                await connection.execute(_FENCE_ALL)

    async def slots(self) -> list[int]:
        """The shard of each slot."""
        return [row["shard_id"] for row in await self._pool.fetch(_SLOTS)]

    async def owners(self) -> list[Owner]:
        """Every shard that serves slots, with its newest incarnation."""
        return [Owner(*row) for row in await self._pool.fetch(_OWNERS)]

    async def take_over(
        self, shard: int, backend_pid: int, refuses: Callable[[str], Awaitable[bool]] | None = None
    ) -> int:
        """Become the shard's owner and return the new epoch; wait while another process is.

        An owner is gone when its address refuses connections, or when it has given no sign of life for a while.
        """
        refuses = refuses or _refuses
        while True:
            row = await self._pool.fetchrow(_OWNER, shard, OWNER_SILENT_MS)
            if row is None:
                raise LookupError(f"shard {shard} has no row: the slots were never dealt to it")
            epoch, address, is_silent = row
            if is_silent or (address is not None and await refuses(address)):
                taken: int | None = await self._pool.fetchval(_TAKE_OVER, shard, epoch, backend_pid)
                if taken is not None:
                    return taken
            await asyncio.sleep(_CLAIM_INTERVAL_S)

    async def announce(self, shard: int, epoch: int, address: str) -> bool:
        """Say where links end; False if a newer incarnation has taken over meanwhile."""
        return await self._pool.fetchval(_ANNOUNCE, shard, epoch, address) is not None

    async def retire(self, shard: int, epoch: int) -> None:
        """Leave in good order: the next incarnation need not wait for a sign of life."""
        await self._pool.execute(_RETIRE, shard, epoch)


async def _refuses(address: str) -> bool:
    """Whether nothing listens at `host:port` any more. A peer that does not answer in time may still live."""
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(_PROBE_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host, int(port))
    except ConnectionRefusedError:
        return True
    except (OSError, TimeoutError):
        return False
    writer.close()
    return False
