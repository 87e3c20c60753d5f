"""A real Postgres for a session of tests, and what tests do to it."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncpg

import migrations
from gavel.postgres import EmbeddedPostgres
from tests.support.waiting import until_true

TABLES = "entities, journal, private, shards, slots, snapshots"


@contextmanager
def running_postgres(folder: Path) -> Iterator[str]:
    """An embedded Postgres with our schema; yields its URL."""
    postgres = EmbeddedPostgres(folder)
    url = postgres.start()
    try:
        asyncio.run(migrations.upgrade(url))
        yield url
    finally:
        postgres.stop()


async def wait_for_lock(connection: asyncpg.Connection | asyncpg.Pool, backend_pid: int) -> None:
    """Wait until a backend waits for a lock that another transaction holds."""

    async def waits() -> bool:
        kind: str | None = await connection.fetchval(
            "SELECT wait_event_type FROM pg_stat_activity WHERE pid = $1", backend_pid
        )
        return kind == "Lock"

    await until_true(waits)


async def wait_until_idle(connection: asyncpg.Connection | asyncpg.Pool, backend_pid: int) -> None:
    """Wait until a backend has nothing to do: a driver that cancels a statement does not wait for that itself."""

    async def is_idle() -> bool:
        state: str | None = await connection.fetchval("SELECT state FROM pg_stat_activity WHERE pid = $1", backend_pid)
        return state == "idle"

    await until_true(is_idle)
