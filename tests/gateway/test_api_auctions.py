import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.messages import GetAuction
from engine.commands import OpenAuction, PlaceBid, SoftClose
from engine.increments import EBAY_US, Step, flat
from engine.limits import USER_BIDS_RATE
from engine.rejections import Rejection
from gateway.api.auctions import AuctionToOpen
from gateway.rates import Rates
from gateway.tokens import Verifier, issue, make_key_pair
from tests.gateway.engine_router import ANNA, MAKER, NOW, World, as_user, auction_to_open

AUCTIONS = "/api/v1/auctions"


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
async def client(world: World) -> AsyncIterator[httpx.AsyncClient]:
    async with world.start() as client:
        yield client


async def opened(client: httpx.AsyncClient, **changes: Any) -> str:
    response = await client.post(AUCTIONS, json=auction_to_open(**changes), headers=as_user("maker"))
    assert response.status_code == 201, response.text
    auction_id: str = response.json()["data"]["auction_id"]
    return auction_id


async def bid(client: httpx.AsyncClient, auction: str, who: str, **body: Any) -> httpx.Response:
    return await client.post(f"{AUCTIONS}/{auction}/bids", json=body, headers=as_user(who))


# Who may ask


async def test_a_suspended_user_is_refused_whatever_it_asks(world: World, client: httpx.AsyncClient) -> None:
    auction = await opened(client)
    world.suspended.add(ANNA)
    for response in (
        await client.get(f"{AUCTIONS}/{auction}", headers=as_user("anna")),
        await client.post(AUCTIONS, json=auction_to_open(), headers=as_user("anna")),
        await bid(client, auction, "anna", bid_amount=20),
    ):
        assert (response.status_code, response.json()["error"]["code"]) == (403, "FORBIDDEN")
        assert response.json()["error"]["message"] == "This user is suspended."
    assert (await client.get(f"{AUCTIONS}/{auction}")).status_code == 200
    assert (await bid(client, auction, "ben", bid_amount=20)).status_code == 201


# Opening


async def test_an_auction_opens_with_exactly_the_fields_of_the_contract(client: httpx.AsyncClient) -> None:
    story = str(uuid4())
    body = auction_to_open(story_id=story, reserve_price=45)
    response = await client.post(AUCTIONS, json=body, headers=as_user("maker"))
    assert response.status_code == 201
    data = response.json()["data"]
    auction_id = data.pop("auction_id")
    assert UUID(auction_id).version == 4
    assert data == {
        "story_id": story,
        "title": "A bowl",
        "currency": "USD",
        "status": "active",
        "starting_price": 10,
        "price": 10,
        "minimum_bid": 10,
        "bid_count": 0,
        "leader_paddle": None,
        "reserve_met": False,
        "start_time": "2023-11-14T22:13:20.000Z",
        "end_time": "2023-11-14T23:13:20.000Z",
        "actual_end_time": None,
        "outcome": None,
        "seq": 1,
        "reserve_price": 45,
    }
    assert b'"starting_price":10.00,' in response.content
    assert b'"reserve_price":45.00' in response.content


async def test_what_is_left_out_gets_the_products_defaults(world: World, client: httpx.AsyncClient) -> None:
    await opened(client)
    command = world.router.asked[-1]
    assert isinstance(command, OpenAuction)
    assert command.terms.increments == flat(500)
    assert command.terms.soft_close == SoftClose(window_ms=900_000, extension_ms=900_000, max_extension_ms=86_400_000)
    assert command.terms.start_time is None
    assert command.terms.reserve_price is None


@pytest.mark.parametrize(
    ("soft_close", "expected"),
    [
        (None, None),
        ({}, SoftClose(window_ms=900_000, extension_ms=900_000, max_extension_ms=86_400_000)),
        (
            {"window_s": 60, "extension_s": 30, "max_extension_s": 0, "anchor": "append"},
            SoftClose(window_ms=60_000, extension_ms=30_000, max_extension_ms=0, anchor="append"),
        ),
    ],
)
async def test_soft_close(world: World, client: httpx.AsyncClient, soft_close: object, expected: object) -> None:
    await opened(client, soft_close=soft_close)
    command = world.router.asked[-1]
    assert isinstance(command, OpenAuction)
    assert command.terms.soft_close == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"increments": "ebay_us"}, EBAY_US),
        ({"minimum_bid_increment": 2.5}, flat(250)),
        (
            {"increments": [{"from": 0, "increment": "0.50"}, {"from": 5, "increment": 1}]},
            (Step(0, 50), Step(500, 100)),
        ),
    ],
)
async def test_increments(world: World, client: httpx.AsyncClient, given: dict[str, Any], expected: object) -> None:
    await opened(client, **given)
    command = world.router.asked[-1]
    assert isinstance(command, OpenAuction)
    assert command.terms.increments == expected


async def test_an_auction_that_starts_later_is_scheduled_and_opens_by_itself(
    world: World, client: httpx.AsyncClient
) -> None:
    auction = await opened(client, start_time="2023-11-14T23:20:00+01:00")
    before = (await client.get(f"{AUCTIONS}/{auction}")).json()["data"]
    assert (before["status"], before["start_time"]) == ("scheduled", "2023-11-14T22:20:00.000Z")
    early = await bid(client, auction, "anna", bid_amount=10)
    assert (early.status_code, early.json()["error"]["code"]) == (409, "NOT_STARTED")
    world.now += 600_000
    assert (await client.get(f"{AUCTIONS}/{auction}")).json()["data"]["status"] == "active"


@pytest.mark.parametrize(("currency", "price", "shown"), [("JPY", "1000", b"1000"), ("KWD", "1.5", b"1.500")])
async def test_each_currency_has_its_own_decimals(
    client: httpx.AsyncClient, currency: str, price: str, shown: bytes
) -> None:
    auction = await opened(client, currency=currency, starting_price=price)
    response = await client.get(f"{AUCTIONS}/{auction}")
    assert b'"price":' + shown + b"," in response.content


async def test_a_retry_with_the_same_key_returns_the_same_auction(client: httpx.AsyncClient) -> None:
    key = str(uuid4())
    ids = [
        (await client.post(AUCTIONS, json=auction_to_open(), headers=as_user(who, **{"Idempotency-Key": key}))).json()[
            "data"
        ]["auction_id"]
        for who in ("maker", "maker", "anna")
    ]
    assert ids[0] == ids[1] != ids[2]


async def test_a_nul_in_a_title_is_kept(client: httpx.AsyncClient) -> None:
    auction = await opened(client, title="A\u0000bowl ✓")
    assert (await client.get(f"{AUCTIONS}/{auction}")).json()["data"]["title"] == "A\u0000bowl ✓"


async def test_terms_that_the_engine_refuses_name_the_field_that_was_sent(client: httpx.AsyncClient) -> None:
    for changes, field in (
        ({"title": "  "}, "title"),
        ({"starting_price": -1}, "starting_price"),
        ({"end_time": "2020-01-01T00:00:00Z"}, "end_time"),
        ({"minimum_bid_increment": 0}, "minimum_bid_increment"),
        ({"increments": []}, "increments"),
        ({"soft_close": {"window_s": 0}}, "soft_close.window_s"),
    ):
        response = await client.post(AUCTIONS, json=auction_to_open(**changes), headers=as_user("maker"))
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (422, "TERMS_INVALID")
        assert [detail["field"] for detail in error["details"]] == [field]


# Looking


async def test_who_looks_decides_what_is_seen(client: httpx.AsyncClient) -> None:
    auction = await opened(client, reserve_price=100)
    await bid(client, auction, "anna", max_bid_amount=50)
    seen = {
        who: (await client.get(f"{AUCTIONS}/{auction}", headers=as_user(who) if who else {})).json()["data"]
        for who in ("", "anna", "ben", "maker", "admin")
    }
    assert seen["anna"]["you"] == {"paddle": 1, "max_amount": 50, "is_leading": True}
    assert [who for who, data in seen.items() if "you" in data] == ["anna"]
    assert [who for who, data in seen.items() if data.get("reserve_price") == 100] == ["maker", "admin"]
    assert seen[""]["leader_paddle"] == 1
    assert seen[""]["minimum_bid"] == 15


async def test_no_reserve_is_null_for_its_maker(client: httpx.AsyncClient) -> None:
    auction = await opened(client)
    response = await client.get(f"{AUCTIONS}/{auction}", headers=as_user("maker"))
    assert response.json()["data"]["reserve_price"] is None


@pytest.mark.parametrize("header", ["Bearer nobody", "Basic YTpi", "Bearer", "anna"])
async def test_a_bad_token_is_refused_even_where_guests_may_look(client: httpx.AsyncClient, header: str) -> None:
    auction = await opened(client)
    response = await client.get(f"{AUCTIONS}/{auction}", headers={"Authorization": header})
    assert (response.status_code, response.json()["error"]["code"]) == (401, "NOT_AUTHENTICATED")
    assert response.headers["www-authenticate"] == "Bearer"


async def test_real_tokens(world: World) -> None:
    private_pem, public_pem = make_key_pair()
    token = issue(private_pem, MAKER, "maker", 60, NOW)
    async with world.start(verifier=Verifier(public_pem)) as client:
        response = await client.post(AUCTIONS, json=auction_to_open(), headers=as_user(token))
        assert response.status_code == 201
        for bad in (token[:-4], "none", "\xe9\xff"):
            headers = [(b"authorization", f"Bearer {bad}".encode("latin-1"))]
            assert (await client.get(f"{AUCTIONS}/{uuid4()}", headers=headers)).status_code == 401
        world.now += 60_000
        response = await client.post(AUCTIONS, json=auction_to_open(), headers=as_user(token))
        assert (response.status_code, response.json()["error"]["message"]) == (401, "The token has expired.")


async def test_guests_cannot_act(client: httpx.AsyncClient) -> None:
    auction = await opened(client)
    for path, body in (
        ("", auction_to_open()),
        (f"/{auction}/bids", {"bid_amount": 10}),
        (f"/{auction}/end", None),
        (f"/{auction}/cancel", None),
    ):
        response = await client.post(AUCTIONS + path, json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (401, "NOT_AUTHENTICATED")


async def test_an_unknown_auction_is_not_found(client: httpx.AsyncClient) -> None:
    unknown = f"{AUCTIONS}/{uuid4()}"
    for method, path, body in (
        ("GET", "", None),
        ("GET", "/bids", None),
        ("POST", "/bids", {"bid_amount": 10}),
        ("POST", "/bids", {"bid_amount": 10, "currency": "USD"}),
        ("POST", "/end", None),
        ("POST", "/cancel", None),
    ):
        response = await client.request(method, unknown + path, json=body, headers=as_user("anna"))
        assert (response.status_code, response.json()["error"]["code"]) == (404, "NOT_FOUND")


# Bidding


async def test_a_bid_that_leads(client: httpx.AsyncClient) -> None:
    auction = await opened(client)
    response = await bid(client, auction, "anna", bid_amount=12.5, currency="USD")
    assert response.status_code == 201
    data = response.json()["data"]
    assert UUID(data.pop("bid_id")).version == 4
    assert data == {
        "auction_id": auction,
        "bid_amount": 12.5,
        "currency": "USD",
        "status": "active",
        "is_current_high_bid": True,
        "created_at": "2023-11-14T22:13:20.000Z",
    }
    assert b'"bid_amount":12.50,' in response.content


async def test_a_bid_that_is_outbid_at_once(client: httpx.AsyncClient) -> None:
    auction = await opened(client)
    first = (await bid(client, auction, "anna", max_bid_amount=100)).json()["data"]
    second = (await bid(client, auction, "ben", max_bid_amount=50)).json()["data"]
    third = (await bid(client, auction, "anna", bid_amount=120)).json()["data"]
    assert (first["bid_amount"], first["status"]) == (100, "active")
    assert (second["bid_amount"], second["status"], second["is_current_high_bid"]) == (50, "outbid", False)
    assert (third["bid_amount"], third["status"]) == (120, "active")


async def test_a_bid_that_is_too_large_is_refused_by_the_rules_in_their_order(client: httpx.AsyncClient) -> None:
    auction = await opened(client)
    for who, currency, code in (
        ("maker", "USD", "OWN_AUCTION"),
        ("anna", "EUR", "CURRENCY_MISMATCH"),
        ("anna", "USD", "AMOUNT_TOO_LARGE"),
    ):
        response = await bid(client, auction, who, bid_amount=100_000_000, currency=currency)
        assert response.json()["error"]["code"] == code


async def test_the_currency_is_asked_for_only_where_it_is_not_given(world: World, client: httpx.AsyncClient) -> None:
    auction = await opened(client)
    await bid(client, auction, "anna", bid_amount="10.00", currency="USD")
    await bid(client, auction, "ben", bid_amount="15.00")
    assert [type(payload) for payload in world.router.asked[1:]] == [PlaceBid, GetAuction, PlaceBid]


async def test_the_key_of_a_bid_is_its_id_and_a_retry_gets_the_first_verdict(client: httpx.AsyncClient) -> None:
    auction = await opened(client)
    key = str(uuid4())
    responses = [
        await client.post(
            f"{AUCTIONS}/{auction}/bids", json={"bid_amount": 10}, headers=as_user("anna", **{"idempotency-key": key})
        )
        for _ in range(2)
    ]
    assert [response.json()["data"]["bid_id"] for response in responses] == [key, key]
    assert responses[0].json()["data"] == responses[1].json()["data"]
    assert (await client.get(f"{AUCTIONS}/{auction}")).json()["data"]["bid_count"] == 1


@pytest.mark.parametrize(
    ("who", "body", "status", "code"),
    [
        ("maker", {"bid_amount": 100}, 403, "OWN_AUCTION"),
        ("ben", {"bid_amount": 100, "currency": "EUR"}, 422, "CURRENCY_MISMATCH"),
        ("ben", {"bid_amount": 0}, 422, "AMOUNT_INVALID"),
        ("ben", {"bid_amount": -5}, 422, "AMOUNT_INVALID"),
        ("ben", {"bid_amount": 14.99}, 422, "BID_TOO_LOW"),
        ("ben", {"bid_amount": 14.99, "currency": "USD"}, 422, "BID_TOO_LOW"),
        ("anna", {"max_bid_amount": 10}, 422, "MAX_NOT_RAISED"),
    ],
)
async def test_refused_bids(client: httpx.AsyncClient, who: str, body: dict[str, Any], status: int, code: str) -> None:
    auction = await opened(client)
    await bid(client, auction, "anna", bid_amount=10)
    response = await bid(client, auction, who, **body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert error.get("minimum") == (15 if code == "BID_TOO_LOW" else None)
    if code == "BID_TOO_LOW":
        assert b'"minimum":15.00' in response.content


async def test_a_shard_that_is_busy_says_when_to_come_back(world: World, client: httpx.AsyncClient) -> None:
    auction = await opened(client)
    world.router.next_answer = Rejection("busy", "Too much at once.", is_transient=True, retry_after_ms=1_250)
    response = await bid(client, auction, "anna", bid_amount=10, currency="USD")
    assert (response.status_code, response.headers["retry-after"]) == (503, "2")
    assert response.json()["error"] == {
        "code": "BUSY",
        "message": "Too much at once.",
        "details": [],
        "retry_after_ms": 1_250,
    }


async def test_a_user_who_bids_too_often_is_told_when_to_come_back() -> None:
    world = World(rates=Rates(()))
    client = world.start()
    auction = await opened(client)
    for _ in range(USER_BIDS_RATE.burst):
        await bid(client, auction, "anna", bid_amount=1, currency="USD")
    response = await bid(client, auction, "anna", bid_amount=10, currency="USD")
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    assert (response.json()["error"]["code"], response.json()["error"]["retry_after_ms"]) == ("RATE_LIMITED", 100)
    assert (await bid(client, auction, "ben", bid_amount=10, currency="USD")).status_code == 201
    world.now += 100
    assert (await bid(client, auction, "anna", bid_amount=20, currency="USD")).status_code == 201


# Ending


async def test_its_maker_ends_an_auction_without_bids(world: World, client: httpx.AsyncClient) -> None:
    auction = await opened(client)
    world.now = NOW + 5
    response = await client.post(f"{AUCTIONS}/{auction}/end", headers=as_user("maker"))
    data = response.json()["data"]
    assert (response.status_code, data["status"], data["outcome"]) == (200, "ended", "unsold")
    assert data["actual_end_time"] == "2023-11-14T22:13:20.005Z"
    again = await client.post(f"{AUCTIONS}/{auction}/end", json={"reason": None}, headers=as_user("maker"))
    assert (again.status_code, again.json()["error"]["code"]) == (409, "ENDED")


async def test_after_a_bid_only_an_admin_cancels_and_says_why(client: httpx.AsyncClient) -> None:
    auction = await opened(client)
    await bid(client, auction, "anna", bid_amount=10)
    path = f"{AUCTIONS}/{auction}/cancel"
    results = []
    for who, body in (("maker", {}), ("anna", {}), ("admin", {}), ("admin", {"reason": "A fake."})):
        response = await client.post(path, json=body, headers=as_user(who))
        results.append((response.status_code, response.json().get("error", {}).get("code")))
    assert results == [(403, "FORBIDDEN"), (403, "FORBIDDEN"), (422, "REASON_REQUIRED"), (200, None)]
    assert (await client.get(f"{AUCTIONS}/{auction}")).json()["data"]["status"] == "cancelled"


# Bad input


def raw(**changes: str) -> bytes:
    """A body of JSON texts, put together by hand: some cannot come from `json.dumps`."""
    fields = {name: json.dumps(value) for name, value in auction_to_open().items()} | changes
    return ("{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}").encode()


BAD_AUCTIONS = [
    (raw(starting_price="45.001"), 422, "starting_price"),
    (raw(starting_price="45.000000000000001"), 422, "starting_price"),
    (raw(starting_price="45.00000000000000000000000000000000001"), 422, "starting_price"),
    (raw(starting_price='"45.001"'), 422, "starting_price"),
    (raw(starting_price="true"), 422, "starting_price"),
    (raw(starting_price="null"), 422, "starting_price"),
    (raw(starting_price='""'), 422, "starting_price"),
    (raw(starting_price='"1_000"'), 422, "starting_price"),
    (raw(starting_price='" 45"'), 422, "starting_price"),
    (raw(starting_price='"٤٥"'), 422, "starting_price"),
    (raw(starting_price='"1e2"'), 422, "starting_price"),
    (raw(starting_price='"NaN"'), 422, "starting_price"),
    (raw(starting_price="[45]"), 422, "starting_price"),
    (raw(starting_price="100000000.00"), 422, "starting_price"),
    (raw(starting_price="1e400"), 422, "starting_price"),
    (raw(starting_price="1e-400"), 422, "starting_price"),
    (raw(starting_price="9" * 4_000), 422, "starting_price"),
    (raw(starting_price="9" * 5_000), 400, None),
    (raw(starting_price="1e99999999999999999999999"), 400, None),
    (raw(starting_price="NaN"), 400, None),
    (raw(starting_price="-Infinity"), 400, None),
    (raw(reserve_price="45.001"), 422, "reserve_price"),
    (raw(minimum_bid_increment="0.001"), 422, "minimum_bid_increment"),
    (raw(minimum_bid_increment="5", increments='"ebay_us"'), 422, "increments"),
    (raw(increments='"ebay_mars"'), 422, "increments"),
    (raw(increments="{}"), 422, "increments"),
    (raw(increments="5"), 422, "increments"),
    (raw(increments="[5]"), 422, "increments.0"),
    (raw(increments='[{"from": 1, "increment": 1}, {"increment": 1}]'), 422, "increments.1.from"),
    (raw(increments='[{"from": 1, "increment": "1.001"}]'), 422, "increments.0.increment"),
    (raw(increments='[{"from": 0.001, "increment": 1}]'), 422, "increments.0.from"),
    (raw(increments="[" + ",".join(['{"from": 1, "increment": 1}'] * 65) + "]"), 422, "increments"),
    (raw(title="5"), 422, "title"),
    (raw(title=json.dumps("x" * 201)), 422, "title"),
    (raw(title='"\\ud800"'), 422, "title"),
    (raw(currency='"usd"'), 422, "currency"),
    (raw(currency='"\\udfff"'), 422, "currency"),
    (raw(story_id='"7"'), 422, "story_id"),
    (raw(end_time='"2023-11-14T23:13:20"'), 422, "end_time"),
    (raw(end_time='"2023-11-14"'), 422, "end_time"),
    (raw(end_time='"soon"'), 422, "end_time"),
    (raw(end_time='"1700003600"'), 422, "end_time"),
    (raw(end_time="1700003600"), 422, "end_time"),
    (raw(end_time='"9999-12-31T23:59:59-14:00"'), 422, "end_time"),
    (raw(start_time='"2023-02-30T00:00:00Z"'), 422, "start_time"),
    (raw(soft_close="[]"), 422, "soft_close"),
    (raw(soft_close='{"window_s": true}'), 422, "soft_close.window_s"),
    (raw(soft_close='{"window_s": 1.5}'), 422, "soft_close.window_s"),
    (raw(soft_close='{"window_s": 99999999999999999999}'), 422, "soft_close.window_s"),
    (raw(soft_close='{"anchor": "\\ud800"}'), 422, "soft_close.anchor"),
    (b"[]", 422, "body"),
    (b'"text"', 422, "body"),
    (b"null", 422, "body"),
    (b"", 422, "body"),
    (b"{", 400, None),
    (b'{"title": "\xff"}', 400, None),
    (b"\xef\xbb\xbf{}", 400, None),
    (b"[" * 100_000, 400, None),
    (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, 400, None),
    (b"\x00", 400, None),
]


@pytest.mark.parametrize(("body", "status", "field"), BAD_AUCTIONS, ids=lambda value: str(value)[:60])
async def test_bad_auctions(client: httpx.AsyncClient, body: bytes, status: int, field: str | None) -> None:
    headers = as_user("maker", **{"Content-Type": "application/json"})
    response = await client.post(AUCTIONS, content=body, headers=headers)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    if field is None:
        assert error == {"code": "BAD_REQUEST", "message": "The body is not valid JSON.", "details": []}
    else:
        assert error["code"] in ("VALIDATION_ERROR", "TERMS_INVALID")
        assert [detail["field"] for detail in error["details"]] == [field]
        assert all(detail["message"] for detail in error["details"])


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "bid_amount"),
        ({"bid_amount": None, "max_bid_amount": None}, "bid_amount"),
        ({"bid_amount": 20, "max_bid_amount": 20}, "bid_amount"),
        ({"bid_amount": True}, "bid_amount"),
        ({"max_bid_amount": "20.001"}, "max_bid_amount"),
        ({"bid_amount": "20.5", "currency": "JPY"}, "bid_amount"),
        ({"bid_amount": 20, "currency": "ABC"}, "currency"),
        ({"bid_amount": 20, "currency": 5}, "currency"),
    ],
)
async def test_bad_bids(client: httpx.AsyncClient, body: dict[str, Any], field: str) -> None:
    auction = await opened(client)
    response = await bid(client, auction, "anna", **body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (422, "VALIDATION_ERROR")
    assert [detail["field"] for detail in error["details"]] == [field]


@pytest.mark.parametrize(
    ("method", "path", "headers", "field"),
    [
        ("GET", "/not-a-uuid", {}, "auction_id"),
        ("GET", "?page=0", {}, "page"),
        ("GET", "?page=99999999999999999999", {}, "page"),
        ("GET", "?limit=101", {}, "limit"),
        ("GET", "?limit=ten", {}, "limit"),
        ("GET", "?status=open", {}, "status"),
        ("GET", "?status=%ff", {}, "status"),
        ("GET", "?maker_id=me", {}, "maker_id"),
        ("POST", "", as_user("maker", **{"Idempotency-Key": "again"}), "Idempotency-Key"),
    ],
)
async def test_bad_parameters(
    client: httpx.AsyncClient, method: str, path: str, headers: dict[str, str], field: str
) -> None:
    body = auction_to_open() if method == "POST" else None
    response = await client.request(method, AUCTIONS + path, json=body, headers=headers)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (422, "VALIDATION_ERROR")
    assert [detail["field"] for detail in error["details"]] == [field]


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded", "application/xml"])
async def test_only_json_is_read(client: httpx.AsyncClient, content_type: str | None) -> None:
    headers = as_user("maker") | ({} if content_type is None else {"Content-Type": content_type})
    response = await client.post(AUCTIONS, content=raw(), headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (415, "UNSUPPORTED_MEDIA_TYPE")


async def test_too_long_a_reason(client: httpx.AsyncClient) -> None:
    auction = await opened(client)
    response = await client.post(f"{AUCTIONS}/{auction}/end", json={"reason": "x" * 501}, headers=as_user("maker"))
    assert (response.status_code, response.json()["error"]["details"][0]["field"]) == (422, "reason")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
_FIELDS = st.sampled_from([*AuctionToOpen.model_json_schema()["properties"], "bid_amount", "max_bid_amount", "reason"])


@settings(max_examples=50)
@given(changes=st.dictionaries(_FIELDS, _JSON, min_size=1, max_size=3))
async def test_no_json_is_answered_by_a_fault(changes: dict[str, Any]) -> None:
    async with World().start() as client:
        auction = await opened(client)
        for path, fields in (("", auction_to_open()), ("/bids", {"bid_amount": 20}), ("/end", {})):
            url = f"{AUCTIONS}/{auction}{path}" if path else AUCTIONS
            content = json.dumps({**fields, **changes})
            headers = as_user("maker", **{"Content-Type": "application/json"})
            response = await client.post(url, content=content, headers=headers)
            assert response.status_code < 500
            assert response.json()["success"] == (response.status_code < 300)
