"""The database schema, step by step: Alembic, called from a running program."""

from pathlib import Path

import asyncpg
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

# Any number will do, as long as nothing else in the database takes it: the bytes of "gavel".
_LOCK_KEY = int.from_bytes(b"gavel")


async def upgrade(database_url: str) -> None:
    """Bring the database to the newest revision, or leave it as it was.

    All revisions run in one transaction under an advisory lock, so that of several starters one migrates and the
    others wait and find nothing left to do. A revision that cannot run in a transaction (`CREATE INDEX CONCURRENTLY`)
    is therefore not possible.

    Args:
        database_url: what asyncpg accepts, for example `postgresql://postgres@/postgres?host=/some/folder`.

    Raises:
        OSError, asyncpg.PostgresError: the database cannot be reached, or refuses the login.
        sqlalchemy.exc.SQLAlchemyError: a revision failed.
        alembic.util.CommandError: the database has a revision that this version of Gavel does not know.
    """

    async def connect() -> asyncpg.Connection:
        return await asyncpg.connect(database_url)

    # asyncpg reads the address itself, so that it means here what it means in the rest of the program.
    engine = create_async_engine("postgresql+asyncpg://", async_creator=connect, poolclass=NullPool)
    try:
        async with engine.begin() as connection:
            # Freed by the end of the transaction, whatever that end is.
            await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK_KEY})
            await connection.run_sync(_upgrade_on)
    finally:
        await engine.dispose()


def _upgrade_on(connection: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
