"""What a gateway remembers of a topic, and what it can tell from that."""

import json
from typing import Any
from uuid import UUID

import pytest

from actors.messages import Published, Watched
from gateway import topic
from gateway.topic import Memories, Memory, Run

TOPIC = UUID(int=1)


def events(first: int, last: int, *extended: int) -> bytes:
    """Events as a shard encodes them; those that are named extend, which is never dropped."""
    return ",".join(
        f'{{"seq":{seq},"kind":"{"extended" if seq in extended else "bid_placed"}"}}' for seq in range(first, last + 1)
    ).encode()


def view(seq: int) -> bytes:
    return f'{{"at":{seq}}}'.encode()


def watched(first: int, seq: int, *extended: int) -> Watched:
    return Watched(TOPIC, seq, view(seq), first, events(first, seq, *extended), [])


def published(first: int, last: int, *extended: int) -> Published:
    kept = b",".join(events(seq, seq, seq) for seq in extended)
    return Published(TOPIC, first, last, events(first, last, *extended), kept, view(last))


def folded(first: int, last: int, *extended: int) -> Published:
    kept = b",".join(events(seq, seq, seq) for seq in extended)
    return Published(TOPIC, first, last, None, kept, view(last))


def listed(encoded: bytes | None) -> list[int] | None:
    return None if encoded is None else [event["seq"] for event in json.loads(b"[" + encoded + b"]")]


def frame(memory: Memory, sent: int) -> Any:
    """A frame's type, what it covers up to, and the events in it."""
    encoded = memory.frame_after(sent)
    if encoded is None:
        return None
    message = json.loads(encoded)
    assert message["topic"] == f"auction:{TOPIC}"
    seqs = [event["seq"] for event in message["events"]]
    if message["type"] == "events":
        return "events", seqs
    assert message["snapshot"] == {"at": message["seq"]}
    return "state", message["seq"], seqs


def test_a_run_is_cut_where_it_must_be() -> None:
    run = Run(3, 5, events(3, 5))
    assert [listed(run.after(seq)) for seq in (2, 3, 4, 5, 9)] == [[3, 4, 5], [4, 5], [5], [], []]
    assert Run(6, 5, b"").after(5) == b""


def test_what_was_seen_is_recalled_from_everywhere() -> None:
    memory = Memory(TOPIC, watched(3, 5), Memories())
    memory.add(published(6, 8))
    memory.add(published(9, 9))
    for since in range(2, 10):
        assert listed(memory.events_after(since)) == list(range(since + 1, 10))
        assert memory.events_after(since) == memory.events_after(since)
    assert [memory.events_after(since) for since in (1, 0, 10)] == [None] * 3


def test_nothing_is_recalled_where_nothing_came() -> None:
    memory = Memory(TOPIC, watched(6, 5), Memories())
    assert memory.events_after(5) == b""
    assert memory.events_after(4) is None


def test_too_much_is_not_recalled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topic, "RESUME_EVENTS_MAX", 3)
    memory = Memory(TOPIC, watched(1, 9), Memories())
    assert listed(memory.events_after(6)) == [7, 8, 9]
    assert memory.events_after(5) is None


def test_only_so_many_bytes_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topic, "TOPIC_EVENTS_BYTES_MAX", 3 * len(events(1, 1)))
    memory = Memory(TOPIC, watched(1, 1), Memories())
    for seq in range(2, 6):
        memory.add(published(seq, seq))
    assert listed(memory.events_after(2)) == [3, 4, 5]
    assert memory.events_after(1) is None
    # One commit that is larger is not remembered at all.
    memory.add(published(6, 9))
    assert memory.events_after(8) is None
    memory.add(published(10, 10))
    assert listed(memory.events_after(9)) == [10]


def test_one_commit_leaves_as_it_is_and_several_as_their_state() -> None:
    memory = Memory(TOPIC, watched(1, 5), Memories())
    memory.add(published(6, 9))
    assert frame(memory, 5) == ("events", [6, 7, 8, 9])
    memory.add(published(10, 11, 10))
    assert frame(memory, 9) == ("events", [10, 11])
    assert frame(memory, 5) == ("state", 11, [10])


def test_several_commits_leave_as_events_where_these_are_shorter() -> None:
    memory = Memory(TOPIC, watched(1, 5), Memories())
    for seq in (6, 7):
        memory.add(Published(TOPIC, seq, seq, events(seq, seq), b"", b'{"at":"' + b"x" * 1_000 + b'"}'))
    assert frame(memory, 5) == ("events", [6, 7])


def test_a_state_has_exactly_what_is_kept_of_what_it_covers() -> None:
    memory = Memory(TOPIC, watched(1, 5, 3), Memories())
    memory.add(published(6, 8, 6, 8))
    memory.add(published(9, 9))
    memory.add(published(10, 11, 10))
    memory.add(folded(12, 15, 13, 14))
    assert [frame(memory, sent) for sent in (5, 8, 9, 11)] == [
        ("state", 15, [6, 8, 10, 13, 14]),
        ("state", 15, [10, 13, 14]),
        ("state", 15, [10, 13, 14]),
        ("state", 15, [13, 14]),
    ]
    # What is folded cannot be recalled, nor what was before it.
    assert memory.events_after(11) is None
    memory.add(published(16, 16))
    assert listed(memory.events_after(15)) == [16]
    assert memory.events_after(14) is None


def test_only_so_much_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topic, "TOPIC_KEPT_BYTES_MAX", 2 * len(events(6, 6, 6)))
    memory = Memory(TOPIC, watched(1, 5), Memories())
    for seq in (6, 7, 8):
        memory.add(folded(seq, seq, seq))
    assert frame(memory, 5) is None
    assert frame(memory, 6) == ("state", 8, [7, 8])


def test_in_the_midst_of_a_commit_there_is_no_state() -> None:
    memory = Memory(TOPIC, watched(1, 5), Memories())
    for seq in (6, 7):
        memory.add(Published(TOPIC, seq, seq, events(seq, seq), b"", None))
    assert memory.snapshot() is None
    assert frame(memory, 5) == ("events", [6, 7])
    memory.add(published(8, 8))
    assert memory.snapshot() == view(8)
    assert frame(memory, 5) == ("state", 8, [])


def test_what_was_missed_is_taken_up() -> None:
    memory = Memory(TOPIC, watched(4, 5), Memories())
    # Somebody else wanted more than the topic itself.
    assert memory.catch_up(watched(2, 9, 3, 7))
    assert (memory.seq, memory.snapshot()) == (9, view(9))
    assert listed(memory.events_after(5)) == [6, 7, 8, 9]
    assert frame(memory, 5) == ("state", 9, [7])
    # And now that it is here, it is remembered.
    assert listed(memory.events_after(1)) == list(range(2, 10))


def test_nothing_missed_changes_nothing() -> None:
    memory = Memory(TOPIC, watched(4, 5), Memories())
    assert memory.catch_up(watched(6, 5))
    assert (memory.seq, listed(memory.events_after(3))) == (5, [4, 5])


def test_what_cannot_be_taken_up_is_left() -> None:
    memory = Memory(TOPIC, watched(4, 5), Memories())
    assert not memory.catch_up(watched(8, 9))
    # The journal was put back to an earlier time.
    assert not memory.catch_up(watched(3, 4))
    assert memory.seq == 5


def test_more_than_may_be_remembered_is_taken_up_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topic, "TOPIC_EVENTS_BYTES_MAX", 2 * len(events(6, 6)))
    memory = Memory(TOPIC, watched(4, 5), Memories())
    assert memory.catch_up(watched(6, 9, 8))
    assert memory.events_after(8) is None
    assert frame(memory, 5) == ("state", 9, [8])


def test_all_together_remember_only_so_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topic, "TOPICS_EVENTS_BYTES_MAX", 4 * len(events(1, 1)) + 2)
    memories = Memories()
    one, two, three = [Memory(TOPIC, watched(1, 1), memories) for _ in range(3)]
    one.add(published(2, 2))
    assert [listed(memory.events_after(0)) for memory in (one, two, three)] == [[1, 2], [1], [1]]
    three.add(published(2, 2))
    # Without news for longest.
    assert two.events_after(0) is None
    one.forget()
    four = Memory(TOPIC, watched(1, 2), memories)
    assert [listed(memory.events_after(0)) for memory in (three, four)] == [[1, 2], [1, 2]]
    # Whoever watches is told all the same.
    two.add(published(2, 3, 3))
    assert frame(two, 1) == ("events", [2, 3])
    four.forget()
    four.add(folded(3, 4, 3))
    assert frame(four, 2) == ("state", 4, [3])
