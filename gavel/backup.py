"""`gavel backup`: a copy of the embedded Postgres and of the signing keys, made while the engine runs."""

import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import click

from gavel.errors import CommandError
from gavel.keys import copy_keys
from gavel.postgres import folder_of, program, reachable_database
from gavel.settings import load_settings

COMPLETE_FILE: Final = "complete_at"
"""The moment from which on a backup can be restored; written last."""


@click.command(
    epilog="""\b
Examples:
  gavel backup /backups/monday
  gavel backup /backups/monday --data-dir ./data"""
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--data-dir", help="The engine's data folder.")
def command(folder: Path, data_dir: str | None) -> None:
    """Write a backup of the engine's journal and signing keys to FOLDER, a new one.

    The engine may run or not. `gavel restore` makes a data folder of it.
    """
    settings = load_settings(data_dir=data_dir)
    refuse_server(settings.database_url)
    if folder.exists():
        raise CommandError(f"{folder} is there already; name a folder that is not.")
    with reachable_database(settings) as database_url:
        try:
            folder.mkdir(mode=0o700, parents=True)
            _copy_database(database_url, folder_of(folder))
            copy_keys(settings.data_dir, folder)
            complete_at = datetime.now(UTC).isoformat()
            (folder / COMPLETE_FILE).write_text(complete_at)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise CommandError(f"{folder} cannot be written ({error.strerror}); name another folder.") from error
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    click.echo(f"{folder} holds the backup; with the archive every moment from {complete_at} on can be restored.")


def refuse_server(database_url: str | None) -> None:
    """Raise `CommandError` if the database is not the embedded one."""
    if database_url is not None:
        raise CommandError(
            "GAVEL_DATABASE_URL names a server; back it up and restore it with its own tools (docs/operations.md)."
        )


def _copy_database(database_url: str, folder: Path) -> None:
    arguments = [f"--dbname={database_url}", f"--pgdata={folder}", "--checkpoint=fast", "--no-password"]
    made = subprocess.run([program("pg_basebackup"), *arguments], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        raise CommandError(f"The backup was not made ({made.stderr.strip()}); put that right and try again.")
