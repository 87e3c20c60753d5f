"""`gavel bench`: measure the engine beside what one would otherwise take, and write a report."""

import signal
import sys
import time
from collections.abc import Iterator, Sequence
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
    with _terminable():
        measured = measure_with_progress(stands, _running(url, data_dir), is_quick=quick)
    write_report(output, measured, [one.name for one in chosen], time.monotonic() - began, is_quick=quick)
    return print_failures(measured)


def measure_with_progress(stands: "Sequence[Stand]", running: "Subject | None", *, is_quick: bool) -> "list[Run]":
    """Measure one thing after the other, and say how far it is."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from loadtests.benchmark import measure
    from loadtests.plots import title_of

    runs: list[Run] = []
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    # It is drawn when there is something to tell: a thread that draws would disturb what is measured here.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True) as progress:
        task = progress.add_task("", total=len(stands))
        for stand in stands:
            names = ", ".join(scenario.name for scenario in stand.scenarios)
            words = f"{title_of(stand.subject)}, {names}, run {stand.number + 1}"
            if not progress.console.is_terminal:
                progress.console.print(words)

            def report(doing: str, words: str = words) -> None:
                progress.update(task, description=f"{words}: {doing}", refresh=True)

            runs += measure(stand, report, is_quick=is_quick, running=running)
            progress.advance(task)
    return runs


def write_report(
    output: Path, runs: "Sequence[Run]", scenarios: Sequence[str], seconds: float, *, is_quick: bool
) -> None:
    """Write the page and the JSON, and print the goals."""
    from rich.console import Console
    from rich.table import Table

    from loadtests import report
    from loadtests.goals import outcomes

    table = Table("goal", "wanted", "measured", "lowest to highest", "met")
    for outcome in outcomes(runs, scenarios):
        met = {None: "-", True: "[green]yes[/]", False: "[red]no[/]"}[outcome.is_met]
        words = (outcome.goal.about, outcome.goal.limit_words, outcome.value_words, outcome.spread_words)
        table.add_row(*words, met)
    console = Console()
    console.print(table)
    report.write(output, runs, {name: SCENARIOS[name].about for name in scenarios}, seconds=seconds, is_quick=is_quick)
    click.echo(f"{output / report.PAGE} has the plots, {output / report.DATA} all figures.")
    if is_quick:
        click.echo("This was a quick run: its figures say nothing about the goals.")


def print_failures(runs: "Sequence[Run]") -> int:
    """Say what is missing. Returns the exit code: 1 if anything broke off."""
    from loadtests.benchmark import BROKE_OFF, LEFT_OUT

    for note in dict.fromkeys(run.notes[0] for run in runs if run.load == LEFT_OUT):
        click.echo(note, err=True)
    broken = [run for run in runs if run.load == BROKE_OFF]
    for run in broken:
        click.echo(f"{run.scenario} on {run.subject}, run {run.number + 1}, broke off: {run.notes[0]}.", err=True)
    return 1 if broken else 0


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
