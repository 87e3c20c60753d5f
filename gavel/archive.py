"""The archive: a copy of the embedded Postgres's write-ahead log in another folder, written as the log itself is.

With a backup (`backup.py`) it leads to any moment since (`restore.py`). Postgres's own `pg_receivewal` does the work: a
process beside the engine, for which no commit waits.
"""

import asyncio
import contextlib
from pathlib import Path
from typing import Final

import asyncpg

from actors.database import ERRORS
from gavel.errors import CommandError
from gavel.postgres import program
from gavel.supervision import Say, persist

KEEP_MB: Final = 1024
"""So much of its log Postgres keeps for an archive that is behind: it fills no disk for one that cannot be written."""
_NAME: Final = "gavel-archive"
_END_OTHERS: Final = "SELECT pg_terminate_backend(pid) FROM pg_stat_replication WHERE application_name = $1"
_SETTLED_S: Final = 1
_STOP_S: Final = 10


def claim(data_dir: Path, folder: Path) -> None:
    """Make a folder the archive of this data folder. Raises `CommandError` if it holds anything of another's.

    The logs of two databases have the same names, those of a database and of its restored copy too.
    """
    record = data_dir / "archived_to"
    try:
        if record.exists() and record.read_text() == str(folder):
            return
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise CommandError(
                f"{folder} holds what this engine has not written; name an empty folder with --archive-dir, and make a "
                "backup when the engine runs."
            )
        record.write_text(str(folder))
    except OSError as error:
        raise CommandError(
            f"The archive folder {folder} cannot be used ({error.strerror}); name another with --archive-dir."
        ) from error


class Archive:
    """The copying of one Postgres's log to a folder."""

    def __init__(self, folder: Path, say: Say) -> None:
        self._folder = folder
        self._say = say
        self._process: asyncio.subprocess.Process | None = None

    async def keep(self, database_url: str) -> None:
        """Copy the log, and begin again whenever that ends."""
        while True:
            await persist(lambda: self._start(database_url), self._say)
            self._say(f"the write-ahead log is copied to {self._folder}")
            assert self._process is not None
            await self._process.wait()

    async def close(self) -> None:
        """Wait for the last of the log: a Postgres that is stopped in good order sends it before it ends."""
        if self._process is None:
            return
        try:
            async with asyncio.timeout(_STOP_S):
                await self._process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    async def _start(self, database_url: str) -> None:
        """Begin to copy. Raises `CommandError` if that ends at once."""
        try:
            await _end_others(database_url)
            self._process = process = await self._spawn(database_url)
        except ERRORS as error:
            raise self._failure(type(error).__name__) from error
        assert process.stderr is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SETTLED_S):
                said = await process.stderr.read()
                lines = said.decode(errors="replace").splitlines()
                raise self._failure(lines[-1] if lines else "it ended without a word")

    async def _spawn(self, database_url: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            program("pg_receivewal"),
            f"--dbname={database_url}&application_name={_NAME}",
            f"--directory={self._folder}",
            # Postgres knows how far it is, to the second (`pg_stat_replication`).
            "--status-interval=1",
            "--no-loop",
            "--no-password",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            # Ctrl-C is for us: what shards commit while they stop is to be copied, too.
            process_group=0,
        )

    def _failure(self, reason: str) -> CommandError:
        return CommandError(
            f"The write-ahead log is not copied to {self._folder} ({reason}), so what is committed now could not be "
            "restored; that is tried again."
        )


async def _end_others(database_url: str) -> None:
    """End the copying that an engine that was killed has left behind on a Postgres that lives on."""
    connection = await asyncpg.connect(database_url)
    try:
        await connection.execute(_END_OTHERS, _NAME)
    finally:
        await connection.close()
