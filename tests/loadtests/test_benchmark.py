"""The order of a benchmark, and what becomes of a scenario that breaks off."""

from typing import Any

import pytest

from gavel.bench import measure_with_progress, print_failures
from loadtests import benchmark
from loadtests.benchmark import Stand, measure, plan
from loadtests.measured import BROKE_OFF, LEFT_OUT, LoadFailed, Options, Run
from loadtests.scenarios import SCENARIOS, Scenario

BIDS = SCENARIOS["bids"]


class Fails(Scenario):
    def run(self, subject: Any, options: Options) -> list[Run]:
        options.report("trying")
        raise LoadFailed("the server does not answer")


class IsReset(Scenario):
    def run(self, subject: Any, options: Options) -> list[Run]:
        raise ConnectionResetError("gone")


class Measures(Scenario):
    def run(self, subject: Any, options: Options) -> list[Run]:
        return [Run(self.name, "gavel", "a load", options.number)]


def test_subjects_take_turns_in_each_repetition() -> None:
    stands = plan([BIDS], 2, is_quick=False, with_peers=True)
    assert [(stand.subject, stand.number) for stand in stands] == [
        (subject, number) for number in range(2) for subject in BIDS.subjects
    ]


def test_without_peers_only_gavel_is_measured() -> None:
    stands = plan(list(SCENARIOS.values()), None, is_quick=False, with_peers=False)
    assert {stand.subject for stand in stands} == {"gavel"}
    assert len(stands) == sum(scenario.repetitions for scenario in SCENARIOS.values())


def test_a_quick_benchmark_starts_each_subject_once_and_runs_all() -> None:
    stands = plan(list(SCENARIOS.values()), None, is_quick=True, with_peers=True)
    subjects = [stand.subject for stand in stands]
    assert len(subjects) == len(set(subjects))
    ran = {(stand.subject, scenario.name) for stand in stands for scenario in stand.scenarios}
    assert ran == {(subject, name) for name, scenario in SCENARIOS.items() for subject in scenario.subjects}


def test_what_breaks_off_costs_nothing_else() -> None:
    said: list[str] = []
    scenarios = (
        Fails("bids", ""),
        IsReset("connect", ""),
        Measures("timers", ""),
    )
    nobody: Any = object()
    runs: list[Run] = []
    measure(Stand("gavel", 1, scenarios), runs, said.append, is_quick=True, running=nobody)
    failed, reset, measured = runs
    assert (failed.scenario, failed.load, failed.notes) == ("bids", BROKE_OFF, ["the server does not answer"])
    assert (reset.load, reset.notes) == (BROKE_OFF, ["ConnectionResetError: gone"])
    assert (measured.scenario, measured.load, measured.number) == ("timers", "a load", 1)
    assert said == ["starting", "bids: trying"]


def test_a_peer_that_cannot_run_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "why_not", lambda name: f"{name} was left out, for Node is missing.")
    runs: list[Run] = []
    measure(Stand("ws", 0, (SCENARIOS["fanout"],)), runs, lambda _: None, is_quick=True)
    (left_out,) = runs
    assert (left_out.subject, left_out.load) == ("ws", LEFT_OUT)
    assert left_out.notes == ["ws was left out, for Node is missing."]


@pytest.mark.parametrize("figure", ["lost", "counted_twice", "missing"])
def test_what_gavel_must_never_do_is_a_failure(figure: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert print_failures([Run("recover", "gavel", "kills", 0, figures={figure: 0})]) == 0
    assert print_failures([Run("fanout", "ws", "20 bids/s", 0, figures={figure: 2})]) == 0
    assert capsys.readouterr().err == ""
    assert print_failures([Run("recover", "gavel", "kills", 0, figures={figure: 2})]) == 1
    assert capsys.readouterr().err == f"recover, kills, run 1: 2 {figure.replace('_', ' ')}.\n"


def test_what_was_measured_is_kept_when_a_benchmark_is_ended() -> None:
    class IsEnded(Scenario):
        def run(self, subject: Any, options: Options) -> list[Run]:
            raise KeyboardInterrupt

    kept: list[str] = []
    scenarios = (Measures("bids", ""), IsEnded("fanout", ""), Measures("connect", ""))
    stands = [Stand("gavel", 0, (scenario,)) for scenario in scenarios]
    nobody: Any = object()
    with pytest.raises(KeyboardInterrupt):
        measure_with_progress(
            stands, nobody, lambda runs: kept.append(" ".join(run.load for run in runs)), is_quick=False
        )
    assert kept == ["a load", "a load"]
