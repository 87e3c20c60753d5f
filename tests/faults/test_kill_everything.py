"""Everything dies at once in the middle of a replay: what was acknowledged is there, once, and the replay goes on."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.engine import ROOT, Engine, running, wait_until
from tests.simulation.checker import check
from tests.simulation.history import Record, Verdict, decode

BIDS = ROOT / "tests" / "data" / "ebay_palm_bids.csv"
ACKS_BEFORE = 1_000
REPLAY_S = 150

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def engine() -> Iterator[Engine]:
    with running() as engine:
        yield engine


def test_nothing_acknowledged_is_lost_or_counted_twice(engine: Engine) -> None:
    history_path, results_path = engine.folder / "history.jsonl", engine.folder / "results.json"
    history_path.touch()
    with _replaying(engine, history_path, results_path) as replay:
        wait_until(lambda: _acks(_records(history_path)) >= ACKS_BEFORE, "the replay does not come to its middle")
        engine.kill_everything()
        assert replay.poll() is None, "the replay was over before the engine was killed"
        before = _acks(_records(history_path))
        engine.start()
        output, errors = replay.communicate(timeout=REPLAY_S)
    assert replay.returncode == 0, output + errors

    assert "341 of 343 auctions closed at the published price" in output
    results = json.loads(results_path.read_text())
    assert results["as_published"] == 341
    assert results["reconnects"] > 0
    history = _records(history_path)
    assert _acks(history) == results["acks"] > before
    assert check(history, engine.journal_rows(), true_time=True) == []
    engine.verify()
    assert not engine.leaks()


@contextmanager
def _replaying(engine: Engine, history: Path, results: Path) -> Iterator["subprocess.Popen[str]"]:
    files = ["--history", str(history), "--json", str(results)]
    options = [
        "--patience",
        str(REPLAY_S),
        "--reserve-from-price",
        "--run",
        "killed",
        "--url",
        engine.url,
        "--data-dir",
        str(engine.data_dir),
    ]
    replay = subprocess.Popen(
        [sys.executable, "-m", "gavel", "replay", str(BIDS), *options, *files],
        cwd=ROOT,
        env=engine.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with replay:
        try:
            yield replay
        finally:
            # Over already, unless something went wrong; nobody waits for its patience then.
            replay.kill()


def _records(path: Path) -> list[Record]:
    """The records in a file to which more is being written."""
    whole, _, _ = path.read_text().rpartition("\n")
    return decode(whole.splitlines())


def _acks(history: list[Record]) -> int:
    return sum(isinstance(record, Verdict) and record.kind == "ack" for record in history)
