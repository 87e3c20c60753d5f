"""The judge of a run: it knows what clients saw and what the journal holds, and nothing of how it came about.

What an auction should have come to is worked out by the oracle, which shares no rule with the engine; the engine is
used for reading only (stored events, hashes, the public form of an event). A history tells of everybody who bids in an
auction of which it tells at all.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple
from uuid import UUID

from actors.journal import Row
from engine import chain
from engine.commands import Terms
from engine.events import (
    BidPlaced,
    Cancelled,
    Ended,
    Event,
    Extended,
    MaximumRaised,
    Opened,
    ReserveReached,
    Scheduled,
    decode,
)
from engine.public import encode_public
from tests.engine.oracle import AMOUNT_MAX, Course, Rules, SoftCloseRule, end_after_outage
from tests.simulation.history import (
    Answered,
    Asked,
    Connected,
    Events,
    Message,
    Notice,
    Presence,
    Record,
    Sent,
    Standings,
    State,
    Subscribed,
    Subscribing,
    Verdict,
)
from tests.simulation.notices import Hearing
from tests.simulation.streams import Stream


class Violation(NamedTuple):
    """Something that must never be."""

    rule: str
    auction: UUID | None
    seq: int | None
    sentence: str

    def __str__(self) -> str:
        where = "" if self.auction is None else f" auction {self.auction}" + (f", seq {self.seq}" if self.seq else "")
        return f"[{self.rule}]{where}: {self.sentence}"


class Outage(NamedTuple):
    """From its last sign of life (`down`) until it was `back`, the shard of these auctions could take no bids."""

    auctions: Container[UUID]
    down: int
    back: int


def check(
    history: Iterable[Record],
    rows: Iterable[Row],
    *,
    true_time: bool = False,
    outages: Sequence[Outage] | None = None,
    taken: Mapping[tuple[UUID, bytes], int] | None = None,
    clock_error_ms: int = 0,
    is_calm: bool = False,
    watching: Collection[tuple[str, int, UUID]] = (),
) -> list[Violation]:
    """All that is wrong; an empty list if nothing is.

    `true_time`: the records of different clients stand in the order of time, too, as one process wrote them. `outages`:
    all that there were, if they are known; `taken`: when each bid was last taken up, by its auction and command. By
    `clock_error_ms` a shard's clock may differ from the one that measured the outages. `is_calm`: nothing was broken.
    `watching`: who still watched what at the end, by client and connection, long enough for all of them to be counted.
    """
    auctions = {entity_id: _Auction(entity_id, of_one) for entity_id, of_one in _by_auction(rows).items()}
    violations: list[Violation] = []
    for auction in auctions.values():
        violations += _check_journal(auction)
        if outages is not None and auction.is_played:
            violations += _outages_paid(auction, outages, clock_error_ms)
            violations += _no_deadline_in_outage(auction, outages, clock_error_ms)
    seen = _Seen(auctions, is_one_order=true_time)
    for record in history:
        seen.take(record)
    violations += seen.violations
    for request in seen.requests.values():
        for rule in (_acks_are_journaled, _refused_stays_out, _no_refusal_after_ack, _answers_were_asked, _real_time):
            violations += rule(request)
        if isinstance(request.sends[0], Sent):
            violations += _refusals_were_right(request)
            violations += _was_in_time(request, taken or {}, clock_error_ms)
    violations += _bids_were_sent(auctions, seen)
    violations += _sent_in_order(seen)
    violations += _told_what_concerns_them(auctions, seen, is_calm=is_calm)
    violations += _viewers_were_counted(seen, watching)
    return violations


# One auction's journal


class _Standing(NamedTuple):
    """What the oracle says of an auction right after one event."""

    status: str
    price: int
    minimum: int
    bids: int
    leader: str | None
    paddle: int | None
    """The leader's."""
    maximum: int
    """The leader's."""
    reserve_met: bool | None
    end_time: int
    outcome: str | None


class _Offer(NamedTuple):
    """The most that somebody would pay, from an event on."""

    seq: int
    paddle: int
    max_amount: int


class _Auction:
    """An auction's journal, and what can be said of it."""

    def __init__(self, entity_id: UUID, rows: list[Row]) -> None:
        self.id = entity_id
        self.rows = rows
        self.events: list[Event] = []
        self.standings: list[_Standing] = []
        """After each event, as far as the journal is right."""
        self.rules: Rules | None = None
        self.terms: Terms | None = None
        self.commands: dict[bytes, list[int]] = defaultdict(list)
        """The `seq` of each event that a command brought about directly."""
        self.offers: dict[UUID, list[_Offer]] = defaultdict(list)
        self._public: dict[int, Message] = {}
        for row in rows:
            if row.command_id is not None:
                self.commands[row.command_id].append(row.seq)

    @property
    def is_played(self) -> bool:
        """Whether the oracle agrees with all of it."""
        return len(self.standings) == len(self.rows)

    def public(self, seq: int) -> Message:
        """An event as everybody may see it."""
        found = self._public.get(seq)
        if found is None:
            row = self.rows[seq - 1]
            reason = None if row.private is None else row.private.body.decode()
            encoded = encode_public(seq, row.at, self.events[seq - 1], row.hash, reason)
            found = self._public[seq] = json.loads(encoded)
        return found

    def snapshot(self, seq: int) -> Message:
        """The auction as everybody may see it after an event."""
        terms, now = self.terms, self.standings[seq - 1]
        assert terms is not None
        return {
            "auction": str(self.id),
            "story": None if terms.story is None else str(terms.story),
            "title": terms.title,
            "currency": terms.currency,
            "status": now.status,
            "starting_price": terms.starting_price,
            "price": now.price,
            "minimum": now.minimum,
            "bids": now.bids,
            "leader": now.paddle,
            "reserve_met": now.reserve_met,
            "start_time": terms.start_time,
            "end_time": now.end_time,
            "outcome": now.outcome,
        }

    def you(self, viewer: UUID | None, seq: int) -> Message | None:
        """How somebody stood after an event; None for one who had not bid."""
        offers = [] if viewer is None else [offer for offer in self.offers.get(viewer, ()) if offer.seq <= seq]
        if not offers:
            return None
        paddle, is_leading = offers[-1].paddle, self.standings[seq - 1].leader == str(viewer)
        return {"paddle": paddle, "max_amount": offers[-1].max_amount, "is_leading": is_leading}


def _by_auction(rows: Iterable[Row]) -> dict[UUID, list[Row]]:
    found: dict[UUID, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.entity_id].append(row)
    for of_one in found.values():
        of_one.sort(key=lambda row: row.seq)
    return found


def _check_journal(auction: _Auction) -> Iterator[Violation]:
    """The journal alone. What cannot be read is not judged any further."""
    problems = list(_sequence(auction)) or list(_readable(auction))
    yield from problems
    if problems:
        return
    yield from _times(auction)
    yield from _chain(auction)
    yield from _commands(auction)
    yield from _prices(auction)
    yield from _Game(auction).play()


def _sequence(auction: _Auction) -> Iterator[Violation]:
    """`seq` counts 1, 2, 3…"""
    for expected, row in enumerate(auction.rows, start=1):
        if row.seq != expected:
            yield Violation("sequence", auction.id, row.seq, f"event {expected} was expected here")
            return


def _readable(auction: _Auction) -> Iterator[Violation]:
    for row in auction.rows:
        try:
            auction.events.append(decode(row.kind, row.version, row.body))
        except ValueError as error:
            yield Violation("readable", auction.id, row.seq, f"the event cannot be read: {error}")
            return


def _times(auction: _Auction) -> Iterator[Violation]:
    """`at` never falls."""
    last = 0
    for row in auction.rows:
        if row.at < last:
            yield Violation("time", auction.id, row.seq, f"it is of {row.at}, the event before it of {last}")
        last = row.at


def _chain(auction: _Auction) -> Iterator[Violation]:
    """Each hash covers its event and the hash before it."""
    last = chain.GENESIS
    for row in auction.rows:
        expected = chain.link(last, row.entity_id, row.seq, row.at, row.kind, row.version, row.body)
        if row.hash != expected:
            yield Violation("chain", auction.id, row.seq, f"its hash is {row.hash.hex()} instead of {expected.hex()}")
            return
        last = row.hash


def _commands(auction: _Auction) -> Iterator[Violation]:
    """No command counts twice, and a bid is filed under its bidder and its id."""
    for command_id, seqs in auction.commands.items():
        if len(seqs) > 1:
            yield Violation("command", auction.id, seqs[1], f"command {command_id.hex()} counted at {seqs[0]} before")
    for row, event in zip(auction.rows, auction.events, strict=True):
        if isinstance(event, BidPlaced | MaximumRaised) and row.command_id != _bid_command(event.bidder, event.bid_id):
            yield Violation("command", auction.id, row.seq, f"bid {event.bid_id} is filed under {row.command_id!r}")


def _prices(auction: _Auction) -> Iterator[Violation]:
    """Prices never fall, and bids count up by one."""
    price = bids = 0
    for row, event in zip(auction.rows, auction.events, strict=True):
        if isinstance(event, BidPlaced | MaximumRaised | ReserveReached | Ended) and event.price is not None:
            if event.price < price:
                yield Violation("price", auction.id, row.seq, f"the price falls from {price} to {event.price}")
            price = event.price
        if isinstance(event, BidPlaced):
            bids += 1
            if event.bids != bids:
                yield Violation("price", auction.id, row.seq, f"this is bid {bids}, but it says {event.bids}")


class _Game:
    """An auction's events, held beside the oracle's course one after another, until they differ."""

    def __init__(self, auction: _Auction) -> None:
        self._auction = auction
        self._course: Course | None = None
        self._status = "none"
        self._outcome: str | None = None
        self._next: Event | None = None
        """What the last event brings with it."""
        self._at = 0
        """Of the event at hand."""

    def play(self) -> Iterator[Violation]:
        auction = self._auction
        for row, event in zip(auction.rows, auction.events, strict=True):
            problem = self._takes_its_turn(row, event) or self._happens(row, event)
            if problem is not None:
                rule, sentence = problem
                yield Violation(rule, auction.id, row.seq, f"{sentence} ({row.kind} at {row.at})")
                return
            self._at = row.at
            if isinstance(event, BidPlaced | MaximumRaised):
                auction.offers[event.bidder].append(_Offer(row.seq, event.paddle, _offered(event)))
            auction.standings.append(self._standing())
        if self._next is not None:
            yield Violation(*_missing(self._next, auction.id, len(auction.rows) + 1))

    def _takes_its_turn(self, row: Row, event: Event) -> tuple[str, str] | None:
        """What a bid brings with it comes right after it, at the same moment."""
        expected = self._next
        if expected is None:
            return None
        if event != expected or row.at != self._at or row.command_id is not None:
            rule, _, _, sentence = _missing(expected, self._auction.id, row.seq)
            return rule, sentence
        return None

    def _happens(self, row: Row, event: Event) -> tuple[str, str] | None:
        if self._status in ("ended", "cancelled"):
            return "over", f"nothing happens in an auction that is {self._status}"
        if isinstance(event, Scheduled | Opened):
            return self._begins(row, event)
        if self._course is None:
            return "oracle", "an auction begins with its terms"
        if self._next is not None:
            self._next = None
            return None
        match event:
            case BidPlaced():
                return self._is_bid_on(self._course, row, event)
            case MaximumRaised():
                return self._is_raised(self._course, row, event)
            case Extended():
                return self._is_extended(self._course, row, event)
            case Ended():
                return self._ends(self._course, row, event)
            case Cancelled():
                return self._is_cancelled(self._course, row, event)
        return "oracle", "nothing brought it about"

    def _begins(self, row: Row, event: Scheduled | Opened) -> tuple[str, str] | None:
        if event.auction != row.entity_id:
            return "oracle", f"it is about the auction {event.auction}"
        rules = _rules_of(event)
        if isinstance(event, Scheduled):
            if self._status != "none" or row.at >= rules.start_time:
                return "hours", f"an auction is scheduled once, before its start at {rules.start_time}"
            self._status = "scheduled"
        else:
            if self._status == "active" or row.at < rules.start_time:
                return "hours", f"an auction opens once, and not before its start at {rules.start_time}"
            if self._status == "scheduled" and event.terms != self._auction.terms:
                return "oracle", "it opens under the terms under which it was scheduled"
            self._status = "active"
        self._auction.terms, self._auction.rules = event.terms, rules
        self._course = Course(rules)
        return None

    def _is_bid_on(self, course: Course, row: Row, event: BidPlaced) -> tuple[str, str] | None:
        bidder, end_time = str(event.bidder), course.end_time
        refusal = self._not_open(course, row) or self._refusal(course, event)
        if refusal is not None:
            return refusal
        if bidder == course.leader:
            return "oracle", f"bid {event.bid_id} is the leader's own: a raise of its maximum"
        course.bid(row.at, bidder, _offered(event), is_exact=event.amount is not None)
        if event.end_time != course.end_time:
            return "extension", f"after bid {event.bid_id} the end is {course.end_time}, not {event.end_time}"
        if course.end_time != end_time:
            cap = None if course.rules.soft_close is None else course.cap
            self._next = Extended(course.end_time, cap, "soft_close")
        assert course.leader is not None
        return _compared(
            f"of bid {event.bid_id}",
            paddle=(course.paddles[bidder], event.paddle),
            price=(course.price, event.price),
            leader=(course.paddles[course.leader], event.leader),
            bids=(course.bids, event.bids),
            minimum=(course.minimum(), event.minimum),
            reserve_met=(course.reserve_met(), event.reserve_met),
        )

    def _is_raised(self, course: Course, row: Row, event: MaximumRaised) -> tuple[str, str] | None:
        bidder, price = str(event.bidder), course.price
        refusal = self._not_open(course, row) or self._refusal(course, event)
        if refusal is not None:
            return refusal
        if bidder != course.leader:
            return "oracle", f"bid {event.bid_id} is that of somebody who does not lead: no raise"
        course.bid(row.at, bidder, _offered(event), is_exact=event.amount is not None)
        if course.price != price:
            self._next = ReserveReached(course.price, course.minimum())
        return _compared(
            f"of the raise {event.bid_id}",
            paddle=(course.paddles[bidder], event.paddle),
            price=(course.price, event.price),
            minimum=(course.minimum(), event.minimum),
            end_time=(course.end_time, event.end_time),
        )

    def _is_extended(self, course: Course, row: Row, event: Extended) -> tuple[str, str] | None:
        """What moves the end here is an outage; the bids' own extensions stand right after them."""
        if event.reason != "outage":
            return "extension", "no bid moves the end here"
        if self._status != "active":
            return "outage", "an outage is paid back to an auction that is active"
        if event.end_time <= course.end_time or event.end_time < row.at:
            return "outage", f"it moves the end from {course.end_time} to {event.end_time}, which gives no time"
        course.move_end(event.end_time)
        cap = None if course.rules.soft_close is None else course.cap
        return None if event.end_time_max == cap else ("outage", f"the cap is {event.end_time_max} instead of {cap}")

    def _ends(self, course: Course, row: Row, event: Ended) -> tuple[str, str] | None:
        if self._status != "active":
            return "hours", "it ends before it began"
        if event.by == "deadline":
            if row.at < course.end_time:
                return "early", f"its end is only at {course.end_time}"
        elif row.at >= course.end_time:
            return "hours", f"its end came first, at {course.end_time}"
        if event.by == "maker" and course.leader is not None and course.rules.soft_close is not None:
            return "oracle", "once there is a bid its maker may not end it"
        if event.by == "admin" and event.reason_hash is None:
            return "oracle", "an admin gives a reason"
        self._status, self._outcome = "ended", course.outcome()
        is_sold = self._outcome == "sold" and course.leader is not None
        return _compared(
            "of the end",
            outcome=(self._outcome, event.outcome),
            winner=(course.leader if is_sold else None, None if event.winner is None else str(event.winner)),
            paddle=(course.paddles[course.leader or ""] if is_sold else None, event.paddle),
            price=(course.price if is_sold else None, event.price),
            ended_at=(row.at, event.ended_at),
        )

    def _is_cancelled(self, course: Course, row: Row, event: Cancelled) -> tuple[str, str] | None:
        due = course.end_time if self._status == "active" else course.rules.start_time
        if row.at >= due:
            return "hours", f"what was due at {due} came first"
        if event.by == "maker" and course.leader is not None:
            return "oracle", "once there is a bid its maker may not cancel it"
        if event.by != "maker" and event.reason_hash is None:
            return "oracle", "an admin gives a reason"
        self._status = "cancelled"
        return _compared("of the cancellation", ended_at=(row.at, event.ended_at))

    def _not_open(self, course: Course, row: Row) -> tuple[str, str] | None:
        """A bid counts from the start on and before the end, as it stands then."""
        if self._status == "active" and course.rules.start_time <= row.at < course.end_time:
            return None
        return "hours", f"bids count from {course.rules.start_time} on and before {course.end_time}"

    def _refusal(self, course: Course, event: BidPlaced | MaximumRaised) -> tuple[str, str] | None:
        code = course.refusal(str(event.bidder), _offered(event))
        return None if code is None else ("oracle", f"bid {event.bid_id} of {_offered(event)} is refused: {code}")

    def _standing(self) -> _Standing:
        course = self._course
        assert course is not None
        leader = course.leader
        return _Standing(
            self._status,
            course.price,
            course.minimum(),
            course.bids,
            leader,
            None if leader is None else course.paddles[leader],
            0 if leader is None else course.maximums[leader],
            course.reserve_met(),
            course.end_time,
            self._outcome,
        )


def _rules_of(event: Scheduled | Opened) -> Rules:
    terms, soft_close = event.terms, event.terms.soft_close
    rule = None
    if soft_close is not None:
        rule = SoftCloseRule(
            soft_close.window_ms, soft_close.extension_ms, soft_close.max_extension_ms, soft_close.anchor
        )
    assert terms.start_time is not None
    return Rules(
        maker=str(event.maker),
        currency=terms.currency,
        starting_price=terms.starting_price,
        reserve_price=terms.reserve_price,
        increments=[(step.from_price, step.increment) for step in terms.increments],
        start_time=terms.start_time,
        end_time=terms.end_time,
        soft_close=rule,
    )


def _compared(what: str, **fields: tuple[object, object]) -> tuple[str, str] | None:
    """The first field in which the journal differs from what is expected."""
    for name, (expected, found) in fields.items():
        if expected != found:
            return "oracle", f"`{name}` {what} should be {expected}, not {found}"
    return None


def _missing(event: Event, auction: UUID, seq: int) -> Violation:
    rule = "extension" if isinstance(event, Extended) else "oracle"
    return Violation(rule, auction, seq, f"{event} must come here")


def _offered(event: BidPlaced | MaximumRaised) -> int:
    offered = event.amount if event.amount is not None else event.max_amount
    assert offered is not None
    return offered


# Outages


def _outages_paid(auction: _Auction, outages: Sequence[Outage], clock_error_ms: int) -> Iterator[Violation]:
    """Each outage that came near an auction's end is paid back, once and exactly; and nothing else is."""
    unexplained = [
        row.seq
        for row, event in zip(auction.rows, auction.events, strict=True)
        if isinstance(event, Extended) and event.reason == "outage"
    ]
    # The latest first: an event that came late may seem to belong to any before it.
    for outage in sorted(outages, key=lambda one: one.back, reverse=True):
        if auction.id not in outage.auctions:
            continue
        name = f"the outage from {outage.down} to {outage.back}"
        paid = next((seq for seq in unexplained if _back_of(auction, outage, seq) == auction.rows[seq - 1].at), None)
        if paid is not None:
            unexplained.remove(paid)
            expected, found = _end_after(auction, outage, paid - 1), auction.standings[paid - 1].end_time
            if found != expected:
                yield Violation("outage", auction.id, paid, f"{name} moves the end to {expected}, not to {found}")
            continue
        # Which events came before its end is not known better than the clocks are; and time may be paid ahead.
        ahead = max(one.back for one in outages if one.down <= outage.down and auction.id in one.auctions)
        least = sum(row.at < outage.back - clock_error_ms for row in auction.rows)
        most = sum(row.at <= max(outage.back, ahead) + clock_error_ms for row in auction.rows)
        ends = [_end_after(auction, outage, seq) for seq in range(least, most + 1)]
        if all(end is not None for end in ends):
            yield Violation("outage", auction.id, least, f"{name} should have moved the end to {ends[0]}")
    for seq in unexplained:
        yield Violation(
            "outage", auction.id, seq, f"no outage that is not paid back ends at {auction.rows[seq - 1].at}"
        )


def _back_of(auction: _Auction, outage: Outage, seq: int) -> int:
    """When an outage is over for an auction, if `seq` pays it back: not before the auction's last event."""
    return max(outage.back, auction.rows[seq - 2].at)


def _end_after(auction: _Auction, outage: Outage, seq: int) -> int | None:
    """Where an outage moves the end that stood after `seq`; None if it does not."""
    rules, standing = auction.rules, auction.standings[seq - 1] if seq > 0 else None
    if rules is None or standing is None:
        return None
    back = _back_of(auction, outage, seq + 1)
    # On return it opens first, if its start fell into the outage.
    is_open = standing.status == "active" or (standing.status == "scheduled" and rules.start_time <= back)
    return end_after_outage(rules, standing.end_time, outage.down, back) if is_open else None


def _no_deadline_in_outage(auction: _Auction, outages: Sequence[Outage], clock_error_ms: int) -> Iterator[Violation]:
    """What comes due while a shard is out is not executed before it is back."""
    for row, event in zip(auction.rows, auction.events, strict=True):
        if isinstance(event, Ended) and event.by == "deadline":
            due = auction.standings[row.seq - 1].end_time
        elif isinstance(event, Opened) and row.seq > 1 and auction.rules is not None:
            due = auction.rules.start_time
        else:
            continue
        for outage in outages:
            is_inside = outage.down + clock_error_ms < due <= row.at < outage.back - clock_error_ms
            if is_inside and auction.id in outage.auctions:
                sentence = f"{row.kind} at {row.at}, in the outage from {outage.down} to {outage.back}"
                yield Violation("outage", auction.id, row.seq, sentence)


# What clients saw


class _Request:
    """A command under one id: each time that it was sent, and each answer, with their places in the history."""

    def __init__(self, auction: _Auction, command_id: bytes, floor: int) -> None:
        self.auction = auction
        self.command_id = command_id
        self.floor = floor
        """The last `seq` that anybody who counts had seen when it was sent first."""
        self.sends: list[Sent | Asked] = []
        self.sent_at: list[int] = []
        self.answers: list[Verdict | Answered] = []
        self.answered_at: list[int] = []

    @property
    def seqs(self) -> list[int]:
        """Where it stands in the journal."""
        return self.auction.commands.get(self.command_id, [])

    def violated(self, rule: str, record: Sent | Asked | Verdict | Answered, sentence: str) -> Violation:
        what = f"bid {record.bid_id}" if isinstance(record, Sent | Verdict) else f"the request {record.request_id}"
        seq = self.seqs[0] if self.seqs else None
        return Violation(rule, self.auction.id, seq, f"{what} of client {record.client} {sentence}")


class _Seen:
    """The history, read once: requests with their answers, and each client's streams."""

    def __init__(self, auctions: dict[UUID, _Auction], *, is_one_order: bool) -> None:
        self.violations: list[Violation] = []
        self.requests: dict[tuple[UUID, bytes], _Request] = {}
        self.sent: dict[tuple[str, int, UUID], list[_Request]] = defaultdict(list)
        """What each connection sent to an auction, in order."""
        self.told: dict[tuple[str, int], list[Standings | Notice]] = defaultdict(list)
        """What each connection was told on the topic `me`, in order."""
        self.users: dict[tuple[str, int], UUID | None] = {}
        """Who is on each connection, in order."""
        self.streams: dict[tuple[str, int, UUID], Stream] = {}
        """What each connection was shown of an auction."""
        self._auctions = auctions
        self._is_one_order = is_one_order
        self._place = 0
        self._bids: dict[tuple[str, UUID, UUID], _Request] = {}
        self._known: dict[tuple[str, UUID], int] = {}
        self._asked: dict[tuple[str, int, UUID], int] = {}

    def take(self, record: Record) -> None:
        self._place += 1
        match record:
            case Events() | State() | Subscribed() | Presence():
                self._listen(record)
            case Sent():
                command_id = _bid_command(record.bidder, record.bid_id)
                request = self._send(record, command_id)
                self._bids[record.client, record.auction, record.bid_id] = request
                self.sent[record.client, record.connection, record.auction].append(request)
            case Verdict():
                self._judge(record)
            case Subscribing():
                stream = record.client, record.connection, record.auction
                self._asked[stream] = self._floor(record.client, record.auction)
            case Connected():
                self.users[record.client, record.connection] = record.user
            case Standings() | Notice():
                self.told[record.client, record.connection].append(record)
            case Asked():
                self._send(record, _command(record))
            case Answered():
                self._answer(record, self.requests.get((record.auction, _command(record))))

    def _auction(self, entity_id: UUID) -> _Auction:
        auction = self._auctions.get(entity_id)
        if auction is None:
            auction = self._auctions[entity_id] = _Auction(entity_id, [])
        return auction

    def _floor(self, client: str, auction: UUID) -> int:
        """The last `seq` that had been seen: by anybody, if the records' order says so, or else by this client."""
        return self._known.get(("" if self._is_one_order else client, auction), 0)

    def _know(self, client: str, auction: UUID, seq: int) -> None:
        key = "" if self._is_one_order else client, auction
        if seq > self._known.get(key, 0):
            self._known[key] = seq

    def _send(self, record: Sent | Asked, command_id: bytes) -> _Request:
        key = record.auction, command_id
        request = self.requests.get(key)
        if request is None:
            floor = self._floor(record.client, record.auction)
            request = self.requests[key] = _Request(self._auction(record.auction), command_id, floor)
        request.sends.append(record)
        request.sent_at.append(self._place)
        return request

    def _judge(self, record: Verdict) -> None:
        self._answer(record, self._bids.get((record.client, record.auction, record.bid_id)))
        if record.seq is not None:
            self._know(record.client, record.auction, record.seq)

    def _answer(self, record: Verdict | Answered, request: _Request | None) -> None:
        if request is None:
            sentence = f"client {record.client} never asked for the answer that it got: {record}"
            self.violations.append(Violation("answer", record.auction, None, sentence))
            return
        request.answers.append(record)
        request.answered_at.append(self._place)

    def _listen(self, record: Subscribed | Events | State | Presence) -> None:
        key = record.client, record.connection, record.auction
        stream = self.streams.get(key)
        if stream is None:
            stream = self.streams[key] = Stream(self._auction(record.auction))
        match record:
            case Events():
                wrong = stream.follow(record)
            case State():
                wrong = stream.leap(record)
            case Presence():
                wrong = stream.count(record)
            case Subscribed():
                wrong = stream.begin(record, self.users, self._asked.get(key, 0))
        if wrong is not None:
            sentence = f"client {record.client}, connection {record.connection}: {wrong.sentence}"
            self.violations.append(Violation("stream", wrong.auction, wrong.seq, sentence))
        elif stream.last is not None:
            self._know(record.client, record.auction, stream.last)


# One request


def _acks_are_journaled(request: _Request) -> Iterator[Violation]:
    """What was acknowledged stands in the journal once, as the acknowledgement says."""
    for answer in request.answers:
        if not _is_done(answer):
            continue
        if len(request.seqs) != 1:
            places = f"stands in the journal {len(request.seqs)} times" if request.seqs else "is not in the journal"
            yield request.violated("ack", answer, f"was acknowledged, but {places}")
        elif isinstance(answer, Verdict) and (problem := _ack_wrong(request, answer)) is not None:
            yield request.violated("ack", answer, problem)


def _ack_wrong(request: _Request, ack: Verdict) -> str | None:
    """Where an acknowledgement differs from its event."""
    (seq,) = request.seqs
    if seq > len(request.auction.events):
        return None  # The journal cannot be read.
    row, event = request.auction.rows[seq - 1], request.auction.events[seq - 1]
    if not isinstance(event, BidPlaced | MaximumRaised):
        return f"was acknowledged as a bid, but is {row.kind}"
    is_leading = isinstance(event, MaximumRaised) or event.leader == event.paddle
    expected = {
        "seq": seq,
        "hash": row.hash.hex(),
        "outcome": "leading" if is_leading else "outbid",
        "price": event.price,
        "paddle": event.paddle,
        "max_amount": _offered(event),
        "minimum": event.minimum,
        "end_time": event.end_time,
    }
    for name, value in expected.items():
        if getattr(ack, name) != value:
            return f"was acknowledged with `{name}` {getattr(ack, name)}, but the journal has {value}"
    return None


def _refused_stays_out(request: _Request) -> Iterator[Violation]:
    """What was answered "not taken" each time that it was sent is not in the journal."""
    refusals = [answer for answer in request.answers if _is_not_taken(answer)]
    if request.seqs and len(refusals) >= len(request.sends):
        codes = ", ".join(str(answer.code) for answer in refusals)
        yield request.violated("refused", refusals[0], f"was never taken ({codes}), but is in the journal")


def _no_refusal_after_ack(request: _Request) -> Iterator[Violation]:
    """Who has an acknowledgement is not told afterwards that the bid was not placed."""
    acks = [place for place, answer in zip(request.answered_at, request.answers, strict=True) if _is_done(answer)]
    if not acks:
        return
    for place, answer in zip(request.answered_at, request.answers, strict=True):
        if not isinstance(answer, Verdict) or answer.kind != "rejected" or place < acks[0]:
            continue
        # One that was under way on another connection, while this one was not known, may speak the truth.
        began = [
            sent_at
            for sent_at, sent in zip(request.sent_at, request.sends, strict=True)
            if isinstance(sent, Sent) and (sent.client, sent.connection) == (answer.client, answer.connection)
        ]
        if began and began[0] > acks[0]:
            yield request.violated("refused", answer, f"was rejected ({answer.code}) after it had been acknowledged")


def _answers_were_asked(request: _Request) -> Iterator[Violation]:
    """Each time that a bid is sent there is at most one answer, on the same connection."""
    if len(request.answers) <= 1:
        return
    open_by_connection: dict[tuple[str, int], int] = defaultdict(int)
    for record in request.sends:
        if isinstance(record, Sent):
            open_by_connection[record.client, record.connection] += 1
    for answer in request.answers:
        if isinstance(answer, Verdict):
            open_by_connection[answer.client, answer.connection] -= 1
            if open_by_connection[answer.client, answer.connection] < 0:
                yield request.violated("answer", answer, f"got an answer too many: {answer}")


def _real_time(request: _Request) -> Iterator[Violation]:
    """What is sent after an event was seen comes after it."""
    for seq in request.seqs[:1]:
        if seq <= request.floor:
            sentence = f"stands at {seq}, though {request.floor} had been seen before it was sent"
            yield request.violated("real_time", request.sends[0], sentence)


def _refusals_were_right(request: _Request) -> Iterator[Violation]:
    """A rejection is right for some state that the auction had, not before what had been seen when the bid was sent."""
    auction = request.auction
    if not auction.is_played:
        return
    bids = [record for record in request.sends if isinstance(record, Sent)]
    offers = {bid.amount if bid.amount is not None else bid.max_amount or 0 for bid in bids}
    standings = auction.standings[max(0, request.floor - 1) :]
    for answer in request.answers:
        if isinstance(answer, Verdict) and answer.kind == "rejected":
            bidder = str(bids[0].bidder)
            was_unknown = answer.code == "not_found" and request.floor == 0
            if not was_unknown and not any(
                _is_refused(auction, standings, answer, bidder, offered) for offered in offers
            ):
                since = f"seq {request.floor} on" if request.floor else "the beginning"
                sentence = f"of {sorted(offers)} was rejected ({answer.code}, minimum {answer.minimum})"
                yield request.violated("refusal", answer, f"{sentence}, which was right at no time from {since}")


def _was_in_time(
    request: _Request, taken: Mapping[tuple[UUID, bytes], int], clock_error_ms: int
) -> Iterator[Violation]:
    """A bid counts at the moment at which it is taken up: what was in time was not told that it came too late."""
    auction = request.auction
    taken_at = taken.get((auction.id, request.command_id))
    if taken_at is None or not auction.is_played or not auction.events:
        return
    last = auction.events[-1]
    if not isinstance(last, Ended) or last.by != "deadline":
        return
    end_time = auction.standings[-1].end_time
    for answer in request.answers:
        if isinstance(answer, Verdict) and answer.code == "ended" and taken_at + clock_error_ms < end_time:
            sentence = f"was taken up at {taken_at}, before the end at {end_time}, and told that it came too late"
            yield request.violated("in_time", answer, sentence)


def _is_refused(auction: _Auction, standings: Sequence[_Standing], answer: Verdict, bidder: str, offered: int) -> bool:
    maker = None if auction.rules is None else auction.rules.maker
    match answer.code:
        case "own_auction":
            return bidder == maker
        case "amount_invalid":
            return offered < 1
        case "amount_too_large":
            return offered > AMOUNT_MAX
        case "not_started":
            return any(standing.status == "scheduled" for standing in standings)
        case "ended":
            return any(standing.status in ("ended", "cancelled") for standing in standings)
        case "bid_too_low":
            return any(
                standing.status == "active"
                and standing.leader != bidder
                and offered < standing.minimum == answer.minimum
                for standing in standings
            )
        case "max_not_raised":
            return any(
                standing.status == "active" and standing.leader == bidder and offered <= standing.maximum
                for standing in standings
            )
        case _:
            return answer.code == "not_authenticated"


def _is_done(answer: Verdict | Answered) -> bool:
    return answer.kind == "ack" if isinstance(answer, Verdict) else answer.code is None


def _is_not_taken(answer: Verdict | Answered) -> bool:
    return not _is_done(answer) and answer.code != "outcome_unknown"


# All of them


def _bids_were_sent(auctions: dict[UUID, _Auction], seen: _Seen) -> Iterator[Violation]:
    """Each bid in the journal is one that somebody sent, with that amount."""
    told = {auction for _, _, auction in seen.sent}
    for auction in auctions.values():
        if auction.id not in told:
            continue
        for row, event in zip(auction.rows, auction.events, strict=False):
            if not isinstance(event, BidPlaced | MaximumRaised):
                continue
            request = seen.requests.get((auction.id, _bid_command(event.bidder, event.bid_id)))
            offers = [] if request is None else [sent for sent in request.sends if isinstance(sent, Sent)]
            if not any((sent.amount, sent.max_amount) == (event.amount, event.max_amount) for sent in offers):
                offered = f"amount {event.amount}, max_amount {event.max_amount}"
                sentence = f"nobody sent bid {event.bid_id} of {event.bidder} with {offered}"
                yield Violation("sent", auction.id, row.seq, sentence)


def _sent_in_order(seen: _Seen) -> Iterator[Violation]:
    """What one connection sent to one auction, each once, is journaled in that order; but for a rejection that was lost
    with its shard's process: the next one judges the bid anew."""
    for requests in seen.sent.values():
        last: _Request | None = None
        for request in requests:
            if len(request.sends) > 1 or not request.seqs:
                continue
            if last is not None and request.seqs[0] < last.seqs[0] and not _may_be_refused(last, request.seqs[0]):
                sentence = f"was sent after what stands at {last.seqs[0]}, on the same connection"
                yield request.violated("order", request.sends[0], sentence)
            last = request


def _may_be_refused(request: _Request, end: int) -> bool:
    """Whether a bid could be rejected in some state that the auction had before the event `end`."""
    auction, bid = request.auction, request.sends[0]
    assert isinstance(bid, Sent)
    if request.floor == 0 or not auction.is_played:
        return True
    offered = bid.amount if bid.amount is not None else bid.max_amount or 0
    return any(
        standing.status != "active"
        or (offered <= standing.maximum if standing.leader == str(bid.bidder) else offered < standing.minimum)
        for standing in auction.standings[request.floor - 1 : end - 1]
    )


def _told_what_concerns_them(auctions: dict[UUID, _Auction], seen: _Seen, *, is_calm: bool) -> Iterator[Violation]:
    """Each user is told, on each connection that asks for it, what becomes of it: no less, and nothing else."""
    newest = dict(seen.users.keys())
    joined: dict[UUID, set[UUID]] = defaultdict(set)
    for request in seen.requests.values():
        sent = request.sends[0]
        if isinstance(sent, Sent) and any(_is_done(answer) for answer in request.answers):
            joined[sent.bidder].add(sent.auction)
    for (client, connection), records in seen.told.items():
        user = seen.users.get((client, connection))
        assert user is not None, "guests have no topic of their own"
        hearing = Hearing(auctions, user, is_calm=is_calm)
        wrong = list(hearing.judge(records))
        if not wrong and newest[client] == connection:
            wrong += hearing.judge_end(joined[user])
        for auction, seq, sentence in wrong[:1]:
            yield Violation("notice", auction, seq, f"client {client}, connection {connection}: {sentence}")


def _viewers_were_counted(seen: _Seen, watching: Collection[tuple[str, int, UUID]]) -> Iterator[Violation]:
    """Everybody was told at last how many watch, over all gateways."""
    viewers = Counter(auction for _, _, auction in watching)
    for key in watching:
        client, connection, auction = key
        told = seen.streams[key].viewers if key in seen.streams else None
        if told != viewers[auction]:
            sentence = f"client {client}, connection {connection}, was told of {told} viewers of {viewers[auction]}"
            yield Violation("presence", auction, None, sentence)


def _bid_command(bidder: UUID, bid_id: UUID) -> bytes:
    return bidder.bytes + bid_id.bytes


def _command(record: Asked | Answered) -> bytes:
    return record.op.encode() + record.caller.bytes + record.request_id.bytes
