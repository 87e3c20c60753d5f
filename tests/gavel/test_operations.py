"""The page on operations against the program: its sentences are said, its commands and settings are there."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from gavel.settings import PREFIX, Settings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
FAILURES = PAGE.split("\n## When something fails\n")[1]
SOURCES = "\n".join(
    path.read_text(encoding="utf-8")
    for layer in ("gavel", "gateway", "actors")
    for path in (ROOT / layer).rglob("*.py")
)
SPEAKERS = {"gavel up", "postgres/log"}
OF_OTHERS = {"No space left on device", "TimeoutError"}
"""What the system and Python say."""
COMMANDS = re.findall(r"^(?:ExecStart=\S+/)?(gavel .+)$", PAGE, re.MULTILINE)


def said() -> list[str]:
    """What the logs say, by the page."""
    columns = [line.split("|")[3] for line in FAILURES.splitlines() if line.startswith("| ")]
    return [quoted for cell in columns for quoted in re.findall("`([^`]+)`", cell)]


@pytest.mark.parametrize("sentence", sorted(set(said()) - SPEAKERS - OF_OTHERS))
def test_a_sentence_is_one_that_is_said(sentence: str) -> None:
    assert sentence in SOURCES


def test_the_settings_are_there() -> None:
    assert set(re.findall(rf"{PREFIX}[A-Z_]+", PAGE)) <= {PREFIX + name.upper() for name in Settings.model_fields}


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_can_be_given(line: str) -> None:
    _, name, *arguments = shlex.split(line)
    import_module(f"gavel.{name}").command.make_context(name, arguments)


def test_there_are_sentences_and_commands() -> None:
    assert len(said()) > 20
    assert len(COMMANDS) > 4
