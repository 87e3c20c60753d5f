"""What holds for every history, and the engine against the oracle."""

import msgspec
import pytest
from hypothesis import given, settings

from engine.auction import outage_window_ms, snapshot
from engine.commands import PayBack
from engine.events import Ended, Extended
from engine.rejections import Rejection
from tests.engine.histories import History, histories, play
from tests.engine.support import Driver, replay

pytestmark = pytest.mark.timeout(120)


@settings(max_examples=1_000)
@given(histories())
def test_the_engine_agrees_with_the_oracle(history: History) -> None:
    for turn in play(history):
        code = turn.result.code if isinstance(turn.result, Rejection) else None
        assert code == turn.expected_code

        expected, state = turn.oracle.view(turn.now), turn.driver.auction
        shown = snapshot(state)
        assert shown.status == expected.status
        assert shown.price == expected.price
        assert shown.minimum == expected.minimum
        assert shown.bids == expected.bids
        assert shown.reserve_met == expected.reserve_met
        assert shown.end_time == expected.end_time
        assert shown.outcome == expected.outcome
        assert state.leader is None or str(state.leader) == expected.leader
        assert shown.leader == (None if expected.leader is None else expected.paddles[expected.leader])
        assert {str(person): bidder.paddle for person, bidder in state.bidders.items()} == expected.paddles
        assert {str(person): bidder.max_amount for person, bidder in state.bidders.items()} == expected.maximums
        if isinstance(turn.result, Rejection) and turn.result.code == "bid_too_low":
            assert turn.result.minimum == expected.minimum
        _check_sale(turn.driver, expected.leader, expected.price, expected.ended_by)


def _check_sale(driver: Driver, leader: str | None, price: int, ended_by: str | None) -> None:
    last = driver.events[-1]
    if not isinstance(last, Ended):
        return
    assert last.by == ended_by
    if last.outcome == "sold":
        assert last.winner is not None
        assert (str(last.winner), last.price) == (leader, price)
        assert last.paddle == driver.auction.bidders[last.winner].paddle
    else:
        assert (last.winner, last.price, last.paddle) == (None, None, None)


@settings(max_examples=300)
@given(histories())
def test_the_price_never_falls_nor_passes_what_the_leader_agreed_to(history: History) -> None:
    for turn in play(history):
        state = turn.driver.auction
        assert state.price >= turn.before.price
        if state.leader is not None:
            assert state.price <= state.bidders[state.leader].max_amount


@settings(max_examples=300)
@given(histories())
def test_the_leader_pays_at_most_one_increment_over_the_runner_up(history: History) -> None:
    for turn in play(history):
        state, terms = turn.driver.auction, turn.driver.auction.terms
        # A reserve, an exact bid and the starting price stand on their own.
        apart = [terms.starting_price]
        apart += [bid.amount for bid in turn.oracle.accepted if bid.is_exact]
        apart += [terms.reserve_price] if terms.reserve_price is not None else []
        others = [bidder.max_amount for person, bidder in state.bidders.items() if person != state.leader]
        runner_up = [max(others) + turn.oracle.increment(max(others))] if others else []
        assert state.price <= max(runner_up + apart)


@settings(max_examples=300)
@given(histories())
def test_the_end_never_moves_back_nor_past_the_cap(history: History) -> None:
    soft_close = history.terms.soft_close
    cap = history.terms.end_time + (0 if soft_close is None else soft_close.max_extension_ms)
    for turn in play(history):
        moved = sum(paid.moved_by for paid in turn.oracle.paid_back)
        assert turn.before.end_time <= turn.driver.auction.end_time <= cap + moved


@settings(max_examples=300)
@given(histories())
def test_after_an_outage_there_is_as_much_time_as_there_was_or_as_it_took(history: History) -> None:
    for turn in play(history):
        if not isinstance(turn.command, PayBack):
            continue
        assert not isinstance(turn.result, Rejection)
        state, before = turn.driver.auction, turn.before
        if not turn.result:
            assert state.end_time == before.end_time
            # It was over, or is to open later, or its end is far enough away.
            is_far = state.end_time - turn.now >= outage_window_ms(state)
            assert state.status != "active" or is_far or turn.now == state.terms.start_time
            continue
        [moved] = turn.result
        assert isinstance(moved, Extended)
        down = max(turn.command.down, before.start_time)
        left, lost = before.end_time - down, turn.now - down
        assert left > 0
        assert state.end_time - turn.now == max(left, min(lost, 60_000))
        assert before.end_time < moved.end_time == state.end_time
        if moved.end_time_max is not None:
            soft_close = state.terms.soft_close
            assert soft_close is not None
            moves = sum(paid.moved_by for paid in turn.oracle.paid_back)
            assert moved.end_time_max == state.terms.end_time + soft_close.max_extension_ms + moves


@settings(max_examples=300)
@given(histories())
def test_stored_events_replay_to_the_live_state(history: History) -> None:
    for turn in play(history):
        recovered = replay(turn.driver.events)
        assert recovered == turn.driver.auction
        # Byte for byte: the order of the bidders counts too.
        assert msgspec.json.encode(recovered) == msgspec.json.encode(turn.driver.auction)


@settings(max_examples=300)
@given(histories())
def test_a_refusal_and_a_late_command_change_nothing(history: History) -> None:
    for turn in play(history):
        if isinstance(turn.result, Rejection) or turn.before.status in {"ended", "cancelled"}:
            assert isinstance(turn.result, Rejection) or turn.result == []
            assert snapshot(turn.driver.auction) == turn.before
