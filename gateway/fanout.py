"""Topic to sockets: who watches what here, and one encoding of each topic's events for all of them.

A topic's events come on its shard's link, in order, from the moment of the first subscription. A socket gets them from
the `seq` of its own `subscribed` on. When a link was broken, each of its topics is asked for anew from the last `seq`
that came, so that no socket has a gap.

Of each topic at most one question is on its way to the shard. Whoever comes meanwhile waits, and all of them go
together with the next one. Of a shard's topics only so many are asked for at once; the others stand in a line.
"""

import asyncio
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol
from uuid import UUID

from actors.logs import get_logger
from actors.messages import Answer, Payload, Presence, Published, Unsubscribe, Viewers, Watch, Watched
from engine.limits import (
    BUSY_RETRY_MS,
    COMMAND_TIMEOUT_MS,
    RESUME_EVENTS_MAX,
    SECOND_MS,
    TICK_MS,
    WATCH_VIEWERS_MAX,
    WATCHES_AT_ONCE,
)
from engine.rejections import INTERNAL, UNAVAILABLE, Rejection
from gateway.slices import Slices
from gateway.topic import Memories, Memory, Run
from gateway.wire import Subscribed, encode_presence

logger = get_logger(__name__)


class Sink(Protocol):
    """A socket, as the fan-out sees it."""

    is_behind: bool
    """Much that it was sent is unread. It is sent nothing until it has read on; then comes `Fanout.catch_up`."""

    def send(self, frame: bytes) -> None:
        """Write a text frame; never blocks, never raises."""

    def close_as_too_slow(self) -> None:
        """Close: the client comes back and asks for what it missed."""


class Shards(Protocol):
    """The way to the shards; see `Router`."""

    def submit(self, payload: Payload, on_answer: Callable[[Answer], None]) -> None:
        """Send a request on its way."""

    def shard_of(self, entity_id: UUID) -> int:
        """The shard that serves this entity."""


class _Newcomer:
    """A subscription that is not answered yet."""

    __slots__ = ("is_wanted", "on_subscribed", "since", "sink", "viewer")

    def __init__(
        self,
        sink: Sink,
        viewer: UUID | None,
        since: int | None,
        on_subscribed: Callable[[Subscribed | Rejection], None],
    ) -> None:
        self.sink = sink
        self.viewer = viewer
        self.since = since
        self.on_subscribed = on_subscribed
        self.is_wanted = True
        """Its socket has not left meanwhile."""


class _Question:
    """A question on its way to the shard, and for whom it is asked."""

    __slots__ = ("newcomers", "topic", "viewers")

    def __init__(self, topic: "_Topic", newcomers: list[_Newcomer], viewers: list[UUID]) -> None:
        self.topic = topic
        self.newcomers = newcomers
        self.viewers = viewers


class _Questions:
    """The questions to one shard: a whole house at once would be more than it reads, and than its link holds."""

    def __init__(self) -> None:
        self.on_their_way: dict[_Question, None] = {}
        self.line: dict[_Topic, float] = {}
        """Topics that are to be asked for, in order, and since when, by the loop's clock."""


class _Topic:
    """What is known of one topic at this gateway."""

    def __init__(self, topic_id: UUID, questions: _Questions) -> None:
        self.id = topic_id
        self.questions = questions
        """Those to its shard."""
        self.memory: Memory | None = None
        """What came on the link; None before the first answer."""
        self.is_incomplete = False
        """Events were missed and asked for; until they come none is taken."""
        self.sinks: dict[Sink, int] = {}
        """Each socket that watches, with the last `seq` that it has been sent."""
        self.newcomers: dict[Sink, list[_Newcomer]] = {}
        """Sockets with subscriptions that are wanted, and not answered yet."""
        self.question: _Question | None = None
        self.retry: asyncio.TimerHandle | None = None
        """Set while the shard, which had no room for the last question, is left alone."""
        self.line: deque[_Newcomer] = deque()
        """Who waits for the next question. Empty, unless one is on its way, in the line, or tried again later."""
        self.cast_seq = 0
        """Up to here the sockets have been written to, or are just now."""
        self.cast_at = 0.0
        """When the last broadcast began, by the loop's clock."""
        self.is_casting = False
        """A broadcast is being written, or waits for its tick."""
        self.viewers: int | None = None
        """On all gateways, as the shard said last."""
        self.untold: dict[Sink, None] = {}
        """Sockets that watch and were not told this number."""
        self.counted: int | None = None
        """How many of them are here, as the shard was told last."""


class Fanout:
    """The subscriptions of one gateway."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._topics: dict[UUID, _Topic] = {}
        self._topics_by_sink: dict[Sink, set[UUID]] = {}
        self._questions: defaultdict[int, _Questions] = defaultdict(_Questions)
        """By shard."""
        self._slices = Slices()
        self._memories = Memories()
        self._uncounted: set[UUID] = set()
        """Topics whose viewers came or went since the last count."""
        self._untold: set[UUID] = set()
        """Topics of which somebody is to be told at the next tick how many watch."""

    # What sockets ask for

    def subscribe(
        self,
        topic_id: UUID,
        viewer: UUID | None,
        since: int | None,
        sink: Sink,
        on_subscribed: Callable[[Subscribed | Rejection], None],
    ) -> None:
        """Let a socket watch. `on_subscribed` is called before the first event is sent to it."""
        topic = self._topics.get(topic_id)
        if topic is None:
            topic = self._topics[topic_id] = _Topic(topic_id, self._questions[self._shards.shard_of(topic_id)])
        newcomer = _Newcomer(sink, viewer, since, on_subscribed)
        topic.newcomers.setdefault(sink, []).append(newcomer)
        self._topics_by_sink.setdefault(sink, set()).add(topic_id)
        self._admit(topic, newcomer)

    def unsubscribe(self, topic_id: UUID, sink: Sink) -> None:
        """Let a socket watch no longer; the last one to leave ends the topic's events on the link."""
        topic = self._topics.get(topic_id)
        if topic is not None:
            self._leave(topic, sink)

    def drop(self, sink: Sink) -> None:
        """A socket is gone."""
        for topic_id in self._topics_by_sink.get(sink, set()).copy():
            self.unsubscribe(topic_id, sink)

    def catch_up(self, sink: Sink) -> None:
        """A socket that was behind has read on: send what it missed, folded."""
        for topic_id in self._topics_by_sink.get(sink, set()).copy():
            # What it is sent may make it one that is behind again, or close it.
            if sink.is_behind or sink not in self._topics_by_sink:
                return
            topic = self._topics[topic_id]
            sent = topic.sinks.get(sink)
            if sent is not None:
                _send_rest(topic, sink, sent)

    # What comes from the shards

    def published(self, published: Published) -> None:
        """Events came on a link."""
        topic = self._topics.get(published.topic)
        memory = None if topic is None else topic.memory
        if topic is None or memory is None or topic.is_incomplete or published.last <= memory.seq:
            return
        if published.first != memory.seq + 1:
            logger.error("events are missing", auction=published.topic, first=memory.seq + 1, last=published.first - 1)
            self._ask_anew(topic)
            return
        memory.add(published)
        if published.snapshot is not None:
            self._cast(topic)

    def presence(self, presence: Presence) -> None:
        """The number of a topic's viewers came on a link: all are told at the next tick."""
        topic = self._topics.get(presence.topic)
        if topic is not None:
            if presence.viewers != topic.viewers:
                topic.viewers = presence.viewers
                topic.untold = dict.fromkeys(topic.sinks)
            self._untold.add(topic.id)

    def resubscribe(self, shard: int) -> None:
        """A link has opened again: ask for what was missed of each topic that it serves, and what was not answered."""
        questions = self._questions[shard]
        lost, questions.on_their_way = questions.on_their_way, {}
        for topic in list(self._topics.values()):
            if topic.questions is questions and topic.memory is not None:
                self._ask_anew(topic)
        for question in lost:
            topic = question.topic
            if topic.question is question:
                # Of a topic that is not known yet, or that everybody has left: its newcomers are told.
                _put_back(topic)
                self._ask(topic)

    # What comes with time

    def tick(self) -> None:
        """Report how many watch here, and tell how many do in all, where that has changed; about once a second."""
        uncounted, self._uncounted = self._uncounted, set()
        for topic_id in uncounted:
            topic = self._topics.get(topic_id)
            # Of others the shard would not take it; they are counted once it has answered.
            if topic is not None and topic.memory is not None and not topic.is_incomplete and not self._count(topic):
                # No other number comes for it that newcomers could wait for.
                self._untold.add(topic_id)
        untold, self._untold = self._untold, set()
        for topic_id in untold & self._topics.keys():
            self._tell_viewers(self._topics[topic_id])
        for questions in self._questions.values():
            self._refuse_late(questions)

    def _count(self, topic: _Topic) -> bool:
        """Report a topic's viewers here, if their number has changed; whether it has."""
        viewers = len(topic.sinks)
        if viewers == topic.counted:
            return False
        topic.counted = viewers
        self._shards.submit(Viewers(topic.id, viewers), _ignore)
        return True

    def _tell_viewers(self, topic: _Topic) -> None:
        viewers = topic.viewers
        if viewers is None:
            return
        frame = encode_presence(topic.id, viewers)

        def tell(sink: Sink) -> None:
            if sink.is_behind:
                self._untold.add(topic.id)
            elif sink in topic.untold and topic.viewers == viewers:
                del topic.untold[sink]
                sink.send(frame)

        self._slices.run(list(topic.untold), tell)

    # Asking the shards

    def _admit(self, topic: _Topic, newcomer: _Newcomer) -> None:
        """Answer a guest from memory, if that will do; whoever else comes is asked for, at once or with the next."""
        known = _recall(topic, newcomer.since) if newcomer.viewer is None else None
        if known is not None:
            self._tell(topic, newcomer, known)
        elif not newcomer.is_wanted:
            self._tell(topic, newcomer, UNAVAILABLE)
        else:
            topic.line.append(newcomer)
            if topic.question is None and topic.retry is None:
                self._ask(topic)

    def _ask_anew(self, topic: _Topic) -> None:
        """Ask for all that came after the last event that did."""
        topic.is_incomplete = True
        topic.counted = None
        _put_back(topic)
        self._ask(topic)

    def _ask(self, topic: _Topic) -> None:
        """Ask as soon as it is this topic's turn."""
        if topic.retry is not None:
            topic.retry.cancel()
            topic.retry = None
        topic.questions.line.setdefault(topic, asyncio.get_running_loop().time())
        self._ask_next(topic.questions)

    def _ask_next(self, questions: _Questions) -> None:
        """Ask for as many topics as may be asked for at once."""
        while questions.line and len(questions.on_their_way) < WATCHES_AT_ONCE:
            topic = next(iter(questions.line))
            del questions.line[topic]
            if self._topics.get(topic.id) is topic:
                self._ask_now(topic)
            else:
                self._refuse_line(topic, UNAVAILABLE)

    def _ask_now(self, topic: _Topic) -> None:
        """Ask for all who wait, and for what the topic itself has missed."""
        newcomers: list[_Newcomer] = []
        viewers: dict[UUID, None] = {}
        while topic.line and len(viewers) < WATCH_VIEWERS_MAX:
            newcomer = topic.line.popleft()
            newcomers.append(newcomer)
            if newcomer.viewer is not None:
                viewers[newcomer.viewer] = None
        question = topic.question = _Question(topic, newcomers, list(viewers))
        topic.questions.on_their_way[question] = None
        watch = Watch(topic.id, _since(topic, newcomers), question.viewers)
        self._shards.submit(watch, lambda answer: self._answered(topic, question, answer))

    def _answered(self, topic: _Topic, question: _Question, answer: Answer) -> None:
        assert isinstance(answer, Watched | Rejection)
        topic.questions.on_their_way.pop(question, None)
        if topic.question is question:
            topic.question = None
            if isinstance(answer, Rejection):
                self._refused(topic, question, answer)
            else:
                self._watched(topic, question, answer)
        self._ask_next(topic.questions)

    def _refused(self, topic: _Topic, question: _Question, refusal: Rejection) -> None:
        """Tell all who wait. Whoever watches already waits on, unless there is nothing to wait for."""
        if topic.is_incomplete and refusal.is_transient and refusal.code != INTERNAL.code:
            pause_ms = refusal.retry_after_ms or BUSY_RETRY_MS
            topic.retry = asyncio.get_running_loop().call_later(pause_ms / SECOND_MS, self._ask, topic)
        elif topic.is_incomplete:
            # Nothing more would come on this link: silence would look like an auction without bids.
            _forget(topic)
            topic.is_incomplete = False
            self._give_up(topic)
        topic.line.extendleft(reversed(question.newcomers))
        self._refuse_line(topic, refusal)

    def _refuse_line(self, topic: _Topic, refusal: Rejection) -> None:
        waiting = list(topic.line)
        topic.line.clear()
        self._slices.run(waiting, lambda newcomer: self._tell(topic, newcomer, refusal))

    def _refuse_late(self, questions: _Questions) -> None:
        """Tell those whose turn does not come: the shard is away, and with it all that were asked before them."""
        late = asyncio.get_running_loop().time() - COMMAND_TIMEOUT_MS / SECOND_MS
        for topic, since in list(questions.line.items()):
            if since > late:
                break
            self._refuse_line(topic, UNAVAILABLE)
            if not topic.is_incomplete or self._topics.get(topic.id) is not topic:
                del questions.line[topic]

    def _watched(self, topic: _Topic, question: _Question, answer: Watched) -> None:
        waiting = list(topic.line)
        topic.line.clear()
        if self._topics.get(topic.id) is topic:
            self._take_up(topic, answer)
            # Guests may find what they want in memory now; how the others stand only the shard knows.
            topic.line.extend(newcomer for newcomer in waiting if newcomer.viewer is not None)
            waiting = [newcomer for newcomer in waiting if newcomer.viewer is None]
            if topic.line:
                self._ask(topic)
        elif topic.id not in self._topics:
            # Everybody had left before this was answered.
            self._shards.submit(Unsubscribe(topic.id), _ignore)
        reception = _Reception(answer, question.viewers)
        self._slices.run(question.newcomers, lambda newcomer: self._tell(topic, newcomer, reception.answer(newcomer)))
        self._slices.run(waiting, lambda newcomer: self._admit(topic, newcomer))

    def _take_up(self, topic: _Topic, watched: Watched) -> None:
        """All of the topic's events up to this came before it on the link, or are in it, or nobody can tell them."""
        topic.is_incomplete = False
        self._uncounted.add(topic.id)
        if topic.memory is not None and topic.memory.catch_up(watched):
            if topic.memory.seq > topic.cast_seq:
                self._cast(topic)
            return
        _forget(topic)
        topic.memory = Memory(topic.id, watched, self._memories)
        topic.cast_seq = watched.seq
        self._give_up(topic)

    def _tell(self, topic: _Topic, newcomer: _Newcomer, answer: Subscribed | Rejection) -> None:
        """Answer a subscription; from here on its socket is sent what comes."""
        sink = newcomer.sink
        try:
            newcomer.on_subscribed(answer)
        except Exception:
            # One client's trouble is not another's.
            logger.exception("a subscription could not be answered")
        if not newcomer.is_wanted:
            return
        topic.newcomers[sink].remove(newcomer)
        if not topic.newcomers[sink]:
            del topic.newcomers[sink]
        if isinstance(answer, Subscribed):
            if sink not in topic.sinks:
                topic.untold[sink] = None
                self._uncounted.add(topic.id)
            topic.sinks[sink] = answer.seq
            _send_rest(topic, sink, answer.seq)
        elif sink not in topic.sinks and sink not in topic.newcomers:
            self._leave(topic, sink)

    def _leave(self, topic: _Topic, sink: Sink) -> None:
        for newcomer in topic.newcomers.pop(sink, ()):
            newcomer.is_wanted = False
        topic.untold.pop(sink, None)
        if topic.sinks.pop(sink, None) is not None:
            self._uncounted.add(topic.id)
        topics = self._topics_by_sink.get(sink)
        if topics is not None:
            topics.discard(topic.id)
            if not topics:
                del self._topics_by_sink[sink]
        if not topic.newcomers and not topic.sinks:
            del self._topics[topic.id]
            _forget(topic)
            self._shards.submit(Unsubscribe(topic.id), _ignore)

    def _give_up(self, topic: _Topic) -> None:
        """Nobody can tell those who watch what they miss: each comes back and asks for its own part."""

        def close(sink: Sink) -> None:
            if sink in topic.sinks:
                sink.close_as_too_slow()

        self._slices.run(list(topic.sinks), close)

    # Broadcasts

    def _cast(self, topic: _Topic) -> None:
        """Write what has come to all of a topic's sockets: at once, or together with what comes until the next tick."""
        if topic.is_casting:
            return
        topic.is_casting = True
        loop = asyncio.get_running_loop()
        wait_s = topic.cast_at + TICK_MS / SECOND_MS - loop.time()
        if wait_s <= 0:
            self._cast_now(topic)
        else:
            loop.call_later(wait_s, self._cast_now, topic)

    def _cast_now(self, topic: _Topic) -> None:
        memory = topic.memory
        if memory is None or memory.snapshot() is None:
            # What follows is cast when it comes.
            topic.is_casting = False
            return
        cast = _Cast(topic, memory.seq, {})
        topic.cast_seq = memory.seq
        topic.cast_at = asyncio.get_running_loop().time()

        def done() -> None:
            topic.is_casting = False
            if topic.memory is not None and topic.memory.seq > topic.cast_seq:
                self._cast(topic)

        self._slices.run(list(topic.sinks), cast.send, done)


class _Cast(NamedTuple):
    """A broadcast of what came up to `last`."""

    topic: _Topic
    last: int
    frames: dict[int, tuple[int, bytes | None]]
    """By what a socket was sent before: the frame for it, and up to where that goes."""

    def send(self, sink: Sink) -> None:
        sinks = self.topic.sinks
        sent = sinks.get(sink, self.last)
        if sent >= self.last or sink.is_behind:
            return
        found = self.frames.get(sent)
        if found is None:
            # The first one, or one that came while other events were gathering.
            found = self.frames[sent] = _frame_after(self.topic, sent)
        last, frame = found
        if frame is None:
            sink.close_as_too_slow()
        else:
            sinks[sink] = last
            sink.send(frame)


class _Reception:
    """What the shard said, for all who waited for it."""

    def __init__(self, watched: Watched, viewers: Sequence[UUID]) -> None:
        self._watched = watched
        self._run = Run(watched.first, watched.seq, watched.events)
        self._you = dict(zip(viewers, watched.you, strict=True))
        self._recalled = watched.seq, b""
        """The last `since` that was asked for, and what came after it."""

    def answer(self, newcomer: _Newcomer) -> Subscribed:
        watched, since = self._watched, newcomer.since
        you = None if newcomer.viewer is None else self._you[newcomer.viewer]
        if since is None or not self._run.first <= since + 1 <= watched.seq + 1:
            return Subscribed(watched.seq, None, watched.snapshot, you)
        if since != self._recalled[0]:
            self._recalled = since, self._run.after(since)
        return Subscribed(watched.seq, self._recalled[1], None, you)


def _recall(topic: _Topic, since: int | None) -> Subscribed | None:
    """What a guest is answered who comes now; None where only the shard knows."""
    memory = topic.memory
    if memory is None or topic.is_incomplete:
        return None
    events = None if since is None else memory.events_after(since)
    if events is not None:
        return Subscribed(memory.seq, events, None, None)
    snapshot = memory.snapshot()
    # Who is ahead of us has seen more elsewhere, and is not to go back.
    if snapshot is None or (since is not None and memory.seq - since <= RESUME_EVENTS_MAX):
        return None
    return Subscribed(memory.seq, None, snapshot, None)


def _forget(topic: _Topic) -> None:
    if topic.memory is not None:
        topic.memory.forget()
        topic.memory = None


def _put_back(topic: _Topic) -> None:
    """Have those wait for the next question for whom one was asked that is not answered any more."""
    if topic.question is not None:
        topic.line.extendleft(reversed(topic.question.newcomers))
        topic.question = None


def _since(topic: _Topic, newcomers: list[_Newcomer]) -> int | None:
    """After what the shard is to tell all: the least that somebody wants who can have it."""
    wanted = [newcomer.since for newcomer in newcomers if newcomer.since is not None]
    memory = topic.memory
    if memory is not None:
        wanted = [since for since in wanted if 0 <= memory.seq - since <= RESUME_EVENTS_MAX]
        wanted.append(memory.seq)
    return min(wanted, default=None)


def _frame_after(topic: _Topic, sent: int) -> tuple[int, bytes | None]:
    memory = topic.memory
    return (sent, None) if memory is None else (memory.seq, memory.frame_after(sent))


def _send_rest(topic: _Topic, sink: Sink, sent: int) -> None:
    """Send what came after `sent` to one socket; close it where that cannot be told any more."""
    if sink.is_behind or (topic.memory is not None and topic.memory.seq == sent):
        return
    last, frame = _frame_after(topic, sent)
    if frame is None:
        sink.close_as_too_slow()
    else:
        topic.sinks[sink] = last
        sink.send(frame)


def _ignore(_answer: Answer) -> None:
    """The answer to a request that has none."""
