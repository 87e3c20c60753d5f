"""`gavel simulate`: run the engine's real code on simulated time, network and Postgres, with faults drawn from seeds.

The simulator stands with the tests, so this works in a checkout of the sources only.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TextIO

import click

from gavel.errors import CommandError

ROOT: Final = Path(__file__).parent.parent
SEEDS: Final = 100
_WORKER: Final = "tests.simulation.worker"
_SHOWN_MAX: Final = 3


@dataclass
class Tally:
    """What came of many seeds."""

    seeds: int = 0
    commands: int = 0
    events: int = 0
    simulated_s: float = 0
    cpu_s: float = 0
    faults: Counter[str] = field(default_factory=Counter)
    strained: Counter[str] = field(default_factory=Counter)
    """How often there was more than a bound allows, by what came of it."""
    failed: dict[int, list[str]] = field(default_factory=dict)
    """What is wrong, by seed."""

    def add(self, result: dict[str, Any]) -> None:
        """Count one seed's result, as the worker prints it."""
        self.seeds += 1
        self.commands += result.get("commands", 0)
        self.events += result.get("events", 0)
        self.simulated_s += result.get("simulated_s", 0)
        self.cpu_s += result["cpu_s"]
        self.faults.update(result.get("faults", {}))
        self.strained.update(result.get("strained", {}))
        if result["violations"]:
            self.failed[result["seed"]] = result["violations"]


class Seeds(click.ParamType[range]):
    """`A..B`: the seeds from A up to, but not including, B; or one seed."""

    name = "A..B"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> range:  # noqa: ANN401
        """Read the text."""
        if isinstance(value, range):
            return value
        first, dots, end = str(value).partition("..")
        if not first.isdecimal() or not (end.isdecimal() if dots else True):
            self.fail(f"{value!r} is no range of seeds; write 0..100, or 17 for one of them.", param, ctx)
        seeds = range(int(first), int(end) if dots else int(first) + 1)
        if not seeds:
            self.fail(f"{value!r} holds no seed; the end must be greater than the beginning.", param, ctx)
        return seeds


@click.command(
    epilog="""\b
Examples:
  gavel simulate
  gavel simulate --seeds 0..10000
  gavel simulate --seeds 17 --trace
  gavel simulate --seeds 0..500 --mutant "a fence that only reads"

Exits with 1 if a seed fails, and says how to repeat it."""
)
@click.option(
    "--seeds",
    type=Seeds(),
    default=range(SEEDS),
    metavar="A..B",
    help="From A up to, not including, B; or one. [default: 0..100]",
)
@click.option("--trace", is_flag=True, help="Tell all that happens, on standard output.")
@click.option("--jobs", type=click.IntRange(1, 256), help="Processes at once. [default: one a core]")
@click.option("--mutant", help="Put in a mistake that must be found; see tests/simulation/mutants.py.")
@click.option("--json", "results", type=click.File("w"), help="Write the results to this file.")
def command(seeds: range, *, trace: bool, jobs: int | None, mutant: str | None, results: TextIO | None) -> int:
    """Simulate engines with faults, and judge what clients saw by what the journal holds.

    Each seed is one engine with its clients and its faults; the same seed is the same run.
    """
    if not (ROOT / "tests" / "simulation").is_dir():
        raise CommandError("The simulator stands with Gavel's tests; run this in a checkout of the sources.")
    if mutant is not None:
        _check_mutant(mutant)
    if trace and (results is not None or jobs is not None):
        raise click.UsageError("--trace tells all that there is; it goes with neither --json nor --jobs.")
    if trace:
        os.chdir(ROOT)
        # In our place: whoever ends us ends it.
        os.execv(sys.executable, _worker(seeds.start, seeds.stop, 1, mutant, "--trace"))  # noqa: S606 (no shell is wanted)
    began = time.monotonic()
    tally = simulate_with_progress(seeds, jobs or os.cpu_count() or 1, mutant)
    print_results(tally, time.monotonic() - began, mutant)
    if results is not None:
        json.dump(vars(tally) | {"wall_s": time.monotonic() - began}, results, indent=2)
        results.write("\n")
    return 1 if tally.failed else 0


def _check_mutant(name: str) -> None:
    sys.path.insert(0, str(ROOT))
    from tests.simulation.mutants import MUTANTS

    names = [mutant.name for mutant in MUTANTS]
    if name not in names:
        raise click.UsageError(f"There is no mutant {name!r}; there are: {'; '.join(names)}.")


def simulate_with_progress(seeds: range, jobs: int, mutant: str | None) -> Tally:
    """Simulate, with a progress bar where somebody looks on."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    tally = Tally()
    columns = (TextColumn("seeds"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task("seeds", total=len(seeds))
        for result in simulate(seeds, jobs, mutant):
            tally.add(result)
            progress.advance(task)
    return tally


def simulate(seeds: range, jobs: int, mutant: str | None) -> Generator[dict[str, Any], None, None]:
    """Simulate seeds in several processes; their results as they come. Leaving it early ends the processes."""
    lines: queue.Queue[str | None] = queue.Queue()
    jobs = min(jobs, len(seeds))
    workers = [
        subprocess.Popen(_worker(first, seeds.stop, jobs, mutant), cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for first in seeds[:jobs]
    ]

    def read(worker: subprocess.Popen[str]) -> None:
        assert worker.stdout is not None
        for line in worker.stdout:
            lines.put(line)
        lines.put(None)

    readers = [threading.Thread(target=read, args=(worker,), daemon=True) for worker in workers]
    try:
        for reader in readers:
            reader.start()
        working = len(workers)
        while working:
            line = lines.get()
            if line is None:
                working -= 1
            else:
                yield json.loads(line)
        if any(worker.wait() for worker in workers):
            raise CommandError("A process of the simulator broke off; what it said stands above.")
    finally:
        for worker in workers:
            worker.terminate()
        for worker, reader in zip(workers, readers, strict=True):
            worker.wait()
            reader.join()
            with contextlib.suppress(OSError):
                worker.stdout.close()  # type: ignore[union-attr]


def _worker(first: int, end: int, step: int, mutant: str | None, *options: str) -> list[str]:
    more = [] if mutant is None else ["--mutant", mutant]
    return [sys.executable, "-m", _WORKER, str(first), str(end), "--step", str(step), *more, *options]


# Results


def repeat_command(seed: int, mutant: str | None) -> str:
    """The command that shows what a seed does."""
    return f"gavel simulate --seeds {seed} --trace" + ("" if mutant is None else f' --mutant "{mutant}"')


def print_results(tally: Tally, wall_s: float, mutant: str | None) -> None:
    """What failed and how to repeat it, and the sums."""
    for seed, violations in sorted(tally.failed.items())[:_SHOWN_MAX]:
        click.echo(f"seed {seed}: {violations[0]}")
        if len(violations) > 1:
            click.echo(f"  and {len(violations) - 1} more")
        click.echo(f"  {repeat_command(seed, mutant)}")
    if len(tally.failed) > _SHOWN_MAX:
        click.echo(f"and {len(tally.failed) - _SHOWN_MAX} seeds more: {sorted(tally.failed)[_SHOWN_MAX:][:20]}")
    for counted in (tally.faults, tally.strained):
        for kind, count in sorted(counted.items()):
            click.echo(f"{count:>10,} {kind}")
    faults = sum(tally.faults.values())
    minutes = tally.cpu_s / 60 or 1
    click.echo(
        f"{tally.seeds:,} seeds, {len(tally.failed):,} failed; {tally.simulated_s / 3_600:,.1f} simulated hours "
        f"in {wall_s:,.0f} s; {tally.commands:,} commands, {tally.events:,} events, {faults:,} faults; "
        f"a minute on one core: {tally.commands / minutes:,.0f} commands, {faults / minutes:,.0f} faults"
    )
