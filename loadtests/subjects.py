"""What is measured: a server that has been started, ours with a folder of its own or one that runs already."""

import http.client
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any, Final, Protocol
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import psutil

from engine.commands import Role
from gateway.tokens import issue
from loadtests.clients import PLAIN, Framing
from loadtests.measured import LoadFailed

READY: Final = "ready "
READY_TIMEOUT_S: Final = 120
STOP_TIMEOUT_S: Final = 30
HTTP_TIMEOUT_S: Final = 15
OPENED_AT_ONCE: Final = 8
TOKEN_TTL_S: Final = 6 * 60 * 60
LOG_LINES: Final = 5

_ROLES: Final = {"ray::ShardActor": "shard", "ray::GatewayActor": "gateway"}
"""What Ray calls our processes."""


class Subject(Protocol):
    """A server that serves the live protocol and is being measured."""

    name: str
    """`gavel`, or the name of a peer, such as `row_lock`."""
    url: str
    """Like http://127.0.0.1:8700."""
    framing: Framing
    """How it wraps the messages of the live protocol."""
    data_dir: Path | None
    """Where its data lie, if it has any and we may look at them."""

    def token(self, user: UUID, role: Role) -> str:
        """What proves that a client is `user`."""
        ...

    def open_auctions(self, count: int, **terms: Any) -> list[str]:  # noqa: ANN401 (as JSON has them)
        """Open auctions and return their ids.

        Every minor unit is a step, nothing moves the end, which is a day away; `terms` (fields of the HTTP API) change
        that where the subject can. Raises `LoadFailed`.
        """
        ...

    def processes(self) -> dict[str, list[int]]:
        """The ids of its processes that live now, by role: `gateway`, `shard`, `postgres`, `server`, `other`."""
        ...


class Engine:
    """A running Gavel."""

    name: str = "gavel"
    framing: Framing = PLAIN

    def __init__(self, url: str, data_dir: Path, pid: int | None = None) -> None:
        """`pid`: that of its `gavel up`, without which its processes are not known."""
        self.url = url.rstrip("/")
        self.data_dir: Path | None = data_dir
        self._pid = pid
        try:
            # The private key comes first in it.
            self._private_pem = (data_dir / "keys" / "signing_keys.pem").read_bytes()
        except OSError as error:
            raise LoadFailed(f"the engine's keys in {data_dir} cannot be read ({error.strerror})") from error

    def token(self, user: UUID, role: Role) -> str:
        return issue(self._private_pem, user, role, TOKEN_TTL_S, time.time_ns() // 1_000_000)

    def open_auctions(self, count: int, **terms: Any) -> list[str]:  # noqa: ANN401 (as JSON has them)
        end = datetime.now(UTC) + timedelta(days=1)
        body = {
            "title": "An auction of the benchmark",
            "currency": "USD",
            "starting_price": "0.01",
            "minimum_bid_increment": "0.01",
            "end_time": end.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "soft_close": None,
            **terms,
        }
        token = self.token(uuid4(), "maker")
        shares = [len(range(first, count, OPENED_AT_ONCE)) for first in range(OPENED_AT_ONCE)]
        try:
            with ThreadPoolExecutor(OPENED_AT_ONCE) as threads:
                opened = list(threads.map(lambda share: self._open(share, json.dumps(body), token), shares))
        except (OSError, http.client.HTTPException) as error:
            raise LoadFailed(f"the engine at {self.url} cannot be reached ({error})") from error
        return [auction for part in opened for auction in part]

    def _open(self, count: int, body: str, token: str) -> list[str]:
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=HTTP_TIMEOUT_S)
        auctions = []
        try:
            for _ in range(count):
                connection.request("POST", "/api/v1/auctions", body, headers)
                response = connection.getresponse()
                try:
                    auctions.append(str(json.loads(response.read())["data"]["auction_id"]))
                except (ValueError, KeyError, TypeError) as error:
                    sentence = f"the engine at {self.url} opens no auction (HTTP {response.status})"
                    raise LoadFailed(sentence) from error
        finally:
            connection.close()
        return auctions

    def processes(self) -> dict[str, list[int]]:
        if self._pid is None:
            return {}
        return processes_of(self._pid, "other", self.data_dir)


class OwnEngine(Engine):
    """One that we have started, and can start anew on its folder."""

    def __init__(self, data_dir: Path, running: ExitStack) -> None:
        """`running`: what it runs on, and what ends it when it is closed."""
        self._running = running
        self._start(data_dir)

    def _start(self, data_dir: Path) -> None:
        arguments = [sys.executable, "-m", "gavel", "up", "--port", "0", "--data-dir", str(data_dir)]
        # What the environment of this process says about an engine is not about this one.
        environment = {name: value for name, value in os.environ.items() if not name.upper().startswith("GAVEL_")}
        began = time.perf_counter()
        url, pid = self._running.enter_context(started(arguments, environment=environment, data_dir=data_dir))
        self.ready_s = time.perf_counter() - began
        """How long it took to start, the last time."""
        super().__init__(url, data_dir, pid)

    def restart(self) -> None:
        """Stop it and start it again; it is then at another address. Raises `LoadFailed`."""
        assert self.data_dir is not None
        self._running.close()
        self._start(self.data_dir)


@contextmanager
def own_engine() -> Iterator[OwnEngine]:
    """Start `gavel up` on a free port and a fresh folder, and stop it afterwards. Raises `LoadFailed`."""
    with tempfile.TemporaryDirectory(prefix="gavel-bench-") as folder, ExitStack() as running:
        # Postgres, as another user, must be able to reach its folder.
        Path(folder).chmod(0o755)
        yield OwnEngine(Path(folder) / "data", running)


@contextmanager
def started(
    arguments: Sequence[str], *, environment: Mapping[str, str] | None = None, data_dir: Path | None = None
) -> Iterator[tuple[str, int]]:
    """Start a server that prints `ready URL` when it serves and ends on SIGTERM. Gives its URL and process id.

    One that does not end in time is killed, with all that it started, the Postgres in its `data_dir` too. Raises
    `LoadFailed`, with the last lines of what it printed as errors.
    """
    with tempfile.TemporaryFile("w+") as errors:
        server = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
        try:
            yield _ready_url(server, errors), server.pid
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                _kill(server, data_dir)


def _kill(server: subprocess.Popen[str], data_dir: Path | None) -> None:
    """End a server at once, and all that it started."""
    # Before the first of them is gone: afterwards nobody knows whose the others are.
    pids = [pid for pids in processes_of(server.pid, "server", data_dir).values() for pid in pids]
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    server.wait()


def processes_of(pid: int, role: str, data_dir: Path | None) -> dict[str, list[int]]:
    """The living processes of a server by role: the first, which has this one, all that it started, and Postgres."""
    found = {role: [pid]}
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            title = next(iter(process.cmdline()), "")
            its_role = next((its_role for prefix, its_role in _ROLES.items() if title.startswith(prefix)), "other")
            found.setdefault(its_role, []).append(process.pid)
    if data_dir is not None:
        # The embedded Postgres is nobody's child, but works in its folder.
        found["postgres"] = _working_in(data_dir / "postgres")
    return found


def cpu_seconds(processes: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """The processor time that processes have taken since they began, by role; of those that live."""
    return {role: sum(_cpu_seconds(pid) for pid in pids) for role, pids in processes.items()}


def memory_bytes(pids: Sequence[int]) -> int:
    """The memory of processes, of which what they share counts once (their PSS)."""
    total = 0
    for pid in pids:
        with suppress(psutil.Error):
            full = psutil.Process(pid).memory_full_info()
            total += getattr(full, "pss", full.rss)
    return total


def _cpu_seconds(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0
    return float(times.user + times.system)


def _working_in(folder: Path) -> list[int]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if Path(process.cwd()) == folder:
                found.append(process.pid)
    return found


def _ready_url(server: subprocess.Popen[str], errors: IO[str]) -> str:
    lines: queue.Queue[str | None] = queue.Queue()
    assert server.stdout is not None
    # To the very end: a server whose pipe is full would stand still.
    threading.Thread(target=_read_lines, args=(server.stdout, lines), daemon=True).start()
    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        try:
            line = lines.get(timeout=max(0, deadline - time.monotonic()))
        except queue.Empty:
            raise LoadFailed(f"the server is not ready after {READY_TIMEOUT_S} s{_last_lines(errors)}") from None
        if line is None:
            raise LoadFailed(f"the server ended before it was ready{_last_lines(errors)}")
        if line.startswith(READY):
            return line.removeprefix(READY).strip()


def _last_lines(errors: IO[str]) -> str:
    errors.seek(0)
    lines = errors.read().splitlines()[-LOG_LINES:]
    return f"; it said: {' / '.join(lines)}" if lines else ""


def _read_lines(stream: IO[str], lines: "queue.Queue[str | None]") -> None:
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(None)
