"""Who gets which events: the shards are a recorder that answers when a test says so."""

import asyncio
import json
from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest

from actors.messages import Answer, Payload, Published, Subscribe, Subscribed, Unsubscribe
from engine.auction import Snapshot
from engine.rejections import Rejection
from gateway import fanout
from gateway.fanout import SLICE_SOCKETS, Fanout
from tests.support.waiting import quiet, turns

TOPIC, OTHER = UUID(int=1), UUID(int=2)
USER = UUID(int=3)
NOT_FOUND = Rejection("not_found", "There is no such auction.")
UNAVAILABLE = Rejection("unavailable", "Away.", is_transient=True)
SNAPSHOT = Snapshot(
    auction=TOPIC,
    story=None,
    title="A bowl",
    currency="USD",
    status="active",
    starting_price=1,
    price=1,
    minimum=1,
    bids=0,
    leader=None,
    reserve_met=None,
    start_time=0,
    end_time=1,
    outcome=None,
)


class Shards:
    """Keeps what was submitted; topic 1 is served by shard 1, topic 2 by shard 2."""

    def __init__(self) -> None:
        self.submitted: list[Payload] = []
        self._waiting: list[Callable[[Answer], None]] = []

    def submit(self, payload: Payload, on_answer: Callable[[Answer], None]) -> None:
        self.submitted.append(payload)
        if not isinstance(payload, Unsubscribe):
            self._waiting.append(on_answer)

    def shard_of(self, entity_id: UUID) -> int:
        return entity_id.int

    def answer(self, answer: Answer, index: int = 0) -> None:
        """Answer the oldest request that waits."""
        self._waiting.pop(index)(answer)

    def pop(self) -> list[Payload]:
        submitted, self.submitted = self.submitted, []
        return submitted


class Socket:
    """A sink that keeps what it is sent, and what its subscriptions were answered, in order."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.frames: list[list[int]] = []
        self.is_behind = False

    def send(self, frame: bytes) -> None:
        message = json.loads(frame)
        assert message["type"] == "events"
        self.frames.append([event["seq"] for event in message["events"]])
        self.log += self.frames[-1]

    def fall_behind(self) -> None:
        self.is_behind = True

    def subscribed(self, answer: Subscribed | Rejection) -> None:
        self.log.append(answer.code if isinstance(answer, Rejection) else f"at {answer.seq}")


class Hall:
    """A fan-out with what is around it."""

    def __init__(self) -> None:
        self.shards = Shards()
        self.fanout = Fanout(self.shards)

    def ask(self, socket: Socket, topic: UUID = TOPIC, since: int | None = None) -> None:
        self.fanout.subscribe(topic, USER, since, socket, socket.subscribed)

    def watch(self, seq: int, topic: UUID = TOPIC) -> Socket:
        """A socket that watches since `seq`."""
        socket = Socket()
        self.ask(socket, topic)
        self.shards.answer(at(seq))
        return socket

    def publish(self, first: int, last: int, topic: UUID = TOPIC) -> None:
        self.fanout.published(Published(topic, first, last, events(first, last)))


@pytest.fixture
def hall() -> Hall:
    return Hall()


def events(first: int, last: int) -> bytes:
    return ",".join(f'{{"seq":{seq}}}' for seq in range(first, last + 1)).encode()


def at(seq: int) -> Subscribed:
    return Subscribed(seq, None, SNAPSHOT, None)


def recovered(first: int, last: int) -> Subscribed:
    return Subscribed(last, events(first, last), None, None)


async def test_a_socket_gets_its_subscription_and_then_every_event(hall: Hall) -> None:
    socket = Socket()
    hall.ask(socket, since=3)
    assert hall.shards.pop() == [Subscribe(TOPIC, USER, 3)]
    hall.shards.answer(at(5))
    hall.publish(6, 7)
    hall.publish(8, 8)
    await quiet()
    assert socket.log == ["at 5", 6, 7, 8]


async def test_each_socket_asks_for_itself_and_gets_what_comes_after_its_own_answer(hall: Hall) -> None:
    first = hall.watch(5)
    hall.publish(6, 6)
    second = Socket()
    hall.ask(second)
    hall.publish(7, 7)
    hall.shards.answer(at(7))
    hall.publish(8, 8)
    await quiet()
    assert first.log == ["at 5", 6, 7, 8]
    assert second.log == ["at 7", 8]
    assert len(hall.shards.pop()) == 2


async def test_events_that_precede_the_first_answer_are_in_it(hall: Hall) -> None:
    socket = Socket()
    hall.ask(socket)
    hall.publish(1, 4)
    hall.shards.answer(at(4))
    hall.publish(5, 5)
    await quiet()
    assert socket.log == ["at 4", 5]


async def test_what_came_already_is_not_sent_again(hall: Hall) -> None:
    socket = hall.watch(5)
    hall.publish(4, 5)
    hall.publish(6, 6)
    hall.publish(6, 6)
    await quiet()
    assert socket.log == ["at 5", 6]


async def test_a_hole_is_asked_for(hall: Hall, caplog: pytest.LogCaptureFixture) -> None:
    one, two = hall.watch(5), hall.watch(5)
    hall.shards.pop()
    hall.publish(7, 7)
    hall.publish(8, 8)
    assert hall.shards.pop() == [Subscribe(TOPIC, None, 5)]
    assert "events 6 to 6 are missing" in caplog.text
    hall.shards.answer(recovered(6, 8))
    hall.publish(9, 9)
    await quiet()
    assert one.log == two.log == ["at 5", 6, 7, 8, 9]
    assert not one.is_behind


async def test_who_subscribed_within_what_was_asked_for_comes_back(hall: Hall) -> None:
    """Of events that came as one piece none can be left out: better closed than told twice."""
    one, late = hall.watch(5), Socket()
    hall.ask(late)
    hall.publish(8, 8)
    hall.shards.answer(at(7))
    hall.shards.answer(recovered(6, 9))
    await quiet()
    assert one.log == ["at 5", 6, 7, 8, 9]
    assert (late.log, late.is_behind) == (["at 7"], True)


async def test_events_of_what_nobody_watches_are_let_go(hall: Hall) -> None:
    hall.publish(1, 1)
    socket = hall.watch(5, OTHER)
    hall.publish(1, 1)
    await quiet()
    assert socket.log == ["at 5"]


async def test_topics_do_not_mix(hall: Hall) -> None:
    one, two = hall.watch(5), hall.watch(8, OTHER)
    hall.publish(9, 9, OTHER)
    hall.publish(6, 6)
    await quiet()
    assert (one.log, two.log) == (["at 5", 6], ["at 8", 9])


async def test_the_last_to_leave_ends_the_topic(hall: Hall) -> None:
    one, two = hall.watch(5), hall.watch(5)
    hall.shards.pop()
    hall.fanout.unsubscribe(TOPIC, one)
    assert hall.shards.pop() == []
    hall.publish(6, 6)
    hall.fanout.unsubscribe(TOPIC, two)
    hall.fanout.unsubscribe(TOPIC, two)
    assert hall.shards.pop() == [Unsubscribe(TOPIC)]
    hall.publish(7, 7)
    await quiet()
    assert (one.log, two.log) == (["at 5"], ["at 5", 6])
    again = hall.watch(7)
    hall.publish(8, 8)
    await quiet()
    assert again.log == ["at 7", 8]


async def test_a_socket_that_is_gone_is_dropped_from_all_its_topics(hall: Hall) -> None:
    socket, stays = hall.watch(5), hall.watch(5, OTHER)
    hall.ask(socket, OTHER)
    hall.shards.pop()
    hall.fanout.drop(socket)
    hall.fanout.drop(Socket())
    assert hall.shards.pop() == [Unsubscribe(TOPIC)]
    hall.shards.answer(at(5))
    hall.publish(6, 6, OTHER)
    await quiet()
    assert socket.log == ["at 5", "at 5"]
    assert stays.log == ["at 5", 6]


async def test_a_refused_subscription_leaves_nothing_behind(hall: Hall) -> None:
    socket = Socket()
    hall.ask(socket)
    hall.shards.pop()
    hall.shards.answer(NOT_FOUND)
    assert socket.log == ["not_found"]
    assert hall.shards.pop() == [Unsubscribe(TOPIC)]
    assert hall.fanout._topics == {}


async def test_a_refused_subscription_leaves_others_alone(hall: Hall) -> None:
    watcher, refused = hall.watch(5), Socket()
    hall.ask(refused)
    hall.shards.answer(UNAVAILABLE)
    hall.publish(6, 6)
    await quiet()
    assert (watcher.log, refused.log) == (["at 5", 6], ["unavailable"])


async def test_who_unsubscribes_before_the_answer_gets_no_events(hall: Hall) -> None:
    socket = Socket()
    hall.ask(socket)
    hall.fanout.unsubscribe(TOPIC, socket)
    hall.shards.pop()
    hall.shards.answer(at(5))
    hall.publish(6, 6)
    await quiet()
    assert socket.log == ["at 5"]


async def test_who_unsubscribes_and_subscribes_again_before_the_answer_watches_once(hall: Hall) -> None:
    socket = Socket()
    hall.ask(socket)
    hall.fanout.unsubscribe(TOPIC, socket)
    hall.ask(socket)
    assert hall.shards.pop() == [Subscribe(TOPIC, USER, None), Unsubscribe(TOPIC), Subscribe(TOPIC, USER, None)]
    hall.shards.answer(at(5))
    hall.shards.answer(at(5))
    hall.publish(6, 6)
    await quiet()
    assert socket.log == ["at 5", "at 5", 6]
    assert hall.shards.pop() == []
    # The answer to the first does not make it forget that this socket watches.
    hall.fanout.drop(socket)
    assert hall.shards.pop() == [Unsubscribe(TOPIC)]
    assert hall.fanout._topics == {}


async def test_two_subscriptions_of_one_socket_are_one_watch(hall: Hall) -> None:
    socket = Socket()
    hall.ask(socket)
    hall.ask(socket, since=2)
    hall.shards.answer(at(5))
    hall.shards.answer(recovered(3, 5))
    hall.publish(6, 6)
    await quiet()
    assert socket.log == ["at 5", "at 5", 6]
    hall.fanout.unsubscribe(TOPIC, socket)
    assert hall.fanout._topics == {}


# Slices


async def test_a_broadcast_to_many_is_written_in_slices_in_order(hall: Hall) -> None:
    sockets = [hall.watch(5) for _ in range(2 * SLICE_SOCKETS + 1)]
    hall.publish(6, 6)
    hall.publish(7, 7)
    assert [len(socket.log) for socket in sockets].count(2) == SLICE_SOCKETS
    between: list[int] = []
    asyncio.get_running_loop().call_soon(lambda: between.append(sum(len(socket.log) == 2 for socket in sockets)))
    await turns(lambda: all(len(socket.log) == 3 for socket in sockets))
    assert SLICE_SOCKETS <= between[0] < len(sockets)
    assert all(socket.log == ["at 5", 6, 7] for socket in sockets)
    hall.publish(8, 8)
    await turns(lambda: all(socket.log[-1] == 8 for socket in sockets))


async def test_who_comes_or_goes_between_slices_gets_what_is_its_own(hall: Hall) -> None:
    sockets = [hall.watch(5) for _ in range(2 * SLICE_SOCKETS)]
    hall.publish(6, 6)
    hall.publish(7, 7)
    gone = sockets[-1]
    hall.fanout.drop(gone)
    late = hall.watch(7)
    hall.publish(8, 8)
    await turns(lambda: all(socket.log[-1] == 8 for socket in sockets[:-1]))
    await quiet()
    assert gone.log == ["at 5"]
    assert late.log == ["at 7", 8]


async def test_what_waits_goes_out_as_one_frame(hall: Hall) -> None:
    socket = hall.watch(5)
    for seq in range(6, 10):
        hall.publish(seq, seq)
    await quiet()
    assert socket.log == ["at 5", 6, 7, 8, 9]
    # The first went at once, and the others gathered behind it.
    assert socket.frames == [[6], [7, 8, 9]]


async def test_who_subscribed_between_events_that_wait_gets_those_after_it(hall: Hall) -> None:
    one = hall.watch(5)
    hall.publish(6, 6)
    hall.publish(7, 8)
    late, later = hall.watch(8), Socket()
    hall.publish(9, 9)
    hall.ask(later)
    hall.shards.answer(at(9))
    hall.publish(10, 10)
    hall.publish(11, 12)
    await quiet()
    assert (one.log, one.frames) == (["at 5", 6, 7, 8, 9, 10, 11, 12], [[6], [7, 8, 9, 10, 11, 12]])
    assert (late.log, late.frames) == (["at 8", 9, 10, 11, 12], [[9, 10, 11, 12]])
    assert (later.log, later.frames) == (["at 9", 10, 11, 12], [[10, 11, 12]])
    hall.publish(13, 13)
    assert [socket.frames[-1] for socket in (one, late, later)] == [[13]] * 3


async def test_so_much_may_wait_for_a_topics_sockets(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fanout, "TOPIC_QUEUE_BYTES_MAX", len(events(10, 12)))
    one, two, other = hall.watch(8), hall.watch(8), hall.watch(5, OTHER)
    hall.publish(9, 9)
    hall.publish(10, 11)
    hall.publish(12, 12)
    hall.publish(6, 6, OTHER)
    hall.publish(7, 7, OTHER)
    await quiet()
    hall.publish(13, 13)
    hall.publish(14, 16)
    assert not one.is_behind
    hall.publish(17, 17)
    assert [socket.is_behind for socket in (one, two, other)] == [True, True, False]
    await quiet()
    assert one.log == ["at 8", 9, 10, 11, 12, 13]
    hall.fanout.drop(one)
    hall.fanout.drop(two)
    again = hall.watch(17)
    hall.publish(18, 18)
    await quiet()
    assert again.log == ["at 17", 18]
    assert other.log == ["at 5", 6, 7]


# When a link was broken


async def test_a_new_link_is_asked_for_what_was_missed(hall: Hall) -> None:
    one, elsewhere = hall.watch(5), hall.watch(9, OTHER)
    hall.publish(6, 6)
    hall.shards.pop()
    hall.fanout.resubscribe(1)
    assert hall.shards.pop() == [Subscribe(TOPIC, None, 6)]
    hall.shards.answer(recovered(7, 9))
    hall.publish(10, 10)
    await quiet()
    assert one.log == ["at 5", 6, 7, 8, 9, 10]
    assert elsewhere.log == ["at 9"]


async def test_nothing_missed_is_nothing_sent(hall: Hall) -> None:
    socket = hall.watch(5)
    hall.fanout.resubscribe(1)
    hall.shards.answer(Subscribed(5, b"", None, None))
    hall.publish(6, 6)
    await quiet()
    assert socket.log == ["at 5", 6]


async def test_who_missed_too_much_comes_back_for_it(hall: Hall) -> None:
    socket = hall.watch(5)
    hall.fanout.resubscribe(1)
    hall.shards.answer(at(5_000))
    assert socket.is_behind
    late = hall.watch(5_000)
    hall.publish(5_001, 5_001)
    await quiet()
    assert late.log == ["at 5000", 5_001]


async def test_only_the_answer_on_the_newest_link_counts(hall: Hall) -> None:
    socket = hall.watch(5)
    hall.fanout.resubscribe(1)
    hall.fanout.resubscribe(1)
    hall.shards.answer(recovered(6, 8))
    assert socket.log == ["at 5"]
    hall.shards.answer(recovered(6, 9))
    await quiet()
    assert socket.log == ["at 5", 6, 7, 8, 9]


async def test_a_topic_that_was_left_meanwhile_stays_left(hall: Hall) -> None:
    socket = hall.watch(5)
    hall.fanout.resubscribe(1)
    hall.fanout.drop(socket)
    hall.shards.answer(recovered(6, 8))
    await quiet()
    assert socket.log == ["at 5"]


async def test_a_topic_without_an_answer_yet_is_asked_for_by_its_own_request(hall: Hall) -> None:
    socket = Socket()
    hall.ask(socket)
    hall.shards.pop()
    hall.fanout.resubscribe(1)
    assert hall.shards.pop() == []
    hall.shards.answer(at(5))
    hall.publish(6, 6)
    await quiet()
    assert socket.log == ["at 5", 6]


async def test_who_subscribed_while_the_link_was_broken_has_no_gap(hall: Hall) -> None:
    watcher, late = hall.watch(5), Socket()
    hall.ask(late)
    hall.fanout.resubscribe(1)
    # The link asks for topics first, and then sends again what was not answered.
    hall.shards.answer(recovered(6, 7), index=1)
    hall.shards.answer(at(7))
    hall.publish(8, 8)
    await quiet()
    assert watcher.log == ["at 5", 6, 7, 8]
    assert late.log == ["at 7", 8]


@pytest.mark.parametrize("refusal", [UNAVAILABLE, Rejection("internal", "Wrong.", is_transient=True)])
async def test_watchers_of_a_topic_that_cannot_be_caught_up_with_are_sent_to_come_back(
    hall: Hall, refusal: Rejection
) -> None:
    """Nothing more would come for them on this link: silence would look like an auction without bids."""
    one, two, elsewhere, late = hall.watch(5), hall.watch(5), hall.watch(5, OTHER), Socket()
    hall.ask(late)
    hall.fanout.resubscribe(1)
    hall.shards.answer(refusal, index=1)
    assert [socket.is_behind for socket in (one, two, elsewhere, late)] == [True, True, False, False]
    # They go, as sockets that are closed do; whoever asked meanwhile has an answer of its own to come.
    hall.fanout.drop(one)
    hall.fanout.drop(two)
    hall.publish(8, 8)
    hall.shards.answer(at(8))
    hall.publish(9, 9)
    await quiet()
    assert (one.log, late.log) == (["at 5"], ["at 8", 9])


async def test_one_commit_of_any_size_closes_nobody(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is on what waits behind a frame that is being written."""
    monkeypatch.setattr(fanout, "TOPIC_QUEUE_BYTES_MAX", 1)
    socket = hall.watch(5)
    hall.publish(6, 7)
    assert (socket.frames, socket.is_behind) == ([[6, 7]], False)
