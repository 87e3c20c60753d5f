"""What a scenario measures, and how a generator measures itself."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

import numpy as np
import psutil

NS_PER_US: Final = 1_000
NS_PER_MS: Final = 1_000_000
NS_PER_S: Final = 1_000_000_000

BUSY_PERCENT: Final = 90
"""Of a core: a generator that takes more measures itself."""
LATE_MS: Final = 5
"""A generator whose sends leave later than this (p99) measures itself, or a machine that has no room for it."""

_GROWTH: Final = math.log(1.01)
"""Each bucket of a histogram is 1 % wider than the one below it, so a percentile is at most 1 % off."""

BROKE_OFF: Final = "broke off"
"""What stands in place of the load where a scenario did not come to its end; the note says why."""
LEFT_OUT: Final = "left out"
"""What stands there where a peer cannot run here; the note says why."""


class LoadFailed(Exception):
    """The load could not be put on; the sentence says why."""


class Latencies:
    """A histogram of latencies whose buckets grow by 1 %, from a microsecond up; its maximum is exact."""

    def __init__(self) -> None:
        self.count = 0
        self.max_ns = 0
        self._counts: Counter[int] = Counter()

    def add(self, ns: int, count: int = 1) -> None:
        """Add a latency in nanoseconds, so many times."""
        self._counts[math.ceil(math.log(max(ns, NS_PER_US) / NS_PER_US) / _GROWTH)] += count
        self.count += count
        self.max_ns = max(self.max_ns, ns)

    def add_many(self, latencies_ns: Iterable[int]) -> None:
        """Add latencies in nanoseconds, much more cheaply than one by one."""
        values = np.fromiter(latencies_ns, dtype=np.int64)
        if not len(values):
            return
        buckets = np.ceil(np.log(np.maximum(values, NS_PER_US) / NS_PER_US) / _GROWTH).astype(np.int64)
        for bucket, count in zip(*np.unique(buckets, return_counts=True), strict=True):
            self._counts[int(bucket)] += int(count)
        self.count += len(values)
        self.max_ns = max(self.max_ns, int(values.max()))

    def merge(self, other: Self) -> None:
        """Add all latencies of another histogram."""
        self._counts.update(other._counts)
        self.count += other.count
        self.max_ns = max(self.max_ns, other.max_ns)

    def percentile_ms(self, percent: float) -> float:
        """The latency within which so many percent of all came; 100 is the maximum. NaN if there are none."""
        if not self.count:
            return math.nan
        rank = max(1, math.ceil(self.count * percent / 100))
        seen = 0
        for bucket in sorted(self._counts):
            seen += self._counts[bucket]
            if seen >= rank:
                break
        upper_ms = math.exp(bucket * _GROWTH) * NS_PER_US / NS_PER_MS
        return self.max_ns / NS_PER_MS if rank == self.count else min(upper_ms, self.max_ns / NS_PER_MS)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        counts = {str(bucket): self._counts[bucket] for bucket in sorted(self._counts)}
        return {"count": self.count, "max_ns": self.max_ns, "buckets": counts}

    @classmethod
    def from_dict(cls, kept: dict[str, Any]) -> Self:
        """The histogram that `to_dict` has put into `kept`."""
        latencies = cls()
        latencies.count, latencies.max_ns = kept["count"], kept["max_ns"]
        latencies._counts.update({int(bucket): count for bucket, count in kept["buckets"].items()})
        return latencies


@dataclass
class Run:
    """One run of one load of a scenario against one subject."""

    scenario: str
    subject: str
    load: str
    """What was put on, in words: "closed loop, 500 sockets", "2 bids/s"."""
    number: int
    """Which repetition, from 0."""
    figures: dict[str, float] = field(default_factory=dict)
    """Units last: `acks_per_second`, `ack_p99_ms`, `bytes_per_socket`, `generator_cpu_percent`."""
    latencies: dict[str, Latencies] = field(default_factory=dict)
    series: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """What changed over time: pairs of seconds since the load began, and a value."""
    notes: list[str] = field(default_factory=list)

    def add_percentiles(self, name: str) -> None:
        """Put the p50, p90, p99 and maximum of the latencies `name` into the figures, as `<name>_p99_ms`."""
        latencies = self.latencies[name]
        for key, percent in (("p50", 50), ("p90", 90), ("p99", 99), ("max", 100)):
            self.figures[f"{name}_{key}_ms"] = latencies.percentile_ms(percent)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it; a figure that could not be measured (NaN) is null."""
        return {
            "scenario": self.scenario,
            "subject": self.subject,
            "load": self.load,
            "number": self.number,
            "figures": {name: None if math.isnan(value) else value for name, value in self.figures.items()},
            "latencies": {name: latencies.to_dict() for name, latencies in self.latencies.items()},
            "series": self.series,
            "notes": self.notes,
        }


@dataclass(frozen=True)
class Options:
    """How a scenario is to be run."""

    quick: bool = False
    """Small numbers: see that it works, in a few seconds. The figures say nothing."""
    number: int = 0
    """Which repetition this is; a scenario puts it into its runs."""
    report: Callable[[str], None] = lambda _: None
    """Is told, in a few words, what is being done."""


class GeneratorMeter:
    """The processor time of this process, which generates load, and of the whole machine, from its making on."""

    def __init__(self) -> None:
        self._wall_ns = time.perf_counter_ns()
        self._cpu_ns = time.process_time_ns()
        self._machine_s = _machine_s()

    def figures(self) -> dict[str, float]:
        """`generator_cpu_percent`, of one core, and `machine_cpu_percent`, of all cores; since the beginning."""
        wall_ns = time.perf_counter_ns() - self._wall_ns
        machine_ns = (_machine_s() - self._machine_s) * NS_PER_S
        return {
            "generator_cpu_percent": 100 * (time.process_time_ns() - self._cpu_ns) / wall_ns,
            "machine_cpu_percent": 100 * machine_ns / wall_ns / (psutil.cpu_count() or 1),
        }


def _machine_s() -> float:
    """The processor time that all cores have worked since the machine was started."""
    times = psutil.cpu_times()
    return sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq"))


def bottleneck_notes(figures: Mapping[str, float]) -> list[str]:
    """Sentences about a generator that was itself the bottleneck.

    Args:
        figures: those of a run: `generator_cpu_percent`, and `late_p99_ms` if it sent at a fixed rate.
    """
    notes = []
    if (cpu_percent := figures.get("generator_cpu_percent", 0)) > BUSY_PERCENT:
        notes.append(f"The generator was the bottleneck: it took {cpu_percent:.0f} % of a core.")
    if (late_ms := figures.get("late_p99_ms", 0)) > LATE_MS:
        notes.append(f"The generator or the machine was the bottleneck: bids left {late_ms:.1f} ms late (p99).")
    return notes
