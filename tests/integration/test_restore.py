"""The archive, backups and restores, on a Postgres without an engine."""

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import asyncpg
import psutil
import pytest
from click.testing import CliRunner, Result

from gavel import archive as archive_module
from gavel.__main__ import main
from gavel.archive import Archive, claim
from gavel.keys import ensure_keys, ensure_secret, read_keys
from gavel.postgres import EmbeddedPostgres, folder_of, held, reachable_database
from gavel.settings import load_settings
from tests.support.waiting import until

COPIED = "the write-ahead log is copied to "


class Made(NamedTuple):
    """A data folder with its archive and a backup; its table `kept` has the numbers 1 to 3."""

    folder: Path
    data_dir: Path
    archive: Path
    backup: Path
    moments: list[datetime]
    """Before the backup, and after the first, the second and the third number."""


def gavel(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="gavel")


def refusal(result: Result) -> str:
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture(autouse=True)
def _no_settings_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.startswith("GAVEL_")]:
        monkeypatch.delenv(variable)


@pytest.fixture(scope="module")
def made() -> Iterator[Made]:
    # Not pytest's folder: Postgres, as another user, must be able to reach it.
    folder = Path(tempfile.mkdtemp(prefix="gr-", dir="/tmp"))
    folder.chmod(0o755)
    try:
        yield asyncio.run(_made(folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _made(folder: Path) -> Made:
    """Have a Postgres archived, backed up and stopped in good order, while numbers are put into it."""
    made = Made(folder, folder / "d", folder / "archive", folder / "backup", [])
    ensure_keys(made.data_dir)
    ensure_secret(made.data_dir)
    claim(made.data_dir, made.archive)

    async def work(connection: asyncpg.Connection) -> None:
        made.moments.append(datetime.now(UTC))
        await connection.execute("CREATE TABLE kept (number integer)")
        for number in (1, 2, 3):
            await connection.execute("INSERT INTO kept VALUES ($1)", number)
            made.moments.append(datetime.now(UTC))
            if number == 1:
                backed_up = await asyncio.to_thread(gavel, "backup", made.backup, "--data-dir", made.data_dir)
                assert backed_up.exit_code == 0, backed_up.stderr
                assert backed_up.stdout.startswith(f"{made.backup} holds the backup; with the archive every moment ")

    # As `gavel up` does: whoever holds the folder starts and stops its Postgres.
    with held(made.data_dir):
        await _archived(made.data_dir, made.archive, work)
    return made


async def _archived(data_dir: Path, folder: Path, work: Callable[[asyncpg.Connection], Awaitable[None]]) -> list[str]:
    """Do some work on a Postgres that is archived, and stop both in good order; what was said."""
    said: list[str] = []
    postgres = EmbeddedPostgres(data_dir)
    archive = Archive(folder, said.append)
    url = await asyncio.to_thread(postgres.start)
    keeping = asyncio.create_task(archive.keep(url))
    try:
        await until(lambda: bool(said))
        connection = await asyncpg.connect(url)
        await work(connection)
        await connection.close()
    finally:
        keeping.cancel()
        await asyncio.to_thread(postgres.stop)
        await archive.close()
    return said


def numbers(data_dir: Path) -> list[int]:
    """What the table `kept` of a data folder has."""

    async def read(url: str) -> list[int]:
        connection = await asyncpg.connect(url)
        try:
            return [row["number"] for row in await connection.fetch("SELECT number FROM kept ORDER BY number")]
        finally:
            await connection.close()

    with reachable_database(load_settings(data_dir=data_dir)) as url:
        return asyncio.run(read(url))


@pytest.fixture
def target(made: Made) -> Iterator[Path]:
    """A data folder to be restored."""
    folder = made.folder / "restored"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


# What is restored


def test_a_backup_alone_is_what_was_there_when_it_was_made(made: Made, target: Path) -> None:
    result = gavel("restore", made.backup, "--data-dir", target)
    assert result.exit_code == 0, result.stderr
    assert numbers(target) == [1]
    assert read_keys(target) == read_keys(made.data_dir)


def test_with_the_archive_all_is_there_that_was_committed_before_a_stop_in_good_order(made: Made, target: Path) -> None:
    result = gavel("restore", made.backup, "--archive", made.archive, "--data-dir", target)
    assert result.exit_code == 0, result.stderr
    assert f"{target} is restored; the last change in it was committed at " in result.stdout
    assert numbers(target) == [1, 2, 3]


def test_a_moment_is_kept_to_the_commit(made: Made, target: Path) -> None:
    moment = made.moments[2].isoformat()
    result = gavel("restore", made.backup, "--archive", made.archive, "--to", moment, "--data-dir", target)
    assert result.exit_code == 0, result.stderr
    assert numbers(target) == [1, 2]
    # The server begins anew, with the settings that it had, and its own log.
    assert "recovery_target" not in (folder_of(target) / "postgresql.auto.conf").read_text()
    assert not (target / "archived_to").exists()


# What cannot be restored


def test_a_moment_before_the_backup(made: Made, target: Path) -> None:
    moment = made.moments[0].isoformat()
    result = gavel("restore", made.backup, "--archive", made.archive, "--to", moment, "--data-dir", target)
    assert "name a later moment, or an earlier backup" in refusal(result)
    assert not target.exists()


def test_a_moment_after_the_end_of_the_archive(made: Made, target: Path) -> None:
    moment = (made.moments[-1] + timedelta(hours=1)).isoformat()
    result = gavel("restore", made.backup, "--archive", made.archive, "--to", moment, "--data-dir", target)
    assert "The archive ends before that moment" in refusal(result)
    assert not target.exists()


def test_a_damaged_backup(made: Made, target: Path) -> None:
    damaged = made.folder / "damaged"
    shutil.copytree(made.backup, damaged)
    (folder_of(damaged) / "PG_VERSION").write_text("9\n")
    assert "damaged" in refusal(gavel("restore", damaged, "--data-dir", target))
    assert not target.exists()


def test_a_folder_that_is_no_backup(made: Made, target: Path) -> None:
    assert "holds no whole backup" in refusal(gavel("restore", made.archive, "--data-dir", target))


def test_nothing_is_overwritten(made: Made) -> None:
    assert "is not empty" in refusal(gavel("restore", made.backup, "--data-dir", made.data_dir))
    assert "is there already" in refusal(gavel("backup", made.backup, "--data-dir", made.data_dir))
    assert numbers(made.data_dir) == [1, 2, 3]


@pytest.mark.parametrize("command", ["backup", "restore"])
def test_a_server_has_tools_of_its_own(made: Made, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAVEL_DATABASE_URL", "postgresql://anna:sesame@127.0.0.1:1/gavel")
    result = gavel(command, made.backup, "--data-dir", made.folder / "other")
    assert "GAVEL_DATABASE_URL names a server" in refusal(result)


@pytest.mark.parametrize("moment", ["now", "2026-11-21", "2026-11-21T18:30:00"])
def test_a_moment_needs_its_time_zone(made: Made, target: Path, moment: str) -> None:
    result = gavel("restore", made.backup, "--archive", made.archive, "--to", moment, "--data-dir", target)
    assert "is not a moment with its time zone" in refusal(result)


def test_a_moment_needs_the_archive(made: Made, target: Path) -> None:
    result = gavel("restore", made.backup, "--to", "2026-11-21T18:30:00Z", "--data-dir", target)
    assert "needs the archive" in refusal(result)


# The archive


@pytest.fixture
def data_dir() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="gr-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


async def test_copying_that_ends_is_begun_again(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_module, "_SETTLED_S", 0.1)
    folder = data_dir / "archive"
    claim(data_dir, folder)

    async def kill(_: asyncpg.Connection) -> None:
        first = _copying(folder)
        first.send_signal(signal.SIGKILL)
        await until(lambda: not first.is_running() and any(_copies(process, folder) for process in _children()))

    said = await _archived(data_dir, folder, kill)
    assert said[0] == f"{COPIED}{folder}"


def _children() -> list[psutil.Process]:
    return psutil.Process().children()


def _copies(process: psutil.Process, folder: Path) -> bool:
    try:
        return f"--directory={folder}" in process.cmdline()
    except psutil.Error:
        return False


def _copying(folder: Path) -> psutil.Process:
    (process,) = [process for process in _children() if _copies(process, folder)]
    return process


async def test_what_an_engine_that_was_killed_has_left_behind_is_ended(data_dir: Path) -> None:
    folder = data_dir / "archive"
    claim(data_dir, folder)
    postgres = EmbeddedPostgres(data_dir)
    left_behind, archive = Archive(folder, print), Archive(folder, print)
    url = await asyncio.to_thread(postgres.start)
    try:
        await left_behind._start(url)
        await archive._start(url)
        assert left_behind._process is not None
        await left_behind._process.wait()
        assert archive._process is not None
        assert archive._process.returncode is None
    finally:
        await asyncio.to_thread(postgres.stop)
        await archive.close()


async def test_an_archive_that_cannot_be_written_is_said_once_and_tried_again(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gavel.supervision.PAUSE_S", 0.001)
    folder = data_dir / "archive"
    postgres, said = EmbeddedPostgres(data_dir), list[str]()
    archive = Archive(folder, said.append)
    keeping = asyncio.create_task(archive.keep(await asyncio.to_thread(postgres.start)))
    try:
        await until(lambda: bool(said))
        assert said == [
            f"The write-ahead log is not copied to {folder} "
            f'(pg_receivewal: error: could not open directory "{folder}": No such file or directory), '
            "so what is committed now could not be restored; that is tried again."
        ]
        folder.mkdir()
        await until(lambda: len(said) > 1)
        assert said[1:] == [f"{COPIED}{folder}"]
    finally:
        keeping.cancel()
        await asyncio.to_thread(postgres.stop)
        await archive.close()
