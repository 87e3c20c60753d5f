"""A whole engine for tests: `gavel up` with its Ray and its Postgres, as processes to be found, stopped and killed.

`gavel up` begins a session of its own, in which all of Ray stays, its workers in their own process groups and orphans
too. Each process of Postgres begins one as well, but works in the folder of its data.
"""

import asyncio
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import UUID

import asyncpg
import psutil

from actors.journal import SELECT_ROWS, Row, row_of
from engine.commands import Role
from gateway.tokens import issue
from gavel.keys import KeyPair, read_keys

ROOT = Path(__file__).resolve().parent.parent.parent
START_S = 90
STOP_S = 60
COMMAND_S = 90
LOOK_S = 0.05
TOKEN_TTL_S = 3_600

# Below the range from which the kernel takes the local ports of clients: a client that tries a port on which nobody
# listens just now could otherwise be given that very port, and be connected to itself.
PORTS = range(20_000, 32_000)


def free_port() -> int:
    """A port on which nobody listens, and nobody will by chance."""
    for port in random.sample(PORTS, 100):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("there is no free port")


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    """Wait until something is so; `what` completes the sentence "waited too long: …"."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited too long: {what}"
        time.sleep(LOOK_S)


class Engine:
    """One engine with a folder of its own. `with` it: at the end nothing of it is left, however the test went."""

    def __init__(self, *options: str, environment: Mapping[str, str] | None = None) -> None:
        # Not pytest's folder: Postgres, as another user, must be able to reach it, and Ray's sockets want short paths.
        self.folder = Path(tempfile.mkdtemp(prefix="gt-", dir="/tmp"))
        self.folder.chmod(0o755)
        self.data_dir = self.folder / "d"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.live_url = f"ws://127.0.0.1:{self.port}/v1/live"
        self.database_url = f"postgresql://postgres@/postgres?host={self.data_dir / 'postgres'}"
        self.tokens: list[str] = []
        self._options = options
        self._environment = environment or {}
        self._starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._session = 0

    # Starting, stopping, killing

    def start(self, *options: str) -> Self:
        """Start `gavel up`, with options for this time only beside the usual ones; return when it says `ready`."""
        assert self._process is None, "it runs"
        self._starts += 1
        arguments = ["up", "--port", str(self.port), "--data-dir", str(self.data_dir), *self._options, *options]
        with self.output_path.open("wb") as output, self.errors_path.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "gavel", *arguments],
                cwd=ROOT,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                start_new_session=True,
            )
        self._session = self._process.pid
        wait_until(self._is_ready, "`gavel up` is not ready", START_S)
        assert self.output_path.read_text() == f"ready {self.url}\n"
        return self

    def stop(self, number: signal.Signals = signal.SIGTERM, *, is_to_the_group: bool = False) -> None:
        """Have it stop, by a signal to `gavel up` or, as a terminal does it, to its process group.

        It must end with exit code 0 and leave no process.
        """
        assert self._process is not None, "it does not run"
        process, self._process = self._process, None
        if is_to_the_group:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        try:
            code = process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process = process
            raise
        assert code == 0, f"`gavel up` ended with {code}: {self.errors_path.read_text()}"
        wait_until(lambda: not self.processes(), f"processes are left: {self.processes()}")

    def kill_everything(self) -> None:
        """`kill -9` every process of the engine at once, its Ray and its Postgres included."""
        doomed = self.processes()
        # First they are stopped, so that none lives to see another die.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in doomed:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
        if self._process is not None:
            self._process.wait()
            self._process = None
        # Whoever was just being born.
        while remaining := self.processes():
            for process in remaining:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(LOOK_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self._process is not None and error is None:
                self.stop()
        finally:
            self.kill_everything()
            shutil.rmtree(self.folder, ignore_errors=True)

    # Its processes

    def processes(self) -> list[psutil.Process]:
        """All that live, whoever their parent is by now."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                is_dead = process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
                if not is_dead and (os.getsid(process.pid) == self._session or self._is_postgres(process)):
                    found.append(process)
        return found

    def pid_of(self, name: str) -> int:
        """The process of `shard-0`, `gateway-0`, …: the one that listens where that one takes connections.

        Ray gives all shards the same process title. Waits for one that Ray is just starting again.
        """
        kind, _, number = name.partition("-")
        found: list[int] = []

        def is_found() -> bool:
            address = self.fetch("SELECT address FROM shards WHERE shard_id = $1", int(number))[0][0]
            port = self.port if kind == "gateway" else int((address or ":0").rpartition(":")[2])
            found[:] = [process.pid for process in self.processes() if port in _listening(process)]
            return bool(found)

        wait_until(is_found, f"there is no {name}")
        assert kind == "shard" or len(found) == 1, "with several gateways a port does not tell which"
        return found[0]

    # Its database

    def fetch(self, query: str, *arguments: object) -> list[Any]:
        """What its Postgres answers."""

        async def fetch() -> list[Any]:
            connection = await asyncpg.connect(self.database_url)
            try:
                return list(await connection.fetch(query, *arguments))
            finally:
                await connection.close()

        # In a loop of its own: an asynchronous test has one that runs.
        result: list[list[Any]] = []
        thread = threading.Thread(target=lambda: result.append(asyncio.run(fetch())))
        thread.start()
        thread.join()
        assert result, "the query failed"
        return result[0]

    def epochs(self) -> dict[int, int]:
        """The epoch of each shard."""
        return dict(tuple(row) for row in self.fetch("SELECT shard_id, epoch FROM shards"))

    def journal_rows(self) -> list[Row]:
        """The whole journal."""
        return [row_of(record) for record in self.fetch(SELECT_ROWS)]

    # Its users, its command line, its logs

    @property
    def keys(self) -> KeyPair:
        return read_keys(self.data_dir)

    def token(self, user: UUID, role: Role = "viewer", ttl_s: int = TOKEN_TTL_S, now_ms: int | None = None) -> str:
        """An access token, which `leaks` will look for in the logs."""
        now_ms = time.time_ns() // 1_000_000 if now_ms is None else now_ms
        token = issue(self.keys.private_pem, user, role, ttl_s, now_ms)
        self.tokens.append(token)
        return token

    def environment(self, **more: str) -> dict[str, str]:
        """What its processes get: nothing of Gavel's from whoever runs the tests, and a place for temporary files."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("GAVEL_")}
        return {**inherited, "PYTHONPATH": str(ROOT), "TMPDIR": str(self.folder), **self._environment, **more}

    def gavel(self, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        """Run a command of the command line to its end."""
        command = subprocess.Popen(
            [sys.executable, "-m", "gavel", *arguments],
            cwd=ROOT,
            env=self.environment(COLUMNS="200", **environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        with command:
            try:
                output, errors = command.communicate(timeout=COMMAND_S)
            except subprocess.TimeoutExpired:
                # Not killed: it may have started an engine.
                command.terminate()
                raise
        return subprocess.CompletedProcess(command.args, command.returncode, output, errors)

    def verify(self) -> str:
        """Run `gavel verify --all`, which must find nothing; return its line."""
        verified = self.gavel("verify", "--all", "--data-dir", str(self.data_dir))
        assert verified.returncode == 0, verified.stdout + verified.stderr
        return verified.stdout

    @property
    def output_path(self) -> Path:
        return self.folder / f"output-{self._starts}"

    @property
    def errors_path(self) -> Path:
        return self.folder / f"errors-{self._starts}"

    def logs(self) -> dict[Path, str]:
        """Each log with its text: of Gavel's processes, of Postgres, and, while it runs, of Ray."""
        ours = [*self.folder.glob("output-*"), *self.folder.glob("errors-*"), *self.data_dir.glob("logs/*")]
        others = [self.data_dir / "postgres" / "log", *self.folder.glob("gavel-ray-*/session_2*/logs/**/*")]
        return {path: path.read_text(errors="replace") for path in ours + others if path.is_file()}

    def leaks(self) -> list[str]:
        """What stands in the logs and must not: tracebacks of ours, tokens, secrets."""
        pem = [line for line in self.keys.private_pem.decode().splitlines() if not line.startswith("-")]
        # A token's signature is its secret part; with that of a key, any line will do.
        secrets = {*pem, *(token.rpartition(".")[2] for token in self.tokens)} - {""}
        secrets.add((self.data_dir / "keys" / "cluster_secret").read_text())
        pattern = re.compile("|".join(map(re.escape, secrets)))
        found = []
        for path, text in self.logs().items():
            if pattern.search(text):
                found.append(f"{path} holds a secret")
            # What Ray's own processes say about themselves is not ours; what our actors say in its workers is.
            is_ours = "gavel-ray-" not in str(path) or path.name.startswith("worker-")
            if is_ours and "Traceback" in text:
                found.append(f"{path} holds a traceback: {text[text.index('Traceback') :][:4_000]}")
        return found

    # The details

    def _is_postgres(self, process: psutil.Process) -> bool:
        try:
            return Path(process.cwd()) == self.data_dir / "postgres"
        except (psutil.AccessDenied, OSError):
            return False  # Somebody else's

    def _is_ready(self) -> bool:
        assert self._process is not None
        code = self._process.poll()
        assert code is None, f"`gavel up` ended with {code}: {self.errors_path.read_text()}"
        return self.output_path.read_bytes().endswith(b"\n")


@contextmanager
def running(*options: str) -> Iterator[Engine]:
    """An engine that runs."""
    with Engine(*options) as engine:
        yield engine.start()


def _listening(process: psutil.Process) -> set[int]:
    with suppress(psutil.NoSuchProcess):
        connections = process.net_connections("tcp")
        return {connection.laddr.port for connection in connections if connection.status == psutil.CONN_LISTEN}
    return set()
