"""Events and auctions as everybody may see them: paddles instead of people, no maximum, no reserve."""

from typing import Any, Final, assert_never

import msgspec

from engine.auction import Auction, evolve, snapshot
from engine.events import (
    BidPlaced,
    Cancelled,
    Ended,
    Event,
    Extended,
    MaximumRaised,
    Opened,
    ReserveReached,
    Scheduled,
)

KEPT: Final = (Extended, Ended, Cancelled)
"""What is never dropped, also where price steps are folded into the state that they led to."""


def encode_snapshot(state: Auction) -> bytes:
    """The public snapshot of an auction, as a JSON object."""
    return _ENCODER.encode(snapshot(state))


def encode_public(seq: int, at: int, event: Event, event_hash: bytes, reason: str | None) -> bytes:
    """One event of the live protocol, as a JSON object: `seq`, `at`, `kind` and the kind's fields.

    `reason` is the text that was given with the event, None where there was none or it has been erased.
    """
    return _ENCODER.encode({"seq": seq, "at": at, **_fields(event, event_hash, reason)})


def _fields(event: Event, event_hash: bytes, reason: str | None) -> dict[str, Any]:
    match event:
        case BidPlaced():
            return {
                "kind": "bid_placed",
                "paddle": event.paddle,
                "price": event.price,
                "leader": event.leader,
                "bids": event.bids,
                "minimum": event.minimum,
                "end_time": event.end_time,
                "reserve_met": event.reserve_met,
            }
        case MaximumRaised():
            return {"kind": "private"}
        case ReserveReached():
            return {"kind": "reserve_reached", "price": event.price, "minimum": event.minimum, "reserve_met": True}
        case Extended():
            return {"kind": "extended", "end_time": event.end_time, "reason": event.reason}
        case Ended():
            return {
                "kind": "ended",
                "outcome": event.outcome,
                "paddle": event.paddle,
                "price": event.price,
                "by": event.by,
                "hash": event_hash.hex(),
            }
        case Cancelled():
            return {"kind": "cancelled", "by": event.by, "reason": reason}
        case Scheduled():
            return {"kind": "scheduled", **msgspec.structs.asdict(snapshot(evolve(None, event)))}
        case Opened():
            return {"kind": "opened", **msgspec.structs.asdict(snapshot(evolve(None, event)))}
        case _:
            assert_never(event)


_ENCODER = msgspec.json.Encoder()
