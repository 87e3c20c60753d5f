"""What one socket is told about one auction, and whether it may be so. Sans-I/O.

An auction's events are one sequence without gaps, each bid that was acknowledged stands in it once, and a price never
falls. Only `state` and a snapshot may jump ahead: they cover all up to their `seq`.
"""

from typing import Any, Final, NamedTuple

import msgspec
from msgspec import Struct

RECENT_MAX: Final = 1_000
"""So many bids a stream remembers: an `ack` may come after its events."""


class Event(Struct, gc=False):
    """What we read of an event."""

    seq: int
    kind: str
    paddle: int | None = None
    price: int | None = None
    minimum: int | None = None
    leader: int | None = None
    end_time: int | None = None


class Snapshot(Struct, gc=False):
    """What we read of an auction's snapshot."""

    status: str
    price: int
    minimum: int
    leader: int | None
    end_time: int


class Message(Struct):
    """What we read of a server's message, whichever it is; what we do not name is skipped."""

    type: str
    ref: int | None = None
    topic: str = ""
    seq: int = 0
    recovered: bool = False
    events: list[Event] = []
    snapshot: Snapshot | None = None
    code: str = ""
    message: str = ""
    is_transient: bool = False
    retry_after_ms: int = 0
    paddle: int = 0
    max_amount: int = 0
    t0: int = 0
    t1: int = 0


decode: Final = msgspec.json.Decoder(Message).decode


class Violation(NamedTuple):
    """A promise that was broken: `order`, `price` or `acknowledged`, and a sentence."""

    check: str
    sentence: str


class Stream:
    """An auction as one socket has been told of it, from its first `subscribed` on, over reconnections."""

    def __init__(self, auction: str) -> None:
        self.auction = auction
        self.seq: int | None = None
        """The last one that was told of; None before the first `subscribed`."""
        self.status = "scheduled"
        self.price = 0
        self.minimum = 0
        self.leader: int | None = None
        self.end_time = 0
        self._covered = 0
        # The paddles of bids by their seq; None for `private`, which says no paddle.
        self._recent: dict[int, int | None] = {}
        # Acknowledged and not told of yet: the paddle and when the `ack` came, by seq.
        self._awaited: dict[int, tuple[int, int]] = {}

    @property
    def is_over(self) -> bool:
        return self.status in ("ended", "cancelled")

    def take(self, message: Message) -> list[Violation]:
        """Follow a `subscribed`, `events` or `state` of this auction."""
        found: list[Violation] = []
        if message.type == "events":
            self._follow(message.events, found)
        elif message.type == "subscribed" and message.recovered:
            self._follow(message.events, found)
            if self.seq != message.seq:
                found.append(Violation("order", "A resumed stream does not reach the seq that it names."))
        elif message.snapshot is not None:
            if message.type == "state":
                self._check_covered(message, found)
            self._jump(message.seq, message.snapshot, found)
        return found

    def acknowledged(self, seq: int, paddle: int, now_ns: int) -> list[Violation]:
        """A bid of this socket's user was acknowledged as the event `seq`."""
        if self.seq is None or seq > self.seq:
            self._awaited[seq] = (paddle, now_ns)
            return []
        return self._compare(seq, paddle)

    def missing(self, before_ns: int) -> list[Violation]:
        """Bids acknowledged before that moment of which the stream has not told; each is named once."""
        late = [seq for seq, (_, at_ns) in self._awaited.items() if at_ns < before_ns]
        for seq in late:
            del self._awaited[seq]
        return [Violation("acknowledged", "An acknowledged bid is not in the stream.") for _ in late]

    # The details

    def _follow(self, events: list[Event], found: list[Violation]) -> None:
        for event in events:
            if self.seq is None or event.seq <= self.seq:
                found.append(Violation("order", "An event came again, or after a later one."))
                continue
            if event.seq != self.seq + 1:
                found.append(Violation("order", "Events are missing."))
            self.seq = event.seq
            self._evolve(event, found)

    def _evolve(self, event: Event, found: list[Violation]) -> None:
        kind = event.kind
        if event.price is not None:
            self._raise_price(event.price, found)
        if event.minimum is not None:
            self.minimum = event.minimum
        if event.end_time is not None:
            self.end_time = event.end_time
        if kind == "bid_placed":
            self.leader = event.leader
        if kind in ("bid_placed", "private"):
            self._recent[event.seq] = event.paddle
            if len(self._recent) > RECENT_MAX:
                del self._recent[next(iter(self._recent))]
        elif kind == "opened":
            self.status = "active"
        elif kind in ("ended", "cancelled"):
            self.status = kind
        awaited = self._awaited.pop(event.seq, None)
        if awaited is not None:
            found += self._compare(event.seq, awaited[0])

    def _check_covered(self, message: Message, found: list[Violation]) -> None:
        """The events that stand in a `state` lie between the last seq and its own, in order."""
        last = self.seq or 0
        for event in message.events:
            if not last < event.seq <= message.seq:
                found.append(Violation("order", "A state names an event that it does not cover."))
            last = event.seq

    def _jump(self, seq: int, snapshot: Snapshot, found: list[Violation]) -> None:
        if self.seq is not None and seq < self.seq:
            found.append(Violation("order", "A snapshot is older than the stream before it."))
        self.seq = self._covered = max(seq, self.seq or 0)
        self._raise_price(snapshot.price, found)
        self.status, self.minimum = snapshot.status, snapshot.minimum
        self.leader, self.end_time = snapshot.leader, snapshot.end_time
        for awaited in [one for one in self._awaited if one <= seq]:
            del self._awaited[awaited]

    def _raise_price(self, price: int, found: list[Violation]) -> None:
        if price < self.price:
            found.append(Violation("price", "A price fell."))
        self.price = max(price, self.price)

    def _compare(self, seq: int, paddle: int) -> list[Violation]:
        """Whether the event `seq`, of which the stream has told, is a bid of this paddle."""
        told: Any = self._recent.get(seq, False)
        if told is False:
            # Covered by a snapshot, or too long ago to say; every other event of the stream would be remembered.
            is_unknown = seq <= self._covered or (bool(self._recent) and seq < next(iter(self._recent)))
            return [] if is_unknown else [Violation("acknowledged", "An acknowledged bid's seq is another event's.")]
        if told is not None and told != paddle:
            return [Violation("acknowledged", "An acknowledged bid's seq is another bidder's.")]
        return []
