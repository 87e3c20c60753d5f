"""What clients saw of an engine: a list of records, in the order in which they were made.

The simulator, the tests with whole engines and `gavel replay --history` write the same records. A file holds one JSON
object a line, `type` first. `at` is the observer's clock in milliseconds, for people; only the records' order counts:
what leaves a client is recorded before it leaves, and what arrives after it has arrived.

A `client` is one who talks to the engine, for as long as it lives; a `connection` is one of its sockets, as it counts
them.
"""

from collections.abc import Iterable
from typing import Any, Literal
from uuid import UUID

import msgspec

Message = dict[str, Any]
"""One JSON object of the live protocol."""


class _Record(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", omit_defaults=True):
    client: str
    at: int


class Connected(_Record, frozen=True, kw_only=True, tag="connected"):
    """The server welcomed a client; `user` is None for a guest."""

    connection: int
    user: UUID | None


class Sent(_Record, frozen=True, kw_only=True, tag="sent", gc=False):
    """A bid leaves a client; again on a retry."""

    connection: int
    auction: UUID
    bid_id: UUID
    bidder: UUID
    amount: int | None = None
    max_amount: int | None = None


class Verdict(_Record, frozen=True, kw_only=True, tag="verdict", gc=False):
    """A bid was answered. An `ack` has what follows `code`, a `rejected` perhaps its `minimum`."""

    connection: int
    auction: UUID
    bid_id: UUID
    kind: Literal["ack", "rejected", "error"]
    code: str | None = None
    seq: int | None = None
    hash: str | None = None
    outcome: str | None = None
    price: int | None = None
    paddle: int | None = None
    max_amount: int | None = None
    minimum: int | None = None
    end_time: int | None = None


class Subscribing(_Record, frozen=True, kw_only=True, tag="subscribing", gc=False):
    """A client asks for an auction's events."""

    connection: int
    auction: UUID
    since: int | None = None


class Subscribed(_Record, frozen=True, kw_only=True, tag="subscribed"):
    """A client gets what it missed, or a snapshot; the events follow. `since` is what it had asked for."""

    connection: int
    auction: UUID
    since: int | None = None
    seq: int
    recovered: bool
    events: list[Message] | None = None
    snapshot: Message | None = None
    you: Message | None = None


class Events(_Record, frozen=True, kw_only=True, tag="events"):
    """A client gets events of an auction."""

    connection: int
    auction: UUID
    events: list[Message]


class State(_Record, frozen=True, kw_only=True, tag="state"):
    """A client that was behind gets an auction as of `seq`, and those of the events up to it that are never dropped."""

    connection: int
    auction: UUID
    seq: int
    snapshot: Message
    events: list[Message]


class Presence(_Record, frozen=True, kw_only=True, tag="presence", gc=False):
    """A client is told how many watch an auction."""

    connection: int
    auction: UUID
    viewers: int


class Standings(_Record, frozen=True, kw_only=True, tag="standings"):
    """A client gets its user's standings; the notices follow."""

    connection: int
    standings: list[Message]


class Notice(_Record, frozen=True, kw_only=True, tag="notice"):
    """A client gets a notice."""

    connection: int
    auction: UUID
    notice: Message


class Asked(_Record, frozen=True, kw_only=True, tag="asked"):
    """Somebody opens, ends or cancels an auction; again, with the same `request_id`, on a retry."""

    op: Literal["open", "end", "cancel"]
    auction: UUID
    caller: UUID
    request_id: UUID


class Answered(_Record, frozen=True, kw_only=True, tag="answered"):
    """What came of it: it was done, or it was not, or (`code` is `outcome_unknown`) nobody knows."""

    op: Literal["open", "end", "cancel"]
    auction: UUID
    caller: UUID
    request_id: UUID
    code: str | None = None
    """None: it was done."""


Record = (
    Connected
    | Sent
    | Verdict
    | Subscribing
    | Subscribed
    | Events
    | State
    | Presence
    | Standings
    | Notice
    | Asked
    | Answered
)

_VERDICT_FIELDS = ("code", "seq", "hash", "outcome", "price", "paddle", "max_amount", "minimum", "end_time")


def verdict(client: str, connection: int, auction: UUID, bid_id: UUID, message: Message, at: int) -> Verdict:
    """The record of an `ack`, a `rejected` or an `error` that came for a bid."""
    found = {name: message.get(name) for name in _VERDICT_FIELDS}
    return Verdict(
        client=client, connection=connection, auction=auction, bid_id=bid_id, kind=message["type"], at=at, **found
    )


def subscribed(client: str, connection: int, auction: UUID, since: int | None, message: Message, at: int) -> Subscribed:
    """The record of a `subscribed`."""
    return Subscribed(
        client=client,
        connection=connection,
        auction=auction,
        since=since,
        seq=message["seq"],
        recovered=message["recovered"],
        events=message.get("events"),
        snapshot=message.get("snapshot"),
        you=message.get("you"),
        at=at,
    )


def state(client: str, connection: int, message: Message, at: int) -> State:
    """The record of a `state`."""
    return State(
        client=client,
        connection=connection,
        auction=UUID(message["topic"].removeprefix("auction:")),
        seq=message["seq"],
        snapshot=message["snapshot"],
        events=message["events"],
        at=at,
    )


def encode(record: Record) -> str:
    """A record as a line, without its end."""
    return _ENCODER.encode(record).decode()


def decode(lines: Iterable[str | bytes]) -> list[Record]:
    """The records of a file's lines."""
    return [_DECODER.decode(line) for line in lines]


_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(Record)
