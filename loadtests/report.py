"""The report of a benchmark: a page of its own with plots, and the same figures as JSON."""

import json
import math
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, Final

import jinja2
import psutil
from markupsafe import Markup

from loadtests.goals import Outcome, number_words, outcomes, words_of
from loadtests.measured import Run
from loadtests.plots import heading_of, plots_of, subjects_of, title_of

PAGE: Final = "report.html"
DATA: Final = "report.json"


@dataclass(frozen=True)
class Row:
    """A load of a scenario on one subject: its figures' medians over the repetitions, and how far these differ."""

    load: str
    subject: str
    figures: dict[str, str]


@dataclass(frozen=True)
class Section:
    """A scenario on the page."""

    name: str
    about: str
    plots: list[Markup]
    columns: list[str]
    rows: list[Row]
    notes: list[str]


def write(folder: Path, runs: Sequence[Run], abouts: dict[str, str], *, seconds: float, is_quick: bool) -> None:
    """Write the page and the JSON into a folder, which is made if need be.

    Args:
        folder: gets `report.html`, which needs nothing but itself, and `report.json`.
        runs: all that was measured.
        abouts: the scenarios that were run, each with a sentence about it.
        seconds: how long all of it took.
        is_quick: small numbers, which say nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    about = _about(seconds, is_quick=is_quick)
    reached = outcomes(runs, list(abouts))
    kept = {
        **about,
        "goals": [_goal_to_dict(outcome, is_quick=is_quick) for outcome in reached],
        "runs": [run.to_dict() for run in runs],
    }
    (folder / DATA).write_text(json.dumps(kept, indent=1) + "\n")
    sections = [
        _section(name, sentence, [run for run in runs if run.scenario == name]) for name, sentence in abouts.items()
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["heading"] = heading_of
    page = environment.get_template("report.html.jinja").render(about=about, outcomes=reached, sections=sections)
    (folder / PAGE).write_text(page)


def _about(seconds: float, *, is_quick: bool) -> dict[str, Any]:
    return {
        "at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "seconds": round(seconds, 1),
        "is_quick": is_quick,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.machine()


def _goal_to_dict(outcome: Outcome, *, is_quick: bool) -> dict[str, Any]:
    goal = outcome.goal
    return {
        "goal": goal.about,
        "scenario": goal.scenario,
        "wanted": goal.limit_words,
        "measured": outcome.value_words,
        "value": outcome.value,
        "spread": outcome.spread_words,
        "remarks": list(outcome.remarks),
        "is_met": None if is_quick else outcome.is_met,
    }


# Tables


def _section(name: str, about: str, runs: Sequence[Run]) -> Section:
    columns = list(dict.fromkeys(figure for run in runs for figure in run.figures if _is_shown(figure)))
    loads = list(dict.fromkeys(run.load for run in runs))
    rows = []
    for load in loads:
        for subject in subjects_of(runs):
            same = [run for run in runs if (run.load, run.subject) == (load, subject)]
            if same:
                rows.append(Row(load, title_of(subject), {column: _spread(column, same) for column in columns}))
    notes = [f"{title_of(run.subject)}, {run.load}, run {run.number + 1}: {note}" for run in runs for note in run.notes]
    return Section(name, about, plots_of(name, runs), columns, rows, notes)


def _is_shown(figure: str) -> bool:
    # What a page has no room for stands in the JSON.
    if figure.endswith("_cpu_percent"):
        return figure in {"generator_cpu_percent", "machine_cpu_percent", "idle_cpu_percent"}
    return not figure.endswith(("_p90_ms", "_max_ms", "_cpu_us_per_ack")) and not figure.startswith("refused_")


def _spread(figure: str, runs: Sequence[Run]) -> str:
    values = [run.figures[figure] for run in runs if not math.isnan(run.figures.get(figure, math.nan))]
    if not values:
        return ""
    middle = words_of(figure, median(values))
    if len(values) == 1 or min(values) == max(values):
        return middle
    return f"{middle} ({number_words(min(values))} to {number_words(max(values))})"
