"""`gavel restore`: a data folder as it was at a moment, from a backup and the archive of what was written since."""

import re
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import click

from gavel.backup import COMPLETE_FILE, refuse_server
from gavel.errors import CommandError
from gavel.keys import copy_keys
from gavel.postgres import folder_of, give_to_postgres, held, program, recover
from gavel.settings import load_settings

_SEGMENT: Final = re.compile(r"(?P<name>[0-9A-F]{24})(?:\.partial)?")
_FIRST_SEGMENT: Final = re.compile(r"^START WAL LOCATION: .*\(file ([0-9A-F]{24})\)$", re.MULTILINE)
_LAST_KEPT: Final = re.compile(r"last completed transaction was at log time (\S+ \S+)")
_OF_ITS_PLACE: Final = shutil.ignore_patterns(".s.PGSQL.*", ".handle_pids.json", "log", "backup_manifest")
"""What a data folder of Postgres holds that belongs to the server that ran in it."""


class Moment(click.ParamType[datetime]):
    """A moment in ISO 8601, with its time zone."""

    name = "moment"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            moment = None
        if moment is None or moment.tzinfo is None:
            self.fail(f"{value!r} is not a moment with its time zone; write it as 2026-11-21T18:30:00Z.", param, ctx)
        return moment.astimezone(UTC)


@click.command(
    epilog="""\b
Examples:
  gavel restore /backups/monday --data-dir ./restored
  gavel restore /backups/monday --archive /backups/log --data-dir ./restored
  gavel restore /backups/monday --archive /backups/log --to 2026-11-21T18:30:00Z --data-dir ./restored"""
)
@click.argument("backup", type=click.Path(path_type=Path))
@click.option("--archive", type=click.Path(path_type=Path), help="The folder that GAVEL_ARCHIVE_DIR named.")
@click.option("--to", "moment", type=Moment(), help="The moment, in ISO 8601; without it, all that there is.")
@click.option("--data-dir", required=True, help="The folder to make: it must be empty, or not be there.")
def command(backup: Path, archive: Path | None, moment: datetime | None, data_dir: str) -> None:
    """Make a data folder from a BACKUP (of `gavel backup`) and the archive of what was written since.

    Whatever was committed up to the moment is there, and nothing later. `gavel up` starts an engine on it.
    """
    if moment is not None and archive is None:
        raise click.UsageError("A moment after the backup needs the archive: name it with --archive.")
    settings = load_settings(data_dir=data_dir)
    refuse_server(settings.database_url)
    _check_backup(backup, moment)
    folder = settings.data_dir
    if folder.exists() and any(folder.iterdir()):
        raise CommandError(f"{folder} is not empty; name a folder that is, or that is not there, with --data-dir.")
    try:
        with held(folder):
            # Under another name: one that was not recovered to the end would recover further than to the moment.
            _lay_out(backup, archive, folder / "restoring")
            last_kept = _recover(folder / "restoring", moment)
            (folder / "restoring").rename(folder_of(folder))
            # Not the cluster's secret: nothing of the engine that was may talk to the new one.
            copy_keys(backup, folder)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise CommandError(f"The backup cannot be copied ({error}); put that right and try again.") from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    click.echo(f"{folder} is restored; {last_kept}. Check it: gavel verify --all --data-dir {folder}")


def _check_backup(backup: Path, moment: datetime | None) -> None:
    try:
        complete_at = datetime.fromisoformat((backup / COMPLETE_FILE).read_text())
    except (OSError, ValueError) as error:
        raise CommandError(f"{backup} holds no whole backup; name a folder that `gavel backup` has made.") from error
    if moment is not None and moment < complete_at:
        # Postgres would restore to that later moment, and say nothing.
        raise CommandError(f"The backup is of {complete_at.isoformat()}; name a later moment, or an earlier backup.")
    arguments = ["--quiet", str(folder_of(backup))]
    checked = subprocess.run([program("pg_verifybackup"), *arguments], capture_output=True, text=True, check=False)
    if checked.returncode != 0:
        raise CommandError(f"{backup} is damaged ({checked.stderr.strip()}); take another backup.")


def _lay_out(backup: Path, archive: Path | None, folder: Path) -> None:
    """Make a folder of Postgres's that will begin with recovery."""
    shutil.copytree(folder_of(backup), folder, ignore=_OF_ITS_PLACE)
    if archive is not None:
        first = _FIRST_SEGMENT.search((folder / "backup_label").read_text())
        assert first is not None, "pg_verifybackup has read it"
        _copy_log(archive, first[1], folder / "pg_wal")
    (folder / "recovery.signal").touch()
    give_to_postgres(folder)


def _copy_log(archive: Path, first: str, folder: Path) -> None:
    """Copy what was archived from a segment on; the last one is not full yet."""
    for path in sorted(archive.iterdir()):
        segment = _SEGMENT.fullmatch(path.name)
        if segment is not None and segment["name"] >= first and not (folder / segment["name"]).exists():
            shutil.copyfile(path, folder / segment["name"])


def _recover(folder: Path, moment: datetime | None) -> str:
    """Have Postgres go through the log up to the moment; say how far it came."""
    # All of the log lies in its own folder already, where it looks when this has failed.
    settings = {"restore_command": "false"}
    if moment is not None:
        settings |= {"recovery_target_time": moment.isoformat(), "recovery_target_action": "promote"}
    is_done, log = recover(folder, settings)
    if "recovery ended before configured recovery target was reached" in log:
        raise CommandError("The archive ends before that moment; name an earlier one, or leave --to out for all of it.")
    if not is_done:
        raise CommandError(f"Postgres cannot recover from this ({log.strip().splitlines()[-1]}); try another backup.")
    kept = _LAST_KEPT.findall(log)
    return f"the last change in it was committed at {kept[-1]}" if kept else "nothing was committed after the backup"
