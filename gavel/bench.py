"""`gavel bench`: measure the engine beside what one would otherwise take, and write a report."""

import itertools
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

from gavel.errors import CommandError
from loadtests.scenarios import SCENARIOS

if TYPE_CHECKING:
    from loadtests.benchmark import Stand
    from loadtests.measured import Run
    from loadtests.subjects import Subject

OUTPUT: Final = "gavel-bench"
_NEVER: Final = ("lost", "counted_twice", "missing")
"""Figures that count what Gavel promises never to do with a bid: however fast it was, it is broken then."""
_LIST: Final = "\n".join(f"  {scenario.name:<10}{scenario.about}" for scenario in SCENARIOS.values())


@click.command(
    epilog=f"""\b
Scenarios:
{_LIST}

\b
Examples:
  gavel bench
  gavel bench --quick
  gavel bench bids --runs 5 --no-peers
  gavel bench bids --url http://127.0.0.1:8700 --data-dir /var/lib/gavel"""
)
@click.argument("scenario", required=False, type=click.Choice(list(SCENARIOS)), metavar="[SCENARIO]")
@click.option("--quick", is_flag=True, help="Only see that all works, in a minute: small numbers, which say nothing.")
@click.option("--runs", type=click.IntRange(1, 100), help="How often each scenario is run. [default: once to thrice]")
@click.option("--no-peers", is_flag=True, help="Measure Gavel alone.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=OUTPUT,
    show_default=True,
    help="The folder for report.html and report.json.",
)
@click.option("--url", help="Measure this running engine. [default: start one for each run]")
@click.option("--data-dir", type=click.Path(path_type=Path), help="The running engine's data folder, for its key.")
def command(
    scenario: str | None,
    *,
    quick: bool,
    runs: int | None,
    no_peers: bool,
    output: Path,
    url: str | None,
    data_dir: Path | None,
) -> int:
    """Measure the engine beside what one would otherwise take, and write a report.

    Starts what it needs, each with a fresh folder; runs all scenarios several times, or the one that is named; prints
    the goals beside what was measured; and writes a page with plots. On two cores all of it takes under 25 minutes.
    """
    if url is not None and scenario is None:
        raise click.UsageError("--url goes with one scenario: name it.")
    if url is None and data_dir is not None:
        raise click.UsageError("--data-dir belongs to --url; without --url the engine has a folder of its own.")
    from loadtests.benchmark import plan

    chosen = list(SCENARIOS.values()) if scenario is None else [SCENARIOS[scenario]]
    stands = plan(chosen, runs, is_quick=quick, with_peers=not no_peers and url is None)
    # Before the first minutes have passed, not after the last.
    _make_folder(output)
    began = time.monotonic()
    names = [one.name for one in chosen]

    def keep(measured: "Sequence[Run]") -> None:
        write_report(output, measured, names, time.monotonic() - began, is_quick=quick)

    with _terminable():
        measured = measure_with_progress(stands, _running(url, data_dir), keep, is_quick=quick)
    print_goals(measured, names, is_quick=quick)
    from loadtests.report import DATA, PAGE

    click.echo(f"{output / PAGE} has the plots, {output / DATA} all figures.")
    if quick:
        click.echo("This was a quick run: its figures say nothing about the goals.")
    return print_failures(measured)


def measure_with_progress(
    stands: "Sequence[Stand]", running: "Subject | None", keep: "Callable[[Sequence[Run]], None]", *, is_quick: bool
) -> "list[Run]":
    """Measure one thing after the other, and say how far it is.

    `keep` is given all runs so far after each scenario, also when something ends us in its midst. A quick benchmark,
    whose subjects go through several scenarios, calls it once.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from loadtests.benchmark import measure
    from loadtests.plots import title_of

    runs: list[Run] = []
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    # It is drawn when there is something to tell: a thread that draws would disturb what is measured here.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True) as progress:
        task = progress.add_task("", total=len(stands))

        def run(stand: "Stand") -> None:
            names = ", ".join(scenario.name for scenario in stand.scenarios)
            words = f"{title_of(stand.subject)}, {names}, run {stand.number + 1}"
            if not progress.console.is_terminal:
                progress.console.print(words)

            def report(doing: str) -> None:
                progress.update(task, description=f"{words}: {doing}", refresh=True)

            measure(stand, runs, report, is_quick=is_quick, running=running)
            progress.advance(task)

        for _, group in itertools.groupby(stands, key=lambda stand: () if is_quick else stand.scenarios):
            try:
                for stand in group:
                    run(stand)
            finally:
                keep(runs)
    return runs


def write_report(
    output: Path, runs: "Sequence[Run]", scenarios: Sequence[str], seconds: float, *, is_quick: bool
) -> None:
    """Write the page and the JSON."""
    from loadtests import report

    abouts = {name: SCENARIOS[name].about for name in scenarios}
    report.write(output, runs, abouts, seconds=seconds, is_quick=is_quick)


def print_goals(runs: "Sequence[Run]", scenarios: Sequence[str], *, is_quick: bool) -> None:
    """Print the goals beside what was measured."""
    from rich.console import Console
    from rich.table import Table

    from loadtests.goals import outcomes

    table = Table("goal", "met", "wanted", "measured", "lowest to highest")
    for outcome in outcomes(runs, scenarios):
        met = {None: "-", True: "[green]yes[/]", False: "[red]no[/]"}[None if is_quick else outcome.is_met]
        measured = "\n".join((outcome.value_words, *(f"[dim]{remark}[/]" for remark in outcome.remarks)))
        table.add_row(outcome.goal.about, met, outcome.goal.limit_words, measured, outcome.spread_words)
    Console().print(table)


def print_failures(runs: "Sequence[Run]") -> int:
    """Say what is missing. Returns the exit code: 1 if anything broke off, or Gavel has lost something."""
    from loadtests.measured import BROKE_OFF, LEFT_OUT

    for note in dict.fromkeys(run.notes[0] for run in runs if run.load == LEFT_OUT):
        click.echo(note, err=True)
    broken = [run for run in runs if run.load == BROKE_OFF]
    for run in broken:
        click.echo(f"{run.scenario} on {run.subject}, run {run.number + 1}, broke off: {run.notes[0]}.", err=True)
    wrong = [(run, name) for run in runs for name in _NEVER if run.subject == "gavel" and run.figures.get(name)]
    for run, name in wrong:
        heading = name.replace("_", " ")
        click.echo(f"{run.scenario}, {run.load}, run {run.number + 1}: {run.figures[name]:,.0f} {heading}.", err=True)
    return 1 if broken or wrong else 0


def _running(url: str | None, data_dir: Path | None) -> "Subject | None":
    if url is None:
        return None
    from gavel.settings import load_settings
    from loadtests.measured import LoadFailed
    from loadtests.subjects import Engine

    try:
        return Engine(url, load_settings(data_dir=data_dir).data_dir)
    except LoadFailed as error:
        raise CommandError(f"There is nothing to measure: {error}; name its folder with --data-dir.") from error


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"{folder} cannot be made ({error.strerror}); name another folder with --output.") from error


@contextmanager
def _terminable() -> Iterator[None]:
    """Ended by SIGTERM we stop what we started, as after Ctrl-C."""

    def end(_number: int, _frame: Any) -> NoReturn:  # noqa: ANN401 (as in signal)
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
