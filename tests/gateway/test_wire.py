import json
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.messages import BidAccepted, Noticed, You
from engine.auction import Snapshot
from engine.rejections import Rejection
from gateway import wire
from gateway.tokens import Identity
from gateway.wire import Subscribed

AUCTION = UUID("a0000000-0000-4000-8000-00000000000a")
BID = UUID("b0000000-0000-4000-8000-00000000000b")
USER = UUID("22222222-2222-4222-8222-222222222222")
TOPIC = f"auction:{AUCTION}"
MOST = 2**53 - 1
DEEP = "[" * 8_000 + "]" * 8_000
SNAPSHOT = Snapshot(
    auction=AUCTION,
    story=None,
    title="A chair",
    currency="EUR",
    status="active",
    starting_price=100,
    price=100,
    minimum=100,
    bids=0,
    leader=None,
    reserve_met=None,
    start_time=1,
    end_time=2,
    outcome=None,
)


def bid(**changes: Any) -> str:
    """A bid's JSON; a value of type `str` stands in it as it is."""
    fields = {"op": '"bid"', "auction": f'"{AUCTION}"', "bid_id": f'"{BID}"', "amount": "100"}
    fields |= changes
    return "{" + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"op":"hello"}', wire.Hello()),
        (' {"ref":7, "token":"x", "op":"hello"} ', wire.Hello("x", 7)),
        ('{"op":"hello","token":null,"ref":null}', wire.Hello()),
        ('{"op":"time","t0":-5,"ref":"é"}', wire.Time(-5, "é")),
        (f'{{"op":"subscribe","topic":"{TOPIC}"}}', wire.Subscribe(TOPIC)),
        (f'{{"op":"subscribe","topic":"{TOPIC}","since":0}}', wire.Subscribe(TOPIC, 0)),
        (f'{{"op":"unsubscribe","topic":"{TOPIC}"}}', wire.Unsubscribe(TOPIC)),
        ('{"op":"ping","ref":"","more":[1.5,{"a":null}]}', wire.Ping("")),
        ('{"op":"ping","ref":"' + "é" * 64 + '"}', wire.Ping("é" * 64)),
        (f'{{"op":"ping","ref":{-MOST}}}', wire.Ping(-MOST)),
        (bid(), wire.Bid(AUCTION, BID, 100)),
        (bid(amount="0", max_amount="null"), wire.Bid(AUCTION, BID, 0)),
        (bid(amount="null", max_amount=str(MOST)), wire.Bid(AUCTION, BID, None, MOST)),
        (bid(auction=f'"{str(AUCTION).upper()}"'), wire.Bid(AUCTION, BID, 100)),
    ],
)
def test_messages_are_read(text: str, message: wire.Message) -> None:
    assert wire.decode(text.encode()) == message


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b" ",
        b"hello",
        b"1",
        b'"x"',
        b"null",
        b"[]",
        b'[{"op":"ping"}]',
        b'{"op":"ping"',
        b'{"op":"ping"} x',
        b'{"op":"ping"}{"op":"ping"}',
        b'{"op":"ping","x":NaN}',
        b'{"op":"ping","x":01}',
        b"{'op':'ping'}",
        b'{"op":"ping",}',
        b'\xef\xbb\xbf{"op":"ping"}',
        b'{"op":"ping","x":"\xff"}',
        b'{"op":"ping","ref":"\xc3"}',
        b'\xff{"op":"ping"}',
        DEEP.encode(),
        b"\xff\xfe{\x00}\x00",
    ],
)
def test_what_is_no_json_object_is_not_the_protocol(data: bytes) -> None:
    with pytest.raises(wire.NotProtocol):
        wire.decode(data)


@pytest.mark.parametrize("data", [rb'{"op":"ping","x":"\ud800"}', rb'{"op":"bid","bid_id":"\udfff"}'])
def test_half_a_surrogate_pair_is_a_mistake_in_a_message_of_the_protocol(data: bytes) -> None:
    """JavaScript makes such texts of emoji that were cut in the middle (RFC 8259, section 8.2)."""
    with pytest.raises(wire.Malformed) as caught:
        wire.decode(data)
    assert caught.value.code == "bad_request"


@pytest.mark.parametrize("data", [rb'["\ud800"]', rb'{"op":NaN,"x":"\ud800"}', rb'{"x":"\ud800"'])
def test_it_makes_no_message_of_what_is_none(data: bytes) -> None:
    with pytest.raises(wire.NotProtocol):
        wire.decode(data)


NOT_INTEGERS = [
    "1.0",
    "1.5",
    "1e2",
    "1E2",
    "-0.0",
    "true",
    '"1"',
    "[]",
    str(MOST + 1),
    str(-MOST - 1),
    "1" * 400,
    "1e999",
]


@pytest.mark.parametrize(
    ("text", "code", "field", "ref"),
    [
        ("{}", "bad_request", "op", None),
        ('{"op":null,"ref":1}', "bad_request", "op", 1),
        ('{"op":5,"ref":"a"}', "bad_request", "op", "a"),
        ('{"op":"dance","ref":"a"}', "unknown_op", "op", "a"),
        ('{"op":"Ping"}', "unknown_op", "op", None),
        ('{"op":"comment","ref":3,"text":"x"}', "unknown_op", "op", 3),
        ('{"op":"react","ref":3}', "unknown_op", "op", 3),
        *((f'{{"op":"ping","ref":{ref}}}', "bad_request", "ref", None) for ref in NOT_INTEGERS if ref != '"1"'),
        ('{"op":"ping","ref":"' + "x" * 65 + '"}', "bad_request", "ref", None),
        ('{"op":"ping","ref":{}}', "bad_request", "ref", None),
        (f'{{"op":"ping","ref":{"[" * 5_000 + "]" * 5_000}}}', "bad_request", None, None),
        (f'{{"op":"ping","more":{DEEP}}}', "bad_request", None, None),
        ('{"op":"hello","token":7}', "bad_request", "token", None),
        ('{"op":"hello","token":"' + "x" * 4_097 + '"}', "bad_request", "token", None),
        ('{"op":"time"}', "bad_request", "t0", None),
        ('{"op":"time","t0":null}', "bad_request", "t0", None),
        *((f'{{"op":"time","ref":1,"t0":{t0}}}', "bad_request", "t0", 1) for t0 in NOT_INTEGERS),
        ('{"op":"subscribe","ref":1}', "bad_request", "topic", 1),
        ('{"op":"subscribe","ref":1,"topic":"you"}', "bad_request", "topic", 1),
        (f'{{"op":"subscribe","topic":"story:{AUCTION}"}}', "bad_request", "topic", None),
        (f'{{"op":"subscribe","topic":"{TOPIC}\\n"}}', "bad_request", "topic", None),
        (f'{{"op":"subscribe","topic":"auction:{{{AUCTION}}}"}}', "bad_request", "topic", None),
        (f'{{"op":"subscribe","topic":"{TOPIC}","since":-1}}', "bad_request", "since", None),
        *(
            (f'{{"op":"subscribe","topic":"{TOPIC}","since":{since}}}', "bad_request", "since", None)
            for since in NOT_INTEGERS
        ),
        ('{"op":"unsubscribe","topic":7,"ref":1}', "bad_request", "topic", 1),
        *((bid(ref="9", amount=amount), "bad_request", "amount", 9) for amount in NOT_INTEGERS),
        *((bid(amount="null", max_amount=most), "bad_request", "max_amount", None) for most in NOT_INTEGERS),
        (bid(ref='"r"', amount="null"), "bad_request", "amount", "r"),
        (bid(ref='"r"', max_amount="200"), "bad_request", "amount", "r"),
        (bid(auction='"chair"', ref="1"), "bad_request", "auction", 1),
        (bid(bid_id="7"), "bad_request", "bid_id", None),
        (bid(bid_id="null"), "bad_request", "bid_id", None),
        (f'{{"op":"bid","auction":"{AUCTION}","amount":1,"ref":1}}', "bad_request", "bid_id", 1),
        ('{"op":"ping","op":"hello","ref":1}', "bad_request", None, 1),
    ],
)
def test_malformed_messages_are_told_what_is_wrong(text: str, code: str, field: str | None, ref: wire.Ref) -> None:
    with pytest.raises(wire.Malformed) as raised:
        wire.decode(text.encode())

    error = raised.value
    assert (error.code, error.field, error.ref) == (code, field, ref)
    assert error.message.endswith(".")


def test_other_topics_are_said_not_to_be_known_here() -> None:
    with pytest.raises(wire.Malformed, match="not known here"):
        wire.decode(b'{"op":"subscribe","topic":"you"}')


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_no_bytes_do_more_than_be_refused(data: bytes) -> None:
    with pytest.raises((wire.Malformed, wire.NotProtocol)):
        wire.decode(data)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "op": st.sampled_from(["hello", "time", "subscribe", "unsubscribe", "bid", "ping", "dance"]) | _JSON,
            **{
                name: st.sampled_from([str(AUCTION), TOPIC]) | _JSON
                for name in ("ref", "token", "t0", "topic", "since", "auction", "bid_id", "amount", "max_amount")
            },
        },
    )
)
def test_any_object_is_read_or_told_what_is_wrong(message: dict[str, Any]) -> None:
    data = json.dumps(message, ensure_ascii=False).encode()
    try:
        wire.decode(data)
    except wire.Malformed as malformed:
        error = malformed
    else:
        return

    assert error.ref is None or error.ref == message["ref"]
    assert error.code == "unknown_op" or error.field is None or error.field in wire.EXPECTED


def test_ids_are_written_in_lower_case() -> None:
    message = wire.decode(b'{"op":"subscribe","topic":"auction:A0000000-0000-4000-8000-00000000000A"}')

    assert isinstance(message, wire.Subscribe)
    assert wire.topic_name(wire.topic_auction(message.topic)) == TOPIC
    assert wire.topic_name(wire.topic_auction("me")) == "me"


def test_a_welcome_to_a_user_and_to_a_guest() -> None:
    frame = json.loads(wire.encode_welcome("r", BID, Identity(USER, "maker", 5), 3))

    assert frame == {
        "type": "welcome",
        "ref": "r",
        "connection": str(BID),
        "server_time": 3,
        "user": str(USER),
        "role": "maker",
        "expires_at": 5,
        "heartbeat_ms": 15_000,
        "limits": {
            "frame_bytes_max": 16_384,
            "amount_max": 9_999_999_999,
            "subscriptions_max": 100,
            "in_flight_max": 64,
        },
    }
    guest = json.loads(wire.encode_welcome(None, BID, None, 3))
    assert guest == frame | {"ref": None, "user": None, "role": None, "expires_at": None}


def test_a_subscription_comes_with_events_or_with_a_snapshot() -> None:
    events = b'{"seq":4,"kind":"private"},{"seq":5,  "kind":"private"}'
    you = You(3, 900, is_leading=True)

    recovered = wire.encode_subscribed(1, AUCTION, Subscribed(5, events, None, you))
    assert events in recovered
    assert json.loads(recovered) == {
        "type": "subscribed",
        "ref": 1,
        "topic": TOPIC,
        "seq": 5,
        "recovered": True,
        "events": [{"seq": 4, "kind": "private"}, {"seq": 5, "kind": "private"}],
        "you": {"paddle": 3, "max_amount": 900, "is_leading": True},
    }
    nothing_missed = json.loads(wire.encode_subscribed(1, AUCTION, Subscribed(5, b"", None, None)))
    assert nothing_missed == {
        "type": "subscribed",
        "ref": 1,
        "topic": TOPIC,
        "seq": 5,
        "recovered": True,
        "events": [],
    }
    snapshot = json.loads(wire.encode_subscribed(1, AUCTION, Subscribed(5, None, msgspec.json.encode(SNAPSHOT), None)))
    assert set(snapshot) == {"type", "ref", "topic", "seq", "recovered", "snapshot"}
    assert snapshot["recovered"] is False
    # In a snapshot, what is not known is null and not left out.
    assert set(snapshot["snapshot"]) == set(Snapshot.__struct_fields__)
    assert snapshot["snapshot"]["auction"] == str(AUCTION)


def test_events_go_out_as_they_were_encoded() -> None:
    assert wire.encode_events(AUCTION, b'{"seq": 1},{"seq": 2}') == (
        f'{{"type":"events","topic":"{TOPIC}","events":[{{"seq": 1}},{{"seq": 2}}]}}'.encode()
    )


def test_states_and_presence() -> None:
    encoded = wire.encode_state(AUCTION, 7, b'{"price": 5}', b'{"seq": 3},{"seq": 6}')
    assert json.loads(encoded) == {
        "type": "state",
        "topic": TOPIC,
        "seq": 7,
        "snapshot": {"price": 5},
        "events": [{"seq": 3}, {"seq": 6}],
    }
    assert json.loads(wire.encode_state(AUCTION, 7, b"{}", b""))["events"] == []
    assert json.loads(wire.encode_presence(AUCTION, 0)) == {"type": "presence", "topic": TOPIC, "viewers": 0}


def test_verdicts() -> None:
    accepted = BidAccepted(7, bytes(range(32)), 1, "leading", 100, 3, 900, 105, 2)
    assert json.loads(wire.encode_ack(1, AUCTION, BID, accepted)) == {
        "type": "ack",
        "ref": 1,
        "seq": 7,
        "hash": bytes(range(32)).hex(),
        "auction": str(AUCTION),
        "bid_id": str(BID),
        "outcome": "leading",
        "price": 100,
        "paddle": 3,
        "max_amount": 900,
        "minimum": 105,
        "end_time": 2,
    }
    assert json.loads(wire.encode_rejected("r", Rejection("bid_too_low", "More.", minimum=105), BID)) == {
        "type": "rejected",
        "ref": "r",
        "bid_id": str(BID),
        "code": "bid_too_low",
        "message": "More.",
        "is_transient": False,
        "minimum": 105,
    }
    assert json.loads(wire.encode_rejected(None, Rejection("ended", "Over."))) == {
        "type": "rejected",
        "ref": None,
        "code": "ended",
        "message": "Over.",
        "is_transient": False,
    }


def test_standings_and_notices() -> None:
    standing = wire.Standing(auction=AUCTION, paddle=3, max_amount=900, is_leading=True, status="active")
    assert json.loads(wire.encode_standings("m", [standing])) == {
        "type": "subscribed",
        "ref": "m",
        "topic": "me",
        "standings": [
            {"auction": str(AUCTION), "paddle": 3, "max_amount": 900, "is_leading": True, "status": "active"}
        ],
    }
    noticed = Noticed(
        user=USER,
        auction=AUCTION,
        kind="outbid",
        seq=7,
        at=1,
        price=100,
        minimum=105,
        end_time=2,
        status="active",
        outcome=None,
        you=You(3, 90, is_leading=False),
    )
    notice = {
        "type": "notice",
        "topic": "me",
        "kind": "outbid",
        "auction": str(AUCTION),
        "seq": 7,
        "at": 1,
        "price": 100,
        "paddle": 3,
        "max_amount": 90,
        "minimum": 105,
        "end_time": 2,
    }
    assert json.loads(wire.encode_notice(noticed)) == notice
    lost = msgspec.structs.replace(noticed, kind="lost", status="ended", outcome="sold")
    assert json.loads(wire.encode_notice(lost)) == notice | {"kind": "lost", "outcome": "sold"}


def test_small_answers() -> None:
    assert wire.encode_time(1, 2, 3, 4) == b'{"type":"time","ref":1,"t0":2,"t1":3,"t2":4}'
    assert wire.encode_pong("x") == b'{"type":"pong","ref":"x"}'
    assert wire.encode_unsubscribed(1, None) == b'{"type":"unsubscribed","ref":1,"topic":"me"}'
    assert wire.encode_unsubscribed(1, AUCTION) == f'{{"type":"unsubscribed","ref":1,"topic":"{TOPIC}"}}'.encode()
    assert wire.encode_error(None, "busy", "Later.", retry_after_ms=5) == (
        b'{"type":"error","code":"busy","message":"Later.","retry_after_ms":5}'
    )
    assert wire.encode_error(1, "bad_request", "No.", field="op") == (
        b'{"type":"error","ref":1,"code":"bad_request","message":"No.","field":"op"}'
    )
