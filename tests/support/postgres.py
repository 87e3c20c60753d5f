"""A real Postgres for a session of tests, and what tests do to it."""

import asyncio
import contextlib
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncpg
import psutil

import migrations
from gavel.postgres import EmbeddedPostgres, folder_of
from tests.support.waiting import until_true

TABLES = "bidders, entities, journal, private, shards, slots, snapshots, suspensions"


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


class OwnPostgres:
    """A Postgres of a test's own, which it may take down."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.url = self.start()

    def start(self) -> str:
        """Start it, for the first time or again; it recovers from its log."""
        self._postgres = EmbeddedPostgres(self._folder)
        return self._postgres.start()

    def crash(self) -> None:
        """End it at once, as `pg_ctl stop -m immediate` does: no session gets to an end, no checkpoint is written."""
        pid_file = folder_of(self._folder) / "postmaster.pid"
        postmaster = psutil.Process(int(pid_file.read_text().split(maxsplit=1)[0]))
        postmaster.send_signal(signal.SIGQUIT)
        with contextlib.suppress(psutil.NoSuchProcess):
            # Whose child it is may not have waited for it yet.
            while postmaster.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)

    def stop(self) -> None:
        """Stop it in good order."""
        self._postgres.stop()


@contextmanager
def own_postgres() -> Iterator[OwnPostgres]:
    """A Postgres in a folder that, unlike pytest's, another user can reach, as whom root starts it."""
    with tempfile.TemporaryDirectory(prefix="gt-", dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        postgres = OwnPostgres(Path(folder))
        try:
            yield postgres
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
