"""All scenarios of the benchmark: what each needs to be run. A scenario is a file beside this one."""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from loadtests.measured import Options, Run
    from loadtests.subjects import Subject


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
        module = import_module(f"loadtests.{self.name}")
        runs: list[Run] = module.run(subject, options)
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
        Scenario(
            "fanout",
            "10,000 sockets watch one auction: how long until a bid is on all their screens.",
            subjects=("gavel", "ws", "socketio"),
            repetitions=2,
        ),
        Scenario(
            "connect",
            "How fast 10,000 sockets are let in, what they cost while nothing happens, and how fast all come back.",
            subjects=("gavel", "ws"),
            repetitions=2,
        ),
        Scenario(
            "timers",
            "10,000 auctions are open, and 1,000 of them end within one second: how late a client hears of it.",
        ),
        Scenario(
            "activate",
            "100,000 auctions in the journal: the start, the memory, the first touch.",
            repetitions=2,
        ),
        Scenario(
            "recover",
            "A shard is killed under load, 20 times: how long until bids are acknowledged again.",
            repetitions=1,
        ),
    )
}
