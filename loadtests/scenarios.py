"""All scenarios of the benchmark: what each needs to be run. A scenario is a file beside this one."""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from loadtests.engine import Subject
    from loadtests.measured import Options, Run


@dataclass(frozen=True)
class Scenario:
    """Something that can be measured of a subject."""

    name: str
    """Also of its file, which is imported when it is run: what measures takes a second to import."""
    about: str
    """What it is, in a sentence."""
    subjects: tuple[str, ...] = ("gavel",)
    """Who is measured, in turn in each repetition."""
    repetitions: int = 3
    """How often it is run unless one says otherwise."""

    def run(self, subject: "Subject", options: "Options") -> "list[Run]":
        """Put the scenario's loads on a subject that was started for the purpose. Raises `LoadFailed`."""
        import uvloop  # noqa: PLC0415 (see above)

        runs: list[Run] = uvloop.run(import_module(f"loadtests.{self.name}").run(subject, options))
        return runs


SCENARIOS: Final = {
    scenario.name: scenario
    for scenario in (
        Scenario(
            "bids",
            "Bids a second on one hot auction, and how long a bid takes at fixed rates over many.",
            subjects=("gavel", "row_lock", "ray_calls"),
        ),
        Scenario(
            "overload",
            "Twice the rate at which one core is full: what is still acknowledged, and how fast.",
            repetitions=1,
        ),
    )
}
