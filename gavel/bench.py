"""`gavel bench`: measure how many bids an engine takes, one of its own or a running one."""

import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final, TextIO

import click

from gavel.errors import CommandError
from loadtests.bids import RATE, SECONDS, SOCKETS, LoadFailed, Measured, measure

READY: Final = "ready "
READY_TIMEOUT_S: Final = 120
STOP_TIMEOUT_S: Final = 30
PERCENTILES: Final = {"p50": 50, "p90": 90, "p99": 99, "max": 100}


@click.group(
    epilog="""\b
Examples:
  gavel bench bids
  gavel bench bids --help"""
)
def command() -> None:
    """Measure how many bids an engine takes."""


@command.command(
    "bids",
    epilog="""\b
Examples:
  gavel bench bids
  gavel bench bids --sockets 100 --seconds 10 --json bids.json
  gavel bench bids --url http://127.0.0.1:8700 --data-dir /var/lib/gavel""",
)
@click.option("--url", help="Measure this running engine. [default: start one for the purpose]")
@click.option("--data-dir", type=click.Path(path_type=Path), help="The running engine's data folder, for its key.")
@click.option("--sockets", type=click.IntRange(1, 20_000), default=SOCKETS, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.1, 3_600), default=SECONDS, show_default=True)
@click.option("--rate", type=click.IntRange(1, 10_000), default=RATE, show_default=True, help="Of the open loop.")
@click.option("--json", "results", type=click.File("w"), help="Write the results to this file.")
def bids(
    *, url: str | None, data_dir: Path | None, sockets: int, seconds: float, rate: int, results: TextIO | None
) -> None:
    """One hot auction, many sockets: bids per second in a closed loop, then the latency at a fixed rate."""
    from gavel.settings import load_settings

    if url is not None:
        measured = run_load(url, load_settings(data_dir=data_dir).data_dir, sockets, seconds, rate)
    else:
        if data_dir is not None:
            raise click.UsageError("--data-dir belongs to --url; without --url the engine has a folder of its own.")
        with own_engine() as (own_url, own_folder):
            measured = run_load(own_url, own_folder, sockets, seconds, rate)
    rows = results_of(measured, sockets, rate)
    print_results(rows)
    if results is not None:
        json.dump(rows, results, indent=2)
        results.write("\n")


def run_load(url: str, data_dir: Path, sockets: int, seconds: float, rate: int) -> tuple[Measured, Measured]:
    """Run the load generator in this process, on uvloop."""
    import uvloop

    from gavel.keys import read_keys

    keys = read_keys(data_dir)
    try:
        return uvloop.run(measure(url, keys.private_pem, sockets=sockets, seconds=seconds, rate=rate))
    except LoadFailed as error:
        raise CommandError(f"The measurement broke off: {error}; look at the engine's log.") from error


@contextmanager
def own_engine() -> Iterator[tuple[str, Path]]:
    """Start `gavel up` on a free port with a folder of its own, and stop it afterwards. Gives its URL and folder."""
    with tempfile.TemporaryDirectory(prefix="gavel-bench-") as folder:
        arguments = [sys.executable, "-m", "gavel", "up", "--port", "0", "--data-dir", folder]
        engine = subprocess.Popen(arguments, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
        try:
            yield _ready_url(engine), Path(folder)
        finally:
            engine.send_signal(signal.SIGTERM)
            try:
                engine.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                engine.kill()
                engine.wait()


def _ready_url(engine: subprocess.Popen[str]) -> str:
    lines: queue.Queue[str | None] = queue.Queue()
    assert engine.stdout is not None
    # To the very end: an engine whose pipe is full would stand still.
    threading.Thread(target=_read_lines, args=(engine.stdout, lines), daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=READY_TIMEOUT_S)
        except queue.Empty:
            raise CommandError(
                f"The engine is not ready after {READY_TIMEOUT_S} s; see what `gavel up --port 0` says."
            ) from None
        if line is None:
            raise CommandError("The engine ended before it was ready; see what `gavel up --port 0` says.")
        if line.startswith(READY):
            return line.removeprefix(READY).strip()


def _read_lines(stream: IO[str], lines: "queue.Queue[str | None]") -> None:
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(None)


def results_of(measured: tuple[Measured, Measured], sockets: int, rate: int) -> list[dict[str, Any]]:
    """A row for each load."""
    names = (f"closed, {sockets} sockets", f"open, {rate} bids/s")
    return [
        {
            "load": name,
            "seconds": load.seconds,
            "acks": load.acks,
            "acks_per_second": round(load.acks_per_second, 1),
            "refused": dict(load.refused),
            "unanswered": load.unanswered,
            **{f"{key}_ms": round(load.percentile_ms(percent), 3) for key, percent in PERCENTILES.items()},
        }
        for name, load in zip(names, measured, strict=True)
    ]


def print_results(rows: list[dict[str, Any]]) -> None:
    """The rows as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("load", *(f"{name}" for name in ("acks/s", "refused", *(f"{key} ms" for key in PERCENTILES))))
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        refused = sum(row["refused"].values())
        codes = ", ".join(f"{count:,} {code}" for code, count in row["refused"].items())
        latencies = (f"{row[f'{key}_ms']:,.2f}" for key in PERCENTILES)
        table.add_row(row["load"], f"{row['acks_per_second']:,.0f}", codes if refused else "0", *latencies)
    Console().print(table)
    unanswered = sum(row["unanswered"] for row in rows)
    if unanswered:
        click.echo(f"{unanswered} bids were not answered within the time limit", err=True)
