"""Who gets which events: the shards are a recorder that answers when a test says so."""

import asyncio
import json
from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest

from actors.messages import Answer, Payload, Presence, Published, Unsubscribe, Viewers, Watch, Watched, You
from engine.limits import (
    BUSY_RETRY_MS,
    COMMAND_TIMEOUT_MS,
    RESUME_EVENTS_MAX,
    SOCKETS_PER_SLICE,
    TICK_MS,
    WATCHES_AT_ONCE,
)
from engine.rejections import Rejection
from gateway import fanout, topic
from gateway.fanout import Fanout
from gateway.wire import Subscribed
from tests.gateway.test_topic import events, folded, published, view
from tests.support.waiting import LoopClock, quiet, turns

TOPIC, OTHER = UUID(int=1), UUID(int=2)
ANNA, BEN = UUID(int=3), UUID(int=4)
NOT_FOUND = Rejection("not_found", "There is no such auction.")
UNAVAILABLE = Rejection("unavailable", "Away.", is_transient=True)
BUSY_FOR_LONG = Rejection("busy", "Later.", is_transient=True, retry_after_ms=1_250)
LEADS = You(1, 100, is_leading=True)


class Shards:
    """Keeps what was submitted; topic 1 is served by shard 1, topic 2 by shard 2."""

    def __init__(self) -> None:
        self.submitted: list[Payload] = []
        self._waiting: list[tuple[Payload, Callable[[Answer], None]]] = []

    def submit(self, payload: Payload, on_answer: Callable[[Answer], None]) -> None:
        self.submitted.append(payload)
        if not isinstance(payload, Unsubscribe | Viewers):
            self._waiting.append((payload, on_answer))

    def shard_of(self, entity_id: UUID) -> int:
        return entity_id.int % 2**64

    def answer(self, answer: Answer, index: int = 0) -> None:
        """Answer the oldest request that waits."""
        self._waiting.pop(index)[1](answer)

    def forget(self, shard: int) -> None:
        """A link has broken: what was asked on it is not answered."""
        self._waiting = [(payload, then) for payload, then in self._waiting if self.shard_of(payload.auction) != shard]

    def pop(self) -> list[Payload]:
        submitted, self.submitted = self.submitted, []
        return submitted


class Socket:
    """A sink that keeps what it is sent, and what its subscriptions were answered, in order."""

    def __init__(self, fanout: Fanout | None = None) -> None:
        self.fanout = fanout
        """It leaves this when it is closed, as real sockets do, at once."""
        self.log: list[Any] = []
        self.frames: list[bytes] = []
        self.you: You | None = None
        self.is_behind = False
        self.is_closed = False

    def send(self, frame: bytes) -> None:
        self.frames.append(frame)
        message = json.loads(frame)
        match message["type"]:
            case "events":
                self.log.append([event["seq"] for event in message["events"]])
            case "state":
                assert message["snapshot"] == {"at": message["seq"]}
                self.log.append((f"state {message['seq']}", [event["seq"] for event in message["events"]]))
            case "presence":
                self.log.append(f"{message['viewers']} viewers")

    def close_as_too_slow(self) -> None:
        self.is_closed = True
        if self.fanout is not None:
            self.fanout.drop(self)

    def subscribed(self, answer: Subscribed | Rejection) -> None:
        if isinstance(answer, Rejection):
            self.log.append(answer.code)
            return
        self.you = answer.you
        if answer.events is None:
            assert answer.snapshot == view(answer.seq)
            self.log.append(f"at {answer.seq}")
        else:
            assert answer.snapshot is None
            missed = [event["seq"] for event in json.loads(b"[" + answer.events + b"]")]
            self.log.append((f"all to {answer.seq}", missed))


class Hall:
    """A fan-out with what is around it."""

    def __init__(self, clock: LoopClock) -> None:
        self.clock = clock
        self.shards = Shards()
        self.fanout = Fanout(self.shards)

    def ask(self, topic_id: UUID = TOPIC, since: int | None = None, viewer: UUID | None = None) -> Socket:
        """A new socket subscribes."""
        socket = Socket(self.fanout)
        self.ask_again(socket, topic_id, since, viewer)
        return socket

    def ask_again(
        self, socket: Socket, topic_id: UUID = TOPIC, since: int | None = None, viewer: UUID | None = None
    ) -> None:
        self.fanout.subscribe(topic_id, viewer, since, socket, socket.subscribed)

    def watch(self, seq: int, topic_id: UUID = TOPIC) -> Socket:
        """A guest who watches since `seq`, the first or one more."""
        socket = self.ask(topic_id)
        if not socket.log:
            self.shards.answer(at(seq))
        assert socket.log == [f"at {seq}"]
        self.shards.pop()
        return socket

    def publish(self, first: int, last: int, *extended: int, topic_id: UUID = TOPIC) -> None:
        frame = published(first, last, *extended)
        self.fanout.published(Published(topic_id, first, last, frame.events, frame.kept, frame.snapshot))

    def reopen(self) -> None:
        """The link to shard 1 has broken, and opened again."""
        self.shards.forget(1)
        self.fanout.resubscribe(1)

    async def tick(self) -> None:
        """A tick passes, and all that can happen happens."""
        await self.clock.advance(TICK_MS)


@pytest.fixture
async def hall(monkeypatch: pytest.MonkeyPatch) -> Hall:
    return Hall(LoopClock(monkeypatch))


def at(seq: int, *you: You | None) -> Watched:
    """An answer that tells nothing of before."""
    return Watched(TOPIC, seq, view(seq), seq + 1, b"", list(you))


def all_of(first: int, seq: int, *you: You | None) -> Watched:
    """An answer with the events from `first` on."""
    return Watched(TOPIC, seq, view(seq), first, events(first, seq), list(you))


# Subscribing


async def test_a_socket_gets_its_subscription_and_then_every_event(hall: Hall) -> None:
    socket = hall.ask(since=3)
    assert hall.shards.pop() == [Watch(TOPIC, 3, [])]
    hall.shards.answer(all_of(4, 5))
    hall.publish(6, 7)
    await hall.tick()
    hall.publish(8, 8)
    await hall.tick()
    assert socket.log == [("all to 5", [4, 5]), [6, 7], [8]]


async def test_guests_of_a_known_topic_are_answered_at_once(hall: Hall) -> None:
    hall.ask(since=3)
    hall.shards.answer(all_of(4, 5))
    hall.publish(6, 7)
    hall.publish(8, 8)
    hall.shards.pop()
    asked = {since: hall.ask(since=since) for since in (None, 3, 5, 6, 7, 8)}
    assert {since: socket.log for since, socket in asked.items()} == {
        None: ["at 8"],
        3: [("all to 8", [4, 5, 6, 7, 8])],
        5: [("all to 8", [6, 7, 8])],
        6: [("all to 8", [7, 8])],
        7: [("all to 8", [8])],
        8: [("all to 8", [])],
    }
    assert hall.shards.pop() == []
    await hall.tick()
    hall.publish(9, 9)
    await hall.tick()
    assert all(socket.log[1:] == [[9]] for socket in asked.values())


async def test_too_old_for_everybody_is_a_snapshot_at_once(hall: Hall) -> None:
    hall.watch(RESUME_EVENTS_MAX + 5)
    assert hall.ask(since=4).log == [f"at {RESUME_EVENTS_MAX + 5}"]
    assert hall.shards.pop() == []


async def test_what_only_the_shard_remembers_is_asked_of_it_once(hall: Hall) -> None:
    hall.watch(9)
    one, two, three = hall.ask(since=7), hall.ask(since=5), hall.ask(since=6)
    assert hall.shards.pop() == [Watch(TOPIC, 7, [])]
    hall.shards.answer(all_of(8, 9))
    assert hall.shards.pop() == [Watch(TOPIC, 5, [])]
    hall.shards.answer(all_of(6, 9))
    assert one.log == [("all to 9", [8, 9])]
    assert two.log == [("all to 9", [6, 7, 8, 9])]
    assert three.log == [("all to 9", [7, 8, 9])]
    # Now it is remembered here, too.
    assert hall.ask(since=5).log == two.log
    assert hall.shards.pop() == []


async def test_what_the_shard_does_not_remember_either_is_a_snapshot(hall: Hall) -> None:
    socket = hall.ask(since=2)
    hall.shards.answer(all_of(5, 9))
    assert socket.log == ["at 9"]


async def test_who_is_ahead_is_not_sent_back_by_a_gateway_that_is_behind(hall: Hall) -> None:
    hall.watch(5)
    ahead, wrong = hall.ask(since=7), hall.ask(since=70)
    assert hall.shards.pop() == [Watch(TOPIC, 5, [])]
    hall.publish(6, 7)
    hall.shards.answer(at(7))
    hall.publish(8, 8)
    hall.shards.answer(at(8))
    await hall.tick()
    assert ahead.log == [("all to 7", []), [8]]
    assert wrong.log == ["at 8"]


async def test_standings_are_asked_for_and_given_to_their_owners(hall: Hall) -> None:
    watcher = hall.watch(5)
    anna, ben, guest = hall.ask(viewer=ANNA), hall.ask(viewer=BEN, since=5), hall.ask()
    again = hall.ask(viewer=BEN)
    assert guest.log == ["at 5"]
    assert hall.shards.pop() == [Watch(TOPIC, 5, [ANNA])]
    hall.shards.answer(at(5, LEADS))
    assert (anna.log, anna.you, ben.log) == (["at 5"], LEADS, [])
    # One user on two sockets is asked for once.
    assert hall.shards.pop() == [Watch(TOPIC, 5, [BEN])]
    hall.publish(6, 6)
    hall.shards.answer(at(6, None))
    assert (ben.log, ben.you, again.log) == (["at 6"], None, ["at 6"])
    await hall.tick()
    assert watcher.log == anna.log == ["at 5", [6]]


async def test_ten_thousand_guests_are_one_question(hall: Hall) -> None:
    sockets = [hall.ask(since=7) for _ in range(10_000)]
    hall.shards.answer(all_of(8, 9))
    await turns(lambda: all(socket.log for socket in sockets))
    assert hall.shards.pop() == [Watch(TOPIC, 7, [])]
    assert all(socket.log == [("all to 9", [8, 9])] for socket in sockets)


async def test_ten_thousand_users_are_a_handful_of_questions(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fanout, "WATCH_VIEWERS_MAX", 3_000)
    sockets = [hall.ask(viewer=UUID(int=number)) for number in range(10_000)]
    questions = hall.shards.pop()
    while questions:
        (question,) = questions
        assert isinstance(question, Watch)
        hall.shards.answer(at(9, *(LEADS for _ in question.viewers)))
        questions = hall.shards.pop()
        assert len(questions) <= 1
    await turns(lambda: all(socket.log for socket in sockets))
    assert all((socket.log, socket.you) == (["at 9"], LEADS) for socket in sockets)


async def test_many_are_answered_in_slices_and_miss_nothing_meanwhile(hall: Hall) -> None:
    hall.watch(4)
    await quiet()
    sockets = [hall.ask(viewer=ANNA) for _ in range(3 * SOCKETS_PER_SLICE)]
    hall.shards.answer(at(4, None))
    hall.shards.answer(at(4, LEADS))
    assert sum(bool(socket.log) for socket in sockets) == SOCKETS_PER_SLICE
    hall.publish(5, 6)
    hall.publish(7, 7, 7)
    await turns(lambda: all(socket.log for socket in sockets))
    await hall.tick()
    assert all(socket.log == ["at 4", ("state 7", [7])] for socket in sockets)
    assert all(socket.you == LEADS for socket in sockets[1:])


async def test_a_topic_is_known_from_its_first_answer_on(hall: Hall) -> None:
    socket = hall.ask()
    hall.publish(1, 4)
    hall.shards.answer(at(4))
    hall.publish(5, 5)
    await hall.tick()
    assert socket.log == ["at 4", [5]]


async def test_what_came_already_is_not_sent_again(hall: Hall) -> None:
    socket = hall.watch(5)
    hall.publish(4, 5)
    hall.publish(6, 6)
    hall.publish(6, 6)
    await hall.tick()
    assert socket.log == ["at 5", [6]]


async def test_events_of_what_nobody_watches_are_let_go(hall: Hall) -> None:
    hall.publish(1, 1)
    socket = hall.watch(5, OTHER)
    hall.publish(1, 1)
    await hall.tick()
    assert socket.log == ["at 5"]


async def test_topics_do_not_mix(hall: Hall) -> None:
    one, two = hall.watch(5), hall.watch(8, OTHER)
    hall.publish(9, 9, topic_id=OTHER)
    hall.publish(6, 6)
    await hall.tick()
    assert (one.log, two.log) == (["at 5", [6]], ["at 8", [9]])


async def test_the_last_to_leave_ends_the_topic(hall: Hall) -> None:
    one, two = hall.watch(5), hall.watch(5)
    hall.fanout.unsubscribe(TOPIC, one)
    assert hall.shards.pop() == []
    hall.publish(6, 6)
    hall.fanout.unsubscribe(TOPIC, two)
    hall.fanout.unsubscribe(TOPIC, two)
    assert hall.shards.pop() == [Unsubscribe(TOPIC)]
    hall.publish(7, 7)
    await hall.tick()
    assert (one.log, two.log) == (["at 5"], ["at 5", [6]])
    assert hall.fanout._memories._bytes == 0
    again = hall.watch(7)
    hall.publish(8, 8)
    await hall.tick()
    assert again.log == ["at 7", [8]]


async def test_a_socket_that_is_gone_is_dropped_from_all_its_topics(hall: Hall) -> None:
    socket, stays = hall.watch(5), hall.watch(5, OTHER)
    hall.ask_again(socket, OTHER, viewer=ANNA)
    hall.shards.pop()
    hall.fanout.drop(socket)
    hall.fanout.drop(Socket())
    assert hall.shards.pop() == [Unsubscribe(TOPIC)]
    hall.shards.answer(at(5, None))
    hall.publish(6, 6, topic_id=OTHER)
    await hall.tick()
    assert socket.log == ["at 5", "at 5"]
    assert stays.log == ["at 5", [6]]


async def test_a_refused_subscription_leaves_nothing_behind(hall: Hall) -> None:
    sockets = [hall.ask(), hall.ask(), hall.ask(viewer=ANNA)]
    hall.shards.pop()
    hall.shards.answer(NOT_FOUND)
    assert [socket.log for socket in sockets] == [["not_found"]] * 3
    assert hall.shards.pop() == [Unsubscribe(TOPIC)]
    assert (hall.fanout._topics, hall.fanout._topics_by_sink) == ({}, {})


async def test_a_refused_subscription_leaves_others_alone(hall: Hall) -> None:
    watcher, refused = hall.watch(5), hall.ask(viewer=ANNA)
    hall.ask_again(watcher, viewer=ANNA)
    hall.shards.answer(UNAVAILABLE)
    hall.publish(6, 6)
    await hall.tick()
    assert (watcher.log, refused.log) == (["at 5", "unavailable", [6]], ["unavailable"])
    hall.fanout.drop(watcher)
    assert hall.fanout._topics == {}


async def test_who_unsubscribes_before_the_answer_gets_no_events(hall: Hall) -> None:
    socket, behind_it = hall.ask(), hall.ask()
    for one in (socket, behind_it):
        hall.fanout.unsubscribe(TOPIC, one)
    assert hall.shards.pop() == [Watch(TOPIC, None, []), Unsubscribe(TOPIC)]
    hall.shards.answer(at(5))
    hall.publish(6, 6)
    await hall.tick()
    # Both are told, as each that asks is; and the shard, which may not have heard of it on a link that broke.
    assert (socket.log, behind_it.log) == (["at 5"], ["unavailable"])
    assert hall.shards.pop() == [Unsubscribe(TOPIC)]


async def test_who_unsubscribes_and_subscribes_again_before_the_answer_watches_once(hall: Hall) -> None:
    socket = hall.ask()
    hall.fanout.unsubscribe(TOPIC, socket)
    hall.ask_again(socket)
    assert hall.shards.pop() == [Watch(TOPIC, None, []), Unsubscribe(TOPIC), Watch(TOPIC, None, [])]
    hall.shards.answer(at(5))
    hall.shards.answer(at(5))
    hall.publish(6, 6)
    await hall.tick()
    assert socket.log == ["at 5", "at 5", [6]]
    assert hall.shards.pop() == []
    # The answer to the first does not make it forget that this socket watches.
    hall.fanout.drop(socket)
    assert hall.shards.pop() == [Unsubscribe(TOPIC)]
    assert hall.fanout._topics == {}


async def test_two_subscriptions_of_one_socket_are_one_watch(hall: Hall) -> None:
    socket = hall.ask(viewer=ANNA)
    hall.ask_again(socket, since=2, viewer=ANNA)
    hall.shards.answer(at(5, LEADS))
    hall.shards.answer(all_of(3, 5, LEADS))
    hall.publish(6, 6)
    await hall.tick()
    assert socket.log == ["at 5", ("all to 5", [3, 4, 5]), [6]]
    hall.fanout.unsubscribe(TOPIC, socket)
    assert hall.fanout._topics == {}


async def test_one_clients_trouble_with_its_answer_is_not_another_ones(
    hall: Hall, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_answer: Subscribed | Rejection) -> None:
        raise RuntimeError("a fault")

    hall.ask()
    hall.fanout.subscribe(TOPIC, ANNA, None, Socket(), fail)
    after = hall.ask(viewer=BEN)
    hall.shards.answer(at(5))
    hall.shards.answer(at(5, None, None))
    assert after.log == ["at 5"]
    assert "a subscription could not be answered" in caplog.text


# Broadcasts


async def test_a_broadcast_to_many_is_written_in_slices_in_order(hall: Hall) -> None:
    sockets = [hall.watch(5) for _ in range(2 * SOCKETS_PER_SLICE + 1)]
    await quiet()
    hall.publish(6, 6)
    hall.publish(7, 7)
    assert [len(socket.log) for socket in sockets].count(2) == SOCKETS_PER_SLICE
    between: list[int] = []
    asyncio.get_running_loop().call_soon(lambda: between.append(sum(len(socket.log) == 2 for socket in sockets)))
    await quiet()
    await hall.tick()
    assert SOCKETS_PER_SLICE <= between[0] < len(sockets)
    assert all(socket.log == ["at 5", [6], [7]] for socket in sockets)
    # One encoding serves them all.
    assert len({id(socket.frames[0]) for socket in sockets}) == 1


async def test_who_comes_or_goes_between_slices_gets_what_is_its_own(hall: Hall) -> None:
    sockets = [hall.watch(5) for _ in range(2 * SOCKETS_PER_SLICE)]
    hall.publish(6, 6)
    gone = sockets[-1]
    hall.fanout.drop(gone)
    late = hall.watch(6)
    hall.publish(7, 7)
    later = hall.watch(7)
    hall.publish(8, 8)
    await quiet()
    await hall.tick()
    assert all(socket.log == ["at 5", [6], ("state 8", [])] for socket in sockets[:-1])
    assert gone.log == ["at 5"]
    assert late.log == ["at 6", ("state 8", [])]
    assert later.log == ["at 7", [8]]


async def test_broadcasts_begin_a_tick_apart(hall: Hall) -> None:
    socket = hall.watch(5)
    hall.publish(6, 6)
    assert socket.log == ["at 5", [6]]
    hall.publish(7, 7)
    await hall.clock.advance(TICK_MS - 1)
    assert socket.log == ["at 5", [6]]
    await hall.clock.advance(1)
    assert socket.log == ["at 5", [6], [7]]
    await hall.clock.advance(TICK_MS)
    hall.publish(8, 9)
    assert socket.log == ["at 5", [6], [7], [8, 9]]


async def test_what_gathers_leaves_as_one_frame_with_all_that_is_kept(hall: Hall) -> None:
    socket = hall.watch(5)
    for seq in range(6, 20):
        hall.publish(seq, seq, *([seq] if seq in (8, 15) else []))
    await hall.tick()
    assert socket.log == ["at 5", [6], ("state 19", [8, 15])]


async def test_what_a_link_has_folded_leaves_as_a_state(hall: Hall) -> None:
    socket = hall.watch(5)
    hall.fanout.published(folded(6, 9, 7))
    assert socket.log == ["at 5", ("state 9", [7])]
    # Whoever comes back for what was folded asks the shard.
    assert hall.ask(since=8).log == []
    assert hall.shards.pop() == [Watch(TOPIC, 8, [])]


async def test_in_the_midst_of_a_commit_nothing_is_cast(hall: Hall) -> None:
    socket = hall.watch(5)
    hall.fanout.published(Published(TOPIC, 6, 6, events(6, 6), b"", None))
    assert socket.log == ["at 5"]
    hall.publish(7, 7)
    assert socket.log == ["at 5", ("state 7", [])]
    hall.fanout.published(Published(TOPIC, 8, 8, events(8, 8), b"", None))
    guest = hall.ask()
    assert guest.log == []
    hall.shards.answer(at(8))
    assert guest.log == ["at 8"]


async def test_a_timer_in_the_midst_of_a_commit_waits_for_its_end(hall: Hall) -> None:
    socket = hall.watch(5)
    hall.publish(6, 6)
    hall.publish(7, 7)
    hall.fanout.published(Published(TOPIC, 8, 8, events(8, 8), b"", None))
    await hall.tick()
    assert socket.log == ["at 5", [6]]
    hall.publish(9, 9, 9)
    assert socket.log == ["at 5", [6], ("state 9", [9])]


# Sockets that are behind


async def test_a_socket_that_is_behind_is_passed_over_and_caught_up(hall: Hall) -> None:
    slow, fast = hall.watch(5), hall.watch(5)
    slow.is_behind = True
    for seq in range(6, 12):
        hall.publish(seq, seq, *([seq] if seq in (7, 10) else []))
        await hall.tick()
    assert fast.log == ["at 5", [6], [7], [8], [9], [10], [11]]
    assert slow.log == ["at 5"]
    slow.is_behind = False
    hall.fanout.catch_up(slow)
    assert slow.log == ["at 5", ("state 11", [7, 10])]
    hall.publish(12, 12)
    await hall.tick()
    assert slow.log[2:] == fast.log[7:] == [[12]]


async def test_who_missed_nothing_is_sent_nothing(hall: Hall) -> None:
    socket = hall.watch(5)
    hall.fanout.catch_up(socket)
    hall.fanout.catch_up(Socket())
    assert socket.log == ["at 5"]


async def test_who_missed_one_commit_gets_it(hall: Hall) -> None:
    socket = hall.watch(5)
    socket.is_behind = True
    hall.publish(6, 8)
    socket.is_behind = False
    hall.fanout.catch_up(socket)
    assert socket.log == ["at 5", [6, 7, 8]]


async def test_a_catch_up_stops_where_the_socket_is_behind_again(hall: Hall) -> None:
    socket = hall.watch(5)
    hall.ask_again(socket, OTHER)
    hall.shards.answer(at(5))
    socket.is_behind = True
    hall.publish(6, 6)
    hall.publish(6, 6, topic_id=OTHER)
    hall.fanout.catch_up(socket)
    assert socket.log == ["at 5", "at 5"]
    socket.is_behind = False
    hall.fanout.catch_up(socket)
    assert socket.log == ["at 5", "at 5", [6], [6]]


async def test_who_catches_up_between_slices_is_not_told_twice(hall: Hall) -> None:
    sockets = [hall.watch(5) for _ in range(2 * SOCKETS_PER_SLICE)]
    slow = sockets[-1]
    slow.is_behind = True
    hall.publish(6, 6)
    slow.is_behind = False
    hall.fanout.catch_up(slow)
    await hall.tick()
    assert all(socket.log == ["at 5", [6]] for socket in sockets)


async def test_who_missed_more_of_what_is_kept_than_is_remembered_is_closed(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topic, "TOPIC_KEPT_BYTES_MAX", 1)
    monkeypatch.setattr(topic, "TOPIC_EVENTS_BYTES_MAX", 1)
    slow = hall.watch(5)
    slow.is_behind = True
    hall.fanout.published(folded(6, 6))
    await hall.tick()
    hall.fanout.published(folded(7, 7, 7))
    await hall.tick()
    slow.is_behind = False
    hall.fanout.catch_up(slow)
    assert (slow.log, slow.is_closed) == (["at 5"], True)


async def test_a_hundred_that_stop_hold_nobody_up(hall: Hall) -> None:
    sockets = [hall.watch(5) for _ in range(500)]
    for slow in sockets[::5]:
        slow.is_behind = True
    for seq in range(6, 10):
        hall.publish(seq, seq)
        await quiet()
        await hall.tick()
    assert all(len(socket.log) == (1 if socket.is_behind else 5) for socket in sockets)


async def test_who_is_closed_while_it_catches_up_is_told_no_more(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topic, "TOPIC_KEPT_BYTES_MAX", 1)
    monkeypatch.setattr(topic, "TOPIC_EVENTS_BYTES_MAX", 1)
    slow = hall.watch(5)
    hall.ask_again(slow, OTHER)
    hall.shards.answer(at(5))
    slow.is_behind = True
    for topic_id in (TOPIC, OTHER):
        hall.publish(6, 6, 6, topic_id=topic_id)
    await hall.tick()
    slow.is_behind = False
    hall.fanout.catch_up(slow)
    assert (slow.log, slow.is_closed, hall.fanout._topics) == (["at 5", "at 5"], True, {})


# Presence


async def test_viewers_are_counted_once_a_second_where_they_changed(hall: Hall) -> None:
    one, _two, _other = hall.watch(5), hall.watch(5), hall.watch(5, OTHER)
    hall.fanout.tick()
    assert sorted(hall.shards.pop(), key=lambda viewers: viewers.auction) == [Viewers(TOPIC, 2), Viewers(OTHER, 1)]
    hall.fanout.tick()
    hall.watch(5)
    hall.fanout.unsubscribe(TOPIC, one)
    hall.fanout.tick()
    assert hall.shards.pop() == []
    hall.fanout.drop(_two)
    hall.fanout.tick()
    assert hall.shards.pop() == [Viewers(TOPIC, 1)]


async def test_who_is_not_answered_yet_is_not_counted_yet(hall: Hall) -> None:
    hall.ask()
    hall.fanout.tick()
    assert hall.shards.pop() == [Watch(TOPIC, None, [])]
    hall.shards.answer(at(5))
    hall.fanout.tick()
    assert hall.shards.pop() == [Viewers(TOPIC, 1)]


async def test_a_new_link_is_told_how_many_watch(hall: Hall) -> None:
    hall.watch(5)
    hall.fanout.tick()
    hall.shards.pop()
    hall.reopen()
    hall.fanout.tick()
    assert hall.shards.pop() == [Watch(TOPIC, 5, [])]
    hall.shards.answer(at(5))
    hall.fanout.tick()
    assert hall.shards.pop() == [Viewers(TOPIC, 1)]


async def test_presence_goes_to_all_who_read_once_a_tick(hall: Hall) -> None:
    slow, fast = hall.watch(5), hall.watch(5)
    hall.fanout.tick()
    hall.fanout.presence(Presence(OTHER, 3))
    slow.is_behind = True
    hall.fanout.presence(Presence(TOPIC, 6))
    hall.fanout.presence(Presence(TOPIC, 7))
    assert (slow.log, fast.log) == (["at 5"], ["at 5"])
    hall.fanout.tick()
    assert (slow.log, fast.log) == (["at 5"], ["at 5", "7 viewers"])
    slow.is_behind = False
    hall.fanout.catch_up(slow)
    assert slow.log == ["at 5"]
    # The same again, from a shard that was started again.
    hall.fanout.presence(Presence(TOPIC, 7))
    for _ in range(2):
        hall.fanout.tick()
        assert slow.log == fast.log == ["at 5", "7 viewers"]


async def test_newcomers_are_told_the_last_number_unless_another_comes(hall: Hall) -> None:
    first = hall.watch(5)
    hall.fanout.tick()
    hall.fanout.presence(Presence(TOPIC, 7))
    hall.fanout.tick()
    newcomer = hall.ask()
    hall.fanout.tick()
    assert newcomer.log == ["at 5"]
    hall.fanout.presence(Presence(TOPIC, 8))
    hall.fanout.tick()
    assert newcomer.log == ["at 5", "8 viewers"]
    # One goes and another comes: there is nothing to report.
    hall.fanout.drop(first)
    instead = hall.ask()
    hall.ask_again(newcomer)
    hall.shards.pop()
    hall.fanout.tick()
    assert hall.shards.pop() == []
    assert (instead.log, newcomer.log) == (["at 5", "8 viewers"], ["at 5", "8 viewers", "at 5"])


async def test_a_number_that_has_changed_between_slices_is_told_at_the_next_tick(hall: Hall) -> None:
    sockets = [hall.watch(5) for _ in range(2 * SOCKETS_PER_SLICE)]
    hall.fanout.tick()
    await quiet()
    for viewers in (7, 8):
        hall.fanout.presence(Presence(TOPIC, viewers))
        hall.fanout.tick()
    await quiet()
    hall.fanout.tick()
    await quiet()
    assert {tuple(socket.log[1:]) for socket in sockets} == {("7 viewers", "8 viewers"), ("8 viewers",)}


async def test_presence_goes_out_in_slices(hall: Hall) -> None:
    sockets = [hall.watch(5) for _ in range(2 * SOCKETS_PER_SLICE)]
    await quiet()
    hall.fanout.presence(Presence(TOPIC, 7))
    hall.fanout.tick()
    hall.fanout.drop(sockets[-1])
    assert sum(len(socket.log) == 2 for socket in sockets) == SOCKETS_PER_SLICE
    await quiet()
    assert all(socket.log == ["at 5", "7 viewers"] for socket in sockets[:-1])
    assert sockets[-1].log == ["at 5"]


# When a link was broken


async def test_a_new_link_is_asked_for_what_was_missed(hall: Hall) -> None:
    one, elsewhere = hall.watch(5), hall.watch(9, OTHER)
    hall.publish(6, 6)
    hall.reopen()
    assert hall.shards.pop() == [Watch(TOPIC, 6, [])]
    hall.shards.answer(all_of(7, 9))
    await hall.tick()
    hall.publish(10, 10)
    await hall.tick()
    assert one.log == ["at 5", [6], [7, 8, 9], [10]]
    assert elsewhere.log == ["at 9"]


async def test_what_was_kept_of_what_was_missed_is_in_the_state(hall: Hall) -> None:
    slow, fast = hall.watch(5), hall.watch(5)
    slow.is_behind = True
    hall.publish(6, 6)
    hall.reopen()
    hall.shards.answer(Watched(TOPIC, 9, view(9), 7, events(7, 9, 8), []))
    await hall.tick()
    slow.is_behind = False
    hall.fanout.catch_up(slow)
    assert fast.log == ["at 5", [6], [7, 8, 9]]
    assert slow.log == ["at 5", ("state 9", [8])]


async def test_nothing_missed_is_nothing_sent(hall: Hall) -> None:
    socket = hall.watch(5)
    hall.reopen()
    hall.shards.answer(at(5))
    hall.publish(6, 6)
    await hall.tick()
    assert socket.log == ["at 5", [6]]


async def test_who_missed_too_much_comes_back_for_it(hall: Hall) -> None:
    socket = hall.watch(5)
    hall.reopen()
    hall.shards.answer(at(5_000))
    assert socket.is_closed
    late = hall.watch(5_000)
    hall.publish(5_001, 5_001)
    await hall.tick()
    assert late.log == ["at 5000", [5_001]]


async def test_only_the_answer_on_the_newest_link_counts(hall: Hall) -> None:
    socket = hall.watch(5)
    hall.fanout.resubscribe(1)
    hall.fanout.resubscribe(1)
    hall.shards.answer(all_of(6, 8))
    assert socket.log == ["at 5"]
    hall.shards.answer(all_of(6, 9))
    await hall.tick()
    assert socket.log == ["at 5", [6, 7, 8, 9]]


async def test_a_topic_that_was_left_meanwhile_stays_left(hall: Hall) -> None:
    socket = hall.watch(5)
    hall.reopen()
    hall.fanout.drop(socket)
    hall.shards.answer(all_of(6, 8))
    await hall.tick()
    assert socket.log == ["at 5"]


async def test_a_topic_without_an_answer_yet_is_asked_for_anew(hall: Hall) -> None:
    socket = hall.ask()
    hall.shards.pop()
    hall.reopen()
    assert hall.shards.pop() == [Watch(TOPIC, None, [])]
    hall.shards.answer(at(5))
    hall.publish(6, 6)
    await hall.tick()
    assert socket.log == ["at 5", [6]]


async def test_who_came_while_the_link_was_broken_goes_with_what_the_topic_missed(hall: Hall) -> None:
    watcher = hall.watch(5)
    late, later = hall.ask(viewer=ANNA, since=3), hall.ask(viewer=BEN)
    hall.shards.pop()
    hall.reopen()
    assert hall.shards.pop() == [Watch(TOPIC, 3, [ANNA, BEN])]
    hall.shards.answer(all_of(4, 7, LEADS, None))
    await hall.tick()
    hall.publish(8, 8)
    await hall.tick()
    assert watcher.log == ["at 5", ("state 7", []), [8]]
    assert (late.log, late.you) == ([("all to 7", [4, 5, 6, 7]), [8]], LEADS)
    assert later.log == ["at 7", [8]]


async def test_while_events_are_missing_guests_wait_as_well(hall: Hall) -> None:
    hall.watch(5)
    hall.reopen()
    guest = hall.ask()
    assert guest.log == []
    hall.shards.answer(at(5))
    assert guest.log == ["at 5"]


async def test_a_hole_is_asked_for(hall: Hall, caplog: pytest.LogCaptureFixture) -> None:
    one, two = hall.watch(5), hall.watch(5)
    hall.publish(7, 7)
    hall.publish(8, 8)
    assert hall.shards.pop() == [Watch(TOPIC, 5, [])]
    [record] = [record for record in caplog.records if record.getMessage() == "events are missing"]
    assert (record.__dict__["first"], record.__dict__["last"]) == (6, 6)
    hall.shards.answer(all_of(6, 8))
    await hall.tick()
    hall.publish(9, 9)
    await hall.tick()
    assert one.log == two.log == ["at 5", [6, 7, 8], [9]]
    assert not one.is_closed


@pytest.mark.parametrize("refusal", [NOT_FOUND, Rejection("internal", "Wrong.", is_transient=True)])
async def test_watchers_of_a_topic_that_cannot_be_caught_up_with_are_sent_to_come_back(
    hall: Hall, refusal: Rejection
) -> None:
    """Nothing more would come for them on this link: silence would look like an auction without bids."""
    one, two, elsewhere = hall.watch(5), hall.watch(5), hall.watch(5, OTHER)
    hall.reopen()
    late = hall.ask()
    hall.shards.answer(refusal)
    assert [socket.is_closed for socket in (one, two, elsewhere, late)] == [True, True, False, False]
    assert late.log == [refusal.code]
    # They go, as sockets that are closed do, and with the last of them the topic.
    hall.fanout.drop(one)
    hall.fanout.drop(two)
    again = hall.watch(8)
    hall.publish(9, 9)
    await hall.tick()
    assert (one.log, again.log) == (["at 5"], ["at 8", [9]])


async def test_who_is_answered_when_the_topic_was_given_up_is_closed_too(hall: Hall) -> None:
    hall.watch(5)
    sockets = [hall.ask(viewer=ANNA) for _ in range(2 * SOCKETS_PER_SLICE)]
    hall.shards.answer(at(5, None))
    hall.shards.answer(at(5, None))
    hall.reopen()
    hall.shards.answer(NOT_FOUND)
    await turns(lambda: all(socket.log == ["at 5"] for socket in sockets))
    assert all(socket.is_closed for socket in sockets)


@pytest.mark.parametrize(("refusal", "pause_ms"), [(UNAVAILABLE, BUSY_RETRY_MS), (BUSY_FOR_LONG, 1_250)])
async def test_a_shard_that_has_no_room_yet_is_asked_again(hall: Hall, refusal: Rejection, pause_ms: int) -> None:
    watcher = hall.watch(5)
    hall.reopen()
    newcomer = hall.ask()
    hall.shards.answer(refusal)
    assert newcomer.log == [refusal.code]
    later = hall.ask()
    hall.shards.pop()
    await hall.clock.advance(pause_ms - 1)
    assert hall.shards.pop() == []
    await hall.clock.advance(1)
    assert hall.shards.pop() == [Watch(TOPIC, 5, [])]
    hall.shards.answer(all_of(6, 7))
    await hall.tick()
    assert (watcher.log, later.log, watcher.is_closed) == (["at 5", [6, 7]], ["at 7"], False)


async def test_a_link_that_opens_meanwhile_is_asked_at_once_and_once(hall: Hall) -> None:
    watcher = hall.watch(5)
    hall.reopen()
    hall.shards.answer(UNAVAILABLE)
    hall.shards.pop()
    hall.reopen()
    await hall.clock.advance(BUSY_RETRY_MS)
    assert hall.shards.pop() == [Watch(TOPIC, 5, [])]
    hall.shards.answer(all_of(6, 6))
    await hall.tick()
    assert watcher.log == ["at 5", [6]]


async def test_nobody_is_asked_for_again_who_has_left_meanwhile(hall: Hall) -> None:
    watcher = hall.watch(5)
    hall.reopen()
    hall.shards.answer(UNAVAILABLE)
    hall.fanout.drop(watcher)
    hall.shards.pop()
    await hall.clock.advance(BUSY_RETRY_MS)
    assert hall.shards.pop() == []


# Many topics at once


def of_shard(shard: int, count: int) -> list[UUID]:
    return [UUID(int=shard + (number << 64)) for number in range(1, count + 1)]


async def test_only_so_many_topics_are_asked_for_at_once(hall: Hall) -> None:
    topics = of_shard(1, 3 * WATCHES_AT_ONCE)
    sockets = [hall.ask(topic_id) for topic_id in topics]
    elsewhere = hall.ask(OTHER)
    assert len(hall.shards.pop()) == WATCHES_AT_ONCE + 1
    hall.shards.answer(at(5), WATCHES_AT_ONCE)
    assert elsewhere.log == ["at 5"]
    for number in range(len(topics)):
        hall.shards.answer(at(5))
        await quiet()
        assert sockets[number].log == ["at 5"]
    assert [watch.auction for watch in hall.shards.pop()] == topics[WATCHES_AT_ONCE:]


async def test_a_new_link_is_asked_for_only_so_many_topics_at_once(hall: Hall) -> None:
    *known, unknown = of_shard(1, WATCHES_AT_ONCE + 1)
    watchers = []
    for topic_id in known:
        watchers.append(hall.watch(5, topic_id))
        # In a turn only a slice of them is answered.
        await asyncio.sleep(0)
    newcomer = hall.ask(unknown)
    for _ in range(3):
        hall.shards.pop()
        hall.reopen()
        asked = hall.shards.pop()
        assert len(asked) == WATCHES_AT_ONCE
    # One answer makes room for the last.
    while asked:
        hall.shards.answer(at(5) if asked.pop(0).auction == unknown else all_of(6, 6))
        asked += hall.shards.pop()
    await hall.tick()
    assert all(socket.log == ["at 5", [6]] for socket in watchers)
    assert newcomer.log == ["at 5"]


async def test_whose_turn_does_not_come_is_told(hall: Hall) -> None:
    for topic_id in of_shard(1, WATCHES_AT_ONCE):
        hall.ask(topic_id)
    waits, left = hall.ask(), hall.ask()
    await hall.clock.advance(COMMAND_TIMEOUT_MS - 1)
    hall.fanout.tick()
    assert waits.log == []
    hall.fanout.drop(left)
    await hall.clock.advance(2)
    hall.fanout.tick()
    assert (waits.log, left.log) == (["unavailable"], ["unavailable"])
    hall.shards.pop()
    hall.shards.answer(at(5))
    assert hall.shards.pop() == []


async def test_who_leaves_before_its_turn_is_not_asked_for(hall: Hall) -> None:
    for topic_id in of_shard(1, WATCHES_AT_ONCE):
        hall.ask(topic_id)
    gone = hall.ask()
    hall.fanout.drop(gone)
    hall.shards.pop()
    hall.shards.answer(at(5))
    assert hall.shards.pop() == []
    assert gone.log == ["unavailable"]


async def test_who_left_before_the_answer_is_told_when_the_link_breaks(hall: Hall) -> None:
    gone = hall.ask()
    hall.fanout.drop(gone)
    hall.shards.pop()
    hall.reopen()
    assert (gone.log, hall.shards.pop()) == (["unavailable"], [])
