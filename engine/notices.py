"""Which events concern one bidder alone, and as what: the kinds of the topic `me`."""

from collections.abc import Iterator
from typing import Literal
from uuid import UUID

from engine.auction import Auction
from engine.events import BidPlaced, Cancelled, Ended, Event, MaximumRaised

NoticeKind = Literal["outbid", "winning", "raised", "won", "lost", "cancelled"]
"""`raised`: the leader changed its own maximum, which it knows; it is for those who keep account of how it stands."""


def notices(state: Auction | None, event: Event) -> Iterator[tuple[UUID, NoticeKind]]:
    """Whom an event concerns, and as what; `state` is the auction before it."""
    if state is None:
        return
    match event:
        case BidPlaced() if event.leader != event.paddle:
            yield event.bidder, "outbid"
        case BidPlaced():
            if state.leader is not None:
                yield state.leader, "outbid"
            yield event.bidder, "winning"
        case MaximumRaised():
            yield event.bidder, "raised"
        case Ended():
            for bidder in state.bidders:
                yield bidder, "won" if bidder == event.winner else "lost"
        case Cancelled():
            for bidder in state.bidders:
                yield bidder, "cancelled"
        case _:
            return
