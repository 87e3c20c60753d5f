"""The rules by example. Amounts in cents; the increment is 5.00 unless a test says otherwise."""

from typing import Any, Literal

import msgspec
import pytest

from engine.auction import decide, due_at, evolve, minimum, reserve_met, snapshot, terms_problem
from engine.chain import seal
from engine.commands import ExecuteDue, OpenAuction, PayBack, PlaceBid, SoftClose
from engine.events import BidPlaced, Cancelled, Ended, Extended, MaximumRaised, Opened, ReserveReached, Scheduled
from engine.increments import EBAY_US, Step, flat
from engine.limits import AMOUNT_MAX, DAY_MS, INCREMENT_STEPS_MAX, REASON_LENGTH_MAX, SECOND_MS, TITLE_LENGTH_MAX
from tests.engine.support import (
    ADMIN,
    ANNA,
    AUCTION,
    BEN,
    CLEO,
    END,
    MAKER,
    NOW,
    REQUEST,
    SOFT_CLOSE,
    STORY,
    STRANGER,
    Driver,
    accepted,
    make_terms,
    refused,
)

# The first bid


def test_the_first_bid_must_reach_the_starting_price() -> None:
    driver = Driver.opened(starting_price=1_000)
    refusal = refused(driver.try_bid(ANNA, up_to=999))
    assert (refusal.code, refusal.minimum) == ("bid_too_low", 1_000)
    assert refusal.message == "The least that can be bid now is 10.00 USD."
    assert driver.bid(ANNA, up_to=1_000)


def test_a_first_automatic_bid_leads_at_the_starting_price() -> None:
    driver = Driver.opened(starting_price=1_000)
    driver.bid(ANNA, up_to=5_000)
    assert (driver.auction.leader, driver.auction.price) == (ANNA, 1_000)


def test_a_first_exact_bid_leads_at_its_own_amount() -> None:
    driver = Driver.opened(starting_price=1_000)
    driver.bid(ANNA, exactly=5_000)
    assert (driver.auction.leader, driver.auction.price) == (ANNA, 5_000)


def test_the_minimum_is_the_starting_price_and_then_one_increment_over_the_price() -> None:
    driver = Driver.opened(starting_price=1_000)
    assert minimum(driver.auction) == 1_000
    driver.bid(ANNA, up_to=5_000)
    assert minimum(driver.auction) == 1_500


# Later bids


def test_a_later_bid_must_pass_the_price_by_the_increment() -> None:
    driver = Driver.opened(starting_price=1_000)
    driver.bid(ANNA, up_to=5_000)
    assert refused(driver.try_bid(BEN, up_to=1_499)).code == "bid_too_low"
    assert driver.bid(BEN, up_to=1_500)


def test_a_bid_over_the_leaders_maximum_leads_one_increment_over_it() -> None:
    driver = Driver.opened()
    driver.bid(ANNA, up_to=5_000)
    driver.bid(BEN, up_to=9_000)
    assert (driver.auction.leader, driver.auction.price) == (BEN, 5_500)


def test_a_bid_over_the_leaders_maximum_never_leads_over_its_own_maximum() -> None:
    driver = Driver.opened()
    driver.bid(ANNA, up_to=5_000)
    driver.bid(BEN, up_to=5_001)
    assert (driver.auction.leader, driver.auction.price) == (BEN, 5_001)


def test_an_exact_bid_over_the_leaders_maximum_leads_at_its_own_amount() -> None:
    driver = Driver.opened()
    driver.bid(ANNA, up_to=5_000)
    driver.bid(BEN, exactly=9_000)
    assert (driver.auction.leader, driver.auction.price) == (BEN, 9_000)


@pytest.mark.parametrize("how", [{"exactly": 2_000}, {"up_to": 2_000}])
def test_a_bid_under_the_leaders_maximum_is_outbid_at_once_by_one_increment(how: dict[str, Any]) -> None:
    driver = Driver.opened()
    driver.bid(ANNA, up_to=5_000)
    [placed] = driver.bid(BEN, **how)
    assert isinstance(placed, BidPlaced)
    assert (placed.paddle, placed.leader, placed.price, placed.minimum) == (2, 1, 2_500, 3_000)
    assert driver.auction.leader == ANNA


def test_the_leaders_answer_never_passes_its_maximum() -> None:
    driver = Driver.opened()
    driver.bid(ANNA, up_to=5_000)
    driver.bid(BEN, up_to=4_900)
    assert (driver.auction.leader, driver.auction.price) == (ANNA, 5_000)


def test_an_equal_maximum_loses_to_the_earlier_one() -> None:
    driver = Driver.opened()
    driver.bid(ANNA, up_to=5_000)
    driver.bid(BEN, up_to=5_000)
    assert (driver.auction.leader, driver.auction.price) == (ANNA, 5_000)


def test_the_increment_follows_the_auctions_table() -> None:
    driver = Driver.opened(increments=EBAY_US, starting_price=2_400)
    driver.bid(ANNA, up_to=2_600)
    assert minimum(driver.auction) == 2_450
    driver.bid(BEN, up_to=2_450)
    assert (driver.auction.price, minimum(driver.auction)) == (2_500, 2_600)


def test_the_increment_of_a_leading_price_is_that_of_the_amount_which_it_passes() -> None:
    table = (Step(1, 100), Step(4_000, 700))
    driver = Driver.opened(increments=table)
    driver.bid(ANNA, up_to=5_000)
    driver.bid(BEN, up_to=4_000)
    assert driver.auction.price == 4_700

    driver = Driver.opened(increments=table)
    driver.bid(ANNA, up_to=5_000)
    driver.bid(BEN, up_to=9_000)
    assert driver.auction.price == 5_700


def test_every_bid_counts_even_one_that_is_outbid_at_once() -> None:
    driver = Driver.opened()
    driver.bid(ANNA, up_to=5_000)
    driver.bid(BEN, up_to=2_000)
    driver.bid(BEN, up_to=3_000)
    driver.bid(BEN, up_to=4_000)
    assert driver.auction.bids == 4


# The leader's own maximum


@pytest.mark.parametrize("how", [{"exactly": 9_000}, {"up_to": 9_000}])
def test_a_leader_that_raises_its_maximum_changes_nothing_else(how: dict[str, Any]) -> None:
    driver = Driver.opened(soft_close=SOFT_CLOSE)
    driver.bid(ANNA, up_to=5_000)
    before = snapshot(driver.auction)
    result = driver.try_bid(ANNA, now=END - 1, **how)
    [raised] = accepted(result)
    assert isinstance(raised, MaximumRaised)
    assert (raised.paddle, raised.price, raised.minimum, raised.end_time) == (1, 1_000, 1_500, END)
    assert snapshot(driver.auction) == before
    assert driver.auction.bidders[ANNA].max_amount == 9_000


def test_a_leader_may_raise_its_maximum_by_less_than_an_increment() -> None:
    driver = Driver.opened()
    driver.bid(ANNA, exactly=5_000)
    driver.bid(ANNA, up_to=5_001)
    assert (driver.auction.price, driver.auction.bidders[ANNA].max_amount) == (5_000, 5_001)


@pytest.mark.parametrize("offered", [5_000, 4_999, 1])
def test_a_leaders_bid_at_or_under_its_maximum_is_refused(offered: int) -> None:
    driver = Driver.opened()
    driver.bid(ANNA, up_to=5_000)
    assert refused(driver.try_bid(ANNA, up_to=offered)).code == "max_not_raised"
    assert refused(driver.try_bid(ANNA, exactly=offered)).code == "max_not_raised"


def test_a_raised_maximum_answers_the_next_bid() -> None:
    driver = Driver.opened()
    driver.bid(ANNA, up_to=2_000)
    driver.bid(ANNA, up_to=9_000)
    driver.bid(BEN, up_to=4_000)
    assert (driver.auction.leader, driver.auction.price) == (ANNA, 4_500)


# Reserve


def test_without_a_reserve_nothing_is_said_about_one() -> None:
    driver = Driver.opened()
    [placed] = driver.bid(ANNA, up_to=5_000)
    assert isinstance(placed, BidPlaced)
    assert placed.reserve_met is None
    assert reserve_met(driver.auction) is None


def test_under_the_reserve_the_price_follows_the_bids() -> None:
    driver = Driver.opened(reserve_price=8_000)
    assert reserve_met(driver.auction) is False
    [placed] = driver.bid(ANNA, up_to=7_999)
    assert isinstance(placed, BidPlaced)
    assert (placed.price, placed.reserve_met) == (1_000, False)


def test_a_maximum_that_reaches_the_reserve_lifts_the_price_to_it() -> None:
    driver = Driver.opened(reserve_price=8_000)
    [placed] = driver.bid(ANNA, up_to=8_000)
    assert isinstance(placed, BidPlaced)
    assert (placed.price, placed.minimum, placed.reserve_met) == (8_000, 8_500, True)


def test_a_price_over_the_reserve_stays_what_the_bids_make_it() -> None:
    driver = Driver.opened(reserve_price=3_000)
    driver.bid(ANNA, up_to=5_000)
    driver.bid(BEN, up_to=9_000)
    assert driver.auction.price == 5_500


def test_a_raise_that_reaches_the_reserve_lifts_the_price_in_an_event_of_its_own() -> None:
    driver = Driver.opened(reserve_price=8_000)
    driver.bid(ANNA, up_to=2_000)
    raised, reached = driver.bid(ANNA, up_to=8_000)
    assert isinstance(raised, MaximumRaised)
    assert reached == ReserveReached(price=8_000, minimum=8_500)
    assert (raised.price, raised.minimum) == (8_000, 8_500)
    assert (driver.auction.price, driver.auction.bids, reserve_met(driver.auction)) == (8_000, 1, True)


def test_a_raise_under_the_reserve_or_after_it_was_reached_lifts_nothing() -> None:
    driver = Driver.opened(reserve_price=8_000)
    driver.bid(ANNA, up_to=2_000)
    assert len(driver.bid(ANNA, up_to=7_999)) == 1
    assert len(driver.bid(ANNA, up_to=8_000)) == 2
    assert len(driver.bid(ANNA, up_to=9_000)) == 1


def test_closing_under_the_reserve_sells_nothing() -> None:
    driver = Driver.opened(reserve_price=8_000)
    driver.bid(ANNA, up_to=7_999)
    driver.execute_due(END)
    assert driver.events[-1] == Ended("reserve_not_met", None, None, None, "deadline", END)
    assert (driver.auction.status, driver.auction.outcome) == ("ended", "reserve_not_met")


# The end


def test_a_bid_counts_until_just_before_the_end() -> None:
    driver = Driver.opened()
    assert driver.bid(ANNA, up_to=5_000, now=END - 1)
    assert refused(driver.try_bid(BEN, up_to=9_000, now=END)).code == "ended"


def test_at_its_end_an_auction_with_a_bid_is_sold_to_the_leader() -> None:
    driver = Driver.opened()
    driver.bid(ANNA, up_to=5_000)
    driver.bid(BEN, up_to=9_000)
    driver.execute_due(END)
    assert driver.events[-1] == Ended("sold", BEN, 2, 5_500, "deadline", END)
    assert (driver.auction.status, driver.auction.ended_at, due_at(driver.auction)) == ("ended", END, None)


def test_at_its_end_an_auction_without_a_bid_is_unsold() -> None:
    driver = Driver.opened()
    driver.execute_due(END + 7)
    assert driver.events[-1] == Ended("unsold", None, None, None, "deadline", END + 7)


def test_nothing_is_due_before_the_end() -> None:
    driver = Driver.opened()
    assert due_at(driver.auction) == END
    assert decide(driver.auction, ExecuteDue(AUCTION), END - 1) == []


def test_nothing_is_due_for_an_auction_that_is_over_or_does_not_exist() -> None:
    driver = Driver.opened()
    driver.execute_due(END)
    assert decide(driver.auction, ExecuteDue(AUCTION), END) == []
    assert decide(None, ExecuteDue(AUCTION), NOW) == []


# Soft close: within a minute of the end, by a minute and a half, in all by at most two and a half


def ends(driver: Driver) -> list[tuple[int, int | None]]:
    return [(event.end_time, event.end_time_max) for event in driver.events if isinstance(event, Extended)]


CAP = END + SOFT_CLOSE.max_extension_ms


def test_a_bid_before_the_window_extends_nothing() -> None:
    driver = Driver.opened(soft_close=SOFT_CLOSE)
    driver.bid(ANNA, up_to=5_000, now=END - 60_001)
    assert ends(driver) == []


def test_reset_counts_the_extension_from_the_bid() -> None:
    driver = Driver.opened(soft_close=SOFT_CLOSE)
    placed, extended = driver.bid(ANNA, up_to=5_000, now=END - 60_000)
    assert isinstance(placed, BidPlaced)
    assert placed.end_time == END + 30_000
    assert extended == Extended(END + 30_000, CAP, "soft_close")
    assert (driver.auction.end_time, due_at(driver.auction)) == (END + 30_000, END + 30_000)


def test_append_counts_the_extension_from_the_end() -> None:
    driver = Driver.opened(soft_close=msgspec.structs.replace(SOFT_CLOSE, anchor="append"))
    driver.bid(ANNA, up_to=5_000, now=END - 60_000)
    assert ends(driver) == [(END + 90_000, CAP)]


def test_a_bid_that_is_outbid_at_once_extends_too() -> None:
    driver = Driver.opened(soft_close=SOFT_CLOSE)
    driver.bid(ANNA, up_to=5_000)
    driver.bid(BEN, up_to=2_000, now=END - 1)
    assert ends(driver) == [(END + 89_999, CAP)]


def test_the_end_never_passes_the_cap() -> None:
    driver = Driver.opened(soft_close=SOFT_CLOSE)
    driver.bid(ANNA, up_to=2_000, now=END - 1)
    driver.bid(BEN, up_to=3_000, now=END + 89_998)
    driver.bid(ANNA, up_to=4_000, now=CAP - 1)
    assert ends(driver) == [(END + 89_999, CAP), (CAP, CAP)]
    assert refused(driver.try_bid(BEN, up_to=9_000, now=CAP)).code == "ended"


@pytest.mark.parametrize("anchor", ["reset", "append"])
def test_a_cap_of_zero_extends_nothing(anchor: Literal["reset", "append"]) -> None:
    driver = Driver.opened(soft_close=msgspec.structs.replace(SOFT_CLOSE, max_extension_ms=0, anchor=anchor))
    driver.bid(ANNA, up_to=2_000, now=END - 1)
    assert ends(driver) == []


def test_an_extension_shorter_than_what_is_left_moves_nothing() -> None:
    driver = Driver.opened(soft_close=SoftClose(window_ms=60_000, extension_ms=10_000, max_extension_ms=150_000))
    driver.bid(ANNA, up_to=2_000, now=END - 60_000)
    driver.bid(BEN, up_to=3_000, now=END - 10_000)
    assert ends(driver) == []
    driver.bid(ANNA, up_to=4_000, now=END - 9_999)
    assert ends(driver) == [(END + 1, CAP)]


def test_without_soft_close_the_end_stands() -> None:
    driver = Driver.opened(soft_close=None)
    driver.bid(ANNA, up_to=2_000, now=END - 1)
    assert (driver.auction.end_time, driver.auction.end_time_max) == (END, None)


def test_after_an_outage_soft_close_keeps_to_the_cap_that_moved_along() -> None:
    driver = Driver.opened(soft_close=SOFT_CLOSE)
    moved = Extended(END + 40_000, CAP + 40_000, "outage")
    driver.state = evolve(driver.state, moved)
    driver.bid(ANNA, up_to=2_000, now=END + 39_999)
    driver.bid(BEN, up_to=3_000, now=END + 129_998)
    assert ends(driver) == [(END + 129_999, CAP + 40_000), (CAP + 40_000, CAP + 40_000)]


# Refusals


def test_there_is_no_such_auction() -> None:
    assert refused(Driver().try_bid(ANNA, up_to=1_000)).code == "not_found"
    assert refused(Driver().end(MAKER)).code == "not_found"
    assert refused(Driver().cancel(MAKER)).code == "not_found"


def test_a_maker_does_not_bid_in_its_own_auction() -> None:
    assert refused(Driver.opened().try_bid(MAKER, up_to=5_000)).code == "own_auction"


def test_a_bid_in_another_currency_is_refused() -> None:
    driver = Driver.opened()
    assert refused(driver.try_bid(ANNA, up_to=5_000, currency="EUR")).code == "currency_mismatch"
    assert accepted(driver.try_bid(ANNA, up_to=5_000, currency="USD"))


@pytest.mark.parametrize("offered", [0, -1])
def test_an_amount_under_one_is_refused(offered: int) -> None:
    assert refused(Driver.opened().try_bid(ANNA, exactly=offered)).code == "amount_invalid"


def test_an_amount_over_the_bound_is_refused() -> None:
    driver = Driver.opened()
    assert refused(driver.try_bid(ANNA, up_to=AMOUNT_MAX + 1)).code == "amount_too_large"
    assert driver.bid(ANNA, up_to=AMOUNT_MAX)


def test_of_several_reasons_the_first_is_given() -> None:
    """The order of the protocol's rejection codes: each line takes one reason away."""
    scheduled = Driver.opened(start_time=NOW + 1)
    assert refused(scheduled.try_bid(MAKER, up_to=0, currency="EUR")).code == "own_auction"
    assert refused(scheduled.try_bid(ANNA, up_to=0, currency="EUR")).code == "currency_mismatch"
    assert refused(scheduled.try_bid(ANNA, up_to=0, currency="USD")).code == "not_started"
    assert refused(scheduled.try_bid(ANNA, up_to=0, currency="USD", now=END)).code == "ended"

    active = Driver.opened()
    active.bid(ANNA, up_to=5_000)
    for bidder in (ANNA, BEN):
        assert refused(active.try_bid(bidder, up_to=0)).code == "amount_invalid"
        assert refused(active.try_bid(bidder, up_to=AMOUNT_MAX + 1)).code == "amount_too_large"
    assert refused(active.try_bid(BEN, up_to=1)).code == "bid_too_low"
    assert refused(active.try_bid(ANNA, up_to=1)).code == "max_not_raised"


@pytest.mark.parametrize(("amount", "max_amount"), [(None, None), (1_000, 1_000)])
def test_a_bid_that_names_no_amount_or_both_is_a_bug_of_the_caller(amount: int | None, max_amount: int | None) -> None:
    command = PlaceBid(auction=AUCTION, bidder=ANNA, bid_id=REQUEST, amount=amount, max_amount=max_amount)
    with pytest.raises(AssertionError, match="names an amount or a maximum"):
        decide(Driver.opened().auction, command, NOW)


# Paddles


def test_paddles_count_up_in_the_order_of_first_accepted_bids() -> None:
    driver = Driver.opened()
    refused(driver.try_bid(CLEO, up_to=1))
    driver.bid(BEN, up_to=2_000)
    driver.bid(ANNA, up_to=3_000)
    driver.bid(BEN, up_to=4_000)
    driver.bid(CLEO, up_to=5_000)
    assert {person: bidder.paddle for person, bidder in driver.auction.bidders.items()} == {BEN: 1, ANNA: 2, CLEO: 3}


def test_a_bidder_keeps_its_paddle_and_has_its_latest_maximum() -> None:
    driver = Driver.opened()
    driver.bid(ANNA, up_to=2_000)
    driver.bid(BEN, up_to=3_000)
    [placed] = driver.bid(ANNA, up_to=9_000)
    assert isinstance(placed, BidPlaced)
    assert (placed.paddle, placed.leader, placed.bids) == (1, 1, 3)
    assert driver.auction.bidders[ANNA].max_amount == 9_000


# Opening and scheduled starts


def open_auction(now: int = NOW, **terms: Any) -> tuple[Driver, Scheduled | Opened]:
    driver = Driver.opened(now, **terms)
    event = driver.events[-1]
    assert isinstance(event, Scheduled | Opened)
    return driver, event


@pytest.mark.parametrize("start_time", [None, NOW - 1, NOW])
def test_an_auction_whose_start_is_not_ahead_opens_at_once(start_time: int | None) -> None:
    driver, event = open_auction(start_time=start_time)
    assert isinstance(event, Opened)
    assert (event.auction, event.maker, event.terms.start_time) == (AUCTION, MAKER, NOW)
    assert driver.auction.status == "active"


def test_an_auction_whose_start_is_ahead_is_scheduled() -> None:
    driver, event = open_auction(start_time=NOW + 1_000)
    assert isinstance(event, Scheduled)
    assert (driver.auction.status, due_at(driver.auction)) == ("scheduled", NOW + 1_000)
    assert refused(driver.try_bid(ANNA, up_to=5_000, now=NOW + 999)).code == "not_started"


def test_a_scheduled_auction_takes_bids_from_its_start_on() -> None:
    driver, _ = open_auction(start_time=NOW + 1_000)
    assert driver.bid(ANNA, up_to=5_000, now=NOW + 1_000)
    assert [type(event) for event in driver.events] == [Scheduled, Opened, BidPlaced]
    assert snapshot(driver.auction).start_time == NOW + 1_000


def test_a_scheduled_auction_that_nobody_touched_opens_and_ends_at_once() -> None:
    driver, _ = open_auction(start_time=NOW + 1_000)
    driver.execute_due(END)
    assert [type(event) for event in driver.events] == [Scheduled, Opened, Ended]


def test_an_auction_is_opened_once() -> None:
    driver = Driver.opened()
    command = OpenAuction(auction=AUCTION, maker=MAKER, request_id=REQUEST, terms=make_terms())
    assert refused(driver.submit(command, NOW)).code == "already_exists"


# After an outage


SMALL = SoftClose(window_ms=5_000, extension_ms=5_000, max_extension_ms=20_000)


@pytest.mark.parametrize(
    ("down", "back", "end_time"),
    [
        # As much is left as there was...
        (END - 20_000, END - 15_000, END + 5_000),
        # ... or as it took, if that is more, but a minute at the most.
        (END - 2_000, END + 10_000, END + 22_000),
        (END - 1, END + 1_000_000, END + 1_060_000),
        (END - 90_000, END + 1_000_000, END + 1_090_000),
        # Far from its end, or after it, nothing was lost.
        (END - 90_000, END - 60_000, None),
        (END - 90_000, END - 59_999, END + 30_001),
        (END, END + 10_000, None),
        (END - 5_000, END - 5_000, None),
    ],
)
def test_an_outage_near_the_end_moves_it(down: int, back: int, end_time: int | None) -> None:
    driver = Driver.opened()
    driver.bid(ANNA, up_to=5_000)
    assert driver.pay_back(down, back) == ([] if end_time is None else [Extended(end_time, None, "outage")])
    if down < END:
        assert driver.auction.end_time == (END if end_time is None else end_time)
        assert driver.auction.status == "active"


def test_with_soft_close_its_window_says_what_is_near_and_its_cap_moves_along() -> None:
    driver = Driver.opened(soft_close=SMALL)
    assert driver.pay_back(END - 20_000, END - 5_000) == []
    assert driver.pay_back(END - 20_000, END - 4_999) == [Extended(END + 15_001, END + 35_001, "outage")]
    # Bids move the end as they would have.
    driver.bid(ANNA, up_to=5_000, now=END + 15_000)
    assert driver.auction.end_time == END + 20_000
    assert driver.pay_back(END + 16_000, END + 18_000) == [Extended(END + 22_000, END + 37_001, "outage")]


def test_what_was_to_open_in_an_outage_lost_the_time_since_then() -> None:
    driver = Driver.opened(start_time=NOW + 5_000, end_time=NOW + 30_000)
    assert driver.pay_back(NOW, NOW + 20_000) == [Extended(NOW + 45_000, None, "outage")]
    assert [type(event) for event in driver.events] == [Scheduled, Opened, Extended]
    driver = Driver.opened(start_time=NOW + 5_000, end_time=NOW + 10_000)
    assert driver.pay_back(NOW, NOW + 20_000) == [Extended(NOW + 35_000, None, "outage")]
    # What opens at the very moment has lost nothing.
    driver = Driver.opened(start_time=NOW + 5_000, end_time=NOW + 10_000)
    assert driver.pay_back(NOW, NOW + 5_000) == []


def test_what_is_not_on_gets_no_time_back() -> None:
    assert decide(None, PayBack(AUCTION, NOW), NOW + 5_000) == []
    scheduled = Driver.opened(start_time=NOW + 5_000, end_time=NOW + 10_000)
    assert scheduled.pay_back(NOW, NOW + 4_999) == []
    cancelled = Driver.opened(end_time=NOW + 10_000)
    cancelled.cancel(MAKER)
    assert cancelled.pay_back(NOW, NOW + 5_000) == []
    ended = Driver.opened(end_time=NOW + 10_000)
    ended.end(MAKER)
    assert ended.pay_back(NOW, NOW + 5_000) == []


# Ending early


def test_without_a_bid_the_maker_ends_its_auction() -> None:
    driver = Driver.opened(soft_close=SOFT_CLOSE)
    assert driver.end(MAKER, reason="It broke", now=NOW + 5) == [
        Ended("unsold", None, None, None, "maker", NOW + 5, seal(b"", "It broke"))
    ]


def test_once_there_is_a_bid_the_maker_does_not_end_a_softly_closing_auction() -> None:
    driver = Driver.opened(soft_close=SOFT_CLOSE)
    driver.bid(ANNA, up_to=5_000)
    refusal = refused(driver.end(MAKER, role="maker"))
    assert (refusal.code, refusal.message) == ("forbidden", "Once there is a bid, only an admin may do this.")


def test_where_soft_close_is_null_the_maker_ends_it_after_a_bid_too() -> None:
    driver = Driver.opened(soft_close=None)
    driver.bid(ANNA, up_to=5_000)
    assert driver.end(MAKER) == [Ended("sold", ANNA, 1, 1_000, "maker", NOW)]


def test_an_admin_ends_an_auction_with_a_reason() -> None:
    driver = Driver.opened(soft_close=SOFT_CLOSE)
    driver.bid(ANNA, up_to=5_000)
    for missing in (None, "", "  "):
        assert refused(driver.end(ADMIN, role="admin", reason=missing)).code == "reason_required"
    assert driver.end(ADMIN, role="admin", reason="A fault") == [
        Ended("sold", ANNA, 1, 1_000, "admin", NOW, seal(b"", "A fault"))
    ]


def test_an_admin_that_is_the_maker_acts_as_maker_only_until_the_first_bid() -> None:
    driver = Driver.opened(soft_close=SOFT_CLOSE)
    driver.bid(ANNA, up_to=5_000)
    assert refused(driver.end(MAKER, role="admin")).code == "reason_required"
    [ended] = accepted(driver.end(MAKER, role="admin", reason="A fault"))
    assert isinstance(ended, Ended)
    assert ended.by == "admin"


@pytest.mark.parametrize("role", ["viewer", "maker", "moderator"])
def test_nobody_else_ends_or_cancels(role: Literal["viewer", "maker", "moderator"]) -> None:
    driver = Driver.opened()
    for attempt in (driver.end, driver.cancel):
        refusal = refused(attempt(STRANGER, role=role, reason="I want to"))
        assert (refusal.code, refusal.message) == ("forbidden", "Only the auction's maker or an admin may do this.")


def test_what_is_not_active_is_not_ended() -> None:
    driver = Driver.opened(start_time=NOW + 1)
    assert refused(driver.end(MAKER)).code == "not_started"
    assert refused(driver.end(MAKER, now=END)).code == "ended"


def test_a_reason_is_bounded() -> None:
    driver = Driver.opened()
    for attempt in (driver.end, driver.cancel):
        refusal = refused(attempt(MAKER, reason="x" * (REASON_LENGTH_MAX + 1)))
        assert (refusal.code, refusal.field) == ("terms_invalid", "reason")
    assert accepted(driver.end(MAKER, reason="x" * REASON_LENGTH_MAX))


# Cancelling


@pytest.mark.parametrize("start_time", [None, NOW + 1_000])
def test_without_a_bid_the_maker_cancels_before_and_after_the_start(start_time: int | None) -> None:
    driver = Driver.opened(start_time=start_time)
    assert driver.cancel(MAKER) == [Cancelled("maker", NOW)]
    assert (driver.auction.status, driver.auction.outcome, driver.auction.ended_at) == ("cancelled", None, NOW)
    assert due_at(driver.auction) is None


@pytest.mark.parametrize("soft_close", [None, SOFT_CLOSE])
def test_once_there_is_a_bid_only_an_admin_cancels_with_a_reason(soft_close: SoftClose | None) -> None:
    driver = Driver.opened(soft_close=soft_close)
    driver.bid(ANNA, up_to=5_000)
    assert refused(driver.cancel(MAKER)).code == "forbidden"
    assert refused(driver.cancel(ADMIN, role="admin")).code == "reason_required"
    assert driver.cancel(ADMIN, role="admin", reason="A fake") == [Cancelled("admin", NOW, seal(b"", "A fake"))]


def test_what_was_cancelled_is_over() -> None:
    driver = Driver.opened()
    driver.cancel(MAKER)
    for refusal in (driver.try_bid(ANNA, up_to=5_000), driver.end(MAKER), driver.cancel(MAKER)):
        assert (refused(refusal).code, refused(refusal).message) == ("ended", "This auction was cancelled.")


def test_what_has_ended_is_not_cancelled() -> None:
    driver = Driver.opened()
    assert refused(driver.cancel(MAKER, now=END)).message == "This auction has ended."


# The public view


def test_a_snapshot_shows_paddles_and_the_terms_that_everybody_may_know() -> None:
    driver = Driver.opened(reserve_price=8_000)
    driver.bid(ANNA, up_to=5_000)
    driver.bid(BEN, up_to=6_000)
    shown = msgspec.structs.asdict(snapshot(driver.auction))
    assert shown == {
        "auction": AUCTION,
        "story": STORY,
        "title": "A bowl",
        "currency": "USD",
        "status": "active",
        "starting_price": 1_000,
        "price": 5_500,
        "minimum": 6_000,
        "bids": 2,
        "leader": 2,
        "reserve_met": False,
        "start_time": NOW,
        "end_time": END,
        "outcome": None,
    }


def test_before_the_first_bid_a_snapshot_has_no_leader() -> None:
    assert snapshot(Driver.opened().auction).leader is None


# Terms


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"title": "x" * TITLE_LENGTH_MAX},
        {"starting_price": 1, "reserve_price": 1},
        {"starting_price": AMOUNT_MAX, "reserve_price": AMOUNT_MAX, "increments": flat(AMOUNT_MAX)},
        {"start_time": NOW - 10 * DAY_MS, "end_time": NOW + 1},
        {"end_time": NOW + 366 * DAY_MS},
        {"start_time": NOW + 366 * DAY_MS, "end_time": NOW + 2 * 366 * DAY_MS},
        {"increments": tuple(Step(price, 1) for price in range(INCREMENT_STEPS_MAX))},
        {"soft_close": SoftClose(window_ms=SECOND_MS, extension_ms=SECOND_MS, max_extension_ms=0)},
        {"soft_close": SoftClose(window_ms=DAY_MS, extension_ms=DAY_MS, max_extension_ms=30 * DAY_MS)},
    ],
)
def test_terms_within_the_bounds_are_fine(changes: dict[str, Any]) -> None:
    assert terms_problem(make_terms(**changes), NOW) is None


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("title", {"title": ""}),
        ("title", {"title": " \t"}),
        ("title", {"title": "x" * (TITLE_LENGTH_MAX + 1)}),
        ("title", {"title": "x" + " " * TITLE_LENGTH_MAX}),
        ("currency", {"currency": "usd"}),
        ("currency", {"currency": "ABC"}),
        ("starting_price", {"starting_price": 0}),
        ("starting_price", {"starting_price": AMOUNT_MAX + 1}),
        ("reserve_price", {"reserve_price": 0}),
        ("reserve_price", {"reserve_price": AMOUNT_MAX + 1}),
        ("start_time", {"start_time": NOW + 366 * DAY_MS + 1, "end_time": NOW + 367 * DAY_MS}),
        ("end_time", {"end_time": NOW}),
        ("end_time", {"start_time": NOW - 2_000, "end_time": NOW - 1_000}),
        ("end_time", {"start_time": NOW + 1_000, "end_time": NOW + 1_000}),
        ("end_time", {"end_time": NOW + 366 * DAY_MS + 1}),
        ("end_time", {"start_time": NOW - DAY_MS, "end_time": NOW + 366 * DAY_MS + 1}),
        ("increments", {"increments": ()}),
        ("increments", {"increments": tuple(Step(price, 1) for price in range(INCREMENT_STEPS_MAX + 1))}),
        ("increments", {"increments": flat(0)}),
        ("increments", {"increments": (Step(1, 1), Step(2, AMOUNT_MAX + 1))}),
        ("increments", {"increments": (Step(-1, 1), Step(2, 1))}),
        ("increments", {"increments": (Step(1, 1), Step(1, 2))}),
        ("increments", {"increments": (Step(1, 1), Step(3, 2), Step(2, 3))}),
        ("soft_close.window_s", {"soft_close": msgspec.structs.replace(SOFT_CLOSE, window_ms=999)}),
        ("soft_close.window_s", {"soft_close": msgspec.structs.replace(SOFT_CLOSE, window_ms=DAY_MS + 1)}),
        ("soft_close.extension_s", {"soft_close": msgspec.structs.replace(SOFT_CLOSE, extension_ms=999)}),
        ("soft_close.extension_s", {"soft_close": msgspec.structs.replace(SOFT_CLOSE, extension_ms=DAY_MS + 1)}),
        ("soft_close.max_extension_s", {"soft_close": msgspec.structs.replace(SOFT_CLOSE, max_extension_ms=-1)}),
        (
            "soft_close.max_extension_s",
            {"soft_close": msgspec.structs.replace(SOFT_CLOSE, max_extension_ms=30 * DAY_MS + 1)},
        ),
    ],
)
def test_terms_out_of_bounds_name_the_field_that_is_at_fault(field: str, changes: dict[str, Any]) -> None:
    problem = terms_problem(make_terms(**changes), NOW)
    assert problem is not None
    assert problem[0] == field
    assert problem[1].endswith(".")


def test_an_auction_does_not_open_under_terms_out_of_bounds() -> None:
    terms = make_terms(starting_price=0)
    refusal = refused(decide(None, OpenAuction(auction=AUCTION, maker=MAKER, request_id=REQUEST, terms=terms), NOW))
    assert (refusal.code, refusal.field) == ("terms_invalid", "starting_price")
    assert refusal.message == "A starting price is above zero and at most 99,999,999.99 USD."
