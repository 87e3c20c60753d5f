"""The README against the program: its tables say what there is, and its Python is Python."""

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic_core import PydanticUndefined

from gavel.__main__ import COMMANDS
from gavel.settings import PREFIX, Settings, default_data_dir
from loadtests.scenarios import SCENARIOS

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SWARM_OPTIONS = Path(__file__).parents[2] / "loadtests" / "swarm" / "options.py"
DATA_DIR_DEFAULT = "root: `/var/lib/gavel`; others: their data folder"


def table_under(heading: str, head: str = "") -> list[list[str]]:
    """The cells of the first table under a heading (whose first column is called `head`), without its head."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (table, *_) = re.findall(rf"^\| {head}.*\n\| ---.*\n((?:\|.*\n)+)", section, re.MULTILINE)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]


def written_default(name: str, default: Any) -> str:
    if name == "data_dir":
        return DATA_DIR_DEFAULT
    assert default is not PydanticUndefined
    return "none" if default is None else f"`{default}`"


def test_the_settings_are_those_that_there_are() -> None:
    assert table_under("The settings") == [
        [f"`{PREFIX}{name.upper()}`", written_default(name, field.default), field.description]
        for name, field in Settings.model_fields.items()
    ]


def test_the_default_folder_is_the_one_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert f"`{default_data_dir()}`" in DATA_DIR_DEFAULT


def test_the_commands_are_those_that_there_are() -> None:
    assert table_under("The commands") == [[f"`gavel {name}`", sentence] for name, sentence in COMMANDS.items()]


def test_the_options_of_the_swarm_are_those_that_there_are() -> None:
    # Read, not imported: importing Locust changes the sockets of the whole process.
    options = re.findall(r'parser\.add_argument\(\s*"(--[a-z-]+)"', SWARM_OPTIONS.read_text(encoding="utf-8"))
    assert [row[0] for row in table_under("Load tests", "option")] == [f"`{name}`" for name in options]


def test_the_scenarios_are_those_that_there_are() -> None:
    assert table_under("Measure it") == [
        [f"`{name}`", scenario.about[0].lower() + scenario.about[1:].rstrip(".")]
        for name, scenario in SCENARIOS.items()
    ]


def test_the_python_is_ten_lines_that_compile() -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    compile(snippet, "README.md", "exec")
    assert len([line for line in snippet.splitlines() if line]) == 10


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#:]+)\)", README))
def test_a_link_leads_to_a_file(target: str) -> None:
    assert (Path(__file__).parents[2] / target).is_file()
