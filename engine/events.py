"""What happened to an auction, in the past tense. Events are for ever: they are stored, hashed and replayed.

A stored event is `kind`, `version` and `body` (JSON bytes). A change of a body's shape is a new version with a reader
of its own here; stored bytes are never rewritten.
"""

from collections.abc import Callable
from typing import Final, Literal
from uuid import UUID

import msgspec

from engine.commands import Terms

Outcome = Literal["sold", "unsold", "reserve_not_met"]
EndedBy = Literal["deadline", "maker", "admin"]
ExtensionReason = Literal["soft_close", "outage"]


class Scheduled(msgspec.Struct, frozen=True):
    """The auction is announced; it opens at `terms.start_time`."""

    auction: UUID
    maker: UUID
    terms: Terms


class Opened(msgspec.Struct, frozen=True):
    """Bids are taken from now on, under these rules."""

    auction: UUID
    maker: UUID
    terms: Terms


class BidPlaced(msgspec.Struct, frozen=True, gc=False):
    """A bid that counts. What follows `max_amount` is the auction after it, and after the extension that it caused."""

    bidder: UUID
    bid_id: UUID
    paddle: int
    amount: int | None
    max_amount: int | None
    price: int
    leader: int
    """The leading paddle: not `paddle` where the leader's maximum answered at once."""
    bids: int
    minimum: int
    end_time: int
    reserve_met: bool | None


class MaximumRaised(msgspec.Struct, frozen=True):
    """The leader changed the most that it will pay. In public only that something happened."""

    bidder: UUID
    bid_id: UUID
    paddle: int
    amount: int | None
    max_amount: int | None
    price: int
    minimum: int
    end_time: int


class ReserveReached(msgspec.Struct, frozen=True):
    """A raised maximum reached the reserve, so the price rose to it."""

    price: int
    minimum: int


class Extended(msgspec.Struct, frozen=True):
    """The end moved; `end_time_max` is how far it may still move (None: not at all by soft close)."""

    end_time: int
    end_time_max: int | None
    reason: ExtensionReason


class Ended(msgspec.Struct, frozen=True):
    """The auction is over. Winner, paddle and price are those of the sale, None where nothing was sold."""

    outcome: Outcome
    winner: UUID | None
    paddle: int | None
    price: int | None
    by: EndedBy
    ended_at: int
    reason_hash: str | None = None
    """Of the reason that was given (`engine.chain.seal`): the text itself can be erased."""


class Cancelled(msgspec.Struct, frozen=True):
    """The auction was called off."""

    by: EndedBy
    ended_at: int
    reason_hash: str | None = None
    """See `Ended`."""


Event = Scheduled | Opened | BidPlaced | MaximumRaised | ReserveReached | Extended | Ended | Cancelled

KINDS: Final[dict[type[Event], str]] = {
    Scheduled: "scheduled",
    Opened: "opened",
    BidPlaced: "bid_placed",
    MaximumRaised: "maximum_raised",
    ReserveReached: "reserve_reached",
    Extended: "extended",
    Ended: "ended",
    Cancelled: "cancelled",
}
VERSION: Final = 1
"""The version in which events are written now."""

_READERS: Final[dict[tuple[str, int], Callable[[bytes], Event]]] = {
    (kind, 1): msgspec.json.Decoder(event_type).decode for event_type, kind in KINDS.items()
}


def encode(event: Event) -> bytes:
    """The bytes to store for an event."""
    return _ENCODER.encode(event)


def decode(kind: str, version: int, body: bytes) -> Event:
    """Read a stored event, whatever version wrote it. Raises `ValueError` for one that this program cannot read."""
    try:
        read = _READERS[kind, version]
    except KeyError:
        raise ValueError(f"no reader for events of kind {kind!r}, version {version}") from None
    return read(body)


_ENCODER = msgspec.json.Encoder()
