"""Topic to sockets: who watches what here, and one encoding of each topic's events for all of them.

A topic's events come on its shard's link, in order, from the moment of the first subscription. A socket gets them from
the `seq` of its own `subscribed` on. When a link was broken, each of its topics is asked for anew from the last `seq`
that came, so that no socket has a gap.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol
from uuid import UUID

from actors.messages import Answer, Payload, Published, Subscribe, Subscribed, Unsubscribe
from engine.rejections import Rejection
from gateway.wire import encode_events

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


class _Topic:
    """What is known of one topic at this gateway."""

    __slots__ = ("asked", "frames", "is_casting", "last_seq", "sinks", "waiting")

    def __init__(self) -> None:
        self.waiting: dict[Sink, list[object]] = {}
        """Sockets with subscriptions that are not answered yet, each by a token of its own."""
        self.sinks: dict[Sink, int] = {}
        """Each socket that watches, with the last `seq` that it has been sent."""
        self.last_seq: int | None = None
        """The last `seq` that came; None before the first answer."""
        self.frames: deque[tuple[int, bytes]] = deque()
        """Encoded frames, each with the last `seq` in it, that are still to be written to the sockets."""
        self.is_casting = False
        self.asked = 0
        """Counts the times that this topic was asked for anew; only the answer to the newest counts."""


class Fanout:
    """The subscriptions of one gateway."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._topics: dict[UUID, _Topic] = {}

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
            elif not topic.waiting and not topic.sinks:
                self._forget(topic_id, topic)

        self._shards.submit(Subscribe(topic_id, viewer, since), answered)

    def unsubscribe(self, topic_id: UUID, sink: Sink) -> None:
        """Let a socket watch no longer; the last one to leave ends the topic's events on the link."""
        topic = self._topics.get(topic_id)
        if topic is None:
            return
        topic.waiting.pop(sink, None)
        topic.sinks.pop(sink, None)
        if not topic.waiting and not topic.sinks:
            self._forget(topic_id, topic)

    def drop(self, sink: Sink) -> None:
        """A socket is gone."""
        for topic_id, topic in list(self._topics.items()):
            if sink in topic.sinks or sink in topic.waiting:
                self.unsubscribe(topic_id, sink)

    def published(self, published: Published) -> None:
        """Events came on a link."""
        topic = self._topics.get(published.topic)
        if topic is None or topic.last_seq is None or published.last <= topic.last_seq:
            return
        assert published.first == topic.last_seq + 1, "a link lost events"
        topic.last_seq = published.last
        self._cast(topic, published.last, encode_events(published.topic, published.events))

    def resubscribe(self, shard: int) -> None:
        """A link has opened again: ask for what was missed of each topic that it serves."""
        for topic_id, topic in self._topics.items():
            if topic.last_seq is not None and self._shards.shard_of(topic_id) == shard:
                topic.asked += 1
                self._shards.submit(Subscribe(topic_id, None, topic.last_seq), self._catch_up(topic_id, topic))

    def _catch_up(self, topic_id: UUID, topic: _Topic) -> Callable[[Answer], None]:
        asked = topic.asked

        def answered(answer: Answer) -> None:
            if topic.asked != asked or self._topics.get(topic_id) is not topic or not isinstance(answer, Subscribed):
                return
            topic.last_seq = answer.seq
            if answer.events:
                self._cast(topic, answer.seq, encode_events(topic_id, answer.events))
            elif answer.events is None:
                # More was missed than the shard could tell: each client asks for its own part.
                for sink in list(topic.sinks):
                    sink.fall_behind()

        return answered

    def _forget(self, topic_id: UUID, topic: _Topic) -> None:
        if self._topics.get(topic_id) is topic:
            del self._topics[topic_id]
            self._shards.submit(Unsubscribe(topic_id), _ignore)

    def _cast(self, topic: _Topic, last_seq: int, frame: bytes) -> None:
        """Write a frame to all of a topic's sockets, after those before it."""
        topic.frames.append((last_seq, frame))
        if not topic.is_casting:
            topic.is_casting = True
            self._cast_next(topic)

    def _cast_next(self, topic: _Topic) -> None:
        last_seq, frame = topic.frames.popleft()
        self._cast_slice(topic, last_seq, frame, list(topic.sinks), 0)

    def _cast_slice(self, topic: _Topic, last_seq: int, frame: bytes, sinks: list[Sink], start: int) -> None:
        sent_by_sink = topic.sinks
        end = start + SLICE_SOCKETS
        for sink in sinks[start:end]:
            # Whoever subscribed after this frame was queued has its events already.
            if sent_by_sink.get(sink, last_seq) < last_seq:
                sent_by_sink[sink] = last_seq
                sink.send(frame)
        if end < len(sinks):
            asyncio.get_running_loop().call_soon(self._cast_slice, topic, last_seq, frame, sinks, end)
        elif topic.frames:
            asyncio.get_running_loop().call_soon(self._cast_next, topic)
        else:
            topic.is_casting = False


def _ignore(_answer: Answer) -> None:
    """The answer to a request that has none."""
