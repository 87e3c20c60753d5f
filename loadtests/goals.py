"""What Gavel wants to reach, as data, and whether a measurement shows it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final, Literal

from loadtests.measured import BROKE_OFF, Run, bottleneck_notes

SUBJECT: Final = "gavel"
FAULTS: Final = {
    "unanswered": "bids were not answered",
    "missing": "pairs of a bid and a socket never came together",
    "lost_sockets": "sockets were closed",
    "refused": "bids were refused",
}
"""Figures that count what a latency does not hold, or only until it was given up; and what they are in words."""
DRAIN_S: Final = 2.0
"""Who needs longer to send what has piled up under a load did not keep up with it, and would be slower under a longer
one."""


@dataclass(frozen=True)
class Goal:
    """A figure of ours beside a limit, or beside the same figure of something else, times `limit`."""

    about: str
    scenario: str
    load: str
    """What the load's name begins with."""
    figure: str
    must_be: Literal["at least", "at most"]
    limit: float
    of_subject: str = SUBJECT
    of_load: str | None = None
    """With this or `of_subject` the limit is a ratio."""
    of_worst: bool = False
    """Whether the worst repetition is judged, instead of the median."""

    @property
    def wants_all(self) -> bool:
        """Whether it is met only if no bid was refused or lost: a latency says nothing about these."""
        return self.scenario in {"bids", "fanout"} and self.figure.endswith("_ms")

    @property
    def is_of_speed(self) -> bool:
        """Whether a generator at its limit makes it worse: memory and what idle sockets take stay as they are."""
        return self.figure.endswith(("_ms", "_s", "_per_second")) or self.figure == "goodput_percent"

    @property
    def is_ratio(self) -> bool:
        return self.of_subject != SUBJECT or self.of_load is not None

    @property
    def limit_words(self) -> str:
        """The limit as a reader wants it: "at most 4 ms", "at least 40x row_lock's"."""
        if not self.is_ratio:
            return f"{self.must_be} {words_of(self.figure, self.limit)}"
        of = f"{self.of_subject}'s" if self.of_load is None else f"that at {self.of_load}"
        return f"{self.must_be} {self.limit:g}x {of}"


@dataclass(frozen=True)
class Outcome:
    """A goal and what was measured: the median of the repetitions or the worst, and the lowest and the highest."""

    goal: Goal
    value: float | None = None
    """None: it was not measured."""
    lowest: float = math.nan
    highest: float = math.nan
    ours: float = math.nan
    """For a ratio: the median of the figure itself,"""
    theirs: float = math.nan
    """and of what it is beside."""
    has_failed: bool = False
    """A run of ours broke off; or bids were refused or lost, where the goal wants all."""
    remarks: Sequence[str] = ()
    """What makes the value worth less, in a few words each."""

    @property
    def is_met(self) -> bool | None:
        """None if it was not measured."""
        if self.has_failed:
            return False
        if self.value is None:
            return None
        return self.value >= self.goal.limit if self.goal.must_be == "at least" else self.value <= self.goal.limit

    @property
    def value_words(self) -> str:
        """What was measured, as a reader wants it."""
        if self.value is None:
            return "not measured"
        if not self.goal.is_ratio:
            return words_of(self.goal.figure, self.value)
        figure = self.goal.figure
        return f"{self.value:.3g}x ({words_of(figure, self.ours)} / {words_of(figure, self.theirs)})"

    @property
    def spread_words(self) -> str:
        """From the lowest to the highest repetition, if there were several."""
        if self.value is None or self.lowest == self.highest:
            return ""
        if self.goal.is_ratio:
            return f"{self.lowest:.3g} to {self.highest:.3g}x"
        return f"{number_words(self.lowest)} to {words_of(self.goal.figure, self.highest)}"


GOALS: Final = (
    Goal(
        "Hot auction, acknowledged bids",
        "bids",
        "closed loop",
        "acks_per_second",
        "at least",
        40,
        of_subject="row_lock",
    ),
    Goal("10,000 bids/s over 1,000 auctions, ack p99", "bids", "10,000 bids/s", "ack_p99_ms", "at most", 5),
    Goal("10,000 bids/s over 1,000 auctions, refused", "bids", "10,000 bids/s", "refused", "at most", 0, of_worst=True),
    Goal("100 bids/s, ack p50", "bids", "100 bids/s", "ack_p50_ms", "at most", 1, of_subject="row_lock"),
    Goal("100 bids/s, ack p99", "bids", "100 bids/s", "ack_p99_ms", "at most", 4),
    Goal(
        "10,000 sockets, 2 bids/s, bid to screen p99",
        "fanout",
        "2 bids/s",
        "bid_to_screen_p99_ms",
        "at most",
        1,
        of_subject="ws",
    ),
    Goal(
        "10,000 sockets, 20 bids/s, bid to screen p99",
        "fanout",
        "20 bids/s",
        "bid_to_screen_p99_ms",
        "at most",
        0.1,
        of_subject="ws",
    ),
    Goal(
        "10,000 sockets, 100 bids/s, bid to screen p99",
        "fanout",
        "100 bids/s",
        "bid_to_screen_p99_ms",
        "at most",
        1.25,
        of_load="20 bids/s",
    ),
    Goal("10,000 sockets, 20 bids/s, ack p50", "fanout", "20 bids/s", "ack_p50_ms", "at most", 5),
    Goal("10,000 sockets, 20 bids/s, ack p99", "fanout", "20 bids/s", "ack_p99_ms", "at most", 20),
    Goal("10,000 sockets, 100 bids/s, ack p50", "fanout", "100 bids/s", "ack_p50_ms", "at most", 5),
    Goal("10,000 sockets, 100 bids/s, ack p99", "fanout", "100 bids/s", "ack_p99_ms", "at most", 20),
    Goal("An idle socket's memory", "connect", "", "bytes_per_socket", "at most", 12 * 1024),
    Goal("10,000 idle sockets, of a core", "connect", "", "idle_cpu_percent", "at most", 3),
    Goal("10,000 sockets cut at once, all served again after", "connect", "", "reconnect_s", "at most", 10),
    Goal("1,000 auctions ending in one second, late p99", "timers", "", "ended_late_p99_ms", "at most", 20),
    Goal("1,000 auctions ending in one second, too early", "timers", "", "early", "at most", 0, of_worst=True),
    Goal("100,000 auctions in the journal, ready after", "activate", "", "ready_s", "at most", 10),
    Goal("100,000 auctions in the journal, asleep, each", "activate", "", "bytes_per_auction", "at most", 1024),
    Goal("A shard killed, bids acknowledged again after", "recover", "", "slowest_s", "at most", 1.5, of_worst=True),
    Goal("A shard killed, acknowledged bids lost", "recover", "", "lost", "at most", 0, of_worst=True),
    Goal("A shard killed, bids counted twice", "recover", "", "counted_twice", "at most", 0, of_worst=True),
    Goal("Twice the knee, goodput of the peak", "overload", "twice the knee", "goodput_percent", "at least", 90),
    Goal("Twice the knee, ack p99", "overload", "twice the knee", "ack_p99_ms", "at most", 250),
)


def outcomes(runs: Sequence[Run], scenarios: Sequence[str]) -> list[Outcome]:
    """What runs say about the goals of these scenarios."""
    return [_outcome(goal, runs) for goal in GOALS if goal.scenario in scenarios]


def words_of(figure: str, value: float) -> str:
    """A value with the unit in which its figure's name ends."""
    for ending, unit in _UNITS.items():
        if figure.endswith(ending):
            return f"{number_words(value)}{unit}"
    if "_us_per_" in figure:
        return f"{number_words(value)}\N{NO-BREAK SPACE}µs"
    if figure.startswith("bytes_per"):
        return f"{value / 1024:,.1f}\N{NO-BREAK SPACE}KiB"
    if figure.endswith("_bytes"):
        return f"{value / 1024**2:,.1f}\N{NO-BREAK SPACE}MiB"
    return number_words(value)


def number_words(value: float) -> str:
    """A number with three digits that count, or none where it was not measured."""
    if math.isnan(value):
        return "-"
    if value == int(value) or abs(value) >= 100:  # noqa: PLR2004 (three digits)
        return f"{value:,.0f}"
    return f"{value:.3g}"


_UNITS: Final = {
    "_per_second": "/s",
    "_ms": "\N{NO-BREAK SPACE}ms",
    "_percent": "\N{NO-BREAK SPACE}%",
    "_s": "\N{NO-BREAK SPACE}s",
}


def _outcome(goal: Goal, runs: Sequence[Run]) -> Outcome:
    our_runs = _runs(runs, goal, SUBJECT, goal.load)
    their_runs = _runs(runs, goal, goal.of_subject, goal.of_load or goal.load) if goal.is_ratio else []
    ours, theirs = _figures(our_runs, goal), _figures(their_runs, goal)
    has_failed = any(run.load == BROKE_OFF or (goal.wants_all and _faults(run)) for run in our_runs)
    other = goal.of_load or goal.of_subject
    remarks = _remarks(goal, our_runs) + [f"{other}: {remark}" for remark in _remarks(goal, their_runs)]
    if goal.is_ratio:
        # Each repetition beside the one that was run right after it: the machine may change meanwhile.
        values = [ours[number] / theirs[number] for number in ours if theirs.get(number)]
    else:
        values = list(ours.values())
    if not values:
        return Outcome(goal, has_failed=has_failed, remarks=remarks)
    worst = max if goal.must_be == "at most" else min
    return Outcome(
        goal,
        worst(values) if goal.of_worst else median(values),
        min(values),
        max(values),
        ours=median(ours.values()),
        theirs=median(theirs.values()) if theirs else math.nan,
        has_failed=has_failed,
        remarks=remarks,
    )


def _runs(runs: Sequence[Run], goal: Goal, subject: str, load: str) -> list[Run]:
    """The runs of this load, and those of the scenario that broke off."""
    return [
        run
        for run in runs
        if (run.scenario, run.subject) == (goal.scenario, subject) and run.load.startswith((load, BROKE_OFF))
    ]


def _figures(runs: Sequence[Run], goal: Goal) -> dict[int, float]:
    """The goal's figure in each repetition."""
    return {
        run.number: run.figures[goal.figure] for run in runs if not math.isnan(run.figures.get(goal.figure, math.nan))
    }


def _faults(run: Run) -> list[str]:
    return [name for name in FAULTS if run.figures.get(name)]


def _remarks(goal: Goal, runs: Sequence[Run]) -> list[str]:
    """What makes these runs' figures worth less."""
    remarks = []
    if broken := sum(run.load == BROKE_OFF for run in runs):
        remarks.append(f"{broken} of {len({run.number for run in runs})} runs broke off")
    if any(run.figures.get("drained_s", 0) > DRAIN_S for run in runs):
        remarks.append("did not keep up")
    if goal.wants_all:
        counts = {name: sum(run.figures.get(name, 0) for run in runs) for name in FAULTS}
        remarks += [f"{number_words(count)} {FAULTS[name]}" for name, count in counts.items() if count]
    if goal.is_of_speed and any(bottleneck_notes(run.figures) for run in runs):
        remarks.append("the generator was at its limit")
    return remarks
