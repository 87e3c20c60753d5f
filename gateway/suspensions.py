"""Who is suspended. Postgres knows; a gateway reads it when it starts, and asks every second if it has changed."""

import asyncio
from collections.abc import Callable
from typing import Final, NoReturn
from uuid import UUID

import asyncpg

from actors.database import ERRORS, is_passing
from actors.logs import get_logger
from engine.limits import SECOND_MS, SUSPENDED_MAX, SUSPENSIONS_MS

logger = get_logger(__name__)

# The same for the same users, in whatever order they are read.
_FINGERPRINT: Final = "SELECT count(*), sum(uuid_hash_extended(user_id, 0)) FROM suspensions"
_USERS: Final = "SELECT user_id FROM suspensions"

# Suspensions come one after the other, so that they can be counted.
_LOCK: Final = "LOCK TABLE suspensions IN SHARE ROW EXCLUSIVE MODE"
_SUSPEND: Final = """
    INSERT INTO suspensions (user_id) SELECT $1 WHERE (SELECT count(*) FROM suspensions) < $2
    ON CONFLICT DO NOTHING
"""
_IS_SUSPENDED: Final = "SELECT EXISTS (SELECT FROM suspensions WHERE user_id = $1)"
_LIFT: Final = "DELETE FROM suspensions WHERE user_id = $1"


class Suspensions:
    """The users that are suspended, as of about a second ago. `user in suspensions` asks nobody."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._users: frozenset[UUID] = frozenset()
        self._fingerprint: asyncpg.Record | None = None

    def __contains__(self, user: object) -> bool:
        return user in self._users

    async def read(self) -> bool:
        """Take over who is suspended now; whether that has changed. Raises one of `ERRORS`."""
        async with asyncio.timeout(SUSPENSIONS_MS / SECOND_MS):
            fingerprint = await self._pool.fetchrow(_FINGERPRINT)
            if fingerprint == self._fingerprint:
                return False
            # Who is added just now is read at once, and again the next time.
            self._users = frozenset([user for (user,) in await self._pool.fetch(_USERS)])
            self._fingerprint = fingerprint
            return True

    async def follow(self, on_change: Callable[[], None]) -> NoReturn:
        """Read again and again. While Postgres is away, what it said last holds."""
        while True:
            await asyncio.sleep(SUSPENSIONS_MS / SECOND_MS)
            try:
                if await self.read():
                    on_change()
            except ERRORS as error:
                if not is_passing(error):
                    raise
                logger.debug("nobody knows who is suspended", error=str(error))


async def suspend(connection: asyncpg.Connection, user: UUID) -> bool:
    """Suspend a user, unless it is already; False where too many are."""
    async with connection.transaction():
        await connection.execute(_LOCK)
        await connection.execute(_SUSPEND, user, SUSPENDED_MAX)
        is_suspended: bool = await connection.fetchval(_IS_SUSPENDED, user)
        return is_suspended


async def lift(connection: asyncpg.Connection, user: UUID) -> None:
    """End a user's suspension, if there is one."""
    await connection.execute(_LIFT, user)
