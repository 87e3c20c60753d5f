"""A whole benchmark: which subjects are started in which order, and what is measured of each."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Final

import psutil

from loadtests.measured import BROKE_OFF, LEFT_OUT, LoadFailed, Options, Run
from loadtests.peers import running_peer, why_not
from loadtests.scenarios import Scenario
from loadtests.subjects import Subject, own_engine

GAVEL: Final = "gavel"
PEER_AUCTIONS: Final = 1_100
"""As many as the scenarios want of one peer."""
_FAILURES: Final = (LoadFailed, OSError, psutil.Error)
"""What a server, or the machine, can do to a scenario; the last two where a process of the server goes away."""


@dataclass(frozen=True)
class Stand:
    """A subject that is started, and the scenarios that are run on it before it is stopped."""

    subject: str
    number: int
    """Which repetition of these scenarios it is."""
    scenarios: tuple[Scenario, ...]


def plan(scenarios: Sequence[Scenario], repetitions: int | None, *, is_quick: bool, with_peers: bool) -> list[Stand]:
    """All that a benchmark starts, in order.

    Each run of a scenario gets a subject of its own, which remembers nothing, and the subjects take turns, so that they
    have the same machine. A quick benchmark starts each subject once.
    """
    if is_quick:
        subjects = dict.fromkeys(name for scenario in scenarios for name in scenario.subjects)
        stands = [Stand(name, 0, tuple(one for one in scenarios if name in one.subjects)) for name in subjects]
    else:
        stands = [
            Stand(name, number, (scenario,))
            for scenario in scenarios
            for number in range(repetitions or scenario.repetitions)
            for name in scenario.subjects
        ]
    return [stand for stand in stands if (with_peers or stand.subject == GAVEL)]


def measure(
    stand: Stand,
    runs: list[Run],
    report: Callable[[str], None],
    *,
    is_quick: bool,
    running: Subject | None = None,
) -> None:
    """Start a subject (unless one is `running`), run the scenarios on it, and stop it. Adds to `runs`.

    What goes wrong stands as a note in a run without figures: the rest of a benchmark shall not be lost for it.
    """
    if stand.subject != GAVEL and (reason := why_not(stand.subject)) is not None:
        runs += [_without_figures(scenario, stand, LEFT_OUT, reason) for scenario in stand.scenarios]
        return
    report("starting")
    try:
        with nullcontext(running) if running is not None else _started(stand) as subject:
            for scenario in stand.scenarios:
                options = Options(is_quick, stand.number, partial(_report_of, scenario, report))
                try:
                    runs += scenario.run(subject, options)
                except _FAILURES as error:
                    runs.append(_without_figures(scenario, stand, BROKE_OFF, _sentence(error)))
    except _FAILURES as error:
        runs += [_without_figures(scenario, stand, BROKE_OFF, _sentence(error)) for scenario in stand.scenarios]


def _report_of(scenario: Scenario, report: Callable[[str], None], doing: str) -> None:
    report(f"{scenario.name}: {doing}")


def _started(stand: Stand) -> AbstractContextManager[Subject]:
    return own_engine() if stand.subject == GAVEL else running_peer(stand.subject, PEER_AUCTIONS)


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, LoadFailed) else f"{type(error).__name__}: {error}"


def _without_figures(scenario: Scenario, stand: Stand, load: str, reason: str) -> Run:
    return Run(scenario.name, stand.subject, load, stand.number, notes=[reason])
