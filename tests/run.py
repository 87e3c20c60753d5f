"""Runs the suites, each within its time, then checks coverage: `make test` ends here."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Suite:
    """Folders of tests that run in one pytest process."""

    name: str
    folders: tuple[str, ...]
    budget_s: int
    test_timeout_s: int
    is_covered: bool = True


# The first two lanes run side by side, on a core each; what comes after them wants all cores for itself.
LANES = (
    (
        Suite("engine", ("engine",), budget_s=180, test_timeout_s=60),
        Suite("units", ("actors", "gateway", "gavel", "loadtests"), budget_s=180, test_timeout_s=20),
    ),
    (Suite("integration", ("contracts", "deploy", "integration"), budget_s=300, test_timeout_s=60),),
)
ALONE = (
    # Seeds are simulated in processes of their own; coverage would not see them.
    Suite("simulation", ("simulation",), budget_s=240, test_timeout_s=120, is_covered=False),
    # Whole engines, as processes of their own: coverage would not see them.
    Suite("whole", ("e2e", "faults"), budget_s=480, test_timeout_s=120, is_covered=False),
)
SUITES = (*LANES[0], *LANES[1], *ALONE)

# Of lines and branches, in percent.
COVERAGE_FLOORS = {"engine": 100, "actors": 90, "gateway": 90}

# How long an interrupted pytest may take to stop what its tests started.
_GRACE_S = 15


class Failed(Exception):
    """A suite failed; the sentence says which and how."""


def main() -> None:
    """Run all suites, or those named as arguments (then without checking coverage)."""
    os.chdir(ROOT)
    names = sys.argv[1:]
    if unknown := sorted(set(names) - {suite.name for suite in SUITES}):
        _fail(f"no suite is called {', '.join(unknown)}; there are {', '.join(suite.name for suite in SUITES)}")

    _coverage("erase")
    started = time.monotonic()
    wanted = [suite for suite in SUITES if not names or suite.name in names]
    try:
        asyncio.run(_run_all(wanted))
    except* Failed as failures:
        _fail("; ".join(map(str, failures.exceptions)))
    except* (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit(130)
    if not names:
        _check_coverage()
    _say(f"passed: {', '.join(suite.name for suite in wanted)}, in {time.monotonic() - started:.0f} s")


async def _run_all(wanted: Sequence[Suite]) -> None:
    """Run these suites. Raises a group of `Failed`."""
    # Ended from outside (a build that takes too long), we end what we started as after Ctrl-C.
    this = asyncio.current_task()
    assert this is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
    lanes = [suites for lane in LANES if (suites := [suite for suite in lane if suite in wanted])]
    async with asyncio.TaskGroup() as group:
        for lane in lanes:
            group.create_task(_run_lane(lane, is_alone=len(lanes) == 1))
    async with asyncio.TaskGroup() as group:
        group.create_task(_run_lane([suite for suite in ALONE if suite in wanted], is_alone=True))


async def _run_lane(suites: Sequence[Suite], *, is_alone: bool) -> None:
    for suite in suites:
        folders = [f"tests/{folder}" for folder in suite.folders]
        _say(f"{suite.name}: {', '.join(folders)}, at most {suite.budget_s} s")
        coverage = ["-m", "coverage", "run"] if suite.is_covered else []
        command = [sys.executable, *coverage, "-m", "pytest", f"--timeout={suite.test_timeout_s}", *folders]
        if is_alone:
            await _run(suite, command, None)
            continue
        with TemporaryFile() as output:
            try:
                await _run(suite, command, output.fileno())
            finally:
                # What runs side by side is read one after the other.
                output.seek(0)
                _say(f"{suite.name}:\n{output.read().decode(errors='replace')}")


async def _run(suite: Suite, command: Sequence[str], output: int | None) -> None:
    """Run a suite. Raises `Failed` if it fails or takes too long."""
    # In a process group of its own, so that we can end pytest together with what its tests started.
    process = await asyncio.create_subprocess_exec(
        *command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
    )
    try:
        async with asyncio.timeout(suite.budget_s):
            exit_code = await process.wait()
    except TimeoutError:
        raise Failed(f"suite {suite.name} took longer than its {suite.budget_s} s and was ended") from None
    finally:
        if process.returncode is None:
            await asyncio.shield(_end(process))
    if exit_code != 0:
        raise Failed(f"suite {suite.name} failed")


async def _end(process: asyncio.subprocess.Process) -> None:
    """Interrupt pytest, which then says where it was and tears down; kill what remains of its group."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_GRACE_S):
            await process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def _check_coverage() -> None:
    _coverage("combine", "--quiet")
    missed = []
    for package, floor in COVERAGE_FLOORS.items():
        _say(f"coverage of {package}/, at least {floor} %")
        if _coverage("report", f"--include={package}/*", "--omit=tests/*", f"--fail-under={floor}") != 0:
            missed.append(f"{package}/ under {floor} %")
    if missed:
        _fail(f"coverage is too low: {', '.join(missed)}")


def _coverage(*arguments: str) -> int:
    return subprocess.run([sys.executable, "-m", "coverage", *arguments], check=False).returncode


def _say(sentence: str) -> None:
    print(f"== {sentence}", flush=True)


def _fail(sentence: str) -> NoReturn:
    _say(f"FAILED: {sentence}")
    sys.exit(1)


if __name__ == "__main__":
    main()
