import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any, get_args
from uuid import uuid4

import httpx
import pytest
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from actors.logs import json_lines
from engine.commands import EndAuction, PlaceBid
from engine.limits import BODY_BYTES_MAX, LINGER_BYTES_MAX, REQUEST_ID_LENGTH_MAX
from engine.rejections import Code, Rejection
from gateway.api import envelope
from gateway.api.envelope import STATUSES, Refused, install, iso
from tests.gateway.engine_router import World, as_user, auction_to_open

AUCTIONS = "/api/v1/auctions"


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
async def client(world: World) -> AsyncIterator[httpx.AsyncClient]:
    async with world.start() as client:
        yield client


# Meta


async def test_every_answer_says_when_which_and_what_version(client: httpx.AsyncClient) -> None:
    responses = [
        await client.get("/api/v1/health"),
        await client.post(AUCTIONS, json=auction_to_open(), headers=as_user("maker")),
        await client.post(AUCTIONS, json={}),
        await client.get("/nowhere"),
    ]
    for response in responses:
        meta = response.json()["meta"]
        assert set(meta) == {"timestamp", "request_id", "version"}
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", meta["timestamp"])
        assert abs((datetime.now(UTC) - datetime.fromisoformat(meta["timestamp"])).total_seconds()) < 60
        assert re.fullmatch(r"req_[0-9a-f]{32}", meta["request_id"])
        assert meta["version"] == "v1"
        assert response.headers["x-request-id"] == meta["request_id"]
        assert response.headers["content-type"] == "application/json"
    assert len({response.headers["x-request-id"] for response in responses}) == len(responses)
    assert [response.json()["success"] for response in responses] == [True, True, False, False]


def test_times_have_milliseconds_and_are_exact() -> None:
    assert iso(0) == "1970-01-01T00:00:00.000Z"
    assert iso(1_700_000_000_001) == "2023-11-14T22:13:20.001Z"


# Addresses


async def test_the_root_leads_to_the_description(client: httpx.AsyncClient) -> None:
    response = await client.get("/")
    assert (response.status_code, response.headers["location"]) == (307, "/docs")
    assert (await client.get("/docs")).status_code == 200


@pytest.mark.parametrize("path", ["/nowhere", "/api/v1/nowhere", "/api/v1/auctions/", "/auctions", "/api/v1"])
async def test_unknown_addresses(client: httpx.AsyncClient, path: str) -> None:
    response = await client.get(path)
    assert response.status_code == 404
    assert response.json()["error"] == {
        "code": "NOT_FOUND",
        "message": "There is nothing at this address.",
        "details": [],
    }


@pytest.mark.parametrize(("method", "path"), [("DELETE", AUCTIONS), ("POST", "/health"), ("PUT", "/docs")])
async def test_unknown_methods(client: httpx.AsyncClient, method: str, path: str) -> None:
    response = await client.request(method, path)
    assert (response.status_code, response.json()["error"]["code"]) == (405, "METHOD_NOT_ALLOWED")
    assert response.headers["allow"]


# Health


async def test_health(world: World, client: httpx.AsyncClient) -> None:
    expected: dict[str, Any] = {"status": "healthy", "parts": {"postgres": "healthy", "shards": "healthy"}}
    root, api = await client.get("/health"), await client.get("/api/v1/health")
    assert (root.status_code, root.json()) == (200, expected)
    assert (api.status_code, api.json()["data"]) == (200, expected)

    world.health["shards"] = "1 of 2 away"
    root, api = await client.get("/health"), await client.get("/api/v1/health")
    assert (root.status_code, root.json()["status"]) == (503, "unhealthy")
    assert (api.status_code, api.headers["retry-after"]) == (503, "1")
    error = api.json()["error"]
    assert error["code"] == "UNAVAILABLE"
    assert {"field": "shards", "message": "1 of 2 away"} in error["details"]


# Refusals and faults


def test_every_code_of_the_engine_has_a_status() -> None:
    assert set(STATUSES) == set(get_args(Code))


@pytest.mark.parametrize("code", get_args(Code))
async def test_every_refusal_of_the_engine(world: World, client: httpx.AsyncClient, code: Code) -> None:
    world.router.next_answer = Rejection(code, "A sentence.")
    response = await client.post(AUCTIONS, json=auction_to_open(), headers=as_user("maker"))
    assert response.status_code == STATUSES[code]
    error = response.json()["error"]
    assert error["code"] == ("INTERNAL_ERROR" if code == "internal" else code.upper())
    assert error["message"] == "A sentence."
    assert ("retry-after" in response.headers) == (response.status_code in (429, 503))
    assert ("www-authenticate" in response.headers) == (response.status_code == 401)


async def test_a_fault_is_one_sentence_for_the_client_and_a_traceback_for_us(
    world: World, client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    world.router.next_answer = RuntimeError("secret detail")
    caplog.handler.setFormatter(json_lines())
    with caplog.at_level(logging.ERROR):
        response = await client.post(AUCTIONS, json=auction_to_open(), headers=as_user("maker"))
    assert response.status_code == 500
    assert response.json()["error"] == {
        "code": "INTERNAL_ERROR",
        "message": "Something went wrong here, and it has been noted.",
        "details": [],
    }
    assert "secret" not in response.text
    line = json.loads(caplog.text)
    assert (line["event"], line["request_id"]) == ("a request failed", response.headers["x-request-id"])
    assert "secret detail" in line["exception"]


async def test_a_request_may_bring_its_own_id(client: httpx.AsyncClient) -> None:
    for given in ("a", "req_1.2:3-4", "x" * REQUEST_ID_LENGTH_MAX):
        response = await client.get(AUCTIONS + "/x", headers={"X-Request-ID": given})
        assert response.headers["x-request-id"] == response.json()["meta"]["request_id"] == given
    for given in ("", "a b", "x" * (REQUEST_ID_LENGTH_MAX + 1), "\xe4", '"'):
        response = await client.get(AUCTIONS + "/x", headers={b"X-Request-ID": given.encode("latin-1")})
        assert re.fullmatch(r"req_[0-9a-f]{32}", response.headers["x-request-id"])


async def test_a_requests_id_leads_to_its_command(
    world: World, client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    opened = await client.post(AUCTIONS, json=auction_to_open(), headers=as_user("maker"))
    path = f"{AUCTIONS}/{opened.json()['data']['auction_id']}"
    caplog.handler.setFormatter(json_lines())
    key = str(uuid4())
    bid = {"bid_amount": 10, "currency": "USD"}
    with caplog.at_level(logging.DEBUG, logger="gateway"):
        for tail, body, headers, role in (
            ("/bids", bid, {}, "anna"),
            ("/bids", {**bid, "bid_amount": 90}, {"Idempotency-Key": key, "X-Request-ID": "mine"}, "anna"),
            ("/end", {"reason": "It broke."}, {"X-Request-ID": "admins"}, "admin"),
        ):
            response = await client.post(path + tail, json=body, headers={**as_user(role), **headers})
            assert response.status_code in (200, 201)
    lines = [json.loads(line) for line in caplog.text.splitlines()]
    place, _, end = world.router.asked[-3:]
    assert isinstance(place, PlaceBid)
    assert isinstance(end, EndAuction)
    assert [(line["request_id"], line["command"], line["command_id"]) for line in lines] == [
        (f"req_{place.bid_id.hex}", "PlaceBid", str(place.bid_id)),
        ("mine", "PlaceBid", key),
        ("admins", "EndAuction", str(end.request_id)),
    ]


async def test_an_answer_that_cannot_be_is_a_fault(world: World, client: httpx.AsyncClient) -> None:
    opened = await client.post(AUCTIONS, json=auction_to_open(), headers=as_user("maker"))
    auction = opened.json()["data"]["auction_id"]
    body = {"bid_amount": 10, "currency": "USD"}
    bid = await client.post(f"{AUCTIONS}/{auction}/bids", json=body, headers=as_user("anna"))
    assert bid.status_code == 201
    world.router.next_answer = await world.router.ask(world.router.asked[-1])
    assert (await client.get(f"{AUCTIONS}/{auction}")).status_code == 500


async def test_other_exceptions_of_http_and_a_minimum_without_a_currency() -> None:
    app = FastAPI()
    install(app)

    @app.get("/teapot")
    async def teapot() -> None:
        raise HTTPException(418)

    @app.get("/refused")
    async def refused() -> None:
        raise Refused(Rejection("bid_too_low", "Too low.", minimum=5))

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gavel") as client:
        response = await client.get("/teapot")
        assert (response.status_code, response.json()["error"]["code"]) == (418, "BAD_REQUEST")
        assert "minimum" not in (await client.get("/refused")).json()["error"]


async def test_an_answer_that_breaks_halfway_is_broken_off() -> None:
    async def halfway(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200})
        raise RuntimeError("halfway")

    app = FastAPI()
    install(app)
    app.mount("/halfway", halfway)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gavel") as client:
        with pytest.raises(RuntimeError, match="halfway"):
            await client.get("/halfway/")


async def test_what_is_not_http_passes() -> None:
    seen = []

    async def remember(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    app = FastAPI()
    install(app)
    app.mount("/live", remember)

    async def nothing() -> Message:
        raise AssertionError

    async def nowhere(message: Message) -> None:
        raise AssertionError

    scope = {"type": "websocket", "path": "/live/", "headers": [], "query_string": b"", "subprotocols": []}
    await app(scope, nothing, nowhere)
    assert seen == ["websocket"]


# Large bodies


async def test_a_body_that_says_that_it_is_too_large(client: httpx.AsyncClient) -> None:
    response = await client.post(AUCTIONS, content=b" " * (BODY_BYTES_MAX + 1), headers=as_user("maker"))
    assert (response.status_code, response.json()["error"]["code"]) == (413, "TOO_LARGE")
    assert response.headers["connection"] == "close"


@pytest.mark.parametrize("length", ["9" * 5_000, str(BODY_BYTES_MAX + 1)])
async def test_its_header_is_enough(client: httpx.AsyncClient, length: str) -> None:
    response = await client.get("/health", headers={"Content-Length": length})
    assert response.status_code == 413


async def test_a_chunked_body_is_not_read_whole(client: httpx.AsyncClient) -> None:
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 64 * BODY_BYTES_MAX:
            sent += 65_536
            yield b" " * 65_536

    headers = as_user("maker", **{"Content-Type": "application/json"})
    response = await client.post(AUCTIONS, content=chunks(), headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "TOO_LARGE")
    assert response.headers["connection"] == "close"
    assert sent <= BODY_BYTES_MAX + LINGER_BYTES_MAX + 2 * 65_536


async def test_nobody_waits_long_for_the_rest_of_too_large_a_body(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envelope, "LINGER_MS", 10)
    app = FastAPI()
    install(app)
    sent: list[Message] = []

    async def silence() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def remember(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/",
        "headers": [(b"content-length", b"99999999")],
        "query_string": b"",
    }
    await app(scope, silence, remember)
    # The answer is out before the wait, the connection is over after it.
    assert [message.get("more_body") for message in sent] == [None, True, None]


async def test_the_largest_body_is_read(client: httpx.AsyncClient) -> None:
    headers = as_user("maker", **{"Content-Type": "application/json"})
    response = await client.post(AUCTIONS, content=b"{}".ljust(BODY_BYTES_MAX), headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (422, "VALIDATION_ERROR")


# The description


async def test_the_description_shows_money_as_numbers_and_how_each_route_may_fail(client: httpx.AsyncClient) -> None:
    description = (await client.get("/openapi.json")).json()
    schemas = description["components"]["schemas"]
    for schema, field in (
        ("AuctionToOpen", "starting_price"),
        ("StepToSet", "from"),
        ("AuctionData", "price"),
        ("BidData", "bid_amount"),
    ):
        money = schemas[schema]["properties"][field]
        assert (money["type"], money["examples"]) == ("number", [45.0])
    assert schemas["AuctionToOpen"]["properties"]["end_time"]["format"] == "date-time"
    assert "HTTPValidationError" not in schemas

    for path, operations in description["paths"].items():
        if "health" in path:
            continue
        for operation in operations.values():
            assert {"422", "429", "500", "503"} <= set(operation["responses"])
            for status, response in operation["responses"].items():
                content = response["content"]["application/json"]
                if status.startswith("2"):
                    assert "Success" in content["schema"]["$ref"]
                else:
                    assert content["schema"]["$ref"].endswith("/Failure")
                    assert content["example"]["success"] is False
