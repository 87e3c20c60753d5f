"""Topic to sockets: who watches what here, and one encoding of each topic's events for all of them.

A topic's events come on its shard's link, in order, from the moment of the first subscription. A socket gets them from
the `seq` of its own `subscribed` on. When a link was broken, each of its topics is asked for anew from the last `seq`
that came, so that no socket has a gap.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol
from uuid import UUID

from actors.messages import Answer, Payload, Published, Subscribe, Subscribed, Unsubscribe
from engine.limits import TOPIC_QUEUE_BYTES_MAX
from engine.rejections import Rejection
from gateway.wire import encode_events

logger = logging.getLogger(__name__)

SLICE_SOCKETS: Final = 100
"""A broadcast is written to so many sockets in one go, so that acknowledgements pass between its slices."""


class Sink(Protocol):
    """A socket, as the fan-out sees it."""

    def send(self, frame: bytes) -> None:
        """Write a text frame; never blocks, never raises."""

    def fall_behind(self) -> None:
        """Close as too slow: the client comes back and asks for what it missed."""


class Shards(Protocol):
    """The way to the shards; see `Router`."""

    def submit(self, payload: Payload, on_answer: Callable[[Answer], None]) -> None:
        """Send a request on its way."""

    def shard_of(self, entity_id: UUID) -> int:
        """The shard that serves this entity."""


class _Events(NamedTuple):
    """Consecutive events that came together: JSON objects joined by commas."""

    first: int
    last: int
    encoded: bytes


class _Topic:
    """What is known of one topic at this gateway."""

    __slots__ = ("asked", "is_casting", "is_incomplete", "last_seq", "queue", "queue_bytes", "sinks", "waiting")

    def __init__(self) -> None:
        self.waiting: dict[Sink, list[object]] = {}
        """Sockets with subscriptions that are not answered yet, each by a token of its own."""
        self.sinks: dict[Sink, int] = {}
        """Each socket that watches, with the last `seq` that it has been sent."""
        self.last_seq: int | None = None
        """The last `seq` that came; None before the first answer."""
        self.is_incomplete = False
        """Events were missed and asked for; until they come none is passed on."""
        self.queue: list[_Events] = []
        """What is still to be written to the sockets, up to `last_seq`."""
        self.queue_bytes = 0
        self.is_casting = False
        self.asked = 0
        """Counts the times that this topic was asked for anew; only the answer to the newest counts."""


class Fanout:
    """The subscriptions of one gateway."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._topics: dict[UUID, _Topic] = {}
        self._topics_by_sink: dict[Sink, set[UUID]] = {}

    def subscribe(
        self,
        topic_id: UUID,
        viewer: UUID | None,
        since: int | None,
        sink: Sink,
        on_subscribed: Callable[[Subscribed | Rejection], None],
    ) -> None:
        """Let a socket watch. `on_subscribed` is called before the first event is sent to it."""
        topic = self._topics.setdefault(topic_id, _Topic())
        token = object()
        topic.waiting.setdefault(sink, []).append(token)
        self._topics_by_sink.setdefault(sink, set()).add(topic_id)

        def answered(answer: Answer) -> None:
            assert isinstance(answer, Subscribed | Rejection)
            tokens = topic.waiting.get(sink, [])
            is_wanted = token in tokens
            if is_wanted:
                tokens.remove(token)
                if not tokens:
                    del topic.waiting[sink]
            if isinstance(answer, Subscribed) and topic.last_seq is None:
                topic.last_seq = answer.seq
            on_subscribed(answer)
            if is_wanted and isinstance(answer, Subscribed):
                topic.sinks[sink] = answer.seq
            elif self._topics.get(topic_id) is topic and sink not in topic.sinks and sink not in topic.waiting:
                self._leave(topic_id, topic, sink)
            if isinstance(answer, Subscribed) and topic_id not in self._topics:
                # Everybody had left before this was answered.
                self._shards.submit(Unsubscribe(topic_id), _ignore)

        self._shards.submit(Subscribe(topic_id, viewer, since), answered)

    def unsubscribe(self, topic_id: UUID, sink: Sink) -> None:
        """Let a socket watch no longer; the last one to leave ends the topic's events on the link."""
        topic = self._topics.get(topic_id)
        if topic is not None:
            self._leave(topic_id, topic, sink)

    def drop(self, sink: Sink) -> None:
        """A socket is gone."""
        for topic_id in self._topics_by_sink.get(sink, set()).copy():
            self.unsubscribe(topic_id, sink)

    def published(self, published: Published) -> None:
        """Events came on a link."""
        topic = self._topics.get(published.topic)
        if topic is None or topic.last_seq is None or topic.is_incomplete or published.last <= topic.last_seq:
            return
        if published.first != topic.last_seq + 1:
            logger.error("events %d to %d are missing", topic.last_seq + 1, published.first - 1)
            self._ask_anew(published.topic, topic)
            return
        topic.last_seq = published.last
        self._cast(published.topic, topic, _Events(published.first, published.last, published.events))

    def resubscribe(self, shard: int) -> None:
        """A link has opened again: ask for what was missed of each topic that it serves."""
        for topic_id, topic in self._topics.items():
            if topic.last_seq is not None and self._shards.shard_of(topic_id) == shard:
                self._ask_anew(topic_id, topic)

    def _ask_anew(self, topic_id: UUID, topic: _Topic) -> None:
        """Ask for all that came after the last event that did."""
        topic.asked += 1
        topic.is_incomplete = True
        asked = topic.asked
        since = topic.last_seq
        assert since is not None

        def answered(answer: Answer) -> None:
            if topic.asked != asked or self._topics.get(topic_id) is not topic:
                return
            topic.is_incomplete = False
            if isinstance(answer, Subscribed) and answer.events is not None:
                topic.last_seq = answer.seq
                if answer.events:
                    self._cast(topic_id, topic, _Events(since + 1, answer.seq, answer.events))
            else:
                # More was missed than the shard can tell, or it cannot tell now: each client asks for its own part.
                topic.last_seq = None
                self._give_up(topic)

        self._shards.submit(Subscribe(topic_id, None, since), answered)

    def _leave(self, topic_id: UUID, topic: _Topic, sink: Sink) -> None:
        topic.waiting.pop(sink, None)
        topic.sinks.pop(sink, None)
        topics = self._topics_by_sink.get(sink)
        if topics is not None:
            topics.discard(topic_id)
            if not topics:
                del self._topics_by_sink[sink]
        if not topic.waiting and not topic.sinks and self._topics.get(topic_id) is topic:
            del self._topics[topic_id]
            self._shards.submit(Unsubscribe(topic_id), _ignore)

    def _give_up(self, topic: _Topic) -> None:
        for sink in list(topic.sinks):
            sink.fall_behind()

    def _cast(self, topic_id: UUID, topic: _Topic, events: _Events) -> None:
        """Write events to all of a topic's sockets, after those before them."""
        topic.queue.append(events)
        topic.queue_bytes += len(events.encoded)
        if not topic.is_casting:
            topic.is_casting = True
            self._cast_next(topic_id, topic)
        elif topic.queue_bytes > TOPIC_QUEUE_BYTES_MAX:
            topic.queue, topic.queue_bytes = [], 0
            self._give_up(topic)

    def _cast_next(self, topic_id: UUID, topic: _Topic) -> None:
        """Write what has gathered as one frame; more gathers meanwhile."""
        parts, topic.queue, topic.queue_bytes = topic.queue, [], 0
        if parts:
            self._cast_slice(_Cast(topic_id, topic, parts, _frame(topic_id, parts), list(topic.sinks)), 0)
        else:
            topic.is_casting = False

    def _cast_slice(self, cast: "_Cast", start: int) -> None:
        first, last = cast.parts[0].first, cast.parts[-1].last
        sent_by_sink = cast.topic.sinks
        end = start + SLICE_SOCKETS
        for sink in cast.sinks[start:end]:
            sent = sent_by_sink.get(sink, last)
            if sent < last:
                sent_by_sink[sink] = last
                if sent == first - 1:
                    sink.send(cast.frame)
                else:
                    _send_rest(cast, sink, sent)
        loop = asyncio.get_running_loop()
        if end < len(cast.sinks):
            loop.call_soon(self._cast_slice, cast, end)
        else:
            loop.call_soon(self._cast_next, cast.topic_id, cast.topic)


class _Cast(NamedTuple):
    """One frame on its way to a topic's sockets."""

    topic_id: UUID
    topic: _Topic
    parts: list[_Events]
    frame: bytes
    sinks: list[Sink]


def _frame(topic_id: UUID, parts: list[_Events]) -> bytes:
    return encode_events(topic_id, b",".join([part.encoded for part in parts]))


def _send_rest(cast: _Cast, sink: Sink, sent: int) -> None:
    """Send what comes after `sent` to a socket that subscribed while these events were waiting."""
    rest = [part for part in cast.parts if part.first > sent]
    if rest and rest[0].first == sent + 1:
        sink.send(_frame(cast.topic_id, rest))
    else:
        sink.fall_behind()


def _ignore(_answer: Answer) -> None:
    """The answer to a request that has none."""
