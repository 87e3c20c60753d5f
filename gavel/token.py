"""`gavel token`: an access token for a user, signed with the key in the data folder."""

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import click

from engine.limits import SECOND_MS, TOKEN_TTL_MS_MAX

if TYPE_CHECKING:
    from engine.commands import Role

_UNITS: Final = {"": 1, "s": 1, "m": 60, "h": 60 * 60, "d": 24 * 60 * 60}


class Duration(click.ParamType[int]):
    """Seconds, or a number with its unit: `90`, `15m`, `1h`, `7d`. Gives whole seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:  # noqa: ANN401
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([0-9]{1,10})([smhd]?)", value)
        if match is None:
            self.fail(f"{value!r} is not a duration; write it as 90, 15m, 1h or 7d.", param, ctx)
        seconds = int(match[1]) * _UNITS[match[2]]
        if not 1 <= seconds <= TOKEN_TTL_MS_MAX // SECOND_MS:
            self.fail(f"{value!r} is not between 1s and 366d.", param, ctx)
        return seconds


@click.command(
    epilog="""\b
Examples:
  gavel token 5f0c3f5e-8a53-4c0a-9d53-1f6f1a2b3c4d
  gavel token "$(uuidgen)" --role maker --ttl 15m"""
)
@click.argument("user_id", type=click.UUID)
@click.option(
    "--role", type=click.Choice(["viewer", "maker", "moderator", "admin"]), default="viewer", show_default=True
)
@click.option("--ttl", type=Duration(), default="1h", show_default=True, help="How long it is good for.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="The engine's data folder.")
def command(user_id: UUID, role: "Role", ttl: int, data_dir: Path | None) -> None:
    """Print an access token for USER_ID (a UUID)."""
    from gateway.tokens import issue
    from gavel.keys import read_keys
    from gavel.settings import load_settings

    keys = read_keys(load_settings(data_dir=data_dir).data_dir)
    click.echo(issue(keys.private_pem, user_id, role, ttl, time.time_ns() // 1_000_000))
