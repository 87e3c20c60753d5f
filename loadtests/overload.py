"""The scenario `overload`: what is left of an engine that is asked for twice what it can do.

The server has one core and the generator the others. The rate of the open loop rises until the p99 of the
acknowledgements passes 50 ms, or less than nine tenths are acknowledged; that is the knee. Then comes twice that rate:
what is acknowledged of it, how fast, and how the rest is refused.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import uvloop

from loadtests.bids import AUCTIONS, KEPT_UP, QUICK_AUCTIONS, QUICK_SOCKETS, SOCKETS, OpenLoop
from loadtests.measured import LoadFailed, Options, Run
from loadtests.subjects import Subject

TWICE: Final = "twice the knee"
"""The name of the load that says what an engine does when it is asked for too much."""
KNEE_MS: Final = 50
FIRST_RATE: Final = 2_000
GROWTH: Final = 1.5
RATE_MAX: Final = 100_000
BISECTIONS: Final = 2
STEP_S: Final = 2.0
QUICK_STEP_S: Final = 0.75
SECONDS: Final = 6.0
_ROUND: Final = 1_000
"""Rates are whole bids a millisecond."""


def run(subject: Subject, options: Options) -> list[Run]:
    """Find the knee of a subject and go to twice its rate. Raises `LoadFailed`."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < 2:  # noqa: PLR2004
        note = "Skipped: it needs Linux and two cores, one for the server and one for the generator."
        return [Run("overload", subject.name, "skipped", options.number, notes=[note])]
    auctions = subject.open_auctions(QUICK_AUCTIONS if options.quick else AUCTIONS)
    with _on_cores(subject, set(cores[:1]), set(cores[1:])):
        return uvloop.run(_run(subject, options, auctions))


async def _run(subject: Subject, options: Options, auctions: list[str]) -> list[Run]:
    search = _Search(subject, options, auctions)
    await search.opened.connect(QUICK_SOCKETS if options.quick else SOCKETS)
    try:
        if options.quick:
            await search.try_rate(FIRST_RATE, QUICK_STEP_S)
            await search.go_to_twice(FIRST_RATE, QUICK_STEP_S)
        else:
            knee = await search.find_knee(0, FIRST_RATE)
            while not await search.go_to_twice(knee, SECONDS):
                # What twice the rate does not fill, the rate did not: that was the machine.
                knee = await search.find_knee(2 * knee, _rounded(2 * knee * GROWTH))
    finally:
        search.opened.disconnect()
    return search.runs


class _Search:
    """The rates that were tried."""

    def __init__(self, subject: Subject, options: Options, auctions: list[str]) -> None:
        self.opened = OpenLoop(subject, auctions)
        self.runs: list[Run] = []
        self._subject = subject
        self._options = options

    async def find_knee(self, low: int, high: int) -> int:
        """The lowest rate seen, in bids a second, that is too much; `low` was not, `high` may be."""
        while not await self._is_too_much(high):
            low, high = high, _rounded(high * GROWTH)
            if high > RATE_MAX:
                raise LoadFailed(f"{low:,} bids/s are not too much; the knee was not found")
        for _ in range(BISECTIONS):
            middle = _rounded((low + high) / 2)
            if middle in {low, high}:
                break
            if await self._is_too_much(middle):
                high = middle
            else:
                low = middle
        return high

    async def go_to_twice(self, knee: int, seconds: float) -> bool:
        """Put twice a rate on, and compare what is acknowledged with the most that ever was. Whether it is too much."""
        is_too_much = await self.try_rate(2 * knee, seconds)
        if is_too_much or self._options.quick:
            run = self.runs[-1]
            run.load = TWICE
            peak = max(run.figures["acks_per_second"] for run in self.runs)
            run.figures["knee_bids_per_second"] = knee
            run.figures["peak_acks_per_second"] = peak
            run.figures["goodput_percent"] = 100 * run.figures["acks_per_second"] / peak
        return is_too_much

    async def try_rate(self, rate: int, seconds: float) -> bool:
        """Put a rate on. Whether it is too much."""
        load = f"{rate:,} bids/s"
        self._options.report(load)
        measured = await self.opened.run(seconds, rate)
        run = measured.to_run("overload", self._subject, load, self._options.number)
        run.figures["bids_per_second"] = rate
        self.runs.append(run)
        # One that refuses in time what it cannot do may never be slow.
        return run.figures["ack_p99_ms"] > KNEE_MS or run.figures["acks_per_second"] < KEPT_UP * rate

    async def _is_too_much(self, rate: int) -> bool:
        # Twice, since once may be the machine.
        return await self.try_rate(rate, STEP_S) and await self.try_rate(rate, STEP_S)


def _rounded(rate: float) -> int:
    return max(1, round(rate / _ROUND)) * _ROUND


@contextmanager
def _on_cores(subject: Subject, server: set[int], generator: set[int]) -> Iterator[None]:
    """Keep all threads of a subject on some cores, and this process on others."""
    before = os.sched_getaffinity(0)
    pids = [pid for pids in subject.processes().values() for pid in pids]
    if not pids:
        raise LoadFailed(
            "the processes of an engine that we did not start are not known, so it cannot be kept on one core"
        )
    try:
        _keep_on(os.getpid(), generator)
        for pid in pids:
            _keep_on(pid, server)
        yield
    finally:
        _keep_on(os.getpid(), before)
        for pid in pids:
            _keep_on(pid, before)


def _keep_on(pid: int, cores: set[int]) -> None:
    # Each thread has cores of its own; those to come have their maker's.
    with suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                os.sched_setaffinity(int(thread.name), cores)
