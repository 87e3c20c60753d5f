"""The judge of journals: it accepts what happened, and names the first thing that did not."""

import random
from typing import Any, NamedTuple
from uuid import UUID

import msgspec
import pytest

from engine import chain
from engine.audit import Audit
from engine.commands import CancelAuction, Command, EndAuction, OpenAuction, PlaceBid
from engine.events import KINDS, VERSION, BidPlaced, Ended, Event, Extended, MaximumRaised, Opened, decode, encode
from engine.rejections import Rejection
from tests.engine.support import (
    ADMIN,
    ANNA,
    AUCTION,
    BEN,
    CLEO,
    DORA,
    END,
    MAKER,
    NOW,
    REQUEST,
    SOFT_CLOSE,
    Driver,
    make_terms,
)


class Private(NamedTuple):
    """What a person wrote."""

    salt: bytes
    body: bytes


class Row(NamedTuple):
    """One row of a journal."""

    entity_id: UUID
    seq: int
    at: int
    kind: str
    version: int
    body: bytes
    hash: bytes
    command_id: bytes | None
    private: Private | None = None


class Journal:
    """An auction and the rows that it leaves, as a shard writes them."""

    def __init__(self, **terms: Any) -> None:
        self.driver = Driver()
        self.rows: list[Row] = []
        self._bid_ids = 0
        opening = OpenAuction(auction=AUCTION, maker=MAKER, request_id=REQUEST, terms=make_terms(**terms))
        self.do(opening, NOW, MAKER.bytes + REQUEST.bytes)

    def do(self, command: Command | None, now: int, command_id: bytes | None = None, *, is_sure: bool = True) -> None:
        """Execute what is due, and then the command if there is one; the rules may refuse it if it is not sure."""
        before = len(self.driver.events)
        self.driver.execute_due(now)
        self._append(self.driver.events[before:], now, None)
        if command is not None:
            events = self.driver.submit(command, now)
            if isinstance(events, Rejection):
                assert not is_sure, events
                return
            self._append(events, now, command_id)

    def bid(
        self, bidder: UUID, now: int, *, exactly: int | None = None, up_to: int | None = None, is_sure: bool = True
    ) -> None:
        self._bid_ids += 1
        bid_id = UUID(int=self._bid_ids)
        command = PlaceBid(auction=AUCTION, bidder=bidder, bid_id=bid_id, amount=exactly, max_amount=up_to)
        self.do(command, now, bidder.bytes + bid_id.bytes, is_sure=is_sure)

    def _append(self, events: list[Event], at: int, command_id: bytes | None) -> None:
        for event in events:
            self.rows.append(row_of(event, len(self.rows) + 1, at, command_id))
            command_id = None
        self.rows = sealed(self.rows)


def row_of(event: Event, seq: int, at: int, command_id: bytes | None) -> Row:
    return Row(AUCTION, seq, at, KINDS[type(event)], VERSION, encode(event), b"", command_id)


def sealed(rows: list[Row]) -> list[Row]:
    """The rows numbered and chained anew: what a forger with write access would do."""
    done: list[Row] = []
    before = chain.GENESIS
    for seq, row in enumerate(rows, 1):
        before = chain.link(before, row.entity_id, seq, row.at, row.kind, row.version, row.body)
        done.append(row._replace(seq=seq, hash=before))
    return done


def verdict(rows: list[Row]) -> str | None:
    audit = Audit()
    for row in rows:
        problem = audit.follow(row)
        if problem is not None:
            return problem
    return audit.finish()


def changed(rows: list[Row], index: int, **fields: Any) -> list[Row]:
    """The rows with other fields in one event, chained anew."""
    row = rows[index]
    event = msgspec.structs.replace(decode(row.kind, row.version, row.body), **fields)
    return sealed([*rows[:index], row._replace(body=encode(event)), *rows[index + 1 :]])


def inserted(rows: list[Row], index: int, event: Event, at: int, command_id: bytes | None = None) -> list[Row]:
    return sealed([*rows[:index], row_of(event, 0, at, command_id), *rows[index:]])


@pytest.fixture
def journal() -> Journal:
    """Opened, three bids of which the last extends, and sold: rows 0 opened, 1-3 bids, 4 extended, 5 ended."""
    journal = Journal(soft_close=SOFT_CLOSE)
    journal.bid(ANNA, NOW + 1_000, up_to=3_000)
    journal.bid(BEN, NOW + 2_000, exactly=1_500)
    journal.bid(CLEO, END - 5, up_to=9_000)
    journal.do(None, END + 200_000)
    kinds = [row.kind for row in journal.rows]
    assert kinds == ["opened", "bid_placed", "bid_placed", "bid_placed", "extended", "ended"]
    return journal


def check(rows: list[Row], *words: str) -> None:
    """The audit must find a fault and name it in these words."""
    problem = verdict(rows)
    assert problem is not None
    for word in words:
        assert word in problem, problem


# What happened


def test_a_whole_auction(journal: Journal) -> None:
    assert verdict(journal.rows) is None
    audit = Audit()
    for row in journal.rows:
        assert audit.follow(row) is None
    assert (audit.seq, audit.hash, audit.last_at) == (6, journal.rows[-1].hash, END + 200_000)
    assert audit.state == journal.driver.state


def test_every_beginning_of_a_journal_is_right_but_in_the_middle_of_a_decision(journal: Journal) -> None:
    found = [verdict(journal.rows[:end]) is None for end in range(7)]
    assert found == [True, True, True, True, False, True, True]
    check(journal.rows[:4], "event 5 is missing", "Extended")


def test_a_scheduled_auction_that_opens_and_ends_unsold() -> None:
    journal = Journal(start_time=NOW + 10)
    journal.do(None, NOW + 10)
    journal.do(None, END)
    assert [row.kind for row in journal.rows] == ["scheduled", "opened", "ended"]
    assert verdict(journal.rows) is None


def test_a_reserve_that_a_raised_maximum_reaches() -> None:
    journal = Journal(reserve_price=5_000)
    journal.bid(ANNA, NOW, up_to=2_000)
    journal.bid(ANNA, NOW, up_to=6_000)
    assert [row.kind for row in journal.rows] == ["opened", "bid_placed", "maximum_raised", "reserve_reached"]
    assert verdict(journal.rows) is None
    check(journal.rows[:3], "ReserveReached")


@pytest.mark.parametrize("make", [EndAuction, CancelAuction])
@pytest.mark.parametrize("has_bid", [False, True])
@pytest.mark.parametrize("is_admin", [False, True])
@pytest.mark.parametrize("reason", [None, "The bowl broke."])
def test_what_makers_and_admins_end_and_cancel(
    make: type[EndAuction | CancelAuction], has_bid: bool, is_admin: bool, reason: str | None
) -> None:
    if (is_admin and reason is None) or (has_bid and not is_admin):
        return  # The rules refuse these.
    journal = Journal(soft_close=SOFT_CLOSE)
    if has_bid:
        journal.bid(ANNA, NOW, exactly=1_000)
    caller, role = (ADMIN, "admin") if is_admin else (MAKER, "maker")
    command = make(auction=AUCTION, caller=caller, role=role, request_id=REQUEST, reason=reason)  # type: ignore[arg-type]
    journal.do(command, NOW + 5, caller.bytes + UUID(int=99).bytes)
    assert journal.rows[-1].kind in ("ended", "cancelled")
    assert verdict(journal.rows) is None
    if reason is not None:
        last = journal.rows[-1]._replace(private=Private(command.salt, reason.encode()))
        assert verdict([*journal.rows[:-1], last]) is None
        for text, salt in (("It did not.", command.salt), (reason, b"salt")):
            last = last._replace(private=Private(salt, text.encode()))
            check([*journal.rows[:-1], last], "the text beside it is not the one that was written")


def test_time_given_back_after_an_outage(journal: Journal) -> None:
    given = Extended(END + 60_000, END + 210_000, "outage")
    rows = inserted(journal.rows[:3], 3, given, NOW + 10_000)
    assert verdict(rows) is None
    # The cap on soft closing moves along, or stays.
    cap = END + SOFT_CLOSE.max_extension_ms
    assert given == Extended(END + 60_000, cap + 60_000, "outage")
    for end_time, end_time_max in ((END + 1, cap), (END, cap)):
        assert verdict(inserted(journal.rows[:3], 3, Extended(end_time, end_time_max, "outage"), NOW + 10_000)) is None


def test_time_given_back_where_there_is_no_soft_close() -> None:
    rows = Journal(soft_close=None).rows
    assert verdict(inserted(rows, 1, Extended(END + 1, None, "outage"), NOW + 10)) is None
    check(inserted(rows, 1, Extended(END + 1, END + 5, "outage"), NOW + 10), "an outage gives time")


@pytest.mark.parametrize(
    ("gained", "cap_moved"), [(-1, 0), (-1, -1), (60_000, 59_999), (60_000, 60_001), (60_000, -1), (0, 1), (1, None)]
)
def test_an_outage_only_gives_time(journal: Journal, gained: int, cap_moved: int | None) -> None:
    end_time_max = None if cap_moved is None else END + SOFT_CLOSE.max_extension_ms + cap_moved
    given = Extended(END + gained, end_time_max, "outage")
    rows = inserted(journal.rows[:3], 3, given, NOW + 10_000)
    check(rows, "event 4 (extended): an outage gives time, and moves the cap along")


def test_an_outage_gives_nothing_to_what_is_not_on(journal: Journal) -> None:
    given = Extended(END + 300_000, END + 400_000, "outage")
    check(inserted(journal.rows, 6, given, END + 300_000), "event 7 (extended): nothing brought it about")
    check(sealed([row_of(given, 1, NOW, None)]), "event 1 (extended): nothing brought it about")
    scheduled = Journal(start_time=NOW + 10, soft_close=SOFT_CLOSE).rows
    check(inserted(scheduled, 1, given, NOW + 5), "event 2 (extended): nothing brought it about")


@pytest.mark.parametrize("start_time", [None, NOW + 10])
def test_the_opening_of_another_auction_is_not_taken_over(start_time: int | None) -> None:
    """A forger may have copied a whole auction under an id of its own."""
    journal = Journal(start_time=start_time)
    journal.do(None, NOW + 10)
    other = UUID(int=1)
    copied = sealed([row._replace(entity_id=other) for row in journal.rows])
    check(copied, f"event 1 ({journal.rows[0].kind}) is that of another auction, {AUCTION}")


def test_random_histories(randomness: random.Random) -> None:
    for _ in range(20):
        journal = Journal(soft_close=SOFT_CLOSE, reserve_price=randomness.choice([None, 3_000, 8_000]))
        now = NOW
        for _ in range(60):
            now = randomness.choice([now, now + 1, now + 100_000, max(now, END - 1)])
            limit = randomness.randrange(500, 20_000)
            if randomness.random() < 0.5:
                journal.bid(randomness.choice([ANNA, BEN, CLEO, DORA]), now, exactly=limit, is_sure=False)
            else:
                journal.bid(randomness.choice([ANNA, BEN, CLEO, DORA]), now, up_to=limit, is_sure=False)
        assert verdict(journal.rows) is None


# What did not


def test_a_changed_body_breaks_the_chain(journal: Journal) -> None:
    row = journal.rows[2]
    body = row.body.replace(b'"price":2000', b'"price":2001')
    assert body != row.body
    check([*journal.rows[:2], row._replace(body=body), *journal.rows[3:]], "the hash of event 3")


@pytest.mark.parametrize("field", ["at", "kind", "version", "entity_id", "hash"])
def test_whatever_is_changed_breaks_the_chain(journal: Journal, field: str) -> None:
    row = journal.rows[3]
    other: dict[str, Any] = {
        "at": row.at + 1,
        "kind": "private",
        "version": 2,
        "entity_id": UUID(int=1),
        "hash": bytes(32),
    }
    rows = [*journal.rows[:3], row._replace(**{field: other[field]}), *journal.rows[4:]]
    check(rows, "the hash of event 4")


@pytest.mark.parametrize("index", range(6))
def test_a_dropped_event_is_missed(journal: Journal, index: int) -> None:
    rows = [*journal.rows[:index], *journal.rows[index + 1 :]]
    if index == 5:
        assert verdict(rows) is None  # The last event's hash is in an acknowledgement, or nobody knew of it.
    else:
        check(rows, f"event {index + 1} is missing")


def test_reordered_events_are_noticed(journal: Journal) -> None:
    rows = journal.rows
    check([rows[0], rows[2], rows[1], *rows[3:]], "event 2 is missing")
    check(sealed([rows[0], rows[2], rows[1], *rows[3:]]), "event 2", "the rules")


def test_time_does_not_run_backwards(journal: Journal) -> None:
    rows = sealed([*journal.rows[:2], journal.rows[2]._replace(at=NOW), *journal.rows[3:]])
    check(rows, "event 3 lies before event 2 in time")


@pytest.mark.parametrize(
    ("kind", "version", "body"), [("bid_placed", 9, b"{}"), ("made_up", 1, b"{}"), ("ended", 1, b"no JSON")]
)
def test_what_cannot_be_read_is_named(journal: Journal, kind: str, version: int, body: bytes) -> None:
    row = journal.rows[2]._replace(kind=kind, version=version, body=body)
    check(sealed([*journal.rows[:2], row, *journal.rows[3:]]), "event 3 cannot be read")


@pytest.mark.parametrize(
    ("index", "fields"),
    [
        (2, {"price": 2_500}),
        (2, {"leader": 2}),
        (2, {"minimum": 2_001}),
        (2, {"bids": 3}),
        (2, {"paddle": 3}),
        (2, {"reserve_met": True}),
        (1, {"end_time": END + 1}),
        (3, {"end_time": END}),
        (4, {"end_time": END + 1_000_000}),
        (4, {"end_time_max": None}),
        (4, {"reason": "outage"}),
        (5, {"winner": BEN}),
        (5, {"winner": None}),
        (5, {"paddle": 2}),
        (5, {"price": 1_000}),
        (5, {"outcome": "unsold"}),
        (5, {"ended_at": END}),
    ],
)
def test_a_forged_field_is_not_what_the_rules_say(journal: Journal, index: int, fields: dict[str, Any]) -> None:
    check(changed(journal.rows, index, **fields), f"event {index + 1} ({journal.rows[index].kind})", "the rules say")


def test_a_bid_for_more_than_was_bid_changes_what_follows(journal: Journal) -> None:
    check(changed(journal.rows, 1, max_amount=20_000), "event 4", "the rules say")


def test_a_bid_that_the_rules_refuse(journal: Journal) -> None:
    check(changed(journal.rows, 2, amount=1_200), "event 3", "bid_too_low")


def test_a_command_that_counts_twice(journal: Journal) -> None:
    rows = journal.rows
    again = rows[1]._replace(at=rows[2].at)
    check(sealed([*rows[:2], again, *rows[2:]]), "event 3", "the rules refuse it: max_not_raised")
    # A raise that would be right, but under the id of a bid that counted.
    raised = MaximumRaised(
        bidder=ANNA,
        bid_id=UUID(int=1),
        paddle=1,
        amount=None,
        max_amount=4_000,
        price=1_000,
        minimum=1_500,
        end_time=END,
    )
    command_id = ANNA.bytes + UUID(int=1).bytes
    check(inserted(rows[:2], 2, raised, rows[1].at, command_id), "event 3", "its command was counted before")


def test_a_raise_filed_under_another_bid() -> None:
    journal = Journal()
    journal.bid(ANNA, NOW, up_to=2_000)
    journal.bid(ANNA, NOW, up_to=3_000)
    assert verdict(journal.rows) is None
    raise_ = journal.rows[2]._replace(command_id=ANNA.bytes + UUID(int=77).bytes)
    check(sealed([*journal.rows[:2], raise_]), "event 3 (maximum_raised)", "not filed under its bidder's bid_id")
    check(sealed([*journal.rows[:2], raise_._replace(command_id=None)]), "not filed under")


def test_a_text_beside_an_event_that_has_none(journal: Journal) -> None:
    row = journal.rows[2]._replace(private=Private(b"", b""))
    check([*journal.rows[:2], row, *journal.rows[3:]], "event 3 (bid_placed)", "the text beside it")


def test_a_missing_extension(journal: Journal) -> None:
    check(sealed([*journal.rows[:4], journal.rows[5]]), "event 5 (ended)", "Extended")


def test_an_extension_that_nothing_brought_about(journal: Journal) -> None:
    extended = Extended(END + 1_000, END + 150_000, "soft_close")
    check(inserted(journal.rows, 2, extended, journal.rows[1].at), "event 3 (extended)", "nothing brought it about")


def test_an_auction_that_ended_early(journal: Journal) -> None:
    early = journal.rows[3].at
    rows = changed([*journal.rows[:5], journal.rows[5]._replace(at=early)], 5, ended_at=early)
    check(rows, "event 6 (ended)", "the rules say None")


def test_an_auction_that_its_maker_ended_for_a_friend(journal: Journal) -> None:
    at = journal.rows[1].at
    ended = Ended(outcome="sold", winner=ANNA, paddle=1, price=1_000, by="maker", ended_at=at)
    check(inserted(journal.rows[:2], 2, ended, at), "event 3 (ended)", "forbidden")


def test_a_bid_after_the_end(journal: Journal) -> None:
    late = BidPlaced(
        bidder=DORA,
        bid_id=UUID(int=50),
        paddle=4,
        amount=50_000,
        max_amount=None,
        price=50_000,
        leader=4,
        bids=4,
        minimum=50_500,
        end_time=END + 89_995,
        reserve_met=None,
    )
    command_id = DORA.bytes + UUID(int=50).bytes
    check(inserted(journal.rows, 6, late, END + 300_000, command_id), "event 7 (bid_placed)", "ended")
    # And one that came before the end was written, but after it was due.
    check(inserted(journal.rows, 5, late, END + 100_000, command_id), "event 6 (bid_placed)", "something was due at")


def test_an_auction_begins_with_its_opening(journal: Journal) -> None:
    check(sealed(journal.rows[1:]), "event 1 (bid_placed)", "not_found")
    check(sealed(journal.rows[4:]), "event 1", "nothing brought it about")
    check(sealed(journal.rows[5:]), "event 1", "the rules say None")


def test_an_auction_opens_once(journal: Journal) -> None:
    terms = make_terms(start_time=NOW, soft_close=SOFT_CLOSE)
    check(inserted(journal.rows, 1, Opened(AUCTION, MAKER, terms), NOW), "event 2 (opened)", "the rules say None")


def test_terms_that_the_rules_refuse(journal: Journal) -> None:
    check(changed(journal.rows, 0, terms=make_terms(start_time=NOW, starting_price=0)), "event 1", "terms_invalid")
    check(changed(journal.rows, 0, terms=make_terms(start_time=NOW + 5)), "event 1", "the rules say")
