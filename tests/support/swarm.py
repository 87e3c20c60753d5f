"""Runs the Locust swarm as its users would: headless, as a program of its own."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
RUN_S = 60


class Table(NamedTuple):
    """What a run ended with: its exit code, its log, and Locust's table: requests and failures by name."""

    code: int
    log: str
    requests: dict[str, int]
    failures: dict[str, int]


def run_swarm(folder: Path, *arguments: str) -> Table:
    """Run it to its end."""
    command = [sys.executable, "-m", "locust", "-f", "loadtests/locustfile.py", "--headless", "--only-summary"]
    # None of the settings of whoever runs the tests.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GAVEL_", "LOCUST_"))}
    ran = subprocess.run(
        [*command, "--csv", str(folder / "table"), *arguments],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )
    log, path = ran.stdout + ran.stderr, folder / "table_stats.csv"
    if not path.exists():
        return Table(ran.returncode, log, {}, {})
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["Name"] != "Aggregated"]
    requests = {row["Name"]: int(row["Request Count"]) for row in rows}
    failures = {row["Name"]: int(row["Failure Count"]) for row in rows if row["Failure Count"] != "0"}
    return Table(ran.returncode, log, requests, failures)
