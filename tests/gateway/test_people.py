"""Who is told what concerns whom: the shards answer when a test says so, from auctions that it sets."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal
from uuid import UUID

import msgspec
import pytest

from actors.messages import Answer, AuctionView, Follow, Followed, GetAuction, Noticed, Payload, Unfollow, You
from engine.auction import Snapshot
from engine.limits import STANDINGS_MS
from engine.notices import NoticeKind
from engine.rejections import INTERNAL, UNAVAILABLE, Rejection
from gateway import people
from gateway.catalogue import CatalogueUnavailable
from gateway.people import People
from gateway.wire import Standing
from tests.gateway.test_wire import SNAPSHOT
from tests.support.waiting import quiet, turns

BOWL, VASE = UUID(int=2), UUID(int=3)
ANNA, BEN = UUID(int=101), UUID(int=102)
MAKER = UUID(int=104)
NOW = 1_000_000


def view(
    seq: int,
    *,
    auction: UUID = BOWL,
    leads: bool = True,
    most: int = 100,
    status: Literal["active", "ended", "cancelled"] = "active",
    outcome: Literal["sold", "unsold", "reserve_not_met"] | None = None,
) -> AuctionView:
    """An auction as its bidder sees it."""
    snapshot = msgspec.structs.replace(SNAPSHOT, auction=auction, status=status, outcome=outcome, price=seq)
    assert isinstance(snapshot, Snapshot)
    return AuctionView(seq, snapshot, You(1, most, is_leading=leads), MAKER, None, None, 1_000 + seq)


def noticed(seq: int, kind: NoticeKind, *, user: UUID = ANNA, auction: UUID = BOWL, most: int = 100) -> Noticed:
    return Noticed(
        user=user,
        auction=auction,
        kind=kind,
        seq=seq,
        at=1_000 + seq,
        price=seq,
        minimum=1,
        end_time=1,
        status="ended" if kind in ("won", "lost") else "active",
        outcome=None,
        you=You(1, most, is_leading=kind in ("winning", "won")),
    )


def standing(auction: UUID = BOWL, *, leads: bool = True, most: int = 100, status: Any = "active") -> Standing:
    return Standing(auction=auction, paddle=1, max_amount=most, is_leading=leads, status=status)


class Socket:
    """A sink that keeps what it is told, in order."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.frames: list[bytes] = []
        self.is_behind = False

    def send(self, frame: bytes) -> None:
        self.frames.append(frame)
        notice = json.loads(frame)
        assert (notice["type"], notice["topic"]) == ("notice", "me")
        self.log.append((notice["kind"], notice["seq"]))

    def close_as_too_slow(self) -> None:
        raise AssertionError("notices close nobody")

    def subscribed(self, answer: list[Standing] | Rejection) -> None:
        self.log.append(answer.code if isinstance(answer, Rejection) else answer)


class Hall:
    """Everybody's auctions, and two shards: even auctions are the first's, odd ones the second's."""

    shards = (0, 1)

    def __init__(self) -> None:
        self.joined: dict[UUID, list[UUID]] = {}
        self.views: dict[UUID, Answer] = {}
        self.told: list[tuple[int, Follow | Unfollow]] = []
        self.asked: list[UUID] = []
        self.is_away = False
        self.follow_answer: Answer = Followed()
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.on_followed: list[Callable[[Answer], None]] = []
        self.away: list[int] = []
        self.now = NOW
        self.people = People(self, self.list_joined, lambda: self.now)

    def unreachable(self) -> list[int]:
        return self.away

    def shard_of(self, entity_id: UUID) -> int:
        return entity_id.int % 2

    def submit_to(self, shard: int, payload: Follow | Unfollow, on_answer: Callable[[Answer], None]) -> None:
        self.told.append((shard, payload))
        if isinstance(payload, Follow):
            self.on_followed.append(on_answer)

    async def ask_shard(self, shard: int, payload: Follow) -> Answer:
        self.told.append((shard, payload))
        await self.go_on.wait()
        return self.follow_answer

    async def ask(self, payload: Payload) -> Answer:
        assert isinstance(payload, GetAuction)
        self.asked.append(payload.auction)
        await asyncio.sleep(0)
        return self.views[payload.auction]

    async def list_joined(self, user: UUID) -> list[UUID]:
        await asyncio.sleep(0)
        if self.is_away:
            raise CatalogueUnavailable
        return self.joined.get(user, [])

    def bids(self, user: UUID, *views: AuctionView) -> None:
        """These are the user's auctions."""
        self.joined[user] = [one.snapshot.auction for one in views]
        self.views |= {one.snapshot.auction: one for one in views}

    async def follow(self, user: UUID = ANNA) -> Socket:
        socket = Socket()
        self.people.follow(user, socket, socket.subscribed)
        await turns(lambda: bool(socket.log))
        return socket

    async def reopen(self, shard: int = 0) -> None:
        """A link has opened again, and everybody is followed there again."""
        self.people.follow_again(shard)
        answers, self.on_followed = self.on_followed, []
        for on_answer in answers:
            on_answer(self.follow_answer)
        await quiet()

    def refuse_to_follow(self) -> None:
        """Whoever is being followed again is not."""
        answers, self.on_followed = self.on_followed, []
        for on_answer in answers:
            on_answer(UNAVAILABLE)

    def pop(self) -> list[tuple[int, Follow | Unfollow]]:
        told, self.told = self.told, []
        return told


@pytest.fixture
async def hall() -> AsyncIterator[Hall]:
    hall = Hall()
    yield hall
    await hall.people.close()


# Standings


async def test_a_user_is_followed_everywhere_and_then_told_how_it_stands(hall: Hall) -> None:
    hall.bids(ANNA, view(5), view(7, auction=VASE, leads=False, most=90))
    hall.go_on.clear()
    socket = Socket()
    hall.people.follow(ANNA, socket, socket.subscribed)
    await quiet()
    assert hall.pop() == [(0, Follow([ANNA])), (1, Follow([ANNA]))]
    # What was decided before it was followed is not in the journal yet.
    assert (hall.asked, socket.log) == ([], [])
    hall.go_on.set()
    await quiet()
    assert socket.log == [[standing(), standing(VASE, leads=False, most=90)]]
    hall.people.noticed(noticed(6, "outbid"))
    assert socket.log[1:] == [("outbid", 6)]


async def test_what_comes_while_it_is_looked_up_stands_in_the_standings(hall: Hall) -> None:
    hall.bids(ANNA, view(5))
    hall.go_on.clear()
    socket = Socket()
    hall.people.follow(ANNA, socket, socket.subscribed)
    hall.people.noticed(noticed(6, "outbid"))
    hall.people.noticed(noticed(2, "winning", auction=VASE))
    hall.go_on.set()
    await quiet()
    assert socket.log == [[standing(leads=False), standing(VASE)]]


async def test_another_connection_is_answered_from_memory_and_both_are_told(hall: Hall) -> None:
    hall.bids(ANNA, view(5))
    first = await hall.follow()
    hall.people.noticed(noticed(6, "outbid"))
    hall.people.noticed(noticed(8, "raised", most=300))
    second = await hall.follow()
    hall.people.noticed(noticed(9, "winning", most=300))
    assert hall.asked == [BOWL]
    assert first.log == [[standing()], ("outbid", 6), ("winning", 9)]
    assert second.log == [[standing(leads=False, most=300)], ("winning", 9)]
    assert first.frames[-1] is second.frames[-1], "encoded once"


async def test_connections_that_come_at_once_are_answered_by_one_look(hall: Hall) -> None:
    hall.bids(ANNA, view(5))
    sockets = [Socket(), Socket()]
    for socket in sockets:
        hall.people.follow(ANNA, socket, socket.subscribed)
    await quiet()
    assert hall.asked == [BOWL]
    assert [socket.log for socket in sockets] == [[[standing()]], [[standing()]]]


async def test_all_who_come_while_others_are_followed_are_followed_together(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(people, "FOLLOWED_AT_ONCE", 2)
    hall.go_on.clear()
    users = [UUID(int=number) for number in range(1, 5)]
    sockets = [Socket() for _ in users]
    for user, socket in zip(users, sockets, strict=True):
        hall.people.follow(user, socket, socket.subscribed)
        await quiet()
    hall.go_on.set()
    await turns(lambda: all(socket.log for socket in sockets))
    parts = [Follow(users[:1]), Follow(users[1:3]), Follow(users[3:])]
    assert hall.pop() == [(shard, part) for part in parts for shard in (0, 1)]
    assert hall.people._followed == {}


async def test_one_that_cannot_be_answered_leaves_no_other_unanswered(
    hall: Hall, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_answer: list[Standing] | Rejection) -> None:
        raise RuntimeError("no answer")

    for is_away in (False, True):
        hall.is_away = is_away
        failing, socket = Socket(), Socket()
        hall.people.follow(ANNA, failing, fail)
        hall.people.follow(ANNA, socket, socket.subscribed)
        await quiet()
        assert socket.log == ["unavailable" if is_away else []]
        hall.people.drop(failing)
        hall.people.drop(socket)
        assert (hall.people._people, hall.people._user_by_sink) == ({}, {})
    assert caplog.text.count("RuntimeError: no answer") == 2


async def test_who_leaves_as_it_is_answered_leaves_nothing_behind(hall: Hall, caplog: pytest.LogCaptureFixture) -> None:
    socket = Socket()
    hall.people.follow(ANNA, socket, lambda _answer: hall.people.drop(socket))
    await quiet()
    assert hall.pop()[2:] == [(0, Unfollow([ANNA])), (1, Unfollow([ANNA]))]
    assert (hall.people._people, hall.people._user_by_sink, caplog.text) == ({}, {}, "")


async def test_others_are_told_nothing(hall: Hall) -> None:
    anna, ben = await hall.follow(ANNA), await hall.follow(BEN)
    hall.people.noticed(noticed(2, "winning", user=BEN))
    assert (anna.log, ben.log) == ([[]], [[], ("winning", 2)])


async def test_nothing_is_told_twice(hall: Hall) -> None:
    hall.bids(ANNA, view(5))
    socket = await hall.follow()
    for seq in (4, 5, 6, 6):
        hall.people.noticed(noticed(seq, "outbid"))
    assert socket.log[1:] == [("outbid", 6)]


async def test_standings_are_bounded_and_those_that_are_over_go_first(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(people, "STANDINGS_MAX", 2)
    await hall.follow()
    one, two, three, four = (UUID(int=number) for number in range(11, 15))
    for auction, kind in ((one, "winning"), (two, "won"), (three, "winning"), (four, "winning")):
        hall.people.noticed(noticed(2, kind, auction=auction))  # type: ignore[arg-type]  # Literals, in a tuple.
    assert (await hall.follow()).log == [[standing(three), standing(four)]]


async def test_what_has_been_over_for_a_day_is_not_among_the_standings(hall: Hall) -> None:
    hall.bids(ANNA, view(5), view(7, auction=VASE))
    await hall.follow()
    over = noticed(8, "won")
    hall.people.noticed(over)
    hall.now = over.at + STANDINGS_MS
    assert (await hall.follow()).log == [[standing(status="ended"), standing(VASE)]]
    hall.now += 1
    again = await hall.follow()
    assert again.log == [[standing(VASE)]]
    hall.bids(ANNA, view(8, status="ended", outcome="sold"), view(7, auction=VASE))
    # It is not told a second time, either.
    await hall.reopen()
    assert again.log == [[standing(VASE)]]


# Leaving


async def test_the_last_to_leave_ends_it(hall: Hall) -> None:
    first, second = await hall.follow(), await hall.follow()
    hall.pop()
    hall.people.drop(first)
    hall.people.drop(Socket())
    assert hall.pop() == []
    hall.people.drop(second)
    assert hall.pop() == [(0, Unfollow([ANNA])), (1, Unfollow([ANNA]))]
    assert (hall.people._people, hall.people._user_by_sink) == ({}, {})


async def test_who_leaves_before_its_answer_has_one_at_once_and_nothing_is_left(hall: Hall) -> None:
    hall.go_on.clear()
    socket = Socket()
    for _ in range(3):
        hall.people.follow(ANNA, socket, socket.subscribed)
        hall.people.drop(socket)
    assert socket.log == ["unavailable"] * 3
    hall.go_on.set()
    await quiet()
    # However often it asked, it was looked up once.
    assert hall.pop() == [(0, Follow([ANNA])), (1, Follow([ANNA])), (0, Unfollow([ANNA])), (1, Unfollow([ANNA]))]
    assert hall.people._people == {}


async def test_what_comes_for_somebody_who_left_is_unfollowed_once_more(hall: Hall) -> None:
    hall.people.noticed(noticed(2, "winning"))
    assert hall.pop() == [(0, Unfollow([ANNA])), (1, Unfollow([ANNA]))]


# What cannot be had


async def test_without_postgres_it_is_refused_and_nothing_is_left(hall: Hall) -> None:
    hall.is_away = True
    assert (await hall.follow()).log == ["unavailable"]
    assert hall.pop()[2:] == [(0, Unfollow([ANNA])), (1, Unfollow([ANNA]))]
    assert (hall.people._people, hall.people._user_by_sink) == ({}, {})
    hall.is_away = False
    assert (await hall.follow()).log == [[]]


async def test_without_a_shard_it_is_refused(hall: Hall) -> None:
    hall.follow_answer = UNAVAILABLE
    assert (await hall.follow()).log == ["unavailable"]
    hall.follow_answer = Followed()
    hall.bids(ANNA, view(5))
    hall.views[BOWL] = UNAVAILABLE
    assert (await hall.follow()).log == ["unavailable"]
    assert hall.people._people == {}


async def test_without_a_link_nobody_waits(hall: Hall) -> None:
    waiting, late = Socket(), Socket()
    hall.go_on.clear()
    hall.people.follow(ANNA, waiting, waiting.subscribed)
    await quiet()
    hall.away = [1]
    hall.people.follow(BEN, late, late.subscribed)
    await quiet()
    # One who was asked for before still hopes, and none of those who come later waits for that.
    assert (waiting.log, late.log) == ([], ["unavailable"])
    hall.go_on.set()
    await quiet()
    assert waiting.log == ["unavailable"]
    assert (hall.asked, hall.people._people) == ([], {})
    hall.away = []
    assert (await hall.follow(BEN)).log == [[]]


async def test_who_waited_behind_others_when_the_link_broke_is_not_asked_for(hall: Hall) -> None:
    first, second = Socket(), Socket()
    hall.go_on.clear()
    hall.people.follow(ANNA, first, first.subscribed)
    await quiet()
    hall.people.follow(BEN, second, second.subscribed)
    await quiet()
    hall.away = [0]
    hall.go_on.set()
    await quiet()
    assert second.log == ["unavailable"]
    assert (0, Follow([BEN])) not in hall.told


async def test_an_auction_that_cannot_be_read_is_left_out_alone(hall: Hall) -> None:
    hall.bids(ANNA, view(5), view(7, auction=VASE))
    hall.views[BOWL] = INTERNAL
    assert (await hall.follow()).log == [[standing(VASE)]]


async def test_a_fault_is_answered(hall: Hall, caplog: pytest.LogCaptureFixture) -> None:
    hall.joined[ANNA] = [BOWL]
    with caplog.at_level(logging.ERROR):
        assert (await hall.follow()).log == ["internal"]
    assert "KeyError" in caplog.text


async def test_a_gateway_that_goes_looks_nobody_up_any_more(hall: Hall) -> None:
    hall.go_on.clear()
    socket = Socket()
    hall.people.follow(ANNA, socket, socket.subscribed)
    await quiet()
    await hall.people.close()
    hall.go_on.set()
    await quiet()
    assert (socket.log, hall.people._tasks) == ([], set())


# After a broken link


async def test_everybody_is_followed_again_in_parts(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(people, "FOLLOWED_AT_ONCE", 2)
    users = [UUID(int=number) for number in range(1, 6)]
    for user in users:
        await hall.follow(user)
    hall.pop()
    await hall.reopen(1)
    assert hall.pop() == [(1, Follow(users[:2])), (1, Follow(users[2:4])), (1, Follow(users[4:]))]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (view(5), view(9, leads=False), [("outbid", 9)]),
        (view(5, leads=False), view(9, most=200), [("winning", 9)]),
        # It bid, and was outbid at once.
        (view(5, leads=False), view(9, leads=False, most=200), [("outbid", 9)]),
        (view(5), view(9, status="ended", outcome="sold"), [("won", 9)]),
        (view(5), view(9, status="ended", outcome="reserve_not_met"), [("lost", 9)]),
        (view(5), view(9, status="ended", outcome="sold", leads=False), [("lost", 9)]),
        (view(5), view(9, status="cancelled"), [("cancelled", 9)]),
        # Nothing that it does not know
        (view(5), view(9, most=200), []),
        (view(5, leads=False), view(9, leads=False), []),
        (view(5), view(5), []),
    ],
)
async def test_what_was_missed_is_told(
    hall: Hall, before: AuctionView, after: AuctionView, expected: list[tuple[str, int]]
) -> None:
    hall.bids(ANNA, before)
    socket = await hall.follow()
    hall.bids(ANNA, after)
    await hall.reopen()
    assert socket.log[1:] == expected
    assert after.you is not None
    told = standing(leads=after.you.is_leading, most=after.you.max_amount, status=after.snapshot.status)
    assert (await hall.follow()).log == [[told]]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (view(2), ("winning", 2)),
        (view(3, leads=False), ("outbid", 3)),
        (view(4, status="ended", outcome="sold"), ("won", 4)),
    ],
)
async def test_an_auction_that_was_joined_meanwhile_is_told_of(
    hall: Hall, found: AuctionView, expected: tuple[str, int]
) -> None:
    socket = await hall.follow()
    hall.bids(ANNA, found)
    await hall.reopen()
    assert socket.log == [[], expected]


async def test_only_the_auctions_of_that_shard_are_asked_for(hall: Hall) -> None:
    hall.bids(ANNA, view(5), view(7, auction=VASE))
    await hall.follow()
    hall.asked.clear()
    await hall.reopen(1)
    assert hall.asked == [VASE]


async def test_a_link_that_breaks_again_is_asked_when_it_opens_again(hall: Hall) -> None:
    hall.bids(ANNA, view(5))
    socket = await hall.follow()
    hall.bids(ANNA, view(9, leads=False))
    hall.people.follow_again(0)
    assert socket.log[1:] == []
    await hall.reopen()
    assert socket.log[1:] == [("outbid", 9)]


async def test_who_could_not_be_followed_again_on_a_link_that_stays_open_is_caught_up_with_all_the_same(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(people, "LOOKUP_RETRY_MS", 0)
    hall.bids(ANNA, view(5))
    socket = await hall.follow()
    ben = await hall.follow(BEN)
    hall.bids(ANNA, view(9, leads=False))
    hall.follow_answer = UNAVAILABLE
    hall.pop()
    await hall.reopen()
    assert socket.log[1:] == [("outbid", 9)]
    # It was asked again, for those who are still there, and tells what came until that was done.
    await turns(lambda: len(hall.told) > 1)
    hall.people.drop(ben)
    hall.refuse_to_follow()
    await turns(lambda: bool(hall.on_followed))
    hall.bids(ANNA, view(12, most=300))
    hall.on_followed.pop()(Followed())
    await quiet()
    assert socket.log[2:] == [("winning", 12)]
    again = [told for told in hall.pop() if isinstance(told[1], Follow)]
    assert again == [(0, Follow([ANNA, BEN])), (0, Follow([ANNA, BEN])), (0, Follow([ANNA]))]
    assert hall.on_followed == []


async def test_a_link_that_has_broken_again_is_left_to_its_next_opening(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(people, "LOOKUP_RETRY_MS", 0)
    await hall.follow()
    hall.pop()
    hall.people.follow_again(0)
    first = hall.on_followed.pop()
    await hall.reopen(0)
    first(UNAVAILABLE)
    await quiet()
    assert hall.pop() == [(0, Follow([ANNA]))] * 2


async def test_what_cannot_be_asked_now_is_asked_again(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(people, "LOOKUP_RETRY_MS", 0)
    hall.bids(ANNA, view(5))
    socket = await hall.follow()
    hall.bids(ANNA, view(9, leads=False))
    hall.is_away = True
    await hall.reopen()
    assert socket.log[1:] == []
    # Whoever comes meanwhile is answered all the same.
    assert (await hall.follow()).log == [[standing()]]
    hall.is_away = False
    hall.views[BOWL] = UNAVAILABLE
    await quiet()
    hall.views[BOWL] = view(9, leads=False)
    await turns(lambda: len(socket.log) > 1)
    assert socket.log[1:] == [("outbid", 9)]
    await quiet()
    assert hall.people._catching_up == 0


async def test_one_users_fault_keeps_no_other_from_being_told(
    hall: Hall, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(people, "LOOKUPS_AT_ONCE", 2)
    anna, ben = await hall.follow(ANNA), await hall.follow(BEN)
    hall.joined[ANNA] = [UUID(int=1_000)]
    hall.bids(BEN, view(2))
    with caplog.at_level(logging.ERROR):
        await hall.reopen()
    assert "KeyError" in caplog.text
    assert (anna.log, ben.log) == ([[]], [[], ("winning", 2)])


async def test_who_left_meanwhile_is_not_asked_for(hall: Hall) -> None:
    hall.bids(ANNA, view(5))
    socket = await hall.follow()
    hall.asked.clear()
    hall.people.follow_again(0)
    hall.people.drop(socket)
    hall.on_followed.pop()(Followed())
    await quiet()
    assert hall.asked == []


async def test_who_left_and_came_back_is_not_told_once_more(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    hall.bids(ANNA, view(5))
    leaving = await hall.follow()
    ask, go_on = hall.ask, asyncio.Event()

    async def ask_slowly(payload: Payload) -> Answer:
        await go_on.wait()
        return await ask(payload)

    monkeypatch.setattr(hall, "ask", ask_slowly)
    await hall.reopen()
    monkeypatch.setattr(hall, "ask", ask)
    hall.people.drop(leaving)
    hall.bids(ANNA, view(6, leads=False))
    socket = await hall.follow()
    assert socket.log == [[standing(leads=False)]]
    hall.bids(ANNA, view(7, leads=False))
    go_on.set()
    await quiet()
    assert len(socket.log) == 1
