"""The command line: help without waiting, and one sentence instead of a traceback."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from gavel.__main__ import COMMANDS, INTERRUPTED, main
from gavel.errors import CommandError
from loadtests.scenarios import SCENARIOS

USER = "5f0c3f5e-8a53-4c0a-9d53-1f6f1a2b3c4d"
# Those whose files are there; the whole is checked once all are.
PRESENT = [name for name in COMMANDS if importlib.util.find_spec(f"gavel.{name}")]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, prog_name="gavel")


def refused(result: Result, exit_code: int) -> str:
    assert result.exit_code == exit_code
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("gavel: ")
    return result.stderr.removeprefix("gavel: ").strip()


def test_help_lists_all_commands() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    assert all(name in result.stdout and sentence in result.stdout for name, sentence in COMMANDS.items())


@pytest.mark.parametrize("name", [name for name in PRESENT if name not in ("up", "verify")])
def test_each_command_has_help_with_examples(name: str) -> None:
    result = invoke(name, "--help")
    assert result.exit_code == 0, result.stderr
    assert f"gavel {name} " in result.stdout.split("Examples:")[1]


def test_the_benchmark_names_its_scenarios() -> None:
    printed = invoke("bench", "--help").stdout
    assert all(f"  {name} " in printed for name in SCENARIOS)


def test_help_waits_for_no_library() -> None:
    program = (
        "import sys\n"
        "from gavel.__main__ import main\n"
        "try: main(['--help'], prog_name='gavel')\n"
        "except SystemExit: pass\n"
        "print(sorted({'ray', 'pydantic', 'rich', 'httpx', 'websockets', 'uvloop', 'jwt'} & sys.modules.keys()))"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["sell"], "No such command 'sell'. See `gavel --help`."),
        (["token", "somebody"], "'somebody' is not a valid UUID. See `gavel token --help`."),
        (["token", USER, "--ttl", "soon"], "write it as 90, 15m, 1h or 7d. See `gavel token --help`."),
        (["watch"], "Missing argument 'AUCTION'. See `gavel watch --help`."),
        (["replay", "/no/such/file"], "does not exist. See `gavel replay --help`."),
        (["bench", "sell"], "See `gavel bench --help`."),
        (["bench", "bids", "--runs", "0"], "See `gavel bench --help`."),
        (["bench", "--url", "http://127.0.0.1:1"], "--url goes with one scenario"),
        (["bench", "bids", "--data-dir", "/tmp"], "--data-dir belongs to --url; without --url"),
    ],
)
def test_wrong_usage_is_one_sentence(arguments: list[str], sentence: str) -> None:
    assert sentence in refused(invoke(*arguments), 2)


def test_without_arguments_there_is_help() -> None:
    result = invoke()
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage: gavel")


def test_a_mistyped_variable_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAVEL_PROT", "1")
    assert refused(invoke("token", USER), 1) == "GAVEL_PROT is not a setting of Gavel; did you mean GAVEL_PORT?"


def test_a_folder_without_keys_is_one_sentence(tmp_path: Path) -> None:
    assert "start `gavel up` once" in refused(invoke("token", USER, "--data-dir", str(tmp_path)), 1)


@pytest.mark.parametrize("command", ["watch", "replay"])
def test_an_impossible_address_is_one_sentence(command: str, tmp_path: Path) -> None:
    from gavel.keys import ensure_keys

    ensure_keys(tmp_path)
    history = tmp_path / "history.csv"
    history.write_text("auctionid,bid,bidtime,bidder,openbid,price,item\n1,2,0.5,ann,1,1,thing\n")
    arguments = {"watch": [USER], "replay": [str(history), "--data-dir", str(tmp_path)]}[command]
    sentence = refused_at_the_end(invoke(command, *arguments, "--url", "gavel.example"))
    assert sentence == "gavel: 'gavel.example' is not an address of Gavel; write it like http://127.0.0.1:8700."


def refused_at_the_end(result: Result) -> str:
    assert result.exit_code == 1
    return result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("raised", "exit_code", "sentence"),
    [
        (CommandError("One thing\nis wrong; do another."), 1, "One thing is wrong; do another."),
        (KeyboardInterrupt(), INTERRUPTED, "interrupted."),
        (click.ClickException("No."), 1, "No."),
    ],
)
def test_known_errors_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, raised: BaseException, exit_code: int, sentence: str
) -> None:
    def fail() -> None:
        raise raised

    monkeypatch.setattr(main, "get_command", _always(click.Command("fail", callback=fail)))
    result = invoke("fail")
    assert result.exit_code == exit_code
    assert result.stderr.strip() == f"gavel: {sentence}"


def test_a_command_may_end_with_a_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "get_command", _always(click.Command("three", callback=lambda: 3)))
    assert invoke("three").exit_code == 3


def _always(command: click.Command) -> Callable[[click.Context, str], click.Command]:
    return lambda _context, _name: command
