"""How our processes come to Postgres, and what its errors mean."""

import asyncio
import logging
from typing import Final, Protocol

import asyncpg

from actors.logs import get_logger
from engine.limits import DATABASE_RETRY_MS, DATABASE_TIMEOUT_MS, READERS_MAX, SECOND_MS, WRITE_TIMEOUT_MS

logger = get_logger(__name__)

# A plan compiled for each of many short statements costs more than it saves.
_JIT: Final = {"jit": "off"}
_PASSING_CLASSES: Final = ("08", "40", "53", "57")
"""Classes of SQLSTATE that tell of the connection, a conflict, the server's means or its operator: all of them pass."""

# The last is raised on a connection on which the server has just said that it goes.
ERRORS: Final = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""What a statement may raise; a time-out is an `OSError`."""


def is_passing(error: Exception) -> bool:
    """Whether one of `ERRORS` leaves it open if the statement was done, or may be done next time."""
    if isinstance(error, asyncpg.PostgresError):
        return str(error.sqlstate)[:2] in _PASSING_CLASSES
    # asyncpg refuses arguments that are of the wrong type before it sends them.
    return not isinstance(error, ValueError)


class Database(Protocol):
    """Where connections come from."""

    async def pool(self) -> asyncpg.Pool:
        """A pool of connections, for reading; waits for a server that is just starting."""

    async def connect(self, name: str) -> asyncpg.Connection:
        """A connection of its own, which the server knows by `name`. Raises one of `ERRORS`."""


class Postgres:
    """The database that there is."""

    def __init__(self, url: str, readers: int = READERS_MAX) -> None:
        self._url = url
        self._readers = readers

    async def pool(self) -> asyncpg.Pool:
        """See `Database`."""
        is_said = False
        while True:
            try:
                return await asyncpg.create_pool(
                    self._url,
                    min_size=1,
                    max_size=self._readers,
                    command_timeout=DATABASE_TIMEOUT_MS / SECOND_MS,
                    timeout=WRITE_TIMEOUT_MS / SECOND_MS,
                    server_settings={"application_name": "gavel", **_JIT},
                )
            except ERRORS as error:
                if not is_passing(error):
                    raise
                # Said once: it may take an hour.
                level = logging.DEBUG if is_said else logging.WARNING
                logger.log(level, "Postgres cannot be reached", error=str(error))
                is_said = True
                await asyncio.sleep(DATABASE_RETRY_MS / SECOND_MS)

    async def connect(self, name: str) -> asyncpg.Connection:
        """See `Database`."""
        return await asyncpg.connect(
            self._url, timeout=WRITE_TIMEOUT_MS / SECOND_MS, server_settings={"application_name": name, **_JIT}
        )
