"""The checker: a good history passes, and one that was doctored is caught by the rule that it breaks."""

import json
import random
from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest
from msgspec.structs import asdict, replace

from actors.entities import Entity, bid_accepted
from actors.followers import noticed
from actors.journal import Private, Row
from engine import chain
from engine.auction import decide, due_at
from engine.commands import Command, EndAuction, ExecuteDue, OpenAuction, PayBack, PlaceBid, Terms, command_id
from engine.events import KINDS, BidPlaced, Ended, Event, Extended, MaximumRaised, decode, encode
from engine.notices import notices
from engine.public import encode_snapshot
from engine.rejections import Rejection
from gateway.wire import Subscribed as Subscription
from gateway.wire import encode_ack, encode_events, encode_notice, encode_rejected, encode_state, encode_subscribed
from tests.engine.oracle import Course, Oracle, Rules, SoftCloseRule
from tests.engine.support import ADMIN, ANNA, AUCTION, BEN, CLEO, MAKER, NOW, REQUEST, SOFT_CLOSE, make_terms
from tests.simulation.checker import Outage, Violation, check
from tests.simulation.history import (
    Answered,
    Asked,
    Connected,
    Events,
    Notice,
    Presence,
    Record,
    Sent,
    Standings,
    State,
    Subscribed,
    Subscribing,
    Verdict,
    state,
    subscribed,
    verdict,
)
from tests.simulation.history import (
    decode as decode_lines,
)
from tests.simulation.history import (
    encode as encode_line,
)

START = NOW + 10_000
END = START + 600_000
DOWN, BACK = END - 30_000, END - 20_000
USERS = {"anna": ANNA, "ben": BEN, "cleo": CLEO}


class House:
    """One auction, its journal, and clients on one connection each who record what they see."""

    def __init__(self) -> None:
        self.entity = Entity(AUCTION)
        self.rows: list[Row] = []
        self.history: list[Record] = []
        self.now = NOW
        self.watching: list[tuple[str, int, UUID]] = []
        """Who watches at the end."""
        self._watchers: dict[str, int] = {}
        self._behind: dict[str, list[dict[str, Any]]] = {}
        """Who does not read, and what it is to be told of all the same."""
        self._followers: list[str] = []
        self._bids = 0

    def connect(self) -> None:
        for name, user in [*USERS.items(), ("guest", None)]:
            self.history.append(Connected(client=name, connection=1, user=user, at=self.now))

    def open(self, terms: Terms) -> None:
        self._ask("open", MAKER, OpenAuction(auction=AUCTION, maker=MAKER, request_id=REQUEST, terms=terms))

    def end(self, reason: str) -> None:
        salt = bytes(16)
        command = EndAuction(auction=AUCTION, caller=ADMIN, role="admin", request_id=REQUEST, reason=reason, salt=salt)
        self._ask("end", ADMIN, command, Private(salt, reason.encode()))

    def bid(self, name: str, amount: int, *, is_exact: bool = False, connection: int = 1) -> UUID:
        self._bids += 1
        bid_id = UUID(int=self._bids)
        self.send(name, bid_id, amount, is_exact=is_exact, connection=connection)
        return bid_id

    def send(self, name: str, bid_id: UUID, amount: int, *, is_exact: bool = False, connection: int = 1) -> None:
        amounts = {"amount" if is_exact else "max_amount": amount}
        sent: dict[str, Any] = {"auction": AUCTION, "bid_id": bid_id, "bidder": USERS[name]} | amounts
        self.history.append(Sent(client=name, connection=connection, at=self.now, **sent))
        bid = PlaceBid(**sent)
        known = self.entity.accepted.get(command_id(bid))
        if known is None:
            decided = self._happen(bid)
            if isinstance(decided, Rejection):
                message = json.loads(encode_rejected(1, decided, bid_id))
                self.history.append(verdict(name, connection, AUCTION, bid_id, message, self.now))
                return
            known = self.entity.accepted[command_id(bid)]
        recorded = self.entity.recall(known)
        assert recorded is not None
        message = json.loads(encode_ack(1, AUCTION, bid_id, bid_accepted(recorded)))
        self.history.append(verdict(name, connection, AUCTION, bid_id, message, self.now))

    def watch(self, name: str, since: int | None = None, connection: int = 1) -> None:
        asked: dict[str, Any] = {"client": name, "connection": connection, "auction": AUCTION, "since": since}
        self.history.append(Subscribing(**asked, at=self.now))
        self._watchers[name] = connection
        missed = None if since is None else self.entity.missed(since)
        assert self.entity.state is not None
        answer = Subscription(
            seq=self.entity.seq,
            events=None if missed is None else b",".join(recorded.public for recorded in missed),
            snapshot=encode_snapshot(self.entity.state) if missed is None else None,
            you=self.entity.you(USERS.get(name)),
        )
        message = json.loads(encode_subscribed(1, AUCTION, answer))
        self.history.append(subscribed(name, connection, AUCTION, since, message, self.now))

    def follow(self, name: str) -> None:
        """Ask for what concerns the user, on its only connection."""
        you = self.entity.you(USERS[name])
        assert self.entity.state is not None
        standings = []
        if you is not None:
            status = self.entity.state.status
            standings.append({"auction": str(AUCTION), "status": status, **asdict(you)})
        self.history.append(Standings(client=name, connection=1, standings=standings, at=self.now))
        self._followers.append(name)

    def leave(self, name: str) -> None:
        del self._watchers[name]

    def fall_behind(self, name: str) -> None:
        self._behind[name] = []

    def catch_up(self, name: str) -> None:
        assert self.entity.state is not None
        kept = ",".join(map(json.dumps, self._behind.pop(name)))
        snapshot = encode_snapshot(self.entity.state)
        message = json.loads(encode_state(AUCTION, self.entity.seq, snapshot, kept.encode()))
        self.history.append(state(name, self._watchers[name], message, self.now))

    def count(self) -> None:
        """Tell all who watch how many they are."""
        self.watching = [(name, connection, AUCTION) for name, connection in self._watchers.items()]
        for name, connection, auction in self.watching:
            told: dict[str, Any] = {"client": name, "connection": connection, "auction": auction}
            self.history.append(Presence(**told, viewers=len(self.watching), at=self.now))

    def pay_back(self, down: int, back: int) -> None:
        self.now = back
        self.execute_due()
        self._happen(PayBack(AUCTION, down))

    def execute_due(self) -> None:
        while self.entity.state is not None and (due := due_at(self.entity.state)) is not None and due <= self.now:
            self._happen(ExecuteDue(AUCTION), is_due=False)

    def _ask(self, op: Any, caller: UUID, command: Any, private: Private | None = None) -> None:
        request: dict[str, Any] = {
            "client": "desk",
            "op": op,
            "auction": AUCTION,
            "caller": caller,
            "request_id": REQUEST,
            "at": self.now,
        }
        self.history.append(Asked(**request))
        assert not isinstance(self._happen(command, private), Rejection)
        self.history.append(Answered(**request))

    def _happen(
        self, command: Command, private: Private | None = None, *, is_due: bool = True
    ) -> list[Event] | Rejection:
        if is_due:
            self.execute_due()
        decided = decide(self.entity.state, command, self.now)
        if isinstance(decided, Rejection) or not decided:
            return decided
        known_by = None if isinstance(command, ExecuteDue | PayBack) else command_id(command)
        public, told = [], []
        for event in decided:
            concerned = list(notices(self.entity.state, event))
            recorded, row = self.entity.record(event, self.now, known_by, private)
            self.rows.append(row)
            public.append(recorded.public)
            told += [noticed(self.entity, recorded, user, kind) for user, kind in concerned if kind != "raised"]
            known_by = private = None
        for name, connection in self._watchers.items():
            events = json.loads(encode_events(AUCTION, b",".join(public)))["events"]
            if name in self._behind:
                self._behind[name] += [event for event in events if event["kind"] == "extended"]
                continue
            self.history.append(Events(client=name, connection=connection, auction=AUCTION, events=events, at=self.now))
        for notice in told:
            for name in self._followers:
                if USERS[name] == notice.user:
                    message = json.loads(encode_notice(notice))
                    self.history.append(Notice(client=name, connection=1, auction=AUCTION, notice=message, at=self.now))
        return decided


def a_good_run() -> House:
    """A scheduled auction with a reserve and soft close: bids, raises, refusals, retries, watchers, an outage."""
    house = House()
    house.connect()
    house.open(make_terms(start_time=START, end_time=END, reserve_price=4_000, soft_close=SOFT_CLOSE))
    house.watch("guest")
    house.follow("anna")
    house.bid("anna", 1_000)
    house.now = START
    house.bid("anna", 2_000)
    house.watch("anna")
    house.now += 1_000
    house.bid("ben", 1_600)
    first = house.bid("cleo", 2_600, is_exact=True)
    house.bid("cleo", 2_600)
    house.bid("ben", 2_700)
    house.leave("guest")
    house.follow("cleo")
    house.now += 1_000
    house.bid("cleo", 5_000)
    house.bid("cleo", 6_000)
    house.watch("guest", since=4, connection=2)
    house.send("cleo", first, 9_999, connection=2)
    house.watch("ben")
    house.fall_behind("ben")
    house.pay_back(DOWN, BACK)
    house.now = END + 5_000
    house.bid("anna", 5_000)
    house.catch_up("ben")
    house.watch("anna", connection=2)
    house.now = END + 200_000
    house.execute_due()
    house.bid("ben", 20_000)
    house.count()
    return house


def judged(house: House, **changes: Any) -> list[Violation]:
    arguments: dict[str, Any] = {"true_time": True, "outages": [Outage({AUCTION}, DOWN, BACK)]} | changes
    return check(house.history, house.rows, watching=house.watching, **arguments)


def test_a_good_history_passes() -> None:
    house = a_good_run()
    kinds = [row.kind for row in house.rows]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "scheduled": 1,
        "opened": 1,
        "bid_placed": 4,
        "maximum_raised": 2,
        "reserve_reached": 1,
        "extended": 2,
        "ended": 1,
    }
    assert judged(house) == []
    assert judged(house, outages=None, true_time=False) == []
    assert judged(house, is_calm=True) == []


def test_a_history_survives_its_file() -> None:
    history = a_good_run().history
    assert decode_lines(map(encode_line, history)) == history


# Doctoring. Each takes the run of above and breaks one promise.

Doctor = Callable[[House], None]


def find(house: House, wanted: type[Record], which: int = 0, **fields: object) -> int:
    """The place of a record in the history."""
    return [
        place
        for place, record in enumerate(house.history)
        if isinstance(record, wanted) and all(getattr(record, name) == value for name, value in fields.items())
    ][which]


def change(wanted: type[Record], which: int = 0, *, having: dict[str, Any] | None = None, **changes: object) -> Doctor:
    """Change a record that a client made."""

    def doctor(house: House) -> None:
        place = find(house, wanted, which, **(having or {}))
        house.history[place] = replace(house.history[place], **changes)

    return doctor


def change_event(wanted: type[Event], which: int = 0, **changes: object) -> Doctor:
    """Change an event in the journal, with all that follows from its bytes; clients are none the wiser."""

    def doctor(house: House) -> None:
        places = [place for place, row in enumerate(house.rows) if row.kind == KINDS[wanted]]
        row = house.rows[places[which]]
        event = replace(decode(row.kind, row.version, row.body), **changes)
        house.rows[places[which]] = row._replace(body=encode(event))
        reseal(house)
        without_clients(house)

    return doctor


def change_row(kind: str, **changes: Any) -> Doctor:
    def doctor(house: House) -> None:
        place = next(place for place, row in enumerate(house.rows) if row.kind == kind)
        house.rows[place] = house.rows[place]._replace(**changes)
        reseal(house)
        without_clients(house)

    return doctor


def insert_row(after: str, event: Event | None = None, **changes: Any) -> Doctor:
    """Put a further event, or the same again, behind the last one of a kind."""

    def doctor(house: House) -> None:
        place = max(place for place, row in enumerate(house.rows) if row.kind == after)
        row = house.rows[place]
        if event is not None:
            row = row._replace(kind=KINDS[type(event)], body=encode(event), command_id=None)
        house.rows.insert(place + 1, row._replace(**changes))
        reseal(house)
        without_clients(house)

    return doctor


def drop_row(kind: str, which: int = 0) -> Doctor:
    def doctor(house: House) -> None:
        places = [place for place, row in enumerate(house.rows) if row.kind == kind]
        del house.rows[places[which]]
        reseal(house)
        without_clients(house)

    return doctor


def reseal(house: House) -> None:
    """Number and chain the journal anew."""
    last = chain.GENESIS
    for place, row in enumerate(house.rows):
        last = chain.link(last, row.entity_id, place + 1, row.at, row.kind, row.version, row.body)
        house.rows[place] = row._replace(seq=place + 1, hash=last)


def without_clients(house: House) -> None:
    house.history.clear()
    house.watching.clear()


def break_chain(house: House) -> None:
    house.rows[3] = house.rows[3]._replace(hash=bytes(32))


def lose_row(house: House) -> None:
    del house.rows[3]


def unreadable(house: House) -> None:
    house.rows[3] = house.rows[3]._replace(body=b"{")


def earlier(house: House) -> None:
    house.rows[5] = house.rows[5]._replace(at=house.rows[4].at - 1)
    reseal(house)


def acknowledge_rejected(house: House) -> None:
    rejected = house.history[find(house, Verdict, code="bid_too_low")]
    assert isinstance(rejected, Verdict)
    ack = house.history[find(house, Verdict, kind="ack")]
    house.history[find(house, Verdict, code="bid_too_low")] = replace(ack, client="ben", bid_id=rejected.bid_id)


def reject_accepted(house: House) -> None:
    place = find(house, Verdict, kind="ack")
    house.history[place] = replace(house.history[place], kind="rejected", code="not_started")


def error_for_accepted(house: House) -> None:
    place = find(house, Verdict, kind="ack")
    house.history[place] = replace(house.history[place], kind="error", code="unavailable")


def reject_after_ack(house: House) -> None:
    place = find(house, Verdict, connection=2)
    house.history[place] = replace(house.history[place], kind="rejected", code="bid_too_low", minimum=1_500)


def answer_twice(house: House) -> None:
    place = find(house, Verdict, kind="ack")
    house.history.insert(place, house.history[place])


def answer_unasked(house: House) -> None:
    del house.history[find(house, Sent)]


def skip_events(house: House) -> None:
    del house.history[find(house, Events, client="anna")]


def repeat_events(house: House) -> None:
    place = find(house, Events, client="anna")
    house.history.insert(place, house.history[place])


def swap_events(house: House) -> None:
    first, second = find(house, Events, client="anna"), find(house, Events, 1, client="anna")
    house.history[first], house.history[second] = house.history[second], house.history[first]


def events_beyond(house: House) -> None:
    last = house.history[find(house, Events, -1)]
    assert isinstance(last, Events)
    house.history.append(replace(last, events=[{**last.events[-1], "seq": last.events[-1]["seq"] + 1}]))


def alter_event(house: House) -> None:
    record = house.history[find(house, Events, client="anna")]
    assert isinstance(record, Events)
    record.events[0]["price"] += 1


def events_without_subscription(house: House) -> None:
    del house.history[find(house, Subscribed, client="anna")]


def since_off_by_one(house: House) -> None:
    record = house.history[find(house, Subscribed, recovered=True)]
    assert isinstance(record, Subscribed)
    assert record.events
    del record.events[0]


def alter_snapshot(house: House) -> None:
    record = house.history[find(house, Subscribed, client="anna")]
    assert isinstance(record, Subscribed)
    assert record.snapshot
    record.snapshot["minimum"] += 1


def alter_state(house: House) -> None:
    record = house.history[find(house, State)]
    assert isinstance(record, State)
    record.snapshot["price"] += 1


def drop_kept(house: House) -> None:
    """Ben is not told that the end moved."""
    record = house.history[find(house, State)]
    assert isinstance(record, State)
    del record.events[0]


def state_ahead(house: House) -> None:
    """Ben is shown a later state, and the events in between after it."""
    record = house.history[find(house, State)]
    last = house.history[find(house, Events, -1, client="ben")]
    assert isinstance(record, State)
    assert isinstance(last, Events)
    house.history[find(house, State)] = replace(record, seq=last.events[0]["seq"])


def repeat_state(house: House) -> None:
    place = find(house, State)
    house.history.insert(place, house.history[place])


def event_after_its_state(house: House) -> None:
    """Ben is shown the state, and then an event that it covers."""
    event = house.history[find(house, Events, -1, client="anna", connection=1)]
    house.history.insert(find(house, State) + 1, replace(event, client="ben"))


def state_without_subscription(house: House) -> None:
    del house.history[find(house, Subscribed, client="ben")]


def count_before_subscription(house: House) -> None:
    """Cleo, who does not watch, is told how many do."""
    house.history.append(replace(house.history[find(house, Presence)], client="cleo"))


def count_for_nobody(house: House) -> None:
    del house.history[find(house, Presence)]


def alter_you(house: House) -> None:
    record = house.history[find(house, Subscribed, client="anna")]
    assert isinstance(record, Subscribed)
    assert record.you
    record.you["is_leading"] = False


def you_of_another(house: House) -> None:
    record = house.history[find(house, Connected, client="anna")]
    house.history[find(house, Connected, client="anna")] = replace(record, user=BEN)


def stale_snapshot(house: House) -> None:
    """Anna subscribes again and is shown what she was shown before."""
    old = house.history[find(house, Subscribed, client="anna")]
    house.history[find(house, Subscribed, client="anna", connection=2)] = replace(old, connection=2)


def stale_refusal(house: House) -> None:
    """Ben's bid is refused at last, as if Anna still led with 2,000."""
    place = find(house, Verdict, -1, kind="rejected", code="ended")
    house.history[place] = replace(house.history[place], code="bid_too_low", minimum=2_100)
    place = find(house, Sent, -1)
    house.history[place] = replace(house.history[place], max_amount=1_600)


def not_in_order(house: House) -> None:
    """Cleo sends the raise to 6,000 before the bid of 5,000; nobody else had seen anything in between."""
    first, second = find(house, Sent, max_amount=5_000), find(house, Sent, max_amount=6_000)
    house.history[first], house.history[second] = house.history[second], house.history[first]


def sent_late(house: House) -> None:
    """Ben's bid is sent when Cleo has seen what came after it."""
    sent = house.history.pop(find(house, Sent, max_amount=1_600))
    answer = house.history.pop(find(house, Verdict, client="ben"))
    place = find(house, Verdict, client="cleo") + 1
    house.history[place:place] = [sent, answer]


def bid_for_nobody(house: House) -> None:
    house.history[:] = [record for record in house.history if getattr(record, "client", None) != "ben"]


def told(house: House, name: str) -> list[int]:
    """Where a user was told something."""
    return [place for place, record in enumerate(house.history) if isinstance(record, Notice) and record.client == name]


def alter_notice(**changes: object) -> Doctor:
    """Change what Anna is told first: that she leads."""

    def doctor(house: House) -> None:
        place = told(house, "anna")[0]
        notice = house.history[place]
        assert isinstance(notice, Notice)
        house.history[place] = replace(notice, notice=notice.notice | changes)

    return doctor


def tell_twice(house: House) -> None:
    place = told(house, "anna")[1]
    house.history.insert(place, house.history[place])


def tell_another(house: House) -> None:
    """Cleo is told what concerns Anna."""
    house.history[told(house, "anna")[0]] = replace(house.history[told(house, "anna")[0]], client="cleo")


def tell_at_once(house: House) -> None:
    """Anna is told before she has been told how she stands."""
    del house.history[find(house, Standings, client="anna")]


def alter_standing(house: House) -> None:
    standings = house.history[find(house, Standings, client="cleo")]
    assert isinstance(standings, Standings)
    standings.standings[0]["max_amount"] += 1


def keep_the_end_back(house: House) -> None:
    del house.history[told(house, "cleo")[-1]]


def lose_request(house: House) -> None:
    house.rows[0] = house.rows[0]._replace(command_id=b"open")


def refuse_request(house: House) -> None:
    place = find(house, Answered)
    house.history[place] = replace(house.history[place], code="unavailable")


def bid_at_the_end(house: House) -> None:
    house.rows[9:11] = [row._replace(at=END + 10_000) for row in house.rows[9:11]]
    reseal(house)
    without_clients(house)


def never_pay(house: House) -> None:
    del house.rows[8:]
    without_clients(house)


DOCTORED: list[tuple[str, Doctor]] = [
    ("ack", acknowledge_rejected),
    ("ack", change(Verdict, having={"kind": "ack"}, seq=4)),
    ("ack", change(Verdict, having={"kind": "ack"}, hash="00")),
    ("ack", change(Verdict, having={"kind": "ack"}, outcome="outbid")),
    ("ack", change(Verdict, having={"kind": "ack"}, price=1_001)),
    ("ack", change(Verdict, having={"kind": "ack"}, paddle=2)),
    ("ack", change(Verdict, having={"kind": "ack"}, max_amount=1_001)),
    ("ack", change(Verdict, having={"kind": "ack"}, minimum=1_001)),
    ("ack", change(Verdict, having={"kind": "ack"}, end_time=END + 1)),
    ("ack", change(Verdict, having={"connection": 2}, max_amount=9_999)),
    ("ack", lose_request),
    ("refused", reject_accepted),
    ("refused", error_for_accepted),
    ("refused", reject_after_ack),
    ("refused", refuse_request),
    ("answer", answer_twice),
    ("answer", answer_unasked),
    ("sequence", lose_row),
    ("readable", unreadable),
    ("time", earlier),
    ("chain", break_chain),
    ("command", change_row("maximum_raised", command_id=None)),
    ("command", change_row("bid_placed", command_id=CLEO.bytes + UUID(int=2).bytes)),
    ("command", insert_row("maximum_raised")),
    ("stream", skip_events),
    ("stream", repeat_events),
    ("stream", swap_events),
    ("stream", events_beyond),
    ("stream", alter_event),
    ("stream", events_without_subscription),
    ("stream", since_off_by_one),
    ("stream", change(Subscribed, having={"recovered": True}, seq=5)),
    ("stream", change(Subscribed, having={"recovered": True}, recovered=False)),
    ("stream", alter_snapshot),
    ("stream", alter_you),
    ("stream", you_of_another),
    ("stream", stale_snapshot),
    ("stream", alter_state),
    ("stream", drop_kept),
    ("stream", change(State, events=[])),
    ("stream", change(State, seq=99)),
    ("stream", state_ahead),
    ("stream", repeat_state),
    ("stream", event_after_its_state),
    ("stream", state_without_subscription),
    ("stream", count_before_subscription),
    ("stream", change(Presence, viewers=-1)),
    ("presence", change(Presence, viewers=2)),
    ("presence", count_for_nobody),
    ("price", change_event(BidPlaced, 1, price=900)),
    ("price", change_event(BidPlaced, 1, bids=1)),
    ("oracle", change_event(BidPlaced, 1, price=2_400)),
    ("oracle", change_event(BidPlaced, 1, leader=2)),
    ("oracle", change_event(BidPlaced, 1, paddle=3)),
    ("oracle", change_event(BidPlaced, 1, minimum=2_000)),
    ("oracle", change_event(BidPlaced, 1, reserve_met=True)),
    ("oracle", change_event(BidPlaced, 1, max_amount=1_499)),
    ("oracle", change_event(MaximumRaised, max_amount=2_600)),
    ("oracle", change_event(Ended, winner=BEN)),
    ("oracle", change_event(Ended, paddle=2)),
    ("oracle", change_event(Ended, price=1_000)),
    ("oracle", change_event(Ended, outcome="unsold", winner=None, paddle=None, price=None)),
    ("oracle", drop_row("reserve_reached")),
    ("hours", change_row("opened", at=START - 1)),
    ("hours", drop_row("opened")),
    ("hours", bid_at_the_end),
    ("early", change_row("ended", at=END + 50_000)),
    ("over", insert_row("ended", Extended(END * 2, END * 2, "outage"))),
    ("over", insert_row("ended")),
    ("extension", change_event(BidPlaced, 3, end_time=END)),
    ("extension", drop_row("extended", -1)),
    ("extension", change_event(Extended, -1, end_time_max=END)),
    ("extension", insert_row("maximum_raised", Extended(END + 90_000, END + 150_000, "soft_close"))),
    ("refusal", stale_refusal),
    ("refusal", change(Verdict, having={"code": "bid_too_low"}, minimum=2_101)),
    ("refusal", change(Verdict, having={"code": "bid_too_low"}, code="not_started")),
    ("refusal", change(Verdict, having={"code": "max_not_raised"}, code="not_started")),
    ("refusal", change(Verdict, having={"code": "not_started"}, code="bid_too_low", minimum=1_501)),
    ("refusal", change(Verdict, having={"code": "bid_too_low"}, code="max_not_raised")),
    ("refusal", change(Verdict, having={"code": "not_started"}, code="own_auction")),
    ("refusal", change(Verdict, having={"code": "ended"}, code="not_found")),
    ("refusal", change(Verdict, having={"code": "ended"}, code="amount_invalid")),
    ("refusal", change(Verdict, having={"code": "ended"}, code="amount_too_large")),
    ("notice", alter_notice(kind="outbid")),
    ("notice", alter_notice(price=1)),
    ("notice", alter_notice(seq=4)),
    ("notice", alter_notice(seq=99)),
    ("notice", tell_twice),
    ("notice", tell_another),
    ("notice", tell_at_once),
    ("notice", alter_standing),
    ("notice", keep_the_end_back),
    ("notice", you_of_another),
    ("order", not_in_order),
    ("real_time", sent_late),
    ("sent", bid_for_nobody),
    ("sent", change(Sent, having={"max_amount": 2_000}, max_amount=2_001)),
    ("outage", never_pay),
    ("outage", change_event(Extended, end_time=END + 1)),
    ("outage", change_event(Extended, end_time=END - 1)),
    ("outage", change_event(Extended, end_time_max=END)),
    ("outage", insert_row("maximum_raised", Extended(END * 2, END * 2 + 150_000, "outage"))),
]


@pytest.mark.parametrize(("rule", "doctor"), DOCTORED)
def test_a_broken_promise_is_caught_by_its_rule(rule: str, doctor: Doctor) -> None:
    house = a_good_run()
    doctor(house)
    violations = judged(house)
    assert rule in {violation.rule for violation in violations}, violations
    assert all(str(violation) for violation in violations)


def test_a_notice_may_be_swallowed_by_a_link_that_breaks_and_by_no_other() -> None:
    house = a_good_run()
    del house.history[told(house, "anna")[1]]
    assert judged(house) == []
    assert [violation.rule for violation in judged(house, is_calm=True)] == ["notice"]


def test_without_one_order_clients_are_compared_with_themselves_alone() -> None:
    house = a_good_run()
    sent_late(house)
    assert judged(house, true_time=False) == []


def test_an_unknown_outcome_may_be_either() -> None:
    house = a_good_run()
    for code in ("bid_too_low", None):
        place = find(house, Verdict, code=code, client="ben")
        unknown = replace(house.history[place], kind="error", code="outcome_unknown", seq=None)
        house.history[place] = unknown
    assert judged(house) == []


def test_a_bid_that_is_never_answered_may_be_either() -> None:
    house = a_good_run()
    house.history = [record for record in house.history if not isinstance(record, Verdict)]
    assert judged(house) == []


def test_one_attempt_may_be_refused_and_another_taken() -> None:
    house = a_good_run()
    place = find(house, Sent, client="ben")
    sent = house.history[place]
    refused = replace(house.history[find(house, Verdict, client="ben")], kind="error", code="busy", seq=None)
    house.history[place:place] = [sent, refused]
    assert judged(house) == []


def test_a_rejection_that_was_under_way_may_come_after_the_acknowledgement() -> None:
    house = a_good_run()
    place = find(house, Sent, client="cleo", connection=2)
    # As if it had been sent at first on both connections, and one request had found an auction that was still closed.
    house.history.insert(0, house.history.pop(place))
    answer = find(house, Verdict, client="cleo", connection=2)
    house.history[answer] = replace(house.history[answer], kind="rejected", code="not_started", seq=None)
    assert judged(house) == []


def test_an_outage_that_is_not_known_must_give_time() -> None:
    house = a_good_run()
    assert judged(house, outages=None) == []
    change_event(Extended, end_time=END)(house)
    assert [violation.rule for violation in judged(house, outages=None)] == ["outage"]


def test_an_outage_of_others_explains_nothing() -> None:
    violations = judged(a_good_run(), outages=[Outage({REQUEST}, DOWN, BACK)])
    assert [(violation.rule, violation.seq) for violation in violations] == [("outage", 9)]


def test_an_outage_is_paid_back_to_the_millisecond() -> None:
    violations = judged(a_good_run(), outages=[Outage({AUCTION}, DOWN - 1, BACK)])
    assert [(violation.rule, violation.seq) for violation in violations] == [("outage", 9)]


@pytest.mark.parametrize(("kind", "due", "at"), [("opened", START, START), ("ended", END + 95_000, END + 200_000)])
def test_no_deadline_is_executed_in_an_outage(kind: str, due: int, at: int) -> None:
    house = a_good_run()
    outages = [Outage({AUCTION}, DOWN, BACK), Outage({AUCTION}, due - 5, at + 5)]
    assert [violation.sentence.split()[0] for violation in judged(house, outages=outages)] == [kind]
    assert judged(house, outages=outages, clock_error_ms=5) == []
    # What was due before the outage may be done late.
    assert judged(house, outages=[Outage({AUCTION}, DOWN, BACK), Outage({AUCTION}, due, at + 5)]) == []


def test_a_moment_is_no_outage() -> None:
    house = House()
    house.open(make_terms(end_time=END))
    assert judged(house, outages=[Outage({AUCTION}, END - 5_000, END - 4_000)]) == []
    assert judged(house, outages=[Outage({AUCTION}, END - 5_000, END - 3_999)]) != []


def test_an_outage_is_over_for_an_auction_no_earlier_than_its_last_event() -> None:
    house = House()
    house.open(make_terms(end_time=END))
    house.now = END - 5_000
    house.bid("anna", 1_000)
    # As a clock that ran ahead has it.
    house.pay_back(END - 8_000, END - 5_000)
    assert judged(house, outages=[Outage({AUCTION}, END - 8_000, END - 5_003)]) == []


def test_an_auction_that_should_have_started_in_an_outage_gets_its_time_from_its_start_on() -> None:
    house = House()
    house.open(make_terms(start_time=START, end_time=START + 30_000))
    house.pay_back(START - 5_000, START + 4_000)
    assert [row.kind for row in house.rows] == ["scheduled", "opened", "extended"]
    assert judged(house, outages=[Outage({AUCTION}, START - 5_000, START + 4_000)]) == []
    assert judged(house, outages=[]) != []


def test_an_end_by_an_admin_is_judged() -> None:
    house = House()
    house.open(make_terms(soft_close=SOFT_CLOSE))
    house.bid("anna", 1_000)
    house.watch("ben")
    house.end("fraud")
    house.watch("ben", since=1, connection=2)
    assert judged(house) == []
    change_event(Ended, by="maker")(house)
    assert [violation.rule for violation in judged(house)] == ["oracle"]


def test_random_games_pass(randomness: random.Random) -> None:
    for _ in range(100):
        house = a_random_run(randomness)
        assert judged(house, outages=None) == []


def a_random_run(randomness: random.Random) -> House:
    house = House()
    house.connect()
    anchor = randomness.choice(["reset", "append"])
    house.open(
        make_terms(
            start_time=randomness.choice([None, START]),
            end_time=END,
            reserve_price=randomness.choice([None, 1_500, 20_000]),
            soft_close=randomness.choice([None, replace(SOFT_CLOSE, anchor=anchor)]),
        )
    )
    house.now = randomness.choice([NOW, START, END - 70_000])
    for step in range(randomness.randrange(60)):
        house.now += randomness.choice([0, 1, 1_000, 5_000])
        name, amount = randomness.choice(list(USERS)), randomness.randrange(500, 1_000 * (step + 2))
        match randomness.randrange(12):
            case 0:
                house.watch(name, since=randomness.choice([None, house.entity.seq, house.entity.seq // 2]))
            case 1:
                house.pay_back(house.now, house.now + randomness.randrange(1_000, 5_000))
            case _:
                house.bid(name, amount, is_exact=randomness.random() < 0.5)
    return house


def test_the_course_agrees_with_the_oracle(randomness: random.Random) -> None:
    for _ in range(200):
        rules = Rules(
            maker="maker",
            currency="USD",
            starting_price=randomness.randrange(1, 20),
            reserve_price=randomness.choice([None, randomness.randrange(1, 100)]),
            increments=randomness.choice([[(1, 5)], [(0, 1), (20, 5)], [(10, 3), (15, 1), (30, 7)]]),
            start_time=0,
            end_time=100_000,
            soft_close=randomness.choice(
                [None, SoftCloseRule(30_000, 20_000, 50_000, "reset"), SoftCloseRule(5_000, 8_000, 10_000, "append")]
            ),
        )
        oracle, course, now = Oracle(rules), Course(rules), 60_000
        for _ in range(30):
            now += randomness.choice([0, 1_000, 5_000])
            if oracle.status(now) != "active":
                break
            if randomness.random() < 0.1:
                oracle.pay_back(now, now + 4_000)
                now += 4_000
                course.move_end(oracle.end_time())
            bidder, amount = randomness.choice("abc"), oracle.price() + randomness.randrange(-1, 15)
            is_exact = randomness.random() < 0.5
            refusal = oracle.bid(now, bidder, amount, is_exact=is_exact)
            assert course.refusal(bidder, amount) == refusal
            if refusal is None:
                course.bid(now, bidder, amount, is_exact=is_exact)
            view = oracle.view(now)
            assert (course.leader, course.price, course.minimum()) == (view.leader, view.price, view.minimum)
            assert (course.bids, course.reserve_met()) == (view.bids, view.reserve_met)
            assert (course.end_time, course.paddles) == (view.end_time, view.paddles)
            assert course.maximums == view.maximums
        assert course.outcome() == oracle.outcome(oracle.end_time())
