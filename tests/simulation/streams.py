"""The judge of one auction on one connection: what was shown of it, beside the journal and what the oracle says of it.

A client is shown all events in order, from the `seq` of its subscription on. A `state` may stand for some of them: it
is what they led to, with those that are never dropped.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final
from uuid import UUID

from engine.limits import RESUME_EVENTS_MAX
from tests.simulation.history import Events, Message, Presence, State, Subscribed
from tests.simulation.notices import Wrong

if TYPE_CHECKING:
    from tests.simulation.checker import _Auction

_KEPT: Final = ("extended", "ended", "cancelled")


class Stream:
    """An auction on a connection."""

    def __init__(self, auction: "_Auction") -> None:
        self._auction = auction
        self._is_begun = False
        self.last: int | None = None
        """The last `seq` that was shown; None before the first, and after a wrong one: what follows says nothing."""
        self.viewers: int | None = None
        """How many watch, as was told last."""

    def begin(self, record: Subscribed, users: Mapping[tuple[str, int], UUID | None], floor: int) -> Wrong | None:
        """Judge the answer to a subscription. `floor`: the last `seq` that had been seen when it was asked for."""
        user = (record.client, record.connection)
        if users.get(user, record.client) is None:
            # Guests are answered by their gateway, which may be behind; but nobody goes back behind its own `since`.
            floor = min(floor, record.since or 0)
        sentence = self._begins_wrong(record, floor)
        auction, seq = self._auction, record.seq
        if sentence is None and user in users and auction.is_played and record.you != auction.you(users[user], seq):
            sentence = f"`you` at {seq} should be {auction.you(users[user], seq)}, not {record.you}"
        return self._go_on(seq, seq, sentence)

    def follow(self, record: Events) -> Wrong | None:
        """Judge events."""
        if not self._is_begun:
            return self._go_on(None, None, f"events came before the subscription: {record.events}")
        last = self.last
        if last is None or not record.events:
            return None
        return self._go_on(last + len(record.events), last + 1, _run_wrong(self._auction, record.events, last))

    def leap(self, record: State) -> Wrong | None:
        """Judge a state: many events at once."""
        if not self._is_begun:
            return self._go_on(None, record.seq, f"a state came before the subscription: {record}")
        return None if self.last is None else self._go_on(record.seq, record.seq, self._leaps_wrong(record, self.last))

    def count(self, record: Presence) -> Wrong | None:
        """Judge a number of viewers, as far as it can be judged while it changes."""
        self.viewers = record.viewers
        if self._is_begun and record.viewers >= 0:
            return None
        return Wrong(self._auction.id, None, f"{record.viewers} viewers were told of, subscribed or not")

    def _go_on(self, last: int | None, seq: int | None, sentence: str | None) -> Wrong | None:
        self._is_begun = True
        self.last = last if sentence is None else None
        return None if sentence is None else Wrong(self._auction.id, seq, sentence)

    def _begins_wrong(self, record: Subscribed, floor: int) -> str | None:
        auction, since, seq = self._auction, record.since, record.seq
        if not auction.is_played:
            return None  # There is no telling what would be right.
        if not 1 <= seq <= len(auction.rows):
            return f"subscribed at {seq}, but the journal has {len(auction.rows)} events"
        if seq < floor:
            return f"subscribed at {seq}, though {floor} had been seen before it asked"
        is_near = since is not None and 0 <= seq - since <= RESUME_EVENTS_MAX
        if record.recovered != is_near:
            return f"asked for all since {since}, at {seq}, and `recovered` was {record.recovered}"
        if since is not None and is_near:
            problem = _run_wrong(auction, record.events or [], since)
            if problem is not None or since + len(record.events or []) != seq:
                return problem or f"got {len(record.events or [])} events since {since}, at {seq}"
        elif record.snapshot != auction.snapshot(seq):
            return f"the snapshot at {seq} should be {auction.snapshot(seq)}, not {record.snapshot}"
        return None

    def _leaps_wrong(self, record: State, last: int) -> str | None:
        auction = self._auction
        if not auction.is_played:
            return None  # There is no telling what would be right.
        if not last < record.seq <= len(auction.rows):
            return f"a state at {record.seq} came after {last}, and the journal has {len(auction.rows)} events"
        if record.snapshot != auction.snapshot(record.seq):
            return f"the state at {record.seq} should be {auction.snapshot(record.seq)}, not {record.snapshot}"
        covered = [auction.public(seq) for seq in range(last + 1, record.seq + 1)]
        kept = [event for event in covered if event["kind"] in _KEPT]
        if record.events != kept:
            return f"with the state at {record.seq}, after {last}, should come {kept}, not {record.events}"
        return None


def _run_wrong(auction: "_Auction", events: list[Message], last: int) -> str | None:
    """What is wrong with events that should be the journal's next ones after `last`."""
    for expected, event in enumerate(events, start=last + 1):
        if event.get("seq") != expected:
            return f"event {expected} was next, but {event} came"
        if expected > len(auction.events):
            return f"the journal has no event {expected}, but {event} came"
        if event != auction.public(expected):
            return f"event {expected} should be {auction.public(expected)}, not {event}"
    return None
