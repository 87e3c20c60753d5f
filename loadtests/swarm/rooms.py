"""The auctions of a run, and what all users of this process know about the bids in them.

Each room holds one auction after another. Nobody hands their ids round: every process opens a room's next auction by
itself when it first needs it, with an `Idempotency-Key` that follows from the run, the room and the turn, so that the
engine opens it once and tells everybody the same id.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID, uuid5

from gevent.lock import Semaphore

from loadtests.swarm.stream import Violation

STARTING_PRICE: Final = 100
STEP: Final = 25
"""Of the bids, in cents."""
SOFT_CLOSE: Final = {"window_s": 5, "extension_s": 5, "max_extension_s": 30}
"""A bid in the last seconds is answered, yet an auction does not go on for ever."""
LEAST_S: Final = 3.0
"""So long an auction is open, even if its time is over when the first user comes."""
REMEMBERED: Final = 1_000
"""Bids whose `ack`, and events whose arrival, a room remembers."""

Open = Callable[[UUID, dict[str, Any]], dict[str, Any] | None]
"""Asks the engine to open an auction, by a key and a body; its data, or None if that failed (and was reported)."""


@dataclass(frozen=True)
class Plan:
    """What the auctions of a run are like: the same in all its processes."""

    run: UUID
    began_s: float
    """Since the epoch."""
    rooms: int
    auction_s: float
    is_together: bool
    """All end at the same moment, once; otherwise one after another, and each is followed by a new one."""

    def end_s(self, room: int, turn: int) -> float:
        """When the auction is to end. In the first turn some last longer, so that afterwards they end in turns."""
        now_s = time.time()
        if turn > 0:
            return now_s + self.auction_s
        share = 0.0 if self.is_together else room / self.rooms
        return max(self.began_s + self.auction_s * (1 + share), now_s + LEAST_S)


class Room:
    """A room of the run. Its users share it, and so know which bid an event on the screen is."""

    def __init__(self, number: int, plan: Plan, open_: Open, show: Callable[[float], None]) -> None:
        self.auction: str | None = None
        self.plan = plan
        self._number = number
        self._open = open_
        self._show = show
        self._turn = 0
        self._lock = Semaphore()
        # Of this auction: who was acknowledged as which event, and since when the bid was on its way.
        self._acknowledged: dict[int, tuple[UUID, int]] = {}
        # When an event reached the screens, as long as nobody knows whose bid it is.
        self._arrivals: dict[int, list[int]] = {}

    def enter(self) -> str | None:
        """The room's auction, opened if need be; None if that failed."""
        with self._lock:
            while self.auction is None:
                opened = self._open(uuid5(self.plan.run, f"{self._number}/{self._turn}"), self._terms())
                if opened is None:
                    return None
                # Over, for one who comes late to a run: its other processes are some turns ahead.
                if opened["status"] in ("scheduled", "active") or self.plan.is_together:
                    self.auction = str(opened["auction_id"])
                else:
                    self._turn += 1
        return self.auction

    def leave(self, auction: str) -> None:
        """This auction is over: the next to enter opens another."""
        if auction == self.auction:
            self.auction = None
            self._turn += 1
            self._acknowledged.clear()
            self._arrivals.clear()

    def acknowledged(self, auction: str, seq: int, bid_id: UUID, sent_ns: int) -> list[Violation]:
        """A bid was acknowledged: time it on all screens that have shown it already."""
        if auction != self.auction:
            return []
        earlier = self._acknowledged.get(seq)
        if earlier is not None:
            is_same = earlier[0] == bid_id
            return [] if is_same else [Violation("acknowledged", "Two bids were acknowledged as the same event.")]
        self._acknowledged[seq] = (bid_id, sent_ns)
        _forget(self._acknowledged)
        for arrived_ns in self._arrivals.pop(seq, ()):
            self._show(_ms(sent_ns, arrived_ns))
        return []

    def shown(self, auction: str, after: int, last: int, now_ns: int) -> None:
        """A screen came from the event `after` to the event `last`: time the bids between that are ours."""
        if auction != self.auction:
            return
        # What lies further back was jumped over by a reader that had fallen behind.
        for seq in range(max(after, last - REMEMBERED) + 1, last + 1):
            known = self._acknowledged.get(seq)
            if known is not None:
                self._show(_ms(known[1], now_ns))
            elif seq in self._arrivals:
                self._arrivals[seq].append(now_ns)
            else:
                self._arrivals[seq] = [now_ns]
                _forget(self._arrivals)

    def _terms(self) -> dict[str, Any]:
        end = datetime.fromtimestamp(self.plan.end_s(self._number, self._turn), UTC)
        return {
            "title": f"Load test, room {self._number}",
            "currency": "USD",
            "starting_price": f"{STARTING_PRICE / 100:.2f}",
            "minimum_bid_increment": f"{STEP / 100:.2f}",
            "end_time": end.isoformat(timespec="milliseconds"),
            "soft_close": SOFT_CLOSE,
        }


def _forget(entries: dict[int, Any]) -> None:
    if len(entries) > REMEMBERED:
        del entries[next(iter(entries))]


def _ms(began_ns: int, ended_ns: int) -> float:
    return (ended_ns - began_ns) / 1_000_000
