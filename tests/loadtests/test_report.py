"""The report: it holds what was measured, needs nothing but itself, and can be drawn from whatever there is."""

import json
import re
from pathlib import Path

from loadtests import report
from loadtests.measured import BROKE_OFF, LEFT_OUT, Latencies, Run
from loadtests.overload import TWICE
from loadtests.scenarios import SCENARIOS


def some_run(scenario: str, subject: str, load: str, number: int = 0) -> Run:
    latencies = Latencies()
    latencies.add_many(range(1_000_000, 50_000_000, 100_000))
    run = Run(scenario, subject, load, number, latencies={"ack": latencies})
    run.add_percentiles("ack")
    run.figures |= {"acks_per_second": 1_000.0 * (number + 1), "bids_per_second": 1_000, "generator_cpu_percent": 95}
    run.series["acks_per_second"] = [(0.0, 900.0), (0.25, 1_100.0)]
    return run


def written(folder: Path, *runs: Run, is_quick: bool = False) -> tuple[str, dict[str, object]]:
    abouts = {name: SCENARIOS[name].about for name in dict.fromkeys(run.scenario for run in runs)}
    report.write(folder / "new", runs, abouts, seconds=90, is_quick=is_quick)
    return (folder / "new" / report.PAGE).read_text(), json.loads((folder / "new" / report.DATA).read_text())


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    page, _ = written(tmp_path, some_run("bids", "gavel", "100 bids/s"), some_run("bids", "row_lock", "100 bids/s"))
    assert "<svg" in page
    assert not re.search(r"<(script|link|img|iframe)\b|@import|url\((?!#)", page)
    assert not re.search(r"(?:src|href)=\"(?!#)", page)


def test_no_two_parts_of_a_page_have_the_same_id(tmp_path: Path) -> None:
    runs = [
        some_run(scenario, subject, load)
        for scenario in ("bids", "fanout")
        for subject in ("gavel", "ws")
        for load in ("a", "b")
    ]
    page, _ = written(tmp_path, *runs)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    # What is named is there.
    assert set(re.findall(r"url\(#([^)]+)\)", page)) | set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)


def test_figures_are_medians_with_their_spread(tmp_path: Path) -> None:
    page, data = written(tmp_path, *(some_run("bids", "gavel", "100 bids/s", number) for number in range(3)))
    assert "2,000/s (1,000 to 3,000)" in page
    assert len(data["runs"]) == 3  # type: ignore[arg-type]  # A list.


def test_what_a_server_says_is_text(tmp_path: Path) -> None:
    run = some_run("bids", "gavel", "100 bids/s")
    run.notes = ["<script>alert(1)</script>"]
    page, _ = written(tmp_path, run)
    assert "<script>" not in page


def test_what_broke_off_or_was_left_out_is_said(tmp_path: Path) -> None:
    runs = [
        Run("fanout", "gavel", BROKE_OFF, 0, notes=["it went away"]),
        Run("fanout", "ws", LEFT_OUT, 0, notes=["no Node"]),
    ]
    page, _ = written(tmp_path, *runs, Run("overload", "gavel", "skipped", 0, notes=["one core"]))
    assert all(words in page for words in ("it went away", "no Node", "one core"))


def test_an_overload_is_drawn_by_rate(tmp_path: Path) -> None:
    page, _ = written(tmp_path, some_run("overload", "gavel", "1,000 bids/s"), some_run("overload", "gavel", TWICE))
    assert "Acknowledged at each rate" in page


def test_a_quick_run_says_that_it_says_nothing(tmp_path: Path) -> None:
    page, data = written(tmp_path, some_run("bids", "gavel", "100 bids/s"), is_quick=True)
    assert "A quick run:" in page
    assert data["is_quick"] is True
