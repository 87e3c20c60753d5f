"""The judge of one auction's journal: order, times, chain, and every decision taken again from the events alone."""

from collections import deque
from typing import Protocol
from uuid import UUID

from msgspec import structs

from engine import chain
from engine.auction import Auction, decide, due_at, evolve
from engine.commands import CancelAuction, Command, EndAuction, ExecuteDue, OpenAuction, PlaceBid, Role
from engine.events import (
    BidPlaced,
    Cancelled,
    Ended,
    EndedBy,
    Event,
    Extended,
    MaximumRaised,
    Opened,
    Scheduled,
    decode,
)
from engine.rejections import Rejection

_NOBODY = UUID(int=0)


class Private(Protocol):
    """What a person wrote, beside its event."""

    @property
    def salt(self) -> bytes: ...
    @property
    def body(self) -> bytes: ...


class StoredEvent(Protocol):
    """One row of the journal."""

    @property
    def entity_id(self) -> UUID: ...
    @property
    def seq(self) -> int: ...
    @property
    def at(self) -> int: ...
    @property
    def kind(self) -> str: ...
    @property
    def version(self) -> int: ...
    @property
    def body(self) -> bytes: ...
    @property
    def hash(self) -> bytes: ...
    @property
    def command_id(self) -> bytes | None: ...
    @property
    def private(self) -> Private | None: ...


class Audit:
    """Follows one auction through its events, in the journal's order, and names the first thing that is not right."""

    def __init__(self) -> None:
        self.state: Auction | None = None
        self.seq = 0
        self.hash = chain.GENESIS
        self.last_at = 0
        self._commands: set[bytes] = set()
        self._following: deque[Event] = deque()
        """What the last decision brought about and must come next."""

    def follow(self, row: StoredEvent) -> str | None:
        """Take the next event; a sentence if something is not right with it, and then the audit is over."""
        if row.seq != self.seq + 1:
            return f"event {self.seq + 1} is missing: {row.seq} comes after {self.seq}"
        if row.at < self.last_at:
            return f"event {row.seq} lies before event {self.seq} in time"
        expected = chain.link(self.hash, row.entity_id, row.seq, row.at, row.kind, row.version, row.body)
        if row.hash != expected:
            return f"the hash of event {row.seq} is {row.hash.hex()}, but should be {expected.hex()}"
        try:
            event = decode(row.kind, row.version, row.body)
        except ValueError as error:
            return f"event {row.seq} cannot be read: {error}"
        if isinstance(event, Scheduled | Opened) and event.auction != row.entity_id:
            return f"event {row.seq} ({row.kind}) is that of another auction, {event.auction}"
        problem = self._decided_again(row, event) or self._command_counted(row, event) or _sealed(row, event)
        if problem is not None:
            return f"event {row.seq} ({row.kind}): {problem}"
        self.state = evolve(self.state, event)
        self.seq, self.hash, self.last_at = row.seq, row.hash, row.at
        return None

    def finish(self) -> str | None:
        """Close the audit; a sentence if the journal breaks off in the middle of a decision."""
        if self._following:
            return f"event {self.seq + 1} is missing: the last decision also brought about {self._following[0]}"
        return None

    def _decided_again(self, row: StoredEvent, event: Event) -> str | None:
        if not self._following:
            command = self._command_of(event)
            if command is None:
                return self._outage_problem(event)
            due = None if self.state is None else due_at(self.state)
            if due is not None and due <= row.at and not isinstance(command, ExecuteDue):
                return f"it came at {row.at}, though something was due at {due}"
            decided = decide(self.state, command, row.at)
            if isinstance(decided, Rejection):
                return f"the rules refuse it: {decided.code}"
            self._following.extend(decided)
        expected = self._following.popleft() if self._following else None
        if isinstance(expected, Ended | Cancelled) and isinstance(event, Ended | Cancelled) and event.reason_hash:
            # Which reason was given is not for the rules, and it may have been erased.
            expected = structs.replace(expected, reason_hash=event.reason_hash)
        return None if event == expected else f"the rules say {expected} instead of {event}"

    def _outage_problem(self, event: Event) -> str | None:
        """Time that an outage took is given back: the one thing that happens to an auction without a command."""
        state = self.state
        if not isinstance(event, Extended) or event.reason != "outage" or state is None or state.status != "active":
            return "nothing brought it about"
        gained = event.end_time - state.end_time
        cap_moved = (event.end_time_max or 0) - (state.end_time_max or 0)
        if gained < 0 or cap_moved not in (0, gained):
            return "an outage gives time, and moves the cap along"
        return None

    def _command_of(self, event: Event) -> Command | None:
        """The command that an event answers, taken from the event itself; None for one that follows another event."""
        auction = _NOBODY if self.state is None else self.state.auction
        match event:
            case BidPlaced() | MaximumRaised():
                return PlaceBid(
                    auction=auction,
                    bidder=event.bidder,
                    bid_id=event.bid_id,
                    amount=event.amount,
                    max_amount=event.max_amount,
                )
            case Scheduled() | Opened() if self.state is None:
                return OpenAuction(auction=event.auction, maker=event.maker, request_id=_NOBODY, terms=event.terms)
            case Opened():
                return ExecuteDue(auction)
            case Ended(by="deadline"):
                return ExecuteDue(auction)
            case Ended():
                caller, role = self._caller(event.by)
                return EndAuction(
                    auction=auction, caller=caller, role=role, request_id=_NOBODY, reason=_some_reason(event)
                )
            case Cancelled():
                caller, role = self._caller(event.by)
                return CancelAuction(
                    auction=auction, caller=caller, role=role, request_id=_NOBODY, reason=_some_reason(event)
                )
        return None

    def _caller(self, by: EndedBy) -> tuple[UUID, Role]:
        maker = _NOBODY if self.state is None else self.state.maker
        return (maker, "maker") if by == "maker" else (_NOBODY, "admin")

    def _command_counted(self, row: StoredEvent, event: Event) -> str | None:
        """No command counts twice, and a bid is filed under its bidder and its id."""
        if isinstance(event, BidPlaced | MaximumRaised) and row.command_id != event.bidder.bytes + event.bid_id.bytes:
            return "it is not filed under its bidder's bid_id, so that a retry would count again"
        if row.command_id is not None:
            if row.command_id in self._commands:
                return "its command was counted before"
            self._commands.add(row.command_id)
        return None


def _some_reason(event: Ended | Cancelled) -> str | None:
    return None if event.reason_hash is None else "given"


def _sealed(row: StoredEvent, event: Event) -> str | None:
    """The text beside an event is the one that was hashed into it."""
    if row.private is None:
        return None
    sealed = event.reason_hash if isinstance(event, Ended | Cancelled) else None
    if sealed != chain.seal(row.private.salt, row.private.body.decode()):
        return "the text beside it is not the one that was written"
    return None
