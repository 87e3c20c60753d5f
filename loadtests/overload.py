"""The scenario `overload`: what is left of an engine that is asked for twice what it can do.

The server has one core and the generator the others. The rate of the open loop rises until the p99 of the
acknowledgements passes 50 ms; that is the knee. Then comes twice that rate: what is acknowledged of it, how fast, and
how the rest is refused.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import uvloop

from loadtests.bids import AUCTIONS, QUICK_AUCTIONS, QUICK_SOCKETS, SOCKETS, OpenLoop
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
    overload = _Overload(subject, options, auctions)
    await overload.opened.connect(QUICK_SOCKETS if options.quick else SOCKETS)
    try:
        if options.quick:
            await overload.is_over(knee := FIRST_RATE)
        else:
            knee = await overload.find_knee()
        await overload.go_to_twice(knee)
    finally:
        overload.opened.disconnect()
    return overload.runs


class _Overload:
    """The runs of one search."""

    def __init__(self, subject: Subject, options: Options, auctions: list[str]) -> None:
        self.opened = OpenLoop(subject, auctions)
        self.runs: list[Run] = []
        self._subject = subject
        self._options = options

    async def find_knee(self) -> int:
        """The lowest rate seen, in bids a second, at which the p99 passes 50 ms."""
        low, high = 0, FIRST_RATE
        while not await self.is_over(high):
            low, high = high, _rounded(high * GROWTH)
            if high > RATE_MAX:
                raise LoadFailed(f"the p99 stays under {KNEE_MS} ms up to {low:,} bids/s")
        for _ in range(BISECTIONS):
            middle = _rounded((low + high) / 2)
            if middle in {low, high}:
                break
            if await self.is_over(middle):
                high = middle
            else:
                low = middle
        return high

    async def go_to_twice(self, knee: int) -> None:
        """Put twice the rate of the knee on, and compare what is acknowledged with the most that ever was."""
        run = await self._put_on(2 * knee, QUICK_STEP_S if self._options.quick else SECONDS, TWICE)
        peak = max(run.figures["acks_per_second"] for run in self.runs)
        run.figures["knee_bids_per_second"] = knee
        run.figures["peak_acks_per_second"] = peak
        run.figures["goodput_percent"] = 100 * run.figures["acks_per_second"] / peak

    async def is_over(self, rate: int) -> bool:
        """Whether the p99 passes 50 ms at a rate."""
        step_s = QUICK_STEP_S if self._options.quick else STEP_S
        # Twice, since once may be the machine.
        for _ in range(2):
            run = await self._put_on(rate, step_s, f"{rate:,} bids/s")
            if run.figures["ack_p99_ms"] <= KNEE_MS:
                return False
        return True

    async def _put_on(self, rate: int, seconds: float, load: str) -> Run:
        self._options.report(f"{load}: {rate:,} bids/s")
        measured = await self.opened.run(seconds, rate)
        run = measured.to_run("overload", self._subject, load, self._options.number)
        run.figures["bids_per_second"] = rate
        self.runs.append(run)
        return run


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
