"""Who owns what: slots, shards and their epochs, in Postgres.

An entity's slot is fixed (`slot_of`); which shard serves a slot, which process is that shard's newest incarnation and
where its links end stands here. Taking over raises the epoch, in a transaction of its own, before anything is read.

Who takes over also takes over a debt: since the last sign of life (`down_at`) no bid could be placed.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple
from uuid import UUID
from zlib import crc32

import asyncpg

from actors.database import ERRORS, is_passing
from actors.journal import past_old_session
from actors.logs import get_logger
from engine.limits import CLAIM_RETRY_MS, OWNER_SILENT_MS, SECOND_MS, SLOTS, WRITE_TIMEOUT_MS

logger = get_logger(__name__)

_TIMEOUT_S: Final = WRITE_TIMEOUT_MS / SECOND_MS


def slot_of(entity_id: UUID) -> int:
    """The slot of an entity, for ever."""
    return crc32(entity_id.bytes) % SLOTS


class Owner(NamedTuple):
    """The newest incarnation of a shard; `address` (`host:port`) is None until it takes links."""

    shard: int
    epoch: int
    address: str | None


class Taken(NamedTuple):
    """A shard that was taken over."""

    epoch: int
    down_at: int | None
    """Since when it was not served, milliseconds by Postgres's clock; None if it never was."""


# Slots are dealt out in turn. When they are dealt anew every shard's epoch is raised: nobody serves an old deal. An
# auction may then find itself on a shard that owes it nothing, so all of them owe as much as the one that owes most.
_LAY_OUT = """
WITH dealt AS (
    INSERT INTO slots SELECT slot, slot % $1 FROM generate_series(0, $2 - 1) AS slot
    ON CONFLICT (slot) DO UPDATE SET shard_id = excluded.shard_id WHERE slots.shard_id <> excluded.shard_id
    RETURNING 1
)
SELECT count(*) FROM dealt"""
_ADD_SHARDS = "INSERT INTO shards (shard_id) SELECT generate_series(0, $1 - 1) ON CONFLICT DO NOTHING"
_DEBT = """
SELECT min(coalesce(down_at, alive_at)) FROM shards
WHERE alive_at > '-infinity' AND shard_id IN (SELECT shard_id FROM slots)"""
_FENCE_ALL = """
UPDATE shards
SET epoch = epoch + 1, address = NULL, owner = NULL, down_at = $1,
    alive_at = coalesce($1::timestamptz, '-infinity')"""
_SLOTS = "SELECT shard_id FROM slots ORDER BY slot"
_OWNERS = "SELECT shard_id, epoch, address FROM shards WHERE shard_id IN (SELECT shard_id FROM slots)"
_OWNER = """
SELECT epoch, owner, address, clock_timestamp() - alive_at > $2 * interval '1 millisecond' AS is_silent
FROM shards WHERE shard_id = $1"""
# The condition on the epoch lets only one of several claimants win.
_TAKE_OVER = """
UPDATE shards
SET epoch = epoch + 1, owner = $3, address = NULL, backend_pid = $4, alive_at = clock_timestamp(),
    down_at = CASE WHEN alive_at > '-infinity' THEN coalesce(down_at, alive_at) END
WHERE shard_id = $1 AND epoch = $2
RETURNING epoch, (extract(epoch FROM down_at) * 1000)::bigint AS down_at"""
_ANNOUNCE = "UPDATE shards SET address = $3 WHERE shard_id = $1 AND owner = $2 RETURNING 1"
_RETIRE = "UPDATE shards SET address = NULL, owner = NULL WHERE shard_id = $1 AND owner = $2"


class Directory:
    """The tables `slots` and `shards`."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def lay_out(self, shards: int) -> None:
        """Deal the slots to this many shards. Only while no shard runs: any that does is fenced."""
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute(_ADD_SHARDS, shards)
            debt = await connection.fetchval(_DEBT)
            if await connection.fetchval(_LAY_OUT, shards, SLOTS):
                await connection.execute(_FENCE_ALL, debt)

    async def slots(self) -> list[int]:
        """The shard of each slot."""
        return [row["shard_id"] for row in await self._pool.fetch(_SLOTS)]

    async def owners(self) -> list[Owner]:
        """Every shard that serves slots, with its newest incarnation."""
        return [Owner(*row) for row in await self._pool.fetch(_OWNERS)]

    async def take_over(
        self, shard: int, owner: UUID, backend_pid: int, refuses: Callable[[str], Awaitable[bool]]
    ) -> Taken:
        """Become the shard's owner; wait while another process is.

        An owner is gone when its address refuses connections (`refuses`), when it has given no sign of life for a
        while, or when it has said so. `backend_pid` is the session in which the new one will write.
        """
        while True:
            try:
                taken = await self._claim(shard, owner, backend_pid, refuses)
            except ERRORS as error:
                # Whoever waits lives through a restart of Postgres like everybody else.
                if not is_passing(error):
                    raise
                logger.debug("the shard cannot be claimed", shard=shard, error=str(error))
            else:
                if taken is not None:
                    return taken
            await asyncio.sleep(CLAIM_RETRY_MS / SECOND_MS)

    async def _claim(
        self, shard: int, owner: UUID, backend_pid: int, refuses: Callable[[str], Awaitable[bool]]
    ) -> Taken | None:
        """Take the shard over if nobody owns it."""
        row = await self._pool.fetchrow(_OWNER, shard, OWNER_SILENT_MS)
        if row is None:
            raise LookupError(f"shard {shard} has no row: the slots were never dealt to it")
        epoch, old_owner, address, is_silent = row
        is_free = is_silent or old_owner in (None, owner)
        if is_free or (address is not None and await refuses(address)):
            return await self._try(shard, epoch, owner, backend_pid)
        return None

    async def _try(self, shard: int, epoch: int, owner: UUID, backend_pid: int) -> Taken | None:
        """Take over from this epoch; None if that did not succeed, or nobody knows."""
        taking = self._pool.fetchrow(_TAKE_OVER, shard, epoch, owner, backend_pid, timeout=_TIMEOUT_S)
        row = await past_old_session(taking, self._pool, shard, backend_pid)
        return None if row is None else Taken(*row)

    async def announce(self, shard: int, owner: UUID, address: str) -> bool:
        """Say where links end; False if another process has taken over meanwhile."""
        return await self._pool.fetchval(_ANNOUNCE, shard, owner, address) is not None

    async def retire(self, shard: int, owner: UUID) -> None:
        """Leave in good order: the next owner need not wait for a sign of life."""
        await self._pool.execute(_RETIRE, shard, owner)
