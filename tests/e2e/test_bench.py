"""`gavel bench --quick`, whole: it starts, measures and stops everything, and writes what it has measured."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from loadtests.goals import GOALS
from loadtests.measured import BROKE_OFF, LEFT_OUT
from loadtests.scenarios import SCENARIOS
from tests.e2e.engine import ROOT, Engine, wait_until

TIMEOUT_S = 230

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Give a folder as an engine has one: with a short path, and which Postgres can reach as another user."""
    engine = Engine()
    yield engine.folder
    shutil.rmtree(engine.folder)


def test_a_quick_benchmark_measures_everything_and_leaves_nothing(folder: Path) -> None:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GAVEL_")}
    output, temporary = folder / "report", folder / "t"
    temporary.mkdir(mode=0o755)
    bench = subprocess.Popen(
        [sys.executable, "-m", "gavel", "bench", "--quick", "--output", str(output)],
        cwd=ROOT,
        env={**inherited, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary), "COLUMNS": "200"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said, errors = bench.communicate(timeout=TIMEOUT_S)
    finally:
        # It stops what it started.
        bench.terminate()
        bench.wait()
    assert bench.returncode == 0, said + errors
    wait_until(lambda: not _left(bench.pid, temporary), f"something is left: {_left(bench.pid, temporary)}")
    assert all(goal.about in said for goal in GOALS)

    data = json.loads((output / "report.json").read_text())
    page = (output / "report.html").read_text()
    assert data["is_quick"] is True
    measured = {(run["scenario"], run["subject"]) for run in data["runs"] if run["figures"]}
    left_out = {(run["scenario"], run["subject"]) for run in data["runs"] if run["load"] == LEFT_OUT}
    assert measured | left_out >= {
        (name, subject) for name, scenario in SCENARIOS.items() for subject in scenario.subjects
    }
    # Where a scenario calls a figure by another name, its goal does not find it.
    without = {run["subject"] for run in data["runs"] if run["load"] == LEFT_OUT}
    sought = [goal for goal in GOALS if goal.load != "10,000 bids/s" and goal.of_subject not in without]
    found = {goal["goal"] for goal in data["goals"] if goal["value"] is not None}
    assert [goal.about for goal in sought if goal.about not in found] == []
    assert not [run for run in data["runs"] if run["load"] == BROKE_OFF]
    sentences = {run["notes"][0] for run in data["runs"] if run["load"] == LEFT_OUT}
    assert all(" was left out, for " in sentence and sentence in errors for sentence in sentences)
    ours = [run["figures"] for run in data["runs"] if run["subject"] == "gavel"]
    counts = {name: [run[name] for run in ours if name in run] for name in ("lost", "counted_twice", "missing")}
    assert all(found and not any(found) for found in counts.values()), counts
    assert all(goal["is_met"] is None for goal in data["goals"])
    assert all(f'<h2 id="{name}">' in page for name in SCENARIOS)


def test_a_running_engine_can_be_measured(engine: Engine, tmp_path: Path) -> None:
    arguments = ("--quick", "--url", engine.url, "--data-dir", str(engine.data_dir), "--output", str(tmp_path))
    measured = engine.gavel("bench", "bids", *arguments)
    assert measured.returncode == 0, measured.stdout + measured.stderr
    runs = json.loads((tmp_path / "report.json").read_text())["runs"]
    assert {run["subject"] for run in runs} == {"gavel"}
    assert all(run["figures"]["acks_per_second"] > 0 for run in runs)


def test_an_engine_that_is_not_there_is_said(engine: Engine, tmp_path: Path) -> None:
    arguments = (
        "--quick",
        "--url",
        "http://127.0.0.1:1",
        "--data-dir",
        str(engine.data_dir),
        "--output",
        str(tmp_path),
    )
    measured = engine.gavel("bench", "bids", *arguments)
    assert measured.returncode == 1
    assert "bids on gavel, run 1, broke off: the engine at http://127.0.0.1:1 cannot be reached" in measured.stderr


def _left(session: int, temporary: Path) -> list[str]:
    """What still lives or lies there: processes of a session or of a Postgres in that folder, and files."""
    # But for the folder in which Postgres's library keeps the sockets of this user.
    left = [path.name for path in temporary.iterdir() if not path.name.startswith("runtime-")]
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == session or Path(process.cwd()).is_relative_to(temporary):
                left.append(f"{process.pid} {process.name()}")
    return left
