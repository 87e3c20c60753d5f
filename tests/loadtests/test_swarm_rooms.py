"""The rooms of a swarm: the same auctions in all processes, and how long a bid takes to the screens."""

from typing import Any
from uuid import UUID, uuid4

from loadtests.swarm.rooms import REMEMBERED, Plan, Room

MS = 1_000_000
RUN = UUID(int=1)


class House:
    """Opens auctions as the engine would: once for each key."""

    def __init__(self) -> None:
        self.opened: dict[UUID, dict[str, Any]] = {}
        self.shown: list[float] = []
        self.is_open = True

    def open(self, key: UUID, terms: dict[str, Any]) -> dict[str, Any] | None:
        if not self.is_open:
            return None
        return self.opened.setdefault(key, {"auction_id": str(uuid4()), "status": "active", **terms})

    def end(self, auction: str | None) -> None:
        (data,) = (data for data in self.opened.values() if data["auction_id"] == auction)
        data["status"] = "ended"

    def room(self, number: int = 0, *, run: UUID = RUN, is_together: bool = False) -> Room:
        plan = Plan(run=run, began_s=2e9, rooms=4, auction_s=60, is_together=is_together)
        return Room(number, plan, self.open, self.shown.append)


def test_all_processes_meet_in_the_same_auctions() -> None:
    house = House()
    room, elsewhere = house.room(), house.room()
    first = room.enter()
    assert first is not None
    assert elsewhere.enter() == room.enter() == first
    assert house.room(1).enter() != first
    assert house.room(run=UUID(int=2)).enter() != first
    house.end(first)
    room.leave(first)
    second = room.enter()
    # One that comes late finds the first one over.
    assert house.room().enter() == second != first
    # Who leaves late does not close the next one.
    room.leave(first)
    assert room.enter() == second


def test_a_room_that_cannot_be_opened_may_be_opened_later() -> None:
    house = House()
    house.is_open = False
    room = house.room()
    assert room.enter() is None
    house.is_open = True
    assert room.enter() is not None


def test_auctions_end_in_turns_or_together() -> None:
    house = House()
    ends = [house.room(number).plan.end_s(number, 0) - 2e9 for number in range(4)]
    assert ends == [60, 75, 90, 105]
    together = House()
    assert [together.room(number, is_together=True).plan.end_s(number, 0) - 2e9 for number in range(4)] == [60] * 4


def test_who_comes_late_to_a_common_end_sees_that_it_is_over() -> None:
    house = House()
    auction = house.room(is_together=True).enter()
    house.end(auction)
    assert house.room(is_together=True).enter() == auction


def test_a_bid_is_timed_on_every_screen_whether_its_ack_comes_first_or_last() -> None:
    house = House()
    room = house.room()
    auction = room.enter()
    assert auction is not None
    room.shown(auction, 3, 4, now_ns=8 * MS)
    room.shown(auction, 3, 5, now_ns=9 * MS)
    assert house.shown == []
    assert room.acknowledged(auction, 4, uuid4(), sent_ns=1 * MS) == []
    assert house.shown == [7, 8]
    room.shown(auction, 2, 7, now_ns=11 * MS)
    assert house.shown == [7, 8, 10]
    # Of an auction that is over.
    room.shown(str(uuid4()), 3, 4, now_ns=12 * MS)
    assert house.shown == [7, 8, 10]


def test_two_bids_that_are_acknowledged_as_one_are_found() -> None:
    house = House()
    room = house.room()
    auction, bid_id = room.enter(), uuid4()
    assert auction is not None
    assert room.acknowledged(auction, 4, bid_id, sent_ns=0) == []
    # Sent again after a lost connection, it gets its first verdict.
    assert room.acknowledged(auction, 4, bid_id, sent_ns=0) == []
    (violation,) = room.acknowledged(auction, 4, uuid4(), sent_ns=0)
    assert violation.check == "acknowledged"


def test_what_a_room_remembers_is_bounded() -> None:
    house = House()
    room = house.room()
    auction = room.enter()
    assert auction is not None
    room.shown(auction, 0, 10_000_000, now_ns=0)
    for seq in range(10_000_000, 10_000_000 + 2 * REMEMBERED):
        room.shown(auction, seq, seq + 1, now_ns=0)
        room.acknowledged(auction, seq + 1, uuid4(), sent_ns=0)
    assert len(house.shown) == 2 * REMEMBERED
    assert len(room._arrivals) <= REMEMBERED
    assert len(room._acknowledged) <= REMEMBERED
