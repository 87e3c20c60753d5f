"""Runs the suites one after another, each within its time, then checks coverage: `make test` ends here."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
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


SUITES = (
    Suite("engine", ("engine",), budget_s=150, test_timeout_s=60),
    Suite("units", ("actors", "gateway", "gavel", "loadtests"), budget_s=120, test_timeout_s=10),
    Suite("integration", ("contracts", "deploy", "integration"), budget_s=220, test_timeout_s=60),
    # Seeds are simulated in processes of their own; coverage would not see them.
    Suite("simulation", ("simulation",), budget_s=240, test_timeout_s=120, is_covered=False),
    # Whole engines, as processes of their own: coverage would not see them.
    Suite("whole", ("e2e", "faults"), budget_s=420, test_timeout_s=120, is_covered=False),
)

# Of lines and branches, in percent.
COVERAGE_FLOORS = {"engine": 100, "actors": 90, "gateway": 90}

# How long an interrupted pytest may take to stop what its tests started.
_GRACE_S = 15


def main() -> None:
    """Run all suites, or those named as arguments (then without checking coverage)."""
    # Ended from outside (a build that takes too long), we end what we started as after Ctrl-C.
    signal.signal(signal.SIGTERM, _interrupt)
    os.chdir(ROOT)
    names = sys.argv[1:]
    if unknown := sorted(set(names) - {suite.name for suite in SUITES}):
        _fail(f"no suite is called {', '.join(unknown)}; there are {', '.join(suite.name for suite in SUITES)}")

    _coverage("erase")
    started = time.monotonic()
    ran = [suite.name for suite in SUITES if (not names or suite.name in names) and _run(suite)]
    if not ran:
        _fail("there are no tests to run")
    if not names:
        _check_coverage()
    _say(f"passed: {', '.join(ran)}, in {time.monotonic() - started:.0f} s")


def _run(suite: Suite) -> bool:
    """Run a suite; False if it has no tests yet. A failure or too long a time ends the program."""
    folders = [f"tests/{folder}" for folder in suite.folders if any(Path("tests", folder).rglob("test_*.py"))]
    if not folders:
        return False

    _say(f"{suite.name}: {', '.join(folders)}, at most {suite.budget_s} s")
    coverage = ["-m", "coverage", "run"] if suite.is_covered else []
    # In a process group of its own, so that we can end pytest together with what its tests started.
    process = subprocess.Popen(
        [sys.executable, *coverage, "-m", "pytest", f"--timeout={suite.test_timeout_s}", *folders],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        exit_code = process.wait(suite.budget_s)
    except subprocess.TimeoutExpired:
        _end(process)
        _fail(f"suite {suite.name} took longer than its {suite.budget_s} s and was ended")
    except KeyboardInterrupt:
        _end(process)
        sys.exit(130)
    if exit_code != 0:
        _fail(f"suite {suite.name} failed")
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt pytest, which then says where it was and tears down; kill what remains of its group."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


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


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _say(sentence: str) -> None:
    print(f"== {sentence}", flush=True)


def _fail(sentence: str) -> NoReturn:
    _say(f"FAILED: {sentence}")
    sys.exit(1)


if __name__ == "__main__":
    main()
