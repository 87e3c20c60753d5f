"""What everybody may see: paddles instead of people, no maximum, no reserve."""

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings

from engine.auction import Snapshot, snapshot
from engine.commands import Role
from engine.events import BidPlaced, Cancelled, Ended, Event, Extended, MaximumRaised, ReserveReached
from engine.public import encode_public
from tests.engine.histories import History, histories, play
from tests.engine.support import ADMIN, ANNA, AUCTION, BEN, CLEO, DORA, MAKER, NOW, REQUEST, SOFT_CLOSE, STORY, Driver

PEOPLE = (MAKER, ANNA, BEN, CLEO, DORA, ADMIN)
HASH = bytes(range(32))
SNAPSHOT_FIELDS = set(Snapshot.__struct_fields__)

# The fields of each kind, as the protocol lists them.
FIELDS = {
    "scheduled": SNAPSHOT_FIELDS,
    "opened": SNAPSHOT_FIELDS,
    "bid_placed": {"paddle", "price", "leader", "bids", "minimum", "end_time", "reserve_met"},
    "private": set[str](),
    "reserve_reached": {"price", "minimum", "reserve_met"},
    "extended": {"end_time", "reason"},
    "ended": {"outcome", "paddle", "price", "by", "hash"},
    "cancelled": {"by", "reason"},
}


def shown(event: Event) -> dict[str, Any]:
    frame: dict[str, Any] = msgspec.json.decode(encode_public(3, NOW, event, HASH, "A fake"))
    assert (frame.pop("seq"), frame.pop("at")) == (3, NOW)
    return frame


def check_fields(frame: dict[str, Any]) -> None:
    assert set(frame) - {"kind"} == FIELDS[frame["kind"]]


@pytest.mark.parametrize(
    ("event", "frame"),
    [
        (
            BidPlaced(ANNA, REQUEST, 2, None, 5_000, 2_500, 1, 7, 3_000, NOW, False),
            b'{"seq":3,"at":1700000000000,"kind":"bid_placed","paddle":2,"price":2500,"leader":1,"bids":7,'
            b'"minimum":3000,"end_time":1700000000000,"reserve_met":false}',
        ),
        (
            MaximumRaised(ANNA, REQUEST, 2, None, 9_000, 2_500, 3_000, NOW),
            b'{"seq":3,"at":1700000000000,"kind":"private"}',
        ),
        (
            ReserveReached(8_000, 8_500),
            b'{"seq":3,"at":1700000000000,"kind":"reserve_reached","price":8000,"minimum":8500,"reserve_met":true}',
        ),
        (
            Extended(NOW, NOW + 1, "outage"),
            b'{"seq":3,"at":1700000000000,"kind":"extended","end_time":1700000000000,"reason":"outage"}',
        ),
        (
            Ended("sold", ANNA, 2, 5_500, "admin", NOW, "5f"),
            b'{"seq":3,"at":1700000000000,"kind":"ended","outcome":"sold","paddle":2,"price":5500,"by":"admin",'
            b'"hash":"000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"}',
        ),
        (
            Cancelled("admin", NOW, "5f"),
            b'{"seq":3,"at":1700000000000,"kind":"cancelled","by":"admin","reason":"A fake"}',
        ),
    ],
)
def test_each_kind_is_shown_in_the_protocols_words(event: Event, frame: bytes) -> None:
    assert encode_public(3, NOW, event, HASH, "A fake") == frame


@pytest.mark.parametrize(("start_time", "kind"), [(None, "opened"), (NOW + 1_000, "scheduled")])
def test_an_auctions_first_event_carries_the_snapshots_fields(start_time: int | None, kind: str) -> None:
    driver = Driver.opened(start_time=start_time, reserve_price=8_000)
    frame = shown(driver.events[0])
    check_fields(frame)
    assert frame == {"kind": kind, **msgspec.to_builtins(snapshot(driver.auction))}
    assert (frame["auction"], frame["story"], frame["reserve_met"]) == (str(AUCTION), str(STORY), False)


def test_a_raise_that_reaches_the_reserve_is_private_and_then_reserve_reached() -> None:
    driver = Driver.opened(reserve_price=8_000)
    driver.bid(ANNA, up_to=2_000)
    frames = [shown(event) for event in driver.bid(ANNA, up_to=9_000)]
    assert frames == [
        {"kind": "private"},
        {"kind": "reserve_reached", "price": 8_000, "minimum": 8_500, "reserve_met": True},
    ]


@pytest.mark.parametrize("role", ["viewer", "admin"])
def test_no_maximum_no_reserve_and_nobodys_id_is_shown(role: Role) -> None:
    """With numbers that nothing else can have."""
    driver = Driver.opened(reserve_price=7_654_321, soft_close=SOFT_CLOSE)
    driver.bid(ANNA, up_to=1_234_567)
    driver.bid(BEN, up_to=3_456_789)
    driver.bid(BEN, up_to=5_678_901)
    driver.bid(CLEO, up_to=2_345_678)
    driver.end(ADMIN, role="admin", reason="A fault") if role == "admin" else driver.execute_due(
        driver.auction.end_time
    )
    text = b"\n".join(encode_public(1, NOW, event, HASH, None) for event in driver.events)
    for amount in (b"7654321", b"3456789", b"5678901"):
        assert amount not in text
    for person in PEOPLE:
        assert str(person).encode() not in text
        assert person.hex.encode() not in text


@pytest.mark.timeout(120)
@settings(max_examples=300)
@given(histories())
def test_public_events_alone_lead_to_the_snapshot(history: History) -> None:
    """What a client does: it starts from the first event and applies the rest as they come."""
    known: dict[str, Any] = {}
    seen = 0
    for turn in play(history):
        for event in turn.driver.events[seen:]:
            frame = shown(event)
            check_fields(frame)
            kind = frame.pop("kind")
            known |= {field: value for field, value in frame.items() if field in SNAPSHOT_FIELDS - {"price"}}
            known["price"] = frame.get("price") or known["price"]
            known["status"] = kind if kind in {"ended", "cancelled"} else known["status"]
            assert not any(str(person) in str(frame) for person in PEOPLE)
        seen = len(turn.driver.events)
        assert known == msgspec.to_builtins(snapshot(turn.driver.auction))
