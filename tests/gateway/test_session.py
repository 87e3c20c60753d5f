import json
from typing import Any
from uuid import UUID

import pytest

from actors.messages import AuctionView, BidAccepted
from engine.commands import PlaceBid
from engine.limits import CLOSE_REASON_BYTES_MAX, ERRORS_MAX, IN_FLIGHT_MAX, SUBSCRIPTIONS_MAX
from engine.rejections import Code, Rejection
from gateway.session import (
    Close,
    FollowUser,
    Intent,
    PendingBid,
    Ping,
    Refuse,
    Send,
    Session,
    Submit,
    Subscribe,
    UnfollowUser,
    Unsubscribe,
)
from gateway.tokens import Identity, TokenInvalid
from gateway.wire import Standing, Subscribed
from tests.gateway.test_wire import SNAPSHOT

NOW = 1_700_000_000_000
CONNECTION = UUID(int=1)
ANNA = UUID("22222222-2222-4222-8222-222222222222")
BEN = UUID("33333333-3333-4333-8333-333333333333")
AUCTION = UUID("a0000000-0000-4000-8000-00000000000a")
BID = UUID("b0000000-0000-4000-8000-00000000000b")
TOPIC = f"auction:{AUCTION}"
ACCEPTED = BidAccepted(7, bytes(32), NOW, "leading", 100, 3, 900, 105, NOW + 1)
SUBSCRIBED = Subscribed(5, b"", None, None)


def verify(token: str, now: int) -> Identity:
    """A token is a name, and for how many seconds more it is valid."""
    name, _, seconds = token.partition(" ")
    if name not in ("anna", "ben") or int(seconds) <= 0:
        message = "The token does not verify."
        raise TokenInvalid(message)
    return Identity(ANNA if name == "anna" else BEN, "viewer", now + int(seconds) * 1000)


class Client:
    """Speaks to a session, and tells its frames from its other intents."""

    def __init__(self, hello: str | None = None) -> None:
        self.suspended: set[UUID] = set()
        self.session = Session(CONNECTION, verify, NOW, self.suspended)
        if hello is not None:
            self.says(op="hello", token=hello or None)

    def says(self, text: str | None = None, now: int = NOW, **fields: Any) -> list[Any]:
        return read(self.session.text_received((text or json.dumps(fields)).encode(), now))

    def bids(self, ref: Any = 1) -> Any:
        [intent] = self.says(op="bid", auction=str(AUCTION), bid_id=str(BID), amount=100, ref=ref)
        return intent

    def subscribes(self, topic: str = TOPIC, **fields: Any) -> Any:
        [intent] = self.says(op="subscribe", topic=topic, **fields)
        return intent


def read(intents: list[Intent]) -> list[Any]:
    return [json.loads(intent.data) if isinstance(intent, Send | Refuse) else intent for intent in intents]


@pytest.fixture
def anna() -> Client:
    return Client("anna 3600")


@pytest.fixture
def guest() -> Client:
    return Client("")


# Hello


def test_a_hello_is_welcomed() -> None:
    [welcome] = Client().says(op="hello", token="anna 60", ref="h")

    assert (welcome["type"], welcome["ref"], welcome["user"], welcome["role"]) == ("welcome", "h", str(ANNA), "viewer")
    assert (welcome["connection"], welcome["server_time"]) == (str(CONNECTION), NOW)
    assert welcome["expires_at"] == NOW + 60_000


def test_a_guest_is_welcomed_and_may_not_bid() -> None:
    client = Client()
    [welcome] = client.says(op="hello", token=None)

    assert welcome["user"] is None
    rejected = client.bids(ref="b")
    assert (rejected["type"], rejected["code"], rejected["ref"]) == ("rejected", "not_authenticated", "b")
    assert (rejected["bid_id"], rejected["is_transient"]) == (str(BID), False)


SUSPENDED_CLOSE = [Close(4501, "This user is suspended.")]


def test_a_suspended_user_is_not_welcome() -> None:
    client = Client()
    client.suspended.add(ANNA)
    assert client.says(op="hello", token="anna 60") == SUSPENDED_CLOSE


def test_whoever_is_suspended_is_closed(anna: Client, guest: Client) -> None:
    for client in (anna, guest):
        client.suspended.add(BEN)
        assert client.session.suspensions_changed() == []
        client.suspended.add(ANNA)
    assert guest.session.suspensions_changed() == []
    assert anna.session.suspensions_changed() == SUSPENDED_CLOSE
    assert anna.session.suspensions_changed() == []


def test_a_bid_of_a_suspended_user_is_not_rejected_for_it_may_be_a_retry(anna: Client) -> None:
    anna.suspended.add(ANNA)
    assert anna.bids() == SUSPENDED_CLOSE[0]


@pytest.mark.parametrize(
    "text",
    [
        '{"op":"ping","ref":1}',
        '{"op":"time","t0":1,"ref":1}',
        f'{{"op":"subscribe","topic":"{TOPIC}","ref":1}}',
        f'{{"op":"bid","auction":"{AUCTION}","bid_id":"{BID}","amount":1,"ref":1}}',
        '{"op":"dance","ref":1}',
        '{"op":"time","ref":1}',
    ],
)
def test_nothing_comes_before_hello(text: str) -> None:
    [error] = Client().says(text)

    assert (error["type"], error["code"], error["ref"]) == ("error", "hello_first", 1)


def test_a_malformed_hello_is_told_what_is_wrong_with_it() -> None:
    [error] = Client().says(op="hello", token=5, ref=1)

    assert (error["code"], error["field"]) == ("bad_request", "token")


def test_a_token_that_does_not_verify_closes() -> None:
    assert Client().says(op="hello", token="mallory 1") == [Close(4501, "The token does not verify.")]


@pytest.mark.parametrize(
    ("first", "second", "is_welcome"),
    [
        ("anna 60", "anna 90", True),
        ("", None, True),
        ("anna 60", "ben 90", False),
        ("anna 60", None, False),
        ("", "anna 60", False),
        ("anna 60", "anna 0", False),
    ],
)
def test_hello_again_is_for_the_same_user(first: str, second: str | None, *, is_welcome: bool) -> None:
    client = Client(first)
    [answer] = client.says(op="hello", token=second)

    if is_welcome:
        assert answer["type"] == "welcome"
    else:
        assert isinstance(answer, Close)
        assert answer.code == 4501
        assert client.says(op="ping") == []


# Small talk


def test_time_and_ping(guest: Client) -> None:
    assert guest.says(op="time", t0=5, ref=1) == [{"type": "time", "ref": 1, "t0": 5, "t1": NOW, "t2": NOW}]
    assert guest.says(op="ping", ref="p") == [{"type": "pong", "ref": "p"}]
    assert guest.says(op="ping") == [{"type": "pong", "ref": None}]


@pytest.mark.parametrize(
    ("text", "code", "field", "ref"),
    [
        ('{"op":"dance","ref":1}', "unknown_op", "op", 1),
        ('{"op":"react","story":"x","kind":"like","ref":1}', "unknown_op", "op", 1),
        ('{"op":"time","t0":1.0,"ref":1}', "bad_request", "t0", 1),
        ('{"op":"subscribe","topic":"you","ref":1}', "bad_request", "topic", 1),
        ('{"op":"subscribe","topic":"story:1","ref":1}', "bad_request", "topic", 1),
        (f'{{"op":"bid","auction":"{AUCTION}","bid_id":"{BID}","ref":1}}', "bad_request", "amount", 1),
        (f'{{"op":"bid","auction":"x","bid_id":"{BID}","amount":1,"ref":1}}', "bad_request", "auction", 1),
        ('{"op":"ping","ref":1.5}', "bad_request", "ref", None),
        ("{}", "bad_request", "op", None),
        ('{"op":"ping","more":' + "[" * 8_000 + "]" * 8_000 + "}", "bad_request", None, None),
    ],
)
def test_mistakes_are_answered(anna: Client, text: str, code: str, field: str | None, ref: int | None) -> None:
    [error] = anna.says(text)

    assert (error["type"], error["code"], error.get("field"), error.get("ref")) == ("error", code, field, ref)
    assert "ref" in error or ref is None


@pytest.mark.parametrize("text", ["", "[]", "null", '{"op":', '"bid"', "[" * 16_000])
def test_what_is_no_json_object_closes(anna: Client, text: str) -> None:
    [close] = read(anna.session.text_received(text.encode(), NOW))

    assert close.code == 4500
    assert anna.says(op="ping") == []


def test_invalid_utf8_and_binary_close() -> None:
    [close] = Client("").session.text_received(b'{"op":"ping","x":"\xff"}', NOW)
    assert isinstance(close, Close)
    assert close.code == 4500
    [close] = Client("").session.binary_received()
    assert isinstance(close, Close)
    assert close.code == 4500


def test_too_many_mistakes_close(guest: Client) -> None:
    for _ in range(ERRORS_MAX - 1):
        [error] = guest.says("{}")
        assert error["type"] == "error"
    [close] = guest.says("{}")
    assert close.code == 4500


def test_mistakes_are_forgotten_with_time(guest: Client) -> None:
    for count in range(3 * ERRORS_MAX):
        [error] = guest.says("{}", now=NOW + count * 250)
        assert error["type"] == "error"


# Bids


def test_a_bid_goes_to_its_shard_and_its_verdict_comes_back(anna: Client) -> None:
    intent = anna.bids(ref="b")

    bid = PlaceBid(auction=AUCTION, bidder=ANNA, bid_id=BID, amount=100)
    assert intent == Submit(bid, PendingBid("b", AUCTION, BID))
    [ack] = read(anna.session.answered(intent.pending, ACCEPTED))
    assert (ack["type"], ack["ref"], ack["bid_id"], ack["seq"]) == ("ack", "b", str(BID), 7)


@pytest.mark.parametrize(
    ("code", "type_"),
    [
        ("not_found", "rejected"),
        ("forbidden", "rejected"),
        ("own_auction", "rejected"),
        ("currency_mismatch", "rejected"),
        ("not_started", "rejected"),
        ("ended", "rejected"),
        ("amount_invalid", "rejected"),
        ("amount_too_large", "rejected"),
        ("max_not_raised", "rejected"),
        ("busy", "error"),
        ("rate_limited", "error"),
        ("unavailable", "error"),
        ("internal", "error"),
        ("outcome_unknown", "error"),
    ],
)
def test_refusals_of_a_bid(anna: Client, code: Code, type_: str) -> None:
    rejection = Rejection(code, "No.", is_transient=type_ == "error", retry_after_ms=250)
    [frame] = read(anna.session.answered(anna.bids().pending, rejection))

    assert (frame["type"], frame["ref"], frame["code"], frame["message"]) == (type_, 1, code, "No.")
    assert frame["retry_after_ms"] == 250
    if type_ == "rejected":
        assert frame["bid_id"] == str(BID)


def test_a_refusal_names_the_minimum(anna: Client) -> None:
    rejection = Rejection("bid_too_low", "More.", minimum=105)
    [frame] = read(anna.session.answered(anna.bids().pending, rejection))

    assert (frame["minimum"], frame["is_transient"]) == (105, False)


def test_an_answer_to_another_question_leaves_the_outcome_open(anna: Client) -> None:
    view = AuctionView(1, SNAPSHOT, None, BEN, None, None, 0)
    [frame] = read(anna.session.answered(anna.bids().pending, view))

    assert (frame["type"], frame["code"]) == ("error", "outcome_unknown")


def test_bids_in_flight_are_bounded(anna: Client) -> None:
    pending = [anna.bids().pending for _ in range(IN_FLIGHT_MAX)]
    error = anna.bids(ref="last")

    assert (error["type"], error["code"], error["ref"]) == ("error", "too_many", "last")
    assert error["retry_after_ms"] > 0
    anna.session.answered(pending[0], ACCEPTED)
    assert isinstance(anna.bids(), Submit)
    assert anna.bids()["code"] == "too_many"


def test_an_answer_that_was_not_asked_for_is_a_bug(anna: Client) -> None:
    with pytest.raises(AssertionError):
        anna.session.answered(PendingBid(1, AUCTION, BID), ACCEPTED)


# Subscriptions


def test_a_subscription_is_answered(anna: Client) -> None:
    intent = anna.subscribes(ref=4, since=3)

    assert (intent.topic, intent.viewer, intent.since) == (AUCTION, ANNA, 3)
    [frame] = read(anna.session.subscribed(intent.pending, SUBSCRIBED))
    assert (frame["type"], frame["ref"], frame["topic"], frame["events"]) == ("subscribed", 4, TOPIC, [])


def test_a_guest_watches_as_nobody(guest: Client) -> None:
    intent = guest.subscribes()

    assert (intent.topic, intent.viewer, intent.since) == (AUCTION, None, None)


@pytest.mark.parametrize(("code", "type_"), [("not_found", "rejected"), ("unavailable", "error")])
def test_a_subscription_that_is_refused_does_not_count(anna: Client, code: Code, type_: str) -> None:
    for number in range(2 * SUBSCRIPTIONS_MAX):
        intent = anna.subscribes(f"auction:{UUID(int=number)}", ref=number)
        [frame] = read(anna.session.subscribed(intent.pending, Rejection(code, "No.")))
        assert (frame["type"], frame["code"], frame["ref"]) == (type_, code, number)
        assert "bid_id" not in frame


def test_subscriptions_are_bounded_and_the_same_one_counts_once(anna: Client) -> None:
    for number in range(SUBSCRIPTIONS_MAX):
        intent = anna.subscribes(f"auction:{UUID(int=number)}")
        anna.session.subscribed(intent.pending, SUBSCRIBED)

    assert anna.subscribes(ref=1)["code"] == "too_many"
    again = anna.subscribes(f"auction:{UUID(int=0)}", ref=2)
    [frame] = read(anna.session.subscribed(again.pending, SUBSCRIBED))
    assert (frame["type"], frame["ref"]) == ("subscribed", 2)
    anna.says(op="unsubscribe", topic=f"auction:{UUID(int=0)}")
    assert isinstance(anna.subscribes(), Subscribe)


def test_a_topic_has_one_unanswered_subscription(anna: Client) -> None:
    first = anna.subscribes(ref=1)
    error = anna.subscribes(ref=2)

    assert (error["type"], error["code"], error["ref"]) == ("error", "too_many", 2)
    [frame] = read(anna.session.subscribed(first.pending, SUBSCRIBED))
    assert (frame["type"], frame["ref"]) == ("subscribed", 1)
    again = anna.subscribes(ref=3)
    assert anna.subscribes(ref=4)["code"] == "too_many"
    [frame] = read(anna.session.subscribed(again.pending, SUBSCRIBED))
    assert (frame["type"], frame["ref"]) == ("subscribed", 3)


def test_what_is_asked_for_and_left_again_and_again_is_bounded(anna: Client) -> None:
    pending = []
    for _ in range(SUBSCRIPTIONS_MAX):
        pending.append(anna.subscribes().pending)
        anna.says(op="unsubscribe", topic=TOPIC)

    other = f"auction:{UUID(int=5)}"
    assert anna.subscribes()["code"] == "too_many"
    assert anna.subscribes(other)["code"] == "too_many"
    # Also the answer to a cancelled one makes room.
    assert anna.session.subscribed(pending[0], SUBSCRIBED) == []
    assert isinstance(anna.subscribes(), Subscribe)
    assert anna.subscribes(other)["code"] == "too_many"


def test_a_user_is_followed_and_a_guest_is_not(anna: Client, guest: Client) -> None:
    intent = anna.subscribes("me", ref=4, since=3)
    assert intent == FollowUser(ANNA, intent.pending)
    assert anna.subscribes("me", ref=5)["code"] == "too_many"
    standing = Standing(auction=AUCTION, paddle=1, max_amount=100, is_leading=True, status="active")
    [frame] = read(anna.session.subscribed(intent.pending, [standing]))
    assert (frame["type"], frame["ref"], frame["topic"]) == ("subscribed", 4, "me")
    assert [one["auction"] for one in frame["standings"]] == [str(AUCTION)]

    rejected = guest.subscribes("me", ref=6)
    assert (rejected["type"], rejected["ref"], rejected["code"]) == ("rejected", 6, "not_authenticated")


def test_the_topic_me_counts_and_is_left_as_others_are(anna: Client) -> None:
    pending = anna.subscribes("me").pending
    for number in range(SUBSCRIPTIONS_MAX - 1):
        anna.session.subscribed(anna.subscribes(f"auction:{UUID(int=number)}").pending, SUBSCRIBED)
    assert anna.subscribes()["code"] == "too_many"
    assert anna.session.subscribed(pending, []) != []
    unfollow, unsubscribed = anna.says(op="unsubscribe", topic="me", ref=7)
    assert (unfollow, unsubscribed) == (UnfollowUser(), {"type": "unsubscribed", "ref": 7, "topic": "me"})
    assert isinstance(anna.subscribes(), Subscribe)


def test_a_user_that_cannot_be_followed_now_is_told_so(anna: Client) -> None:
    pending = anna.subscribes("me", ref=8).pending
    [frame] = read(anna.session.subscribed(pending, Rejection("unavailable", "Later.")))
    assert (frame["type"], frame["ref"], frame["code"]) == ("error", 8, "unavailable")
    assert isinstance(anna.subscribes("me"), FollowUser)


def test_a_subscription_survives_the_refusal_of_its_repetition(anna: Client) -> None:
    anna.session.subscribed(anna.subscribes().pending, SUBSCRIBED)
    anna.session.subscribed(anna.subscribes().pending, Rejection("unavailable", "Later."))

    assert anna.says(op="unsubscribe", topic=TOPIC)[0] == Unsubscribe(AUCTION)


def test_the_refusal_of_a_cancelled_one_leaves_the_next(anna: Client) -> None:
    first = anna.subscribes(ref=1)
    anna.says(op="unsubscribe", topic=TOPIC)
    second = anna.subscribes(ref=2)
    assert anna.session.subscribed(first.pending, Rejection("unavailable", "Later.")) == []
    [frame] = read(anna.session.subscribed(second.pending, SUBSCRIBED))

    assert (frame["type"], frame["ref"]) == ("subscribed", 2)
    assert anna.says(op="unsubscribe", topic=TOPIC)[0] == Unsubscribe(AUCTION)


def test_unsubscribing(anna: Client) -> None:
    upper = f"auction:{str(AUCTION).upper()}"
    nothing_to_do = anna.says(op="unsubscribe", topic=upper, ref=1)
    assert nothing_to_do == [{"type": "unsubscribed", "ref": 1, "topic": TOPIC}]

    anna.session.subscribed(anna.subscribes().pending, SUBSCRIBED)
    assert anna.says(op="unsubscribe", topic=upper, ref=2) == [
        Unsubscribe(AUCTION),
        {"type": "unsubscribed", "ref": 2, "topic": TOPIC},
    ]


def test_unsubscribing_overtakes_a_subscription_that_is_on_its_way(anna: Client) -> None:
    intent = anna.subscribes(ref=1)
    unsubscribe, error, unsubscribed = anna.says(op="unsubscribe", topic=TOPIC, ref=2)

    assert unsubscribe == Unsubscribe(AUCTION)
    assert (error["type"], error["ref"], unsubscribed["ref"]) == ("error", 1, 2)
    assert anna.session.subscribed(intent.pending, SUBSCRIBED) == []
    assert isinstance(anna.subscribes(), Subscribe)


# Time


def test_without_a_hello_in_time_it_closes() -> None:
    client = Client()
    assert client.session.tick(NOW + 4_999) == []
    [close] = client.session.tick(NOW + 5_000)
    assert isinstance(close, Close)
    assert close.code == 4501


def test_a_token_is_honoured_a_minute_longer() -> None:
    client = Client("anna 10")
    for late in (10_000, 25_000, 40_000, 55_000, 70_000):
        client.session.activity()
        assert all(isinstance(intent, Ping) for intent in client.session.tick(NOW + late))
    assert isinstance(client.bids(), Submit)
    [close] = client.session.tick(NOW + 70_001)
    assert isinstance(close, Close)
    assert close.code == 4501


def test_a_newer_token_is_honoured_longer() -> None:
    client = Client("anna 10")
    client.says(op="hello", token="anna 3600", now=NOW + 5_000)

    assert client.session.tick(NOW + 100_000) == [Ping()]


def test_without_a_sign_of_life_it_closes(guest: Client) -> None:
    session = guest.session
    assert session.tick(NOW + 14_999) == []
    assert session.tick(NOW + 15_000) == [Ping()]
    assert session.tick(NOW + 29_999) == []
    assert session.tick(NOW + 30_000) == [Ping()]
    assert session.tick(NOW + 44_999) == []
    [close] = session.tick(NOW + 45_000)
    assert isinstance(close, Close)
    assert close.code == 4002
    assert session.tick(NOW + 60_000) == []


def test_it_says_when_it_has_something_to_do() -> None:
    silent, guest, anna = Client(), Client(""), Client("anna 10")
    for session, times in (
        (silent.session, [5_000]),
        (guest.session, [15_000, 30_000, 45_000]),
        (anna.session, [15_000, 30_000, 45_000]),
    ):
        for time in times:
            assert session.due_at == NOW + time
            assert session.tick(NOW + time - 1) == []
            assert session.tick(NOW + time) != []
    lasting = Client("anna 10")
    for late in (15_000, 30_000, 45_000, 60_000):
        lasting.session.activity()
        assert lasting.session.tick(NOW + late) == [Ping()]
    assert lasting.session.due_at == NOW + 70_001


@pytest.mark.parametrize("how", ["pong", "message"])
def test_pongs_and_messages_are_signs_of_life(guest: Client, how: str) -> None:
    for count in range(1, 20):
        assert guest.session.tick(NOW + count * 15_000) == [Ping()]
        if how == "pong":
            guest.session.activity()
        else:
            guest.says(op="ping")


def test_the_ends_that_the_gateway_brings() -> None:
    ends = {
        4000: Client("").session.drained(),
        4001: Client("").session.too_slow(),
        4502: Client().session.too_many(),
    }
    for code, [close] in ends.items():
        assert isinstance(close, Close)
        assert close.code == code
        assert 0 < len(close.reason) <= CLOSE_REASON_BYTES_MAX


def test_after_the_end_there_is_nothing(anna: Client) -> None:
    bid, subscription = anna.bids(), anna.subscribes()
    assert len(anna.session.drained()) == 1

    assert anna.session.drained() == []
    assert anna.session.answered(bid.pending, ACCEPTED) == []
    assert anna.session.subscribed(subscription.pending, SUBSCRIBED) == []
    assert anna.session.tick(NOW + 1_000_000) == []
    assert anna.says(op="ping") == []
    assert anna.session.binary_received() == []
