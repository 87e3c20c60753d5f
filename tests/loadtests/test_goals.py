"""The goals: which figures they look at, and when they are met."""

import pytest

from loadtests.goals import FAULTS, GOALS, Goal, Outcome, outcomes, words_of
from loadtests.measured import BROKE_OFF, Run
from loadtests.overload import TWICE
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
def test_a_limit_of_milliseconds_holds_for_the_median(p99_ms: float, is_met: bool | None) -> None:
    runs = [run("gavel", number, "100 bids/s", ack_p99_ms=p99_ms) for number in range(3)]
    (outcome,) = [one for one in outcomes(runs, ["bids"]) if one.goal.about == "100 bids/s, ack p99"]
    assert outcome.is_met is is_met


def outcome_of(about: str, scenario: str, *runs: Run) -> Outcome:
    return next(one for one in outcomes(runs, [scenario]) if one.goal.about == about)


def test_what_must_never_happen_is_judged_by_the_worst_run() -> None:
    runs = [
        Run("recover", "gavel", "kills", number, figures={"lost": lost, "slowest_s": slowest_s})
        for number, (lost, slowest_s) in enumerate([(0, 0.5), (0, 0.6), (1, 1.6)])
    ]
    lost = outcome_of("A shard killed, acknowledged bids lost", "recover", *runs)
    assert (lost.value, lost.is_met, lost.spread_words) == (1, False, "0 to 1")
    slowest = outcome_of("A shard killed, bids acknowledged again after", "recover", *runs)
    assert (slowest.value, slowest.is_met) == (1.6, False)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_latency_is_none_where_bids_were_refused_or_lost(fault: str) -> None:
    runs = [
        Run("fanout", "gavel", "20 bids/s", number, figures={"ack_p99_ms": 1, fault: number}) for number in range(2)
    ]
    outcome = outcome_of("10,000 sockets, 20 bids/s, ack p99", "fanout", *runs)
    assert (outcome.value, outcome.is_met, outcome.remarks) == (1, False, [f"1 {FAULTS[fault]}"])


def test_refusals_are_no_fault_where_too_much_is_asked_for() -> None:
    figures: dict[str, float] = {"ack_p99_ms": 1, "refused": 1_000, "unanswered": 1}
    outcome = outcome_of("Twice the knee, ack p99", "overload", Run("overload", "gavel", TWICE, 0, figures=figures))
    assert (outcome.is_met, outcome.remarks) == (True, [])


def test_a_goal_is_not_met_if_a_run_of_ours_broke_off() -> None:
    good = Run("timers", "gavel", "1,000 of 10,000", 0, figures={"ended_late_p99_ms": 1})
    about = "1,000 auctions ending in one second, late p99"
    assert outcome_of(about, "timers", good).is_met is True
    broken = outcome_of(about, "timers", good, Run("timers", "gavel", BROKE_OFF, 1))
    assert (broken.is_met, broken.remarks) == (False, ["1 of 2 runs broke off"])
    assert outcome_of(about, "timers", Run("timers", "gavel", BROKE_OFF, 0)).is_met is False


def test_it_is_said_what_makes_a_figure_worth_less() -> None:
    ours = Run("fanout", "gavel", "20 bids/s", 0, figures={"bid_to_screen_p99_ms": 1, "generator_cpu_percent": 95})
    theirs = Run("fanout", "ws", "20 bids/s", 0, figures={"bid_to_screen_p99_ms": 100, "drained_s": 30})
    outcome = outcome_of("10,000 sockets, 20 bids/s, bid to screen p99", "fanout", ours, theirs)
    assert outcome.is_met is True
    assert outcome.remarks == ["the generator was at its limit", "ws: did not keep up"]


def test_a_generator_at_its_limit_makes_a_server_slow_but_not_big() -> None:
    figures: dict[str, float] = {"bytes_per_socket": 1, "idle_cpu_percent": 1, "generator_cpu_percent": 95}
    again: dict[str, float] = {"reconnect_s": 1, "generator_cpu_percent": 95}
    runs = [
        Run("connect", "gavel", load, 0, figures=one)
        for load, one in (("10,000 sockets", figures), ("10,000 sockets cut at once", again))
    ]
    remarks = {one.goal.figure: one.remarks for one in outcomes(runs, ["connect"])}
    at_limit = ["the generator was at its limit"]
    assert remarks == {"bytes_per_socket": [], "idle_cpu_percent": [], "reconnect_s": at_limit}


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
        ("bytes_per_socket", 12 * 1024, f"12.0{SPACE}KiB"),
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
