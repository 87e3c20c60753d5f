"""Whom an event concerns, and as what."""

from uuid import UUID

from engine.notices import NoticeKind, notices
from tests.engine.support import ADMIN, ANNA, BEN, CLEO, END, MAKER, NOW, SOFT_CLOSE, Driver, replay


def told(driver: Driver, since: int) -> list[list[tuple[UUID, NoticeKind]]]:
    """For each event from the one after `since` on: who is told what."""
    events = driver.events
    return [list(notices(replay(events[:index]), events[index])) for index in range(since, len(events))]


def test_an_opening_concerns_nobody() -> None:
    assert told(Driver.opened(now=NOW), 0) == [[]]
    scheduled = Driver.opened(now=NOW, start_time=NOW + 1_000)
    scheduled.execute_due(NOW + 1_000)
    assert told(scheduled, 0) == [[], []]


def test_who_takes_the_lead_is_winning_and_who_lost_it_is_outbid() -> None:
    driver = Driver.opened()
    driver.bid(ANNA, up_to=1_000)
    driver.bid(BEN, exactly=2_000)
    assert told(driver, 1) == [[(ANNA, "winning")], [(ANNA, "outbid"), (BEN, "winning")]]


def test_who_is_outbid_at_once_is_told_so_and_the_leader_nothing() -> None:
    driver = Driver.opened()
    driver.bid(ANNA, up_to=5_000)
    driver.bid(BEN, up_to=2_000)
    assert told(driver, 2) == [[(BEN, "outbid")]]


def test_a_raise_and_the_reserve_that_it_reaches_are_no_news_to_others() -> None:
    driver = Driver.opened(reserve_price=5_000)
    driver.bid(ANNA, up_to=2_000)
    driver.bid(ANNA, up_to=6_000)
    assert told(driver, 2) == [[(ANNA, "raised")], []]


def test_an_extension_concerns_nobody() -> None:
    driver = Driver.opened(soft_close=SOFT_CLOSE)
    driver.bid(ANNA, exactly=1_000, now=END - 1)
    assert told(driver, 1) == [[(ANNA, "winning")], []]


def test_at_the_end_one_has_won_and_the_others_have_lost() -> None:
    driver = Driver.opened()
    driver.bid(ANNA, exactly=1_000)
    driver.bid(BEN, exactly=1_500)
    driver.bid(CLEO, exactly=2_000)
    driver.execute_due(END)
    assert told(driver, 4) == [[(ANNA, "lost"), (BEN, "lost"), (CLEO, "won")]]


def test_under_its_reserve_all_have_lost() -> None:
    driver = Driver.opened(reserve_price=5_000)
    driver.bid(ANNA, exactly=1_000)
    driver.execute_due(END)
    assert told(driver, 2) == [[(ANNA, "lost")]]


def test_a_cancellation_concerns_all_who_bid() -> None:
    driver = Driver.opened()
    driver.bid(ANNA, exactly=1_000)
    driver.bid(BEN, exactly=1_500)
    driver.cancel(ADMIN, role="admin", reason="It is broken.")
    assert told(driver, 3) == [[(ANNA, "cancelled"), (BEN, "cancelled")]]
    unwanted = Driver.opened()
    unwanted.cancel(MAKER)
    assert told(unwanted, 1) == [[]]
