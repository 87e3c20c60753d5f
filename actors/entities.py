"""One entity awake in a shard: its state, its place in the journal, and what was accepted before.

An entity turns the events that were decided into rows of the journal, and rows of the journal back into itself.
"""

from collections import deque
from typing import Final
from uuid import UUID

import msgspec

from actors.directory import slot_of
from actors.journal import EntityRow, Loaded, Private, Row, SnapshotRow
from actors.messages import AuctionView, BidAccepted, You
from engine import chain
from engine.auction import Auction, due_at, evolve, outage_window_ms, snapshot
from engine.events import KINDS, VERSION, BidPlaced, Event, MaximumRaised, decode, encode
from engine.limits import RESUME_EVENTS_MAX, TOPIC_EVENTS_BYTES_MAX
from engine.public import encode_public

NO_SNAPSHOT: Final = 0
SNAPSHOT_VERSION: Final = 1
"""Raise it when the shape of `Auction` changes: older snapshots are then ignored and the journal is replayed whole."""


class Recorded:
    """An event with its place in the journal. `reason` is the text that was given with it, unless it was erased."""

    __slots__ = ("_public", "at", "event", "hash", "reason", "seq")

    def __init__(self, seq: int, at: int, event: Event, event_hash: bytes, reason: str | None = None) -> None:
        self.seq = seq
        self.at = at
        self.event = event
        self.hash = event_hash
        self.reason = reason
        self._public: bytes | None = None

    @property
    def public(self) -> bytes:
        """The event as everybody may see it, as JSON; encoded once for all who ask."""
        if self._public is None:
            self._public = encode_public(self.seq, self.at, self.event, self.hash, self.reason)
        return self._public


class Entity:
    """An auction that is awake. `state` is None for an id under which nothing happened yet."""

    __slots__ = ("accepted", "hash", "id", "last_at", "recent", "saved_seq", "seq", "slot", "state", "turn", "used_at")

    def __init__(self, entity_id: UUID) -> None:
        self.id = entity_id
        self.slot = slot_of(entity_id)
        self.state: Auction | None = None
        self.seq = 0
        self.hash = chain.GENESIS
        self.last_at = 0
        self.accepted: dict[bytes, int] = {}
        """The `seq` of the first event of each command that was accepted, by the command's id."""
        self.recent: deque[Recorded] = deque(maxlen=RESUME_EVENTS_MAX)
        self.saved_seq = 0
        """The `seq` of the newest snapshot that was taken."""
        self.turn = 0
        """The newest turn that recorded something here."""
        self.used_at = 0

    @classmethod
    def restore(cls, entity_id: UUID, loaded: Loaded) -> "Entity":
        """Wake an entity from what the journal holds. Raises `ValueError` where that cannot be read."""
        entity = cls(entity_id)
        if loaded.snapshot is not None:
            entity.state = decode_state(loaded.snapshot.body)
            entity.seq = entity.saved_seq = loaded.snapshot.seq
            entity.hash = loaded.snapshot.hash
            entity.last_at = loaded.snapshot.last_at
        entity.accepted = dict(loaded.commands)
        for row in loaded.rows:
            event = decode(row.kind, row.version, row.body)
            reason = None if row.private is None else row.private.body.decode()
            entity.recent.append(Recorded(row.seq, row.at, event, row.hash, reason))
            if row.seq > entity.seq:
                assert row.seq == entity.seq + 1, f"the journal of {entity_id} has a gap before {row.seq}"
                entity.state = evolve(entity.state, event)
                entity.seq, entity.hash, entity.last_at = row.seq, row.hash, row.at
        return entity

    def record(self, event: Event, at: int, command_id: bytes | None, private: Private | None) -> tuple[Recorded, Row]:
        """Apply an event that was decided at `at`, and return it with the row to append for it."""
        body = encode(event)
        kind = KINDS[type(event)]
        joined = None
        if isinstance(event, BidPlaced) and self.state is not None and event.bidder not in self.state.bidders:
            joined = event.bidder
        self.seq += 1
        self.last_at = at
        self.hash = chain.link(self.hash, self.id, self.seq, at, kind, VERSION, body)
        self.state = evolve(self.state, event)
        reason = None if private is None else private.body.decode()
        recorded = Recorded(self.seq, at, event, self.hash, reason)
        self.recent.append(recorded)
        if command_id is not None:
            self.accepted[command_id] = self.seq
        return recorded, Row(self.id, self.seq, at, kind, VERSION, body, self.hash, command_id, private, joined)

    def recall(self, seq: int) -> Recorded | None:
        """A recent event by its `seq`; None if it has left the memory."""
        if not self.recent or not self.recent[0].seq <= seq <= self.seq:
            return None
        return self.recent[seq - self.recent[0].seq]

    def missed(self, since: int | None) -> list[Recorded]:
        """The events after `since`, as far as they are in memory; without it the last ones, for others to ask for."""
        if since is None:
            return self._last(TOPIC_EVENTS_BYTES_MAX)
        return [recorded for recorded in self.recent if recorded.seq > since]

    def _last(self, bytes_max: int) -> list[Recorded]:
        """As many of the last events as fit into so many bytes of JSON, with a comma behind each."""
        found: deque[Recorded] = deque()
        for recorded in reversed(self.recent):
            bytes_max -= len(recorded.public) + 1
            if bytes_max < 0:
                break
            found.appendleft(recorded)
        return list(found)

    def snapshot_row(self) -> SnapshotRow:
        """The state as it is now, to be kept once the event `seq` is committed."""
        self.saved_seq = self.seq
        return SnapshotRow(self.id, self.seq, self.hash, self.last_at, SNAPSHOT_VERSION, _ENCODE_STATE(self.state))

    def row(self) -> EntityRow:
        """What the rest of the system finds this entity by; `created_at` counts when it is stored first."""
        assert self.state is not None
        return EntityRow(
            entity_id=self.id,
            slot=self.slot,
            kind="auction",
            owner_id=self.state.maker,
            status=self.state.status,
            due_at=due_at(self.state),
            window_ms=outage_window_ms(self.state),
            created_at=self.recent[0].at,
            ended_at=self.state.ended_at,
        )

    def view(self, viewer: UUID | None) -> AuctionView:
        """The auction as `viewer` asks for it."""
        state = self.state
        assert state is not None
        return AuctionView(
            seq=self.seq,
            snapshot=snapshot(state),
            you=self.you(viewer),
            maker=state.maker,
            reserve_price=state.terms.reserve_price,
            ended_at=state.ended_at,
            at=self.last_at,
        )

    def you(self, viewer: UUID | None) -> You | None:
        """How the viewer stands here; None for one that has not bid."""
        if self.state is None or viewer is None or viewer not in self.state.bidders:
            return None
        bidder = self.state.bidders[viewer]
        return You(bidder.paddle, bidder.max_amount, self.state.leader == viewer)


def bid_accepted(recorded: Recorded) -> BidAccepted:
    """The acknowledgement of the bid that this event records."""
    event = recorded.event
    assert isinstance(event, BidPlaced | MaximumRaised)
    offered = event.amount if event.amount is not None else event.max_amount
    assert offered is not None
    is_leading = isinstance(event, MaximumRaised) or event.leader == event.paddle
    return BidAccepted(
        seq=recorded.seq,
        hash=recorded.hash,
        at=recorded.at,
        outcome="leading" if is_leading else "outbid",
        price=event.price,
        paddle=event.paddle,
        max_amount=offered,
        minimum=event.minimum,
        end_time=event.end_time,
    )


_ENCODE_STATE: Final = msgspec.msgpack.Encoder(uuid_format="bytes").encode
decode_state: Final = msgspec.msgpack.Decoder(Auction).decode
