"""The simulator at work: fresh seeds must be clean, and every mistake that is put in must be found."""

import secrets
import subprocess
import sys
from typing import Any

import pytest

from gavel.simulate import ROOT, Tally, repeat_command, simulate
from tests.simulation.mutants import MUTANTS, Mutant

FRESH_SEEDS = 300
MUTANT_SEEDS = 500
JOBS = 2
STRAINS = {
    "client behind",
    "client closed as too slow",
    "client told a state",
    "client told busy",
    "events folded on a link",
    "events no longer at the gateway",
    "gateway behind",
    "gateway cut off",
}


def first_failure(seeds: range, mutant: str | None) -> dict[str, Any] | None:
    """The first of these seeds to fail, or None."""
    results = simulate(seeds, JOBS, mutant)
    try:
        return next((result for result in results if result["violations"]), None)
    finally:
        results.close()


def gavel(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gavel", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_fresh_seeds_are_clean() -> None:
    first = secrets.randbelow(1 << 40)
    tally = Tally()
    for result in simulate(range(first, first + FRESH_SEEDS), JOBS, None):
        tally.add(result)
    told = [f"{repeat_command(seed, None)}: {violations[0]}" for seed, violations in tally.failed.items()]
    assert not told, "\n".join(told)
    assert tally.seeds == FRESH_SEEDS
    # Clean, though a lot went wrong.
    assert tally.commands > 100 * FRESH_SEEDS
    assert tally.faults.total() > FRESH_SEEDS
    assert set(tally.strained) == STRAINS


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_a_mistake_is_found(mutant: Mutant) -> None:
    assert first_failure(range(MUTANT_SEEDS), mutant.name) is not None


def test_a_seed_is_the_same_run_in_every_process() -> None:
    def lines() -> list[str]:
        return gavel("simulate", "--seeds", "7", "--trace").stdout.splitlines()

    once, again = lines(), lines()
    assert len(once) > 1_000
    assert [line for line in once if not line.startswith("cpu_s")] == [
        line for line in again if not line.startswith("cpu_s")
    ]


def test_a_failing_seed_says_how_to_repeat_it() -> None:
    mutant = "a raise that extends"
    ran = gavel("simulate", "--seeds", "0..10", "--mutant", mutant)
    assert ran.returncode == 1
    seed = next(line.split()[1].rstrip(":") for line in ran.stdout.splitlines() if line.startswith("seed "))
    command = f'gavel simulate --seeds {seed} --trace --mutant "{mutant}"'
    assert command in ran.stdout
    repeated = gavel("simulate", "--seeds", seed, "--trace", "--mutant", mutant)
    assert repeated.returncode == 1
    assert "[extension]" in repeated.stdout
    assert "clients" in repeated.stdout


def test_wrong_seeds_are_refused_with_a_sentence() -> None:
    for wrong in ("a", "5..5", "9..3", "-1", "1..x"):
        ran = gavel("simulate", "--seeds", wrong)
        assert ran.returncode == 2
        assert "seed" in ran.stderr
        assert "Traceback" not in ran.stderr
