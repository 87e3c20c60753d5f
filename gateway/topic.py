"""What a gateway remembers of one topic: its state, its last events, and those that are never dropped.

From this, sockets that come back are told what they missed, and sockets that are behind what it came to.
"""

from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple
from uuid import UUID

import msgspec

from actors.messages import Published, Watched
from engine.events import KINDS
from engine.limits import (
    RESUME_EVENTS_MAX,
    TOPIC_EVENTS_BYTES_MAX,
    TOPIC_KEPT_BYTES_MAX,
    TOPICS_EVENTS_BYTES_MAX,
)
from engine.public import KEPT
from gateway.wire import encode_events, encode_state


class Run(NamedTuple):
    """Consecutive events: JSON objects joined by commas; none where `first` is `last` + 1."""

    first: int
    last: int
    encoded: bytes

    def after(self, seq: int) -> bytes:
        """The events after `seq`."""
        if seq < self.first:
            return self.encoded
        if seq >= self.last:
            return b""
        return b",".join(_decode_list(b"[" + self.encoded + b"]")[seq + 1 - self.first :])


class Memories:
    """What all topics of a gateway remember of their events, in all so much."""

    def __init__(self) -> None:
        self._bytes = 0
        self._bytes_by_memory: dict[Memory, int] = {}
        """Those without news for longest come first."""

    def grow(self, memory: "Memory", size: int) -> None:
        """A topic remembers so many bytes now; others may have to forget theirs for it."""
        self.discard(memory)
        self._bytes += size
        self._bytes_by_memory[memory] = size
        while self._bytes > TOPICS_EVENTS_BYTES_MAX:
            next(iter(self._bytes_by_memory)).forget()

    def discard(self, memory: "Memory") -> None:
        """A topic remembers nothing."""
        self._bytes -= self._bytes_by_memory.pop(memory, 0)


class Memory:
    """One topic's state at `seq`, and as much of what led there as fits into the bounds."""

    __slots__ = (
        "_kept",
        "_kept_bytes",
        "_kept_since",
        "_memories",
        "_recalled",
        "_ring",
        "_ring_bytes",
        "_snapshot",
        "_snapshot_seq",
        "_topic",
        "seq",
    )

    def __init__(self, topic: UUID, watched: Watched, memories: Memories) -> None:
        self._topic = topic
        self._memories = memories
        self.seq = watched.seq
        self._snapshot = watched.snapshot
        self._snapshot_seq = watched.seq
        """For a moment, in the midst of a commit, it is an older one."""
        self._ring: deque[Run] = deque()
        self._ring_bytes = 0
        self._recalled: tuple[int, int, bytes] = (watched.seq, watched.seq, b"")
        """What was asked for last: the events from after the first number up to the second."""
        self._kept: deque[Run] = deque()
        """In each run those of its events that are never dropped."""
        self._kept_bytes = 0
        self._kept_since = watched.seq
        """All that was kept after this `seq` is still there."""
        if watched.events:
            self._remember(Run(watched.first, watched.seq, watched.events))

    def add(self, published: Published) -> None:
        """Take what comes next."""
        first, last = published.first, published.last
        assert first == self.seq + 1
        self.seq = last
        self._recalled = last, last, b""
        if published.snapshot is not None:
            self._snapshot, self._snapshot_seq = published.snapshot, last
        if published.events is None:
            self.forget()
        else:
            self._remember(Run(first, last, published.events))
        self._keep(Run(first, last, published.kept))

    def catch_up(self, watched: Watched) -> bool:
        """Take what was missed up to `watched`; False if some of it is not there."""
        if not watched.first - 1 <= self.seq <= watched.seq:
            return False
        self._snapshot, self._snapshot_seq = watched.snapshot, watched.seq
        run = Run(watched.first, watched.seq, watched.events)
        if watched.seq > self.seq:
            missed = run.after(self.seq)
            self._remember(Run(self.seq + 1, watched.seq, missed))
            self._keep(Run(self.seq + 1, watched.seq, _kept_of(missed)))
            self.seq = watched.seq
            self._recalled = self.seq, self.seq, b""
        if len(run.encoded) <= TOPIC_EVENTS_BYTES_MAX and run.first < (
            self._ring[0].first if self._ring else run.last + 1
        ):
            # More than was remembered: whoever comes next may want as much.
            self.forget()
            self._remember(run)
        return True

    def events_after(self, since: int) -> bytes | None:
        """All events after `since`, or None where they are not all remembered, are too many, or `since` lies ahead."""
        if since == self.seq:
            return b""
        if not self._ring or not self._ring[0].first <= since + 1 <= self.seq or self.seq - since > RESUME_EVENTS_MAX:
            return None
        if self._recalled[:2] != (since, self.seq):
            events = b",".join([run.after(since) for run in self._ring if run.last > since])
            self._recalled = since, self.seq, events
        return self._recalled[2]

    def snapshot(self) -> bytes | None:
        """The public snapshot at `seq`; None in the midst of a commit."""
        return self._snapshot if self._snapshot_seq == self.seq else None

    def frame_after(self, sent: int) -> bytes | None:
        """What came after `sent`, which was the end of a run, as one frame; None where that cannot be told.

        One run leaves as it is, if it is remembered; several as the state that they led to, where that is shorter.
        """
        events = self.events_after(sent)
        if events is not None and self._ring and self._ring[-1].first == sent + 1:
            return encode_events(self._topic, events)
        snapshot = self.snapshot()
        if snapshot is not None and self._kept_since <= sent:
            kept = b",".join([run.encoded for run in self._kept if run.last > sent])
            if events is None or len(snapshot) + len(kept) < len(events):
                return encode_state(self._topic, self.seq, snapshot, kept)
        return None if events is None else encode_events(self._topic, events)

    def forget(self) -> None:
        """Remember no events but those that are never dropped."""
        self._ring.clear()
        self._ring_bytes = 0
        self._recalled = self.seq, self.seq, b""
        self._memories.discard(self)

    def _remember(self, run: Run) -> None:
        self._ring.append(run)
        self._ring_bytes += len(run.encoded)
        while self._ring_bytes > TOPIC_EVENTS_BYTES_MAX:
            self._ring_bytes -= len(self._ring.popleft().encoded)
        self._memories.grow(self, self._ring_bytes)

    def _keep(self, run: Run) -> None:
        if not run.encoded:
            return
        self._kept.append(run)
        self._kept_bytes += len(run.encoded)
        while self._kept_bytes > TOPIC_KEPT_BYTES_MAX:
            oldest = self._kept.popleft()
            self._kept_bytes -= len(oldest.encoded)
            self._kept_since = oldest.last


class _Kind(msgspec.Struct, frozen=True):
    kind: str


def _kept_of(encoded: bytes) -> bytes:
    """Those of some events that are never dropped."""
    return b",".join([event for event in _decode_list(b"[" + encoded + b"]") if _decode_kind(event).kind in _KEPT])


_KEPT: Final = frozenset(KINDS[event_type] for event_type in KEPT)
_decode_list: Final[Callable[[bytes], list[msgspec.Raw]]] = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_kind: Final[Callable[[msgspec.Raw], _Kind]] = msgspec.json.Decoder(_Kind).decode
