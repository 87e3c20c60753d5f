"""What a gateway and a shard say to each other on a link: frames of msgpack, ids as 16 bytes.

A link opens with a proof on both sides that they hold the cluster's secret, which itself is never sent: the shard
greets (`Greeting`), the gateway proves and challenges (`Proof`), the shard proves (`Welcome`). From then on the gateway
sends `Batch` frames and the shard `Output` frames, each a list in order.
"""

import hmac
from typing import Final, Literal
from uuid import UUID

import msgspec

from engine.auction import Snapshot, Status
from engine.commands import CancelAuction, EndAuction, OpenAuction, PlaceBid
from engine.events import Outcome
from engine.notices import NoticeKind
from engine.rejections import Rejection

VERSION: Final = 1
"""The version of this link protocol; both ends must speak the same one."""


# Gateway to shard


class GetAuction(msgspec.Struct, frozen=True, tag="get", array_like=True):
    """Ask for an auction as `viewer` may see it."""

    auction: UUID
    viewer: UUID | None


class Watch(msgspec.Struct, frozen=True, tag="watch", array_like=True):
    """Ask for an auction's events from now on, on this link, for what was missed after `since`, and for standings."""

    auction: UUID
    since: int | None
    viewers: list[UUID]


class Recall(msgspec.Struct, frozen=True, tag="recall", array_like=True):
    """Ask what became of a command, without doing it: its verdict, or `internal` if it was never taken."""

    auction: UUID
    command_id: bytes
    caller: UUID


class Unsubscribe(msgspec.Struct, frozen=True, tag="unsubscribe", array_like=True):
    """Stop an auction's events on this link. Has no answer."""

    auction: UUID


class Viewers(msgspec.Struct, frozen=True, tag="viewers", array_like=True):
    """So many sockets of this gateway watch an auction. Has no answer."""

    auction: UUID
    viewers: int


class Follow(msgspec.Struct, frozen=True, tag="follow", array_like=True):
    """Ask for what concerns these users, in all auctions of the shard, from now on and on this link.

    Its answer comes when all that was decided before is in the journal.
    """

    users: list[UUID]


class Unfollow(msgspec.Struct, frozen=True, tag="unfollow", array_like=True):
    """Stop what concerns these users on this link. Has no answer."""

    users: list[UUID]


Payload = OpenAuction | PlaceBid | EndAuction | CancelAuction | GetAuction | Recall | Watch | Unsubscribe | Viewers


class Request(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Something to do or to tell; the answer carries the same `request` number."""

    request: int
    payload: Payload | Follow | Unfollow


class Proof(msgspec.Struct, frozen=True, tag="proof", array_like=True):
    """The gateway holds the secret (`mac` over the shard's nonce), and challenges the shard with its own `nonce`."""

    gateway: str
    nonce: bytes
    mac: bytes


class Batch(msgspec.Struct, frozen=True, tag="batch", array_like=True):
    """What came to the gateway in one turn of its loop, or a part of it, in order."""

    requests: list[Request]


GatewayFrame = Proof | Batch


# Shard to gateway


class You(msgspec.Struct, frozen=True):
    """How the viewer stands in an auction in which it bids."""

    paddle: int
    max_amount: int
    is_leading: bool


class BidAccepted(msgspec.Struct, frozen=True, tag="bid_accepted", array_like=True, gc=False):
    """The bid is in the journal, at `seq`. Amounts in minor units, as they were right after it."""

    seq: int
    hash: bytes
    at: int
    outcome: Literal["leading", "outbid"]
    price: int
    paddle: int
    max_amount: int
    minimum: int
    end_time: int


class AuctionView(msgspec.Struct, frozen=True, tag="view", array_like=True):
    """An auction at `seq`: what everybody sees, how the viewer stands, and what only some may see."""

    seq: int
    snapshot: Snapshot
    you: You | None
    maker: UUID
    reserve_price: int | None
    """For its maker and admins only: the gateway decides."""
    ended_at: int | None
    at: int
    """Of the event `seq`."""


class Watched(msgspec.Struct, frozen=True, tag="watched", array_like=True):
    """An auction at `seq`. On this link its events up to there came before this, and all others follow."""

    auction: UUID
    seq: int
    snapshot: bytes
    """The public snapshot, as a JSON object."""
    first: int
    events: bytes
    """The public events `first` to `seq` as JSON objects, joined by commas; none where `first` is `seq` + 1."""
    you: list[You | None]
    """How each of the viewers stands; None for one that has not bid."""


class Followed(msgspec.Struct, frozen=True, tag="followed", array_like=True):
    """The users are followed."""


Answer = BidAccepted | AuctionView | Watched | Followed | Rejection


class Answered(msgspec.Struct, frozen=True, tag="answered", array_like=True, gc=False):
    """The answer to one request."""

    request: int
    answer: Answer


class Published(msgspec.Struct, frozen=True, tag="published", array_like=True):
    """Events `first` to `last` of a topic, committed: public JSON objects, joined by commas."""

    topic: UUID
    first: int
    last: int
    events: bytes | None
    """None where they were folded, for a gateway that is behind: then there is a snapshot."""
    kept: bytes
    """Those among them that are never dropped."""
    snapshot: bytes | None
    """The public snapshot at `last`; None where more of the same commit follows at once."""


class Presence(msgspec.Struct, frozen=True, tag="presence", array_like=True):
    """So many sockets watch a topic, on all gateways."""

    topic: UUID
    viewers: int


class Noticed(msgspec.Struct, frozen=True, kw_only=True, tag="noticed", array_like=True):
    """An event, committed, that concerns `user`; the rest is the auction, and how the user stands, right after it."""

    user: UUID
    auction: UUID
    kind: NoticeKind
    seq: int
    at: int
    price: int
    minimum: int
    end_time: int
    status: Status
    outcome: Outcome | None
    you: You


Message = Answered | Published | Presence | Noticed
"""What a shard sends on an open link."""


class Greeting(msgspec.Struct, frozen=True, tag="greeting", array_like=True):
    """Who serves here: the process `owner`, and in which epoch."""

    version: int
    shard: int
    epoch: int
    owner: UUID
    nonce: bytes


class Welcome(msgspec.Struct, frozen=True, tag="welcome", array_like=True):
    """The shard holds the secret too (`mac` over the gateway's nonce): the link is open."""

    mac: bytes


class Output(msgspec.Struct, frozen=True, tag="output", array_like=True):
    """Answers, events and notices, in the order in which they were decided."""

    messages: list[Message]


ShardFrame = Greeting | Welcome | Output

_ENCODER = msgspec.msgpack.Encoder(uuid_format="bytes")
encode_into: Final = _ENCODER.encode_into
decode_gateway_frame: Final = msgspec.msgpack.Decoder(GatewayFrame).decode
decode_shard_frame: Final = msgspec.msgpack.Decoder(ShardFrame).decode


MALFORMED: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What the decoders raise for bytes that are no frame."""


def proof(secret: bytes, side: Literal["gateway", "shard"], nonce: bytes, shard: int, epoch: int) -> bytes:
    """What only a holder of the cluster's secret can say to `nonce`, for this shard in this epoch, on this side."""
    return hmac.digest(secret, f"gavel/{VERSION}/{side}/{shard}/{epoch}/".encode() + nonce, "sha256")
