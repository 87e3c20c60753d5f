"""Who hears from a shard what concerns whom, and when."""

import logging
from uuid import UUID

import pytest

from actors import followers
from actors.messages import Follow, Followed, GetAuction, Noticed, Payload, Unfollow, You
from engine.commands import CancelAuction
from tests.engine.support import ADMIN, ANNA, AUCTION, BEN, CLEO, END, NOW, REQUEST
from tests.support.shards import House, Recorder, Start, accepted, bid, opening
from tests.support.waiting import quiet, turns

OTHER = UUID("a0000000-0000-4000-8000-000000000001")


async def following(house: House, *users: UUID) -> Recorder:
    """A gateway that follows some users."""
    outlet = Recorder()
    (request,) = house.take(outlet, Follow(list(users)))
    assert await outlet.answer(request) == Followed()
    return outlet


async def done(house: House, *payloads: Payload) -> None:
    for payload in payloads:
        await house.ask(payload)


async def test_followed_users_are_told_and_others_are_not(house: House) -> None:
    annas, both = await following(house, ANNA), await following(house, ANNA, BEN)
    await done(house, bid(ANNA, 1_000), bid(BEN, 2_000), bid(CLEO, 3_000))
    assert annas.noticed == [(ANNA, "winning", 2), (ANNA, "outbid", 3)]
    assert both.noticed == [(ANNA, "winning", 2), (ANNA, "outbid", 3), (BEN, "winning", 3), (BEN, "outbid", 4)]


async def test_a_notice_tells_how_the_user_stands_right_after_the_event(house: House) -> None:
    outlet = await following(house, BEN)
    await done(house, bid(ANNA, up_to=5_000), bid(BEN, up_to=2_000))
    assert outlet.messages[-1] == Noticed(
        user=BEN,
        auction=AUCTION,
        kind="outbid",
        seq=3,
        at=NOW,
        price=2_500,
        minimum=3_000,
        end_time=END,
        status="active",
        outcome=None,
        you=You(2, 2_000, is_leading=False),
    )


async def test_the_end_is_told_to_followed_bidders_of_each_auction(house: House) -> None:
    await house.ask(opening(OTHER))
    outlet = await following(house, ANNA, BEN)
    await done(house, bid(ANNA, 1_000), bid(BEN, 2_000), bid(CLEO, 3_000), bid(ANNA, 1_000, auction=OTHER))
    cancel = CancelAuction(auction=OTHER, caller=ADMIN, role="admin", request_id=REQUEST, reason="It is broken.")
    await done(house, cancel)
    outlet.messages.clear()
    house.now = END
    await done(house, GetAuction(AUCTION, None), GetAuction(OTHER, None))
    assert outlet.noticed == [(ANNA, "lost", 5), (BEN, "lost", 5)]


async def test_no_notice_leaves_before_its_commit_and_it_comes_before_the_acknowledgement(house: House) -> None:
    outlet = await following(house, ANNA)
    outlet.messages.clear()
    house.journal.hold()
    (request,) = house.take(outlet, bid(ANNA, 1_000))
    await turns(lambda: len(house.journal.appends) == 2)
    await quiet()
    assert outlet.messages == []
    house.journal.let_go()
    accepted(await outlet.answer(request))
    assert [type(message).__name__ for message in outlet.messages] == ["Noticed", "Answered"]


async def test_what_was_decided_before_it_is_committed_when_a_follow_is_answered(house: House) -> None:
    bidder, outlet = Recorder(), Recorder()
    house.journal.hold()
    house.take(bidder, bid(ANNA, 1_000))
    (request,) = house.take(outlet, Follow([ANNA]))
    await turns(lambda: len(house.journal.appends) == 2)
    await quiet()
    assert outlet.messages == []
    house.journal.let_go()
    assert await outlet.answer(request) == Followed()
    assert house.store.bidders == {(ANNA, AUCTION)}


async def test_unfollowed_users_are_told_no_more(house: House) -> None:
    outlet = await following(house, ANNA, BEN)
    house.take(outlet, Unfollow([ANNA, CLEO]))
    await done(house, bid(ANNA, 1_000), bid(BEN, 2_000))
    assert outlet.noticed == [(BEN, "winning", 3)]


async def test_a_gateway_that_is_gone_is_forgotten(house: House) -> None:
    gone, other = await following(house, ANNA, BEN), await following(house, ANNA)
    gone.is_gone = True
    house.shard.leave(gone)
    house.take(gone, Follow([ANNA]))
    await done(house, bid(ANNA, 1_000))
    assert (gone.noticed, other.noticed) == ([], [(ANNA, "winning", 2)])
    assert list(house.shard._followers.by_user) == [ANNA]


async def test_a_follow_is_not_refused_while_the_shard_is_away(house: House) -> None:
    outlet = Recorder()
    house.shard._is_away = True
    (request,) = house.take(outlet, Follow([ANNA]))
    assert await outlet.answer(request) == Followed()


async def test_one_gateway_follows_at_most_so_many(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(followers, "FOLLOWED_MAX", 2)
    house = await start()
    await house.ask(opening())
    with caplog.at_level(logging.ERROR):
        outlet, other = await following(house, ANNA, BEN, CLEO), await following(house, CLEO)
    assert "more users" in caplog.text
    await done(house, bid(CLEO, 1_000))
    assert (outlet.noticed, other.noticed) == ([], [(CLEO, "winning", 2)])


async def test_a_bidders_first_bid_in_an_auction_is_noted_with_it(house: House) -> None:
    await done(
        house, bid(ANNA, 1_000), bid(BEN, 1_200, bid_id=2), bid(ANNA, 2_000, bid_id=3), bid(BEN, 3_000, bid_id=4)
    )
    assert house.store.bidders == {(ANNA, AUCTION), (BEN, AUCTION)}
    joined = [row.joined for rows in house.journal.appends for row in rows]
    assert joined == [None, ANNA, None, BEN]
    assert house.store.entities[AUCTION].ended_at is None
    house.now = END
    await done(house, GetAuction(AUCTION, None))
    assert house.store.entities[AUCTION].ended_at == END
