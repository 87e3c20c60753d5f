"""The peers: what a user would otherwise take, started and spoken to in the same way as Gavel.

| peer | what it is | a bid is acknowledged when | broadcasts |
| --- | --- | --- | --- |
| `row_lock` | FastAPI and Postgres, `SELECT … FOR UPDATE` for each bid | it is on the disk | no |
| `ray_calls` | FastAPI, and a Ray call to one of Gavel's shards for each bid | it is on the disk | no |
| `ws` | Node's `ws` | it is in memory | yes |
| `socketio` | Socket.IO on Node | it is in memory | yes |

All have the same rules, keep each bid's verdict by its `bid_id`, and speak the JSON of the live protocol, as far as the
benchmark needs it. A token is the user's id itself. Each file says by which document it is written.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from engine.commands import Role
from loadtests.clients import PLAIN, Framing
from loadtests.measured import LoadFailed
from loadtests.subjects import processes_of, started

IN_PYTHON: Final = ("row_lock", "ray_calls")
IN_JAVASCRIPT: Final = {"ws": "ws.js", "socketio": "socketio.js"}
NAMES: Final = (*IN_PYTHON, *IN_JAVASCRIPT)

_NODE: Final = Path(__file__).parent / "node"
_INSTALL_S: Final = 120

# What Ray is told by the engine, too (see `gavel.cluster`). The peer handles its signals itself.
_ENVIRONMENT: Final = {
    "RAY_worker_niceness": "0",
    "RAY_timeout_ms_task_wait_for_death_info": "50",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",
}

_EVENT: Final = b'42["message",'


# Functions with names, since a framing goes to generators in other processes.
def _wrap(message: bytes) -> bytes:
    return b"%b%b]" % (_EVENT, message)


def _unwrap(text: bytes) -> bytes | None:
    return text[len(_EVENT) : -1] if text.startswith(_EVENT) else None


SOCKETIO: Final = Framing(
    path="/socket.io/?EIO=4&transport=websocket",
    encode=_wrap,
    decode=_unwrap,
    # Its open packet is answered by a request to connect, and its ping by a pong.
    replies={b"0": b"40", b"2": b"3"},
    opened_by=b"40",
)
"""Version 5 of Socket.IO's protocol over version 4 of Engine.IO's: an event is a type, its name and its payload."""


class Peer:
    """A running peer: a `Subject`. Its auctions are there from the start, and are given out one after another."""

    def __init__(self, name: str, url: str, pid: int, auctions: int, data_dir: Path | None) -> None:
        self.name = name
        self.url = url
        self.framing = SOCKETIO if name == "socketio" else PLAIN
        self.data_dir = data_dir
        self._pid = pid
        self._auctions = iter(range(auctions))

    def token(self, user: UUID, role: Role) -> str:  # noqa: ARG002 (a peer knows no roles)
        return str(user)

    def open_auctions(self, count: int, **terms: Any) -> list[str]:  # noqa: ANN401 (see `Subject`)
        if terms:
            raise LoadFailed(f"the auctions of {self.name} know no {' and no '.join(terms)}")
        numbers = [number for number, _ in zip(self._auctions, range(count), strict=False)]
        if len(numbers) < count:
            raise LoadFailed(f"{self.name} was started with too few auctions")
        return [f"00000000-0000-4000-8000-{number:012x}" for number in numbers]

    def processes(self) -> dict[str, list[int]]:
        return processes_of(self._pid, "server", self.data_dir)


@contextmanager
def running_peer(name: str, auctions: int, data_dir: Path | None = None) -> Iterator[Peer]:
    """Start a peer with so many auctions, and stop it afterwards. Raises `LoadFailed`.

    Args:
        name: one of `NAMES`, for which `why_not` has no reason.
        auctions: how many there are from the start; there will be no more.
        data_dir: where a peer in Python keeps its database; without it a fresh folder, which is removed afterwards.
    """
    if name in IN_JAVASCRIPT:
        with _started(["node", str(_NODE / IN_JAVASCRIPT[name])], auctions, None) as (url, pid):
            yield Peer(name, url, pid, auctions, None)
        return
    with tempfile.TemporaryDirectory(prefix="gavel-peer-") as folder:
        # Postgres, as another user, must be able to reach its folder.
        Path(folder).chmod(0o755)
        kept = data_dir or Path(folder) / "data"
        command = [sys.executable, "-m", f"loadtests.peers.{name}", "--data-dir", str(kept)]
        with _started(command, auctions, kept) as (url, pid):
            yield Peer(name, url, pid, auctions, kept)


def _started(command: list[str], auctions: int, data_dir: Path | None) -> AbstractContextManager[tuple[str, int]]:
    environment = os.environ | _ENVIRONMENT
    arguments = [*command, "--port", "0", "--auctions", str(auctions)]
    return started(arguments, environment=environment, data_dir=data_dir)


def why_not(name: str) -> str | None:
    """Why this peer cannot run here, as a sentence; None if it can. Installs what it needs at the first time."""
    if name in IN_PYTHON:
        return None
    if shutil.which("node") is None or shutil.which("npm") is None:
        return f"{name} was left out, for Node is missing."
    if _is_installed():
        return None
    try:
        subprocess.run(["npm", "ci"], cwd=_NODE, check=True, capture_output=True, text=True, timeout=_INSTALL_S)  # noqa: S607
    except (OSError, subprocess.SubprocessError) as error:
        return f"{name} was left out, for npm cannot install its packages ({type(error).__name__})."
    return None


def _is_installed() -> bool:
    """Whether npm has installed what the lock file names: it writes this file last."""
    installed = _NODE / "node_modules" / ".package-lock.json"
    return installed.exists() and installed.stat().st_mtime >= (_NODE / "package-lock.json").stat().st_mtime
