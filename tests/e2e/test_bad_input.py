"""Hostile input over real sockets: each gets the contract's answer or close code, and the engine does not feel it."""

import asyncio
import hashlib
import hmac
import json
import time
from base64 import urlsafe_b64encode
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from engine.limits import AMOUNT_MAX, BODY_BYTES_MAX, ERRORS_MAX, FRAME_BYTES_MAX, INTEGER_MAX, SUBSCRIPTIONS_MAX
from gateway.tokens import issue, make_key_pair
from tests.e2e.engine import Engine
from tests.e2e.live import Live, call, connected, iso, open_auction

MANY = 1_000
FOREIGN_PRIVATE, _ = make_key_pair()
INSIDES = ("Traceback", "asyncpg", "msgspec", ".py")
"""What no answer tells."""

pytestmark = pytest.mark.timeout(120)


@dataclass(frozen=True)
class Stage:
    """What the table plays on: auctions in each state, and how the engine was before it."""

    maker: UUID
    bidder: UUID
    active: UUID
    scheduled: UUID
    ended: UUID
    pids: dict[str, int]
    epochs: dict[int, int]


@pytest.fixture(scope="module")
def stage(engine: Engine) -> Iterator[Stage]:
    async def set_up() -> Stage:
        maker = uuid4()
        ended = await open_auction(engine, maker)
        response = await call(engine, "POST", f"/auctions/{ended}/end", token=engine.token(maker, "maker"))
        assert response.status_code == 200, response.text
        return Stage(
            maker=maker,
            bidder=uuid4(),
            active=await open_auction(engine, maker),
            scheduled=await open_auction(
                engine, maker, start_time=iso(timedelta(hours=1)), end_time=iso(timedelta(days=1))
            ),
            ended=ended,
            pids=_pids(engine),
            epochs=engine.epochs(),
        )

    stage = asyncio.run(set_up())
    yield stage
    _check_unhurt(engine, stage)


def _pids(engine: Engine) -> dict[str, int]:
    return {name: engine.pid_of(name) for name in ("shard-0", "shard-1", "gateway-0")}


def _check_unhurt(engine: Engine, stage: Stage) -> None:
    """After the whole table: the same processes in the same epochs, bids taken, nothing in the logs, all verified."""

    async def bid() -> dict[str, Any]:
        async with connected(engine, engine.token(uuid4())) as live:
            minimum = (await live.subscribe(stage.active))["snapshot"]["minimum"]
            return await live.bid(stage.active, amount=minimum)

    assert asyncio.run(bid())["type"] == "ack"
    assert _pids(engine) == stage.pids
    assert engine.epochs() == stage.epochs
    assert not engine.leaks()
    engine.verify()


@pytest.fixture
async def guest(engine: Engine, stage: Stage) -> AsyncIterator[Live]:
    async with connected(engine) as live:
        yield live


@pytest.fixture
async def bidder(engine: Engine, stage: Stage) -> AsyncIterator[Live]:
    async with connected(engine, engine.token(stage.bidder)) as live:
        yield live


# Messages that are no messages


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        pytest.param("", 4500, id="empty"),
        pytest.param("hello", 4500, id="no JSON"),
        pytest.param("{", 4500, id="half an object"),
        pytest.param("[]", 4500, id="a list"),
        pytest.param("null", 4500, id="null"),
        pytest.param("1", 4500, id="a number"),
        pytest.param('{"op":"ping"}{"op":"ping"}', 4500, id="two objects"),
        pytest.param("[" * 16_000, 4500, id="sixteen thousand lists in one another"),
        pytest.param("[" * 1_000_000, 1009, id="a million lists in one another"),
        pytest.param(b'{"op":"ping"}', 4500, id="binary"),
        pytest.param(b"", 4500, id="empty binary"),
        pytest.param(" " * (FRAME_BYTES_MAX + 1), 1009, id="a byte over the limit"),
        pytest.param(["x" * 9_000, "y" * 9_000], 1009, id="over the limit in fragments"),
        pytest.param([" "] * (FRAME_BYTES_MAX + 1), 1009, id="over the limit in fragments of a byte"),
    ],
)
async def test_what_is_no_message_closes(guest: Live, frames: Any, code: int) -> None:
    with suppress(ConnectionClosed):
        await guest.socket.send(frames)
    assert await guest.close_code() == code


async def test_what_is_no_utf_8_closes(guest: Live) -> None:
    await guest.socket.send(b'{"op":"ping","x":"\xff"}', text=True)
    assert await guest.close_code() == 4500


@pytest.mark.parametrize(
    ("frames", "ref"),
    [
        (['{"op":', '"ping"', ',"ref":1}'], 1),
        (list('{"op":"ping","ref":"é"}'), "é"),
        ('{"op":"ping","ref":2}'.ljust(FRAME_BYTES_MAX), 2),
        ('{"op":"ping","ref":3,"unknown":{"a":[1,null]}}', 3),
        ('{"op":"ping","ref":9007199254740991}', INTEGER_MAX),
    ],
)
async def test_what_is_unusual_but_right_is_taken(guest: Live, frames: Any, ref: object) -> None:
    await guest.socket.send(frames)
    assert await guest.receive() == {"type": "pong", "ref": ref}


AUCTION = '"auction":"a0000000-0000-4000-8000-00000000000a"'
BID_ID = '"bid_id":"b0000000-0000-4000-8000-00000000000b"'


@pytest.mark.parametrize(
    ("text", "code", "field"),
    [
        ('{"op":"sing"}', "unknown_op", "op"),
        ('{"op":""}', "unknown_op", "op"),
        ("{}", "bad_request", "op"),
        ('{"op":1}', "bad_request", "op"),
        ('{"op":["ping"]}', "bad_request", "op"),
        ('{"op":"ping","ref":1.5}', "bad_request", "ref"),
        ('{"op":"ping","ref":{}}', "bad_request", "ref"),
        ('{"op":"ping","ref":true}', "bad_request", "ref"),
        ('{"op":"ping","ref":9007199254740992}', "bad_request", "ref"),
        ('{"op":"ping","ref":"' + "x" * 65 + '"}', "bad_request", "ref"),
        ('{"op":"time"}', "bad_request", "t0"),
        ('{"op":"time","t0":"now"}', "bad_request", "t0"),
        ('{"op":"time","t0":1e3}', "bad_request", "t0"),
        ('{"op":"subscribe"}', "bad_request", "topic"),
        ('{"op":"subscribe","topic":1}', "bad_request", "topic"),
        ('{"op":"subscribe","topic":"auction:"}', "bad_request", "topic"),
        ('{"op":"subscribe","topic":"auction:x"}', "bad_request", "topic"),
        ('{"op":"subscribe","topic":"auction:a0000000-0000-4000-8000-00000000000a\\n"}', "bad_request", "topic"),
        (
            '{"op":"subscribe","topic":"auction:a0000000-0000-4000-8000-00000000000a","since":-1}',
            "bad_request",
            "since",
        ),
        (
            '{"op":"subscribe","topic":"auction:a0000000-0000-4000-8000-00000000000a","since":"1"}',
            "bad_request",
            "since",
        ),
        ('{"op":"hello","token":1}', "bad_request", "token"),
        ('{"op":"hello","token":"' + "x" * 5_000 + '"}', "bad_request", "token"),
        ('{"op":"bid",' + BID_ID + ',"amount":1}', "bad_request", "auction"),
        ('{"op":"bid",' + AUCTION + ',"amount":1}', "bad_request", "bid_id"),
        ('{"op":"bid","auction":"x",' + BID_ID + ',"amount":1}', "bad_request", "auction"),
        ('{"op":"bid","auction":1,' + BID_ID + ',"amount":1}', "bad_request", "auction"),
        ('{"op":"bid","auction":null,' + BID_ID + ',"amount":1}', "bad_request", "auction"),
        ('{"op":"bid",' + AUCTION + ',"bid_id":"1","amount":1}', "bad_request", "bid_id"),
        ('{"op":"bid",' + AUCTION + ',"bid_id":[],"amount":1}', "bad_request", "bid_id"),
        ('{"op":"ping","x":' + "[" * 5_000 + "]" * 5_000 + "}", "bad_request", None),
    ],
)
async def test_a_wrong_message_is_an_error(guest: Live, text: str, code: str, field: str | None) -> None:
    await guest.socket.send(text)
    answer = await guest.receive()
    assert (answer["type"], answer["code"], answer.get("field")) == ("error", code, field)
    assert (await guest.ask({"op": "ping"}))["type"] == "pong"


async def test_too_many_errors_close(guest: Live) -> None:
    for _ in range(ERRORS_MAX):
        await guest.socket.send('{"op":"sing"}')
    assert await guest.close_code() == 4500
    assert len(guest.others) == ERRORS_MAX - 1


# Bids


@pytest.mark.parametrize(
    "amounts",
    [
        "",
        '"amount":null',
        '"amount":null,"max_amount":null',
        '"amount":100,"max_amount":100',
        '"amount":"100"',
        '"amount":"1e2"',
        '"amount":true',
        '"amount":[100]',
        '"amount":100.5',
        '"amount":100.0',
        '"amount":1e2',
        '"amount":1e400',
        '"amount":9007199254740992',
        '"amount":-9007199254740992',
        pytest.param('"amount":' + "9" * 5_000, id="five thousand digits"),
        '"max_amount":"100"',
        '"max_amount":0.1',
        '"max_amount":false',
    ],
)
async def test_a_wrong_amount_is_an_error(bidder: Live, stage: Stage, amounts: str) -> None:
    text = f'{{"op":"bid","ref":1,"auction":"{stage.active}","bid_id":"{uuid4()}",{amounts}'
    await bidder.socket.send(text.rstrip(",") + "}")
    answer = await bidder.receive()
    assert (answer["type"], answer["code"], answer["ref"]) == ("error", "bad_request", 1)


@pytest.mark.parametrize("field", ["amount", "max_amount"])
@pytest.mark.parametrize(
    ("amount", "code"),
    [
        (0, "amount_invalid"),
        (-1, "amount_invalid"),
        (-INTEGER_MAX, "amount_invalid"),
        (AMOUNT_MAX + 1, "amount_too_large"),
        (INTEGER_MAX, "amount_too_large"),
        (99, "bid_too_low"),
    ],
)
async def test_an_impossible_amount_is_rejected(bidder: Live, stage: Stage, field: str, amount: int, code: str) -> None:
    rejected = await bidder.ask({"op": "bid", "auction": str(stage.active), "bid_id": str(uuid4()), field: amount})
    assert (rejected["type"], rejected["code"], rejected["is_transient"]) == ("rejected", code, False)


@pytest.mark.parametrize(
    ("state", "code"), [("scheduled", "not_started"), ("ended", "ended"), ("missing", "not_found")]
)
async def test_a_bid_out_of_place_is_rejected(bidder: Live, stage: Stage, state: str, code: str) -> None:
    auction = uuid4() if state == "missing" else getattr(stage, state)
    bid_id = uuid4()
    rejected = await bidder.bid(auction, bid_id, amount=500)
    assert (rejected["type"], rejected["code"], rejected["bid_id"]) == ("rejected", code, str(bid_id))


async def test_nobody_bids_on_its_own_auction(engine: Engine, stage: Stage) -> None:
    async with connected(engine, engine.token(stage.maker, "maker")) as maker:
        assert (await maker.bid(stage.active, amount=500))["code"] == "own_auction"


async def test_a_guest_does_not_bid(guest: Live, stage: Stage) -> None:
    assert (await guest.bid(stage.active, amount=500))["code"] == "not_authenticated"


async def test_a_bid_sent_twice_gets_its_first_verdict(engine: Engine, bidder: Live) -> None:
    auction, bid_id = await open_auction(engine), uuid4()
    first = await bidder.bid(auction, bid_id, amount=500)
    assert first["type"] == "ack"
    for again in (await bidder.bid(auction, bid_id, amount=500), await bidder.bid(auction, bid_id, max_amount=90_000)):
        assert {**again, "ref": None} == {**first, "ref": None}
    refused_id = uuid4()
    refused = await bidder.bid(auction, refused_id, max_amount=500)
    assert refused["type"] == "rejected"
    again = await bidder.bid(auction, refused_id, max_amount=90_000)
    assert {**again, "ref": None} == {**refused, "ref": None}


async def test_the_bid_id_of_another_is_nothing_special(engine: Engine, bidder: Live) -> None:
    auction, bid_id = await open_auction(engine), uuid4()
    first = await bidder.bid(auction, bid_id, max_amount=70_000)
    async with connected(engine, engine.token(uuid4())) as other:
        second = await other.bid(auction, bid_id, amount=500)
    assert second["type"] == "ack"
    assert (second["seq"], second["paddle"], second["max_amount"]) == (first["seq"] + 1, 2, 500)


# Tokens


def _unsigned(header: dict[str, str], claims: dict[str, object]) -> str:
    parts = [urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in (header, claims)]
    return ".".join([*parts, ""])


def _claims(**more: object) -> dict[str, Any]:
    now = int(time.time())
    return {
        "iss": "gavel",
        "aud": "gavel",
        "sub": str(uuid4()),
        "role": "admin",
        "iat": now,
        "exp": now + 3_600,
        **more,
    }


def _signed(engine: Engine, **more: object) -> str:
    return jwt.encode(_claims(**more), engine.keys.private_pem, algorithm="RS256")


def _with_the_public_key(engine: Engine) -> str:
    # The library refuses to sign so; whoever attacks does not ask it.
    head = _unsigned({"alg": "HS256", "typ": "JWT"}, _claims())[:-1]
    mac = hmac.digest(engine.keys.public_pem, head.encode(), hashlib.sha256)
    return f"{head}.{urlsafe_b64encode(mac).rstrip(b'=').decode()}"


def _of_another(engine: Engine) -> str:
    head, _, _ = engine.token(uuid4()).rpartition(".")
    return f"{head}.{engine.token(uuid4()).rpartition('.')[2]}"


def _with_its_own_key(engine: Engine) -> str:
    key = serialization.load_pem_private_key(FOREIGN_PRIVATE, password=None)
    assert isinstance(key, rsa.RSAPrivateKey)
    jwk = RSAAlgorithm.to_jwk(key.public_key(), as_dict=True)
    return jwt.encode(_claims(), FOREIGN_PRIVATE, algorithm="RS256", headers={"jwk": jwk})


BAD_TOKENS: dict[str, Callable[[Engine], str]] = {
    "empty": lambda _: "",
    "no token": lambda _: "a.b.c",
    "forged": lambda _: issue(FOREIGN_PRIVATE, uuid4(), "admin", 3_600, time.time_ns() // 1_000_000),
    "with a key of its own": _with_its_own_key,
    "the signature of another": _of_another,
    "expired": lambda engine: engine.token(uuid4(), ttl_s=1, now_ms=time.time_ns() // 1_000_000 - 60_000),
    "alg none": lambda _: _unsigned({"alg": "none", "typ": "JWT"}, _claims()),
    "alg None": lambda _: _unsigned({"alg": "None", "typ": "JWT"}, _claims()),
    "HS256 with the public key": _with_the_public_key,
    "a number as its user": lambda engine: _signed(engine, sub="1"),
    "a role of its own": lambda engine: _signed(engine, role="owner"),
    "a list as its role": lambda engine: _signed(engine, role=["admin"]),
    "of another issuer": lambda engine: _signed(engine, iss="mallet"),
    "for another audience": lambda engine: _signed(engine, aud="mallet"),
    "without an end": lambda engine: _signed(engine, exp=None),
    "with an end in text": lambda engine: _signed(engine, exp="tomorrow"),
    "with an end beyond time": lambda engine: _signed(engine, exp=10**30),
}


@pytest.mark.parametrize("kind", BAD_TOKENS)
async def test_a_bad_token_is_not_welcome(engine: Engine, stage: Stage, kind: str) -> None:
    token = BAD_TOKENS[kind](engine)
    async with connect(engine.live_url) as socket:
        await socket.send(json.dumps({"op": "hello", "token": token}))
        live = Live(socket)
        assert await live.close_code() == 4501
        assert not live.others
    if token:
        response = await call(engine, "POST", f"/auctions/{stage.active}/bids", token=token, body={"bid_amount": 5})
        assert (response.status_code, response.json()["error"]["code"]) == (401, "NOT_AUTHENTICATED")


async def test_a_connection_stays_with_its_user(engine: Engine, bidder: Live) -> None:
    await bidder.socket.send(json.dumps({"op": "hello", "token": engine.token(uuid4())}))
    assert await bidder.close_code() == 4501


@pytest.mark.parametrize("text", ['{"op":"ping"}', '{"op":"bid"}', '{"op":"subscribe","topic":"auction:x"}'])
async def test_hello_comes_first(engine: Engine, stage: Stage, text: str) -> None:
    async with connect(engine.live_url) as socket:
        await socket.send(text)
        live = Live(socket)
        assert (await live.receive())["code"] == "hello_first"
        assert (await live.ask({"op": "hello"}))["type"] == "welcome"


# A lot of everything


async def test_who_says_no_hello_is_closed(engine: Engine, stage: Stage) -> None:
    """One keeps silent, one does not even finish its request, one says everything but hello: together, to save time."""
    _, writer = await asyncio.open_connection("127.0.0.1", engine.port)
    writer.write(b"GET /v1/live HTTP/1.1\r\nHost: gavel\r\nUpgrade: websocket\r\nConnection: Upg")
    await writer.drain()
    async with connect(engine.live_url) as silent, connect(engine.live_url) as noisy:
        await noisy.send('{"op":"ping"}')
        codes = tuple(await asyncio.gather(Live(silent).close_code(), Live(noisy).close_code()))
    assert codes == (4501, 4501)
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()


async def test_a_thousand_pings(guest: Live) -> None:
    for ref in range(MANY):
        await guest.socket.send(json.dumps({"op": "ping", "ref": ref}))
    assert [(await guest.receive())["ref"] for _ in range(MANY)] == list(range(MANY))


async def test_a_thousand_subscriptions(engine: Engine, guest: Live) -> None:
    auctions = await asyncio.gather(*(open_auction(engine) for _ in range(SUBSCRIPTIONS_MAX + 5)))
    for number in range(MANY):
        topic = f"auction:{auctions[number % len(auctions)]}"
        await guest.socket.send(json.dumps({"op": "subscribe", "topic": topic, "ref": number}))
    answers = [await guest.receive() for _ in range(MANY)]
    assert sorted(answer["ref"] for answer in answers) == list(range(MANY))
    subscribed = {answer["topic"] for answer in answers if answer["type"] == "subscribed"}
    assert len(subscribed) == SUBSCRIPTIONS_MAX
    assert {answer["code"] for answer in answers if answer["type"] == "error"} == {"too_many"}
    assert (await guest.ask({"op": "ping"}))["type"] == "pong"


async def test_a_thousand_subscriptions_to_nothing(guest: Live) -> None:
    for number in range(MANY):
        await guest.socket.send(json.dumps({"op": "subscribe", "topic": f"auction:{uuid4()}", "ref": number}))
    answers = [await guest.receive() for _ in range(MANY)]
    assert sorted(answer["ref"] for answer in answers) == list(range(MANY))
    assert {answer["code"] for answer in answers} <= {"not_found", "too_many"}


# HTTP


@pytest.mark.parametrize(
    ("content", "status"),
    [
        pytest.param(b"", 422, id="empty"),
        pytest.param(b"{", 400, id="half an object"),
        pytest.param(b'"\xff"', 400, id="no UTF-8"),
        pytest.param(b"[]", 422, id="a list"),
        pytest.param(b"{}", 422, id="no amount"),
        pytest.param(b"[" * 1_000_000, 400, id="a million lists in one another"),
        pytest.param(b" " * (BODY_BYTES_MAX + 1), 413, id="a byte over the limit"),
        pytest.param(b'{"bid_amount":NaN}', 400, id="NaN"),
        pytest.param(b'{"bid_amount":Infinity}', 400, id="Infinity"),
        pytest.param(b'{"bid_amount":1e400}', 422, id="a huge exponent"),
        pytest.param(b'{"bid_amount":1e99999999999999999999}', 400, id="an exponent beyond all bounds"),
        pytest.param(b'{"bid_amount":' + b"9" * 10_000 + b"}", 400, id="ten thousand digits"),
        pytest.param(b'{"bid_amount":true}', 422, id="true"),
        pytest.param(b'{"bid_amount":null}', 422, id="null"),
        pytest.param(b'{"bid_amount":[1]}', 422, id="a list of amounts"),
        pytest.param(b'{"bid_amount":5,"max_bid_amount":5}', 422, id="both"),
        pytest.param(b'{"bid_amount":5.001}', 422, id="a fraction of a cent"),
        pytest.param(b'{"bid_amount":"5,00"}', 422, id="a comma"),
        pytest.param(b'{"bid_amount":" 5"}', 422, id="a space"),
        pytest.param('{"bid_amount":"\u0665"}'.encode(), 422, id="a digit of another script"),
        pytest.param(b'{"bid_amount":-5}', 422, id="negative"),
        pytest.param(b'{"bid_amount":0}', 422, id="zero"),
        pytest.param(b'{"bid_amount":100000000}', 422, id="too large"),
        pytest.param(b'{"bid_amount":5,"currency":"EUR"}', 422, id="another currency"),
        pytest.param(b'{"bid_amount":5,"currency":"\\ud800"}', 422, id="half a surrogate pair"),
    ],
)
async def test_a_bad_body_is_refused(engine: Engine, stage: Stage, content: bytes, status: int) -> None:
    headers = {"Authorization": f"Bearer {engine.token(stage.bidder)}", "Content-Type": "application/json"}
    async with httpx.AsyncClient(timeout=60) as client:
        response = await client.post(
            f"{engine.url}/api/v1/auctions/{stage.active}/bids", content=content, headers=headers
        )
    assert response.status_code == status, response.text
    _check_failure(response)


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/api/v1/auctions/x", {}, 422),
        ("GET", f"/api/v1/auctions/{uuid4()}", {}, 404),
        ("GET", "/api/v1/auctions/%00", {}, 422),
        ("GET", "/api/v1/auctions?page=0", {}, 422),
        ("GET", "/api/v1/auctions?page=99999999999999999999", {}, 422),
        ("GET", "/api/v1/auctions?limit=101", {}, 422),
        ("GET", "/api/v1/auctions?maker_id=%27%3B--", {}, 422),
        ("GET", "/api/v1/auctions", {"Authorization": "Basic eDp5"}, 401),
        ("GET", "/api/v1/auctions", {"Authorization": "Bearer"}, 401),
        ("GET", "/api/v1/auctions", {"Authorization": "Bearer x.y.z"}, 401),
        ("GET", "/api/v1/nothing", {}, 404),
        ("GET", "/api/v1/../../etc/passwd", {}, 404),
        ("DELETE", "/api/v1/auctions", {}, 405),
        ("POST", "/api/v1/auctions", {}, 401),
    ],
)
async def test_a_bad_request_is_refused(
    engine: Engine, stage: Stage, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    async with httpx.AsyncClient(timeout=60) as client:
        response = await client.request(method, engine.url + path, headers=headers)
    assert response.status_code == status, response.text
    _check_failure(response)


async def test_an_idempotency_key_is_a_uuid(engine: Engine, stage: Stage) -> None:
    headers = {"Authorization": f"Bearer {engine.token(stage.bidder)}", "Idempotency-Key": "1"}
    async with httpx.AsyncClient(timeout=60) as client:
        url = f"{engine.url}/api/v1/auctions/{stage.active}/bids"
        response = await client.post(url, json={"bid_amount": 5}, headers=headers)
    assert response.status_code == 422
    _check_failure(response)


@pytest.mark.parametrize(
    "title",
    [
        pytest.param("\u0000", id="a zero"),
        pytest.param("a\u0000b", id="a zero inside"),
        pytest.param("\u202eevil", id="right to left"),
        pytest.param("💥" * 50, id="beyond the basic plane"),
        "'; DROP TABLE journal; --",
        "<script>",
    ],
)
async def test_a_strange_title_is_a_title(engine: Engine, stage: Stage, bidder: Live, title: str) -> None:
    auction = await open_auction(engine, title=title)
    assert (await bidder.subscribe(auction))["snapshot"]["title"] == title
    assert (await bidder.bid(auction, amount=500))["type"] == "ack"
    assert (await call(engine, "GET", f"/auctions/{auction}")).json()["data"]["title"] == title


@pytest.mark.parametrize(
    "terms",
    [
        {"title": ""},
        {"title": "x" * 201},
        {"title": "\ud800"},
        {"title": None},
        {"title": 1},
        {"currency": "ABC?"},
        {"starting_price": 0},
        {"starting_price": -1},
        {"starting_price": "1e3"},
        {"minimum_bid_increment": 0},
        {"increments": []},
        {"increments": [{"from": 5, "increment": 1}, {"from": 5, "increment": 2}]},
        {"increments": [{"from": -1, "increment": 1}]},
        {"increments": "ebay_mars"},
        {"increments": [{"from": "0.01", "increment": 1}] * 1_000},
        {"end_time": "tomorrow"},
        {"end_time": "2001-01-01T00:00:00Z"},
        {"end_time": "9999-12-31T23:59:59Z"},
        {"end_time": "2001-01-01T00:00:00"},
        {"end_time": 0},
        {"soft_close": []},
        {"soft_close": {"window_s": -1}},
        {"soft_close": {"window_s": 10**30}},
        {"story_id": "x"},
    ],
)
async def test_impossible_terms_are_refused(engine: Engine, stage: Stage, terms: dict[str, object]) -> None:
    body = {"title": "Bowl", "currency": "USD", "starting_price": 1, "end_time": iso(timedelta(days=1)), **terms}
    headers = {"Authorization": f"Bearer {engine.token(stage.maker, 'maker')}", "Content-Type": "application/json"}
    async with httpx.AsyncClient(timeout=60) as client:
        # Not `json=`, which could not encode half a surrogate pair.
        response = await client.post(f"{engine.url}/api/v1/auctions", content=json.dumps(body), headers=headers)
    assert response.status_code == 422, response.text
    _check_failure(response)


def _check_failure(response: httpx.Response) -> None:
    answer = response.json()
    assert answer["success"] is False
    assert answer["error"]["code"].isupper()
    assert answer["meta"]["request_id"] == response.headers["X-Request-Id"]
    assert not any(word in response.text for word in INSIDES)
