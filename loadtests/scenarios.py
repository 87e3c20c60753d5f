"""All scenarios of the benchmark: what each needs to be run."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from loadtests import bids, overload
from loadtests.engine import Subject
from loadtests.measured import Options, Run


@dataclass(frozen=True)
class Scenario:
    """Something that can be measured of a subject."""

    name: str
    about: str
    """What it is, in a sentence."""
    run: Callable[[Subject, Options], Awaitable[list[Run]]]
    """Puts its loads on a subject that was started for the purpose. Raises `LoadFailed`."""
    subjects: tuple[str, ...] = ("gavel",)
    """Who is measured, one after the other in each repetition."""
    repetitions: int = 3
    """How often it is run unless one says otherwise."""


SCENARIOS: Final = {
    scenario.name: scenario
    for scenario in (
        Scenario(
            "bids",
            "Bids a second on one hot auction, and how long a bid takes at fixed rates over many.",
            bids.run,
            subjects=("gavel", "row_lock", "ray_calls"),
        ),
        Scenario(
            "overload",
            "Twice the rate at which one core is full: what is still acknowledged, and how fast.",
            overload.run,
            repetitions=1,
        ),
    )
}
