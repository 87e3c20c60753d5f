"""`gavel`: the command line. A command is a file beside this one, imported when it is asked for."""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Final, NoReturn

import click

from gavel.errors import CommandError

COMMANDS: Final = {
    "up": "Run the engine: database, shards and gateways.",
    "token": "Print an access token for a user.",
    "suspend": "Lock a user out, or let it in again.",
    "watch": "Follow an auction in the terminal.",
    "replay": "Play a recorded bid history against an engine.",
    "verify": "Check the journal: order, hash chains, decisions.",
    "backup": "Write a backup of the embedded Postgres and the keys.",
    "restore": "Make a data folder as it was at a moment, from a backup.",
    "bench": "Measure the engine beside its peers, and write a report.",
    "simulate": "Run the engine on simulated time and faults, and judge it.",
}
INTERRUPTED: Final = 130
"""The exit code of a program that Ctrl-C ended: 128 and the signal's number."""


class CommandLine(click.Group):
    """A group that knows its commands by name, so that `gavel --help` need not import them."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        command = import_module(f"gavel.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def main(self, args: Sequence[str] | None = None, *more: Any, **named: Any) -> NoReturn:  # noqa: ANN401
        """Run, and end with one sentence instead of a traceback for whatever a person can put right."""
        named["standalone_mode"] = False
        try:
            result = super().main(args, *more, **named)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            sys.exit(error.exit_code)
        except click.UsageError as error:
            help_of = "gavel" if error.ctx is None else error.ctx.command_path
            _end(f"{error.format_message()} See `{help_of} --help`.", error.exit_code)
        except click.ClickException as error:
            _end(error.format_message(), error.exit_code)
        except click.Abort:
            _end("interrupted.", INTERRUPTED)
        except CommandError as error:
            _end(str(error), 1)
        sys.exit(result if isinstance(result, int) else 0)


def _end(sentence: str, code: int) -> NoReturn:
    # A path or a name in it may hold a line break.
    click.echo(f"gavel: {' '.join(sentence.split())}", err=True)
    sys.exit(code)


@click.group(
    cls=CommandLine,
    epilog="""\b
Examples:
  gavel up --demo
  gavel watch 5f0c3f5e-8a53-4c0a-9d53-1f6f1a2b3c4d
  gavel bench""",
)
@click.version_option(package_name="gavel")
def main() -> None:
    """Gavel, an engine for live auctions. `gavel COMMAND --help` tells more about a command."""


if __name__ == "__main__":
    main(prog_name="gavel")
