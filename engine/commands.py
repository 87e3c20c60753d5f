"""What can be asked of an auction, in the imperative. Frozen, and small on the wire between processes.

Each command names who asks (`caller`, `bidder`, `maker`) and an id that the asker chose: asked again with the same id,
it gets its first answer.
"""

from typing import Final, Literal, assert_never
from uuid import UUID

import msgspec

from engine.increments import Increments

Role = Literal["viewer", "maker", "moderator", "admin"]


class SoftClose(msgspec.Struct, frozen=True, kw_only=True):
    """A bid in the last `window_ms` moves the end by `extension_ms`, in all by at most `max_extension_ms`.

    `reset` counts the extension from the bid, `append` from the end.
    """

    window_ms: int
    extension_ms: int
    max_extension_ms: int
    anchor: Literal["reset", "append"] = "reset"


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """The rules of one auction, fixed when it is opened. Amounts in minor units, times in milliseconds (UTC)."""

    title: str
    currency: str
    starting_price: int
    increments: Increments
    start_time: int | None
    """None: at once. Once an auction is open or scheduled it is never None."""
    end_time: int
    reserve_price: int | None = None
    soft_close: SoftClose | None = None
    story: UUID | None = None


class OpenAuction(msgspec.Struct, frozen=True, kw_only=True, tag="open", array_like=True):
    """Open an auction, or schedule it where its start lies ahead."""

    auction: UUID
    maker: UUID
    request_id: UUID
    terms: Terms


class PlaceBid(msgspec.Struct, frozen=True, kw_only=True, tag="bid", array_like=True, gc=False):
    """Bid exactly `amount`, or for the bidder up to `max_amount`: one of the two is given, in minor units."""

    auction: UUID
    bidder: UUID
    bid_id: UUID
    amount: int | None = None
    max_amount: int | None = None
    currency: str | None = None
    """The currency that the bidder had in mind, where it said so."""


class EndAuction(msgspec.Struct, frozen=True, kw_only=True, tag="end", array_like=True):
    """End an auction before its time, with the result that it has now."""

    auction: UUID
    caller: UUID
    role: Role
    request_id: UUID
    reason: str | None = None
    salt: bytes = b""
    """Random bytes for the reason's hash (see `engine.chain.seal`); given along, since the rules know no chance."""


class CancelAuction(msgspec.Struct, frozen=True, kw_only=True, tag="cancel", array_like=True):
    """Call an auction off: nobody wins."""

    auction: UUID
    caller: UUID
    role: Role
    request_id: UUID
    reason: str | None = None
    salt: bytes = b""
    """See `EndAuction`."""


class ExecuteDue(msgspec.Struct, frozen=True, tag="due", array_like=True):
    """Do what the auction's clock asks for: open what was scheduled, end what has run out."""

    auction: UUID


class PayBack(msgspec.Struct, frozen=True, tag="pay_back", array_like=True):
    """Give back the time that an outage took: from `down` until now no bid could be placed."""

    auction: UUID
    down: int


Command = OpenAuction | PlaceBid | EndAuction | CancelAuction | ExecuteDue | PayBack


BID_COMMAND_ID_BYTES: Final = 32
"""No other command's id has this length."""


def command_id(command: OpenAuction | PlaceBid | EndAuction | CancelAuction) -> bytes:
    """By what a command is known: who asked, and the id that it chose. A bid's is never another command's."""
    match command:
        case PlaceBid():
            return command.bidder.bytes + command.bid_id.bytes
        case OpenAuction():
            return b"open" + command.maker.bytes + command.request_id.bytes
        case EndAuction():
            return b"end" + command.caller.bytes + command.request_id.bytes
        case CancelAuction():
            return b"cancel" + command.caller.bytes + command.request_id.bytes
        case _:
            assert_never(command)
