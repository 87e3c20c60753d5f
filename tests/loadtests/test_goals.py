"""The goals: which figures they look at, and when they are met."""

import pytest

from loadtests.goals import GOALS, Goal, outcomes, words_of
from loadtests.measured import Run
from loadtests.scenarios import SCENARIOS

SPACE = "\N{NO-BREAK SPACE}"


def run(subject: str, number: int, load: str = "closed loop, 500 sockets", **figures: float) -> Run:
    return Run("bids", subject, load, number, figures=figures)


def hot_auction(*runs: Run) -> tuple[bool | None, str, str]:
    outcome = outcomes(runs, ["bids"])[0]
    assert outcome.goal.of_subject == "row_lock"
    return outcome.is_met, outcome.value_words, outcome.spread_words


def test_each_goal_is_of_a_scenario_that_there_is() -> None:
    assert {goal.scenario for goal in GOALS} == SCENARIOS.keys()
    for goal in GOALS:
        assert goal.of_subject in SCENARIOS[goal.scenario].subjects


def test_a_goal_without_runs_is_not_measured() -> None:
    assert hot_auction() == (None, "not measured", "")


def test_a_ratio_is_taken_in_each_repetition() -> None:
    runs = [
        run("gavel", 0, acks_per_second=40_000),
        run("row_lock", 0, acks_per_second=1_000),
        run("gavel", 1, acks_per_second=10_000),
        run("row_lock", 1, acks_per_second=200),
        run("gavel", 2, acks_per_second=60_000),
        run("row_lock", 2, acks_per_second=1_000),
    ]
    assert hot_auction(*runs) == (True, "50x (40,000/s / 1,000/s)", "40 to 60x")


def test_what_the_peer_did_not_do_is_no_ratio() -> None:
    assert hot_auction(run("gavel", 0, acks_per_second=1), run("row_lock", 0, acks_per_second=0))[0] is None
    assert hot_auction(run("gavel", 0, acks_per_second=1), run("row_lock", 1, acks_per_second=1))[0] is None


@pytest.mark.parametrize(("p99_ms", "is_met"), [(3.99, True), (4, True), (4.01, False), (float("nan"), None)])
def test_a_limit_holds_for_the_median(p99_ms: float, is_met: bool | None) -> None:
    runs = [run("gavel", number, "100 bids/s", ack_p99_ms=p99_ms) for number in range(3)]
    (outcome,) = [one for one in outcomes(runs, ["bids"]) if one.goal.about == "100 bids/s, ack p99"]
    assert outcome.is_met is is_met


def test_a_load_is_known_by_its_beginning() -> None:
    runs = [
        Run("fanout", "gavel", load, 0, figures={"ack_p99_ms": ms}) for load, ms in (("2 bids/s", 1), ("20 bids/s", 9))
    ]
    found = {one.goal.load: one.value for one in outcomes(runs, ["fanout"]) if one.goal.figure == "ack_p99_ms"}
    assert found == {"20 bids/s": 9, "100 bids/s": None}


def test_a_goal_may_compare_two_loads() -> None:
    goal = next(goal for goal in GOALS if goal.of_load is not None)
    runs = [
        Run("fanout", "gavel", load, 0, figures={"bid_to_screen_p99_ms": ms})
        for load, ms in (("20 bids/s", 100), ("100 bids/s", 120))
    ]
    (outcome,) = [one for one in outcomes(runs, ["fanout"]) if one.goal is goal]
    assert (outcome.value, outcome.is_met) == (1.2, True)


@pytest.mark.parametrize(
    ("figure", "value", "words"),
    [
        ("acks_per_second", 62_000, "62,000/s"),
        ("ack_p99_ms", 3.2049, f"3.2{SPACE}ms"),
        ("recovery_max_ms", 1_500, f"1,500{SPACE}ms"),
        ("ready_s", 10, f"10{SPACE}s"),
        ("bytes_per_socket", 12 * 1024, f"12.0{SPACE}KB"),
        ("idle_cpu_percent", 2.5, f"2.5{SPACE}%"),
        ("refused", 0, "0"),
        ("ack_p99_ms", float("nan"), f"-{SPACE}ms"),
    ],
)
def test_a_figure_is_written_with_its_unit(figure: str, value: float, words: str) -> None:
    assert words_of(figure, value) == words


def test_a_limit_is_written_as_it_is_meant() -> None:
    goal = Goal("", "bids", "", "ack_p99_ms", "at most", 5)
    assert goal.limit_words == f"at most 5{SPACE}ms"
    assert next(goal for goal in GOALS if goal.of_load).limit_words == "at most 1.25x that at 20 bids/s"
    assert GOALS[0].limit_words == "at least 40x row_lock's"
