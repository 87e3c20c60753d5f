"""Everything dies at once in the middle of a replay: what was acknowledged is there, once, and the replay goes on."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.engine import ROOT, Engine, running, wait_until

HISTORY = ROOT / "tests" / "data" / "ebay_palm_bids.csv"
ACKS_BEFORE = 1_000
REPLAY_S = 150

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def engine() -> Iterator[Engine]:
    with running() as engine:
        yield engine


def test_nothing_acknowledged_is_lost_or_counted_twice(engine: Engine) -> None:
    acks_path, results_path = engine.folder / "acks.jsonl", engine.folder / "results.json"
    acks_path.touch()
    with _replaying(engine, acks_path, results_path) as replay:
        wait_until(lambda: len(_lines(acks_path)) >= ACKS_BEFORE, "the replay does not come to its middle")
        engine.kill_everything()
        assert replay.poll() is None, "the replay was over before the engine was killed"
        before = len(_lines(acks_path))
        engine.start()
        output, errors = replay.communicate(timeout=REPLAY_S)
    assert replay.returncode == 0, output + errors

    assert "341 of 343 auctions closed at the published price" in output
    results = json.loads(results_path.read_text())
    assert results["as_published"] == 341
    assert results["reconnects"] > 0
    acks = [json.loads(line) for line in _lines(acks_path)]
    assert len(acks) == results["acks"] > before
    _check_acks(engine, acks)
    engine.verify()
    assert not engine.leaks()


@contextmanager
def _replaying(engine: Engine, acks: Path, results: Path) -> Iterator["subprocess.Popen[str]"]:
    files = ["--acks", str(acks), "--json", str(results)]
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
        [sys.executable, "-m", "gavel", "replay", str(HISTORY), *options, *files],
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


def _lines(path: Path) -> list[str]:
    """The whole lines of a file that is being written."""
    return path.read_text().splitlines(keepends=True) if path.read_text().endswith("\n") else []


def _check_acks(engine: Engine, acks: list[dict[str, Any]]) -> None:
    """Each acknowledged bid is in the journal exactly once, where its acknowledgement says and with that hash."""
    rows = engine.fetch(
        "SELECT entity_id, seq, hash, substring(command_id FROM 17) FROM journal WHERE command_id <> ''"
    )
    journaled: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for entity_id, seq, event_hash, command in rows:
        journaled.setdefault((str(entity_id), command.hex()), []).append((seq, event_hash.hex()))
    for ack in acks:
        key = ack["auction"], ack["bid_id"].replace("-", "")
        assert journaled.get(key) == [(ack["seq"], ack["hash"])], ack
    assert len({(ack["auction"], ack["bid_id"]) for ack in acks}) == len(acks)
