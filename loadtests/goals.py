"""What Gavel wants to reach, as data, and whether a measurement shows it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final, Literal

from loadtests.measured import Run

SUBJECT: Final = "gavel"


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
    """A goal and what was measured: the median of the repetitions, and the lowest and the highest of them."""

    goal: Goal
    value: float | None = None
    """None: it was not measured."""
    lowest: float = math.nan
    highest: float = math.nan
    ours: float = math.nan
    """For a ratio: the median of the figure itself,"""
    theirs: float = math.nan
    """and of what it is beside."""

    @property
    def is_met(self) -> bool | None:
        """None if it was not measured."""
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
    Goal("10,000 bids/s over 1,000 auctions, refused", "bids", "10,000 bids/s", "refused", "at most", 0),
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
    Goal("1,000 auctions ending in one second, late p99", "timers", "", "end_p99_ms", "at most", 20),
    Goal("100,000 auctions in the journal, ready after", "activate", "", "ready_s", "at most", 10),
    Goal("100,000 auctions in the journal, asleep, each", "activate", "", "bytes_per_auction", "at most", 1024),
    Goal("A shard killed, bids acknowledged again after", "recover", "", "slowest_s", "at most", 1.5),
    Goal("A shard killed, acknowledged bids lost", "recover", "", "lost", "at most", 0),
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
    if figure.startswith("bytes_per"):
        return f"{value / 1024:,.1f}\N{NO-BREAK SPACE}KB"
    if figure.endswith("_bytes"):
        return f"{value / 1024**2:,.1f}\N{NO-BREAK SPACE}MB"
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
    "_us_per_ack": "\N{NO-BREAK SPACE}µs",
}


def _outcome(goal: Goal, runs: Sequence[Run]) -> Outcome:
    ours = _figures(runs, goal, SUBJECT, goal.load)
    if not goal.is_ratio:
        values = list(ours.values())
        return Outcome(goal, median(values), min(values), max(values)) if values else Outcome(goal)
    theirs = _figures(runs, goal, goal.of_subject, goal.of_load or goal.load)
    # Each repetition beside the one that was run right after it: the machine may change meanwhile.
    ratios = [ours[number] / theirs[number] for number in ours if theirs.get(number)]
    if not ratios:
        return Outcome(goal)
    return Outcome(
        goal, median(ratios), min(ratios), max(ratios), ours=median(ours.values()), theirs=median(theirs.values())
    )


def _figures(runs: Sequence[Run], goal: Goal, subject: str, load: str) -> dict[int, float]:
    """The goal's figure in each repetition."""
    return {
        run.number: run.figures[goal.figure]
        for run in runs
        if (run.scenario, run.subject) == (goal.scenario, subject)
        and run.load.startswith(load)
        and not math.isnan(run.figures.get(goal.figure, math.nan))
    }
