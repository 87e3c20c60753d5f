from collections.abc import Iterable
from uuid import UUID

import msgspec
import pytest

from actors.directory import slot_of
from actors.entities import Entity, Recorded, bid_accepted, decode_state
from actors.journal import Loaded, Row, SnapshotRow
from engine import chain
from engine.auction import decide
from engine.commands import Command
from engine.limits import RESUME_EVENTS_MAX, SLOTS
from engine.rejections import Rejection
from tests.engine.support import ANNA, AUCTION, BEN, END, MAKER, NOW, SOFT_CLOSE
from tests.support.shards import bid, opening


class Story:
    """An entity to which things happen, and the rows that this makes."""

    def __init__(self) -> None:
        self.entity = Entity(AUCTION)
        self.rows: list[Row] = []
        self.recorded: list[Recorded] = []

    def do(self, command: Command, now: int = NOW, command_id: bytes | None = None) -> Recorded:
        events = decide(self.entity.state, command, now)
        assert not isinstance(events, Rejection), events
        made = []
        for event in events:
            recorded, row = self.entity.record(event, now, command_id, None)
            command_id = None
            made.append(recorded)
            self.rows.append(row)
        self.recorded += made
        return made[0]


@pytest.fixture
def story() -> Story:
    story = Story()
    story.do(opening(soft_close=SOFT_CLOSE), command_id=b"open")
    story.do(bid(ANNA, up_to=2_000), NOW + 1, b"first")
    story.do(bid(BEN, 1_500, bid_id=2), END - 1, b"second")
    return story


def loaded(story: Story, snapshot: SnapshotRow | None = None, after: int = 0) -> Loaded:
    commands = [(row.command_id, row.seq) for row in story.rows if row.command_id is not None]
    return Loaded(snapshot, story.rows[after:], commands)


def told(recorded: Recorded | None) -> tuple[object, ...] | None:
    """All that an event with its place says."""
    if recorded is None:
        return None
    return recorded.seq, recorded.at, recorded.event, recorded.hash, recorded.reason, recorded.public


def all_told(recorded: Iterable[Recorded] | None) -> list[tuple[object, ...] | None]:
    assert recorded is not None
    return [told(one) for one in recorded]


def same(one: Entity, other: Entity) -> bool:
    names = ("id", "slot", "seq", "hash", "last_at", "accepted", "state")
    return all(getattr(one, name) == getattr(other, name) for name in names)


def test_rows_are_numbered_and_chained(story: Story) -> None:
    assert [(row.seq, row.kind, row.at) for row in story.rows] == [
        (1, "opened", NOW),
        (2, "bid_placed", NOW + 1),
        (3, "bid_placed", END - 1),
        (4, "extended", END - 1),
    ]
    before = chain.GENESIS
    for row in story.rows:
        before = chain.link(before, AUCTION, row.seq, row.at, row.kind, row.version, row.body)
        assert row.hash == before
    assert [row.command_id for row in story.rows] == [b"open", b"first", b"second", None]
    assert story.entity.slot == slot_of(AUCTION) < SLOTS


def test_it_is_restored_from_all_its_rows(story: Story) -> None:
    restored = Entity.restore(AUCTION, loaded(story))
    assert same(restored, story.entity)
    assert all_told(restored.recent) == all_told(story.recorded)
    assert restored.saved_seq == 0


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_it_is_restored_from_a_snapshot_and_what_came_after(at: int) -> None:
    story = Story()
    story.do(opening(soft_close=SOFT_CLOSE), command_id=b"open")
    if at > 1:
        story.do(bid(ANNA, up_to=2_000), NOW + 1, b"first")
    if at > 2:
        story.do(bid(BEN, 1_500, bid_id=2), END - 1, b"second")
    snapshot = story.entity.snapshot_row()
    assert story.entity.saved_seq == snapshot.seq == story.entity.seq
    frozen = msgspec.msgpack.encode(decode_state(snapshot.body))
    story.do(bid(BEN, 5_000, bid_id=3), END + 1, b"third")
    assert msgspec.msgpack.encode(decode_state(snapshot.body)) == frozen
    for after in range(snapshot.seq + 1):
        restored = Entity.restore(AUCTION, loaded(story, snapshot, after))
        assert same(restored, story.entity)
        assert all_told(restored.recent) == all_told(story.recorded[after:])
        assert restored.saved_seq == snapshot.seq


def test_nothing_loaded_is_an_entity_to_which_nothing_happened() -> None:
    restored = Entity.restore(AUCTION, Loaded(None, [], []))
    assert same(restored, Entity(AUCTION))
    assert restored.state is None
    assert restored.you(ANNA) is None


def test_a_gap_or_an_event_of_the_future_is_not_passed_over(story: Story) -> None:
    without = Loaded(None, [story.rows[0], *story.rows[2:]], [])
    with pytest.raises(AssertionError, match="gap"):
        Entity.restore(AUCTION, without)
    with pytest.raises(ValueError, match="no reader"):
        Entity.restore(AUCTION, Loaded(None, [story.rows[0]._replace(version=9)], []))


def test_an_event_is_encoded_once_for_all_who_ask(story: Story) -> None:
    recorded = story.recorded[1]
    assert recorded.public is recorded.public
    assert msgspec.json.decode(recorded.public)["seq"] == 2


def test_recall_and_missed_know_what_is_in_memory(story: Story) -> None:
    entity = Entity.restore(AUCTION, loaded(story, None))
    assert [told(entity.recall(seq)) for seq in range(6)] == [None, *all_told(story.recorded), None]
    assert all_told(entity.missed(0)) == all_told(story.recorded)
    assert all_told(entity.missed(3)) == all_told(story.recorded[3:])
    assert entity.missed(4) == entity.missed(5) == []
    assert all_told(entity.missed(None)) == all_told(story.recorded)
    assert Entity(AUCTION).recall(1) is None

    snapshot = story.entity.snapshot_row()
    story.do(bid(ANNA, up_to=9_000, bid_id=9), END + 1)
    tail = Entity.restore(AUCTION, loaded(story, snapshot, 4))
    assert tail.recall(4) is None
    assert told(tail.recall(5)) == told(story.recorded[4])
    assert tail.missed(3) == tail.missed(4)
    assert all_told(tail.missed(4)) == all_told(story.recorded[4:])


def test_only_so_many_events_stay_in_memory(story: Story) -> None:
    for number in range(RESUME_EVENTS_MAX):
        story.do(bid(ANNA, up_to=10_000 + number, bid_id=10 + number), END + 1)
    last = story.entity.seq
    assert len(story.entity.recent) == RESUME_EVENTS_MAX
    assert story.entity.missed(last - RESUME_EVENTS_MAX) == story.recorded[-RESUME_EVENTS_MAX:]
    assert story.entity.missed(last - RESUME_EVENTS_MAX - 1) == story.recorded[-RESUME_EVENTS_MAX:]
    assert story.entity.recall(last - RESUME_EVENTS_MAX) is None
    assert story.entity.recall(last - RESUME_EVENTS_MAX + 1) == story.recorded[-RESUME_EVENTS_MAX]


def test_a_bid_is_acknowledged_as_it_was() -> None:
    story = Story()
    story.do(opening(reserve_price=3_000))
    first = bid_accepted(story.do(bid(ANNA, up_to=2_000)))
    assert (first.seq, first.outcome, first.price, first.paddle, first.max_amount, first.minimum, first.end_time) == (
        2,
        "leading",
        1_000,
        1,
        2_000,
        1_500,
        END,
    )
    second = bid_accepted(story.do(bid(BEN, 1_700, bid_id=2), NOW + 5))
    assert (second.outcome, second.price, second.paddle, second.max_amount, second.at) == (
        "outbid",
        2_000,
        2,
        1_700,
        NOW + 5,
    )
    raised = bid_accepted(story.do(bid(ANNA, 4_000, bid_id=3)))
    assert (raised.outcome, raised.price, raised.paddle, raised.max_amount, raised.hash) == (
        "leading",
        3_000,
        1,
        4_000,
        story.rows[3].hash,
    )


def test_everybody_sees_their_own(story: Story) -> None:
    entity = story.entity
    anna, ben = entity.you(ANNA), entity.you(BEN)
    assert anna is not None
    assert (anna.paddle, anna.max_amount, anna.is_leading) == (1, 2_000, True)
    assert ben is not None
    assert (ben.paddle, ben.max_amount, ben.is_leading) == (2, 1_500, False)
    assert entity.you(MAKER) is None
    assert entity.you(None) is None
    view = entity.view(BEN)
    assert (view.seq, view.you, view.maker, view.reserve_price, view.ended_at) == (4, ben, MAKER, None, None)
    row = entity.row()
    assert (row.entity_id, row.owner_id, row.status, row.kind) == (AUCTION, MAKER, "active", "auction")
    assert row.due_at == END + 89_999
    assert row.created_at == NOW


def test_slots_are_for_ever() -> None:
    # Changing the function would send auctions to shards that know nothing of them.
    assert [slot_of(UUID(int=number)) for number in (0, 1, 2)] == [853, 963, 633]
