"""What the swarm's users check: forged streams are found out, honest ones are not."""

import json
from typing import Any

import pytest

from loadtests.swarm.stream import RECENT_MAX, Stream, Violation, decode

AUCTION = "0b1f7f0e-5d25-4d9a-9a53-0c8a35e4f9b1"


def snapshot(price: int, status: str = "active") -> dict[str, Any]:
    return {"status": status, "price": price, "minimum": price + 25, "leader": None, "end_time": 60_000, "bids": 0}


def bid(seq: int, price: int, paddle: int = 1) -> dict[str, Any]:
    return {
        "seq": seq,
        "at": seq,
        "kind": "bid_placed",
        "paddle": paddle,
        "price": price,
        "leader": paddle,
        "bids": seq,
        "minimum": price + 25,
        "end_time": 60_000,
        "reserve_met": None,
    }


def ended(seq: int, price: int | None) -> dict[str, Any]:
    return {"seq": seq, "kind": "ended", "outcome": "sold", "paddle": 1, "price": price, "by": "deadline", "hash": "00"}


def take(stream: Stream, **message: Any) -> list[Violation]:
    return stream.take(decode(json.dumps({"topic": f"auction:{AUCTION}", **message}).encode()))


def events(stream: Stream, *those: dict[str, Any]) -> list[Violation]:
    return take(stream, type="events", events=those)


def state(stream: Stream, seq: int, price: int, *those: dict[str, Any]) -> list[Violation]:
    return take(stream, type="state", seq=seq, snapshot=snapshot(price), events=those)


def resumed(stream: Stream, seq: int, *those: dict[str, Any]) -> list[Violation]:
    return take(stream, type="subscribed", ref=0, seq=seq, recovered=True, events=those)


def checks(found: list[Violation]) -> list[str]:
    return [violation.check for violation in found]


@pytest.fixture
def stream() -> Stream:
    """At seq 5, where the price is 100."""
    stream = Stream(AUCTION)
    assert take(stream, type="subscribed", ref=0, seq=5, recovered=False, snapshot=snapshot(100)) == []
    return stream


def test_an_honest_stream_is_followed(stream: Stream) -> None:
    assert events(stream, bid(6, 125), {"seq": 7, "at": 7, "kind": "private"}) == []
    assert events(stream, bid(8, 150, paddle=2), {"seq": 9, "kind": "extended", "end_time": 70_000}) == []
    assert (stream.seq, stream.price, stream.minimum, stream.leader) == (9, 150, 175, 2)
    assert (stream.end_time, stream.status, stream.is_over) == (70_000, "active", False)
    assert state(stream, 20, 300, {"seq": 15, "kind": "extended", "end_time": 80_000}) == []
    assert resumed(stream, 22, bid(21, 325), bid(22, 350)) == []
    assert events(stream, {"seq": 23, "kind": "of tomorrow"}, ended(24, 350)) == []
    assert stream.is_over


def test_an_end_without_a_sale_has_no_price(stream: Stream) -> None:
    assert events(stream, ended(6, None)) == []
    assert stream.price == 100


def test_a_lost_event_is_found_once(stream: Stream) -> None:
    assert checks(events(stream, bid(7, 125))) == ["order"]
    assert events(stream, bid(8, 150)) == []


def test_a_lost_event_within_a_frame_is_found(stream: Stream) -> None:
    assert checks(events(stream, bid(6, 125), bid(8, 150))) == ["order"]


def test_a_doubled_event_is_found(stream: Stream) -> None:
    assert events(stream, bid(6, 125)) == []
    assert checks(events(stream, bid(6, 125), bid(7, 150))) == ["order"]


def test_events_in_another_order_are_found(stream: Stream) -> None:
    assert checks(events(stream, bid(7, 150), bid(6, 125))) == ["order", "order"]


def test_events_before_the_subscription_are_found() -> None:
    assert checks(events(Stream(AUCTION), bid(1, 100))) == ["order"]


def test_a_falling_price_is_found(stream: Stream) -> None:
    assert events(stream, bid(6, 150)) == []
    assert checks(events(stream, bid(7, 125))) == ["price"]
    assert checks(state(stream, 9, 125)) == ["price"]
    assert checks(events(stream, ended(10, 149))) == ["price"]


def test_a_state_that_goes_back_is_found(stream: Stream) -> None:
    assert checks(state(stream, 4, 100)) == ["order"]
    assert events(stream, bid(6, 125)) == []


@pytest.mark.parametrize("seqs", [(5,), (11,), (8, 7)])
def test_a_state_that_names_what_it_does_not_cover_is_found(stream: Stream, seqs: tuple[int, ...]) -> None:
    those = [{"seq": seq, "kind": "extended", "end_time": 70_000} for seq in seqs]
    assert checks(state(stream, 10, 100, *those)) == ["order"]


def test_a_resumption_that_leaves_something_out_is_found(stream: Stream) -> None:
    assert checks(resumed(stream, 7, bid(6, 125))) == ["order"]
    assert checks(resumed(stream, 9, bid(9, 150))) == ["order"]


def test_an_acknowledged_bid_may_come_before_or_after(stream: Stream) -> None:
    assert stream.acknowledged(6, 1, now_ns=0) == []
    assert events(stream, bid(6, 125), bid(7, 150, paddle=2), {"seq": 8, "kind": "private"}) == []
    assert stream.acknowledged(7, 2, now_ns=0) == []
    assert stream.acknowledged(8, 2, now_ns=0) == []
    assert stream.missing(before_ns=1) == []


def test_an_acknowledged_bid_that_never_comes_is_found_once(stream: Stream) -> None:
    assert stream.acknowledged(6, 1, now_ns=10) == []
    assert stream.missing(before_ns=10) == []
    assert checks(stream.missing(before_ns=11)) == ["acknowledged"]
    assert stream.missing(before_ns=11) == []


def test_an_acknowledged_bid_may_be_covered(stream: Stream) -> None:
    assert stream.acknowledged(7, 1, now_ns=0) == []
    assert state(stream, 10, 200) == []
    assert stream.acknowledged(9, 1, now_ns=0) == []
    assert stream.missing(before_ns=1) == []


def test_an_acknowledged_bid_that_is_something_else_is_found(stream: Stream) -> None:
    assert stream.acknowledged(6, 1, now_ns=0) == []
    extended = {"seq": 7, "kind": "extended", "end_time": 70_000}
    assert checks(events(stream, bid(6, 125, paddle=2), extended)) == ["acknowledged"]
    assert checks(stream.acknowledged(6, 1, now_ns=0)) == ["acknowledged"]
    assert checks(stream.acknowledged(7, 1, now_ns=0)) == ["acknowledged"]


def test_what_is_remembered_is_bounded(stream: Stream) -> None:
    assert events(stream, *(bid(seq, seq * 25) for seq in range(6, 2 * RECENT_MAX))) == []
    # Too long ago to say; the newest are known.
    assert stream.acknowledged(6, 2, now_ns=0) == []
    assert checks(stream.acknowledged(2 * RECENT_MAX - 1, 2, now_ns=0)) == ["acknowledged"]
