"""The lists of the HTTP API, with the rules behind the API and a real Postgres beside it."""

from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import asyncpg
import httpx
import pytest

from actors.journal import EntityRow, Row
from engine.rejections import Rejection
from gateway.catalogue import CatalogueUnavailable, auctions
from gateway.catalogue.auctions import list_auctions
from tests.gateway.engine_router import ANNA, MAKER, World, as_user, auction_to_open

AUCTIONS = "/api/v1/auctions"


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[asyncpg.Pool]:
    async with asyncpg.create_pool(database_url, min_size=1, max_size=2) as pool:
        await pool.execute("TRUNCATE entities, journal, private")
        yield pool


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
async def client(world: World, pool: asyncpg.Pool) -> AsyncIterator[httpx.AsyncClient]:
    async def keep(rows: list[Row], entity: EntityRow) -> None:
        await pool.executemany(
            "INSERT INTO journal (entity_id, seq, at, kind, version, body, hash) VALUES ($1, $2, $3, $4, $5, $6, $7)",
            [row[:7] for row in rows],
        )
        await pool.execute(
            "INSERT INTO entities (entity_id, slot, kind, owner_id, status, due_at, window_ms, created_at, ended_at) "
            "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) "
            "ON CONFLICT (entity_id) DO UPDATE SET status = excluded.status, due_at = excluded.due_at",
            *entity,
        )

    async with world.start(pool, keep) as client:
        yield client


async def opened(client: httpx.AsyncClient, who: str = "maker", **changes: Any) -> str:
    response = await client.post(AUCTIONS, json=auction_to_open(**changes), headers=as_user(who))
    assert response.status_code == 201, response.text
    auction_id: str = response.json()["data"]["auction_id"]
    return auction_id


async def listed(client: httpx.AsyncClient, query: str = "") -> tuple[list[str], dict[str, Any]]:
    response = await client.get(f"{AUCTIONS}{query}")
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    return [auction["auction_id"] for auction in data["auctions"]], data["pagination"]


async def test_auctions_are_listed_newest_first_and_page_by_page(world: World, client: httpx.AsyncClient) -> None:
    ids = []
    for _ in range(5):
        ids.append(await opened(client))
        world.now += 1
    ids.reverse()
    assert (await listed(client))[0] == ids
    first, pages = await listed(client, "?limit=2")
    assert first == ids[:2]
    cursor = pages.pop("next_cursor")
    assert pages == {"page": 1, "limit": 2, "total": 5, "has_more": True}
    last, pages = await listed(client, "?limit=2&page=3")
    assert last == ids[4:]
    assert pages["has_more"] is False
    beyond, pages = await listed(client, "?page=2147483647&limit=100")
    assert (beyond, pages["total"]) == ([], 5)
    # A cursor goes on where its list ended, though a newer auction has come.
    await opened(client)
    assert (await listed(client, "?limit=2&page=2"))[0] == ids[1:3]
    third, pages = await listed(client, f"?limit=2&cursor={cursor}")
    assert third == ids[2:4]
    last, pages = await listed(client, f"?limit=2&cursor={pages['next_cursor']}")
    assert (last, pages["has_more"], pages["next_cursor"]) == (ids[4:], False, None)


@pytest.mark.parametrize("cursor", ["", "x", "1", "1.x", "-1.", f"1.{MAKER}x", "\u0661", "9" * 30])
async def test_what_no_list_has_given_is_no_cursor(client: httpx.AsyncClient, cursor: str) -> None:
    auction = await opened(client)
    response = await client.get(AUCTIONS, params={"cursor": cursor})
    assert (response.status_code, response.json()["error"]["details"][0]["field"]) == (422, "cursor")
    if cursor != "1":
        response = await client.get(f"{AUCTIONS}/{auction}/bids", params={"cursor": cursor})
        assert (response.status_code, response.json()["error"]["details"][0]["field"]) == (422, "cursor")


async def test_auctions_are_filtered_by_status_and_maker(world: World, client: httpx.AsyncClient) -> None:
    running = await opened(client)
    annas = await opened(client, "anna")
    ended = await opened(client)
    await client.post(f"{AUCTIONS}/{ended}/end", headers=as_user("maker"))
    scheduled = await opened(client, start_time="2023-11-14T23:00:00Z")
    for query, expected in (
        ("?status=active", {running, annas}),
        ("?status=ended", {ended}),
        ("?status=scheduled", {scheduled}),
        ("?status=cancelled", set()),
        (f"?maker_id={ANNA}", {annas}),
        (f"?maker_id={MAKER}&status=active", {running}),
        (f"?maker_id={uuid4()}", set()),
    ):
        ids, pages = await listed(client, query)
        assert set(ids) == expected
        assert pages["total"] == len(expected)


async def test_a_list_shows_each_caller_what_is_its_own(client: httpx.AsyncClient) -> None:
    auction = await opened(client, reserve_price=80)
    await client.post(f"{AUCTIONS}/{auction}/bids", json={"max_bid_amount": 50}, headers=as_user("anna"))
    for who, is_maker, is_bidder in (("maker", True, False), ("anna", False, True), ("ben", False, False)):
        response = await client.get(AUCTIONS, headers=as_user(who))
        (data,) = response.json()["data"]["auctions"]
        assert ("reserve_price" in data, "you" in data) == (is_maker, is_bidder)


async def test_a_list_says_so_when_a_shard_is_away_and_skips_what_no_shard_knows(
    world: World, client: httpx.AsyncClient
) -> None:
    await opened(client)
    world.router.next_answer = Rejection("unavailable", "Away.", is_transient=True, retry_after_ms=500)
    response = await client.get(AUCTIONS)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "UNAVAILABLE")
    world.router.next_answer = Rejection("not_found", "There is no such auction.")
    assert (await listed(client))[0] == []


async def test_bids_are_listed_without_names_and_maximums(world: World, client: httpx.AsyncClient) -> None:
    auction = await opened(client)
    path = f"{AUCTIONS}/{auction}/bids"
    for who, body in (
        ("anna", {"max_bid_amount": 100}),
        ("anna", {"max_bid_amount": 120}),  # Its own maximum: no bid in public.
        ("ben", {"bid_amount": 50}),
        ("ben", {"bid_amount": "200.00"}),
    ):
        world.now += 1_001
        assert (await client.post(path, json=body, headers=as_user(who))).status_code == 201
    response = await client.get(path)
    assert response.json()["data"] == {
        "bids": [
            {"seq": 5, "at": "2023-11-14T22:13:24.004Z", "paddle": 2, "price": 200, "leader": 2},
            {"seq": 4, "at": "2023-11-14T22:13:23.003Z", "paddle": 2, "price": 55, "leader": 1},
            {"seq": 2, "at": "2023-11-14T22:13:21.001Z", "paddle": 1, "price": 10, "leader": 1},
        ],
        "pagination": {"page": 1, "limit": 20, "total": 3, "has_more": False, "next_cursor": None},
    }
    assert b'"price":55.00' in response.content
    first = (await client.get(f"{path}?limit=2")).json()["data"]
    assert (await client.post(path, json={"bid_amount": 300}, headers=as_user("anna"))).status_code == 201
    rest = (await client.get(f"{path}?limit=2&cursor={first['pagination']['next_cursor']}")).json()["data"]
    assert [bid["seq"] for bid in rest["bids"]] == [2]
    assert (rest["pagination"]["has_more"], rest["pagination"]["next_cursor"]) == (False, None)
    second = (await client.get(f"{path}?limit=3&page=2")).json()["data"]
    assert [bid["seq"] for bid in second["bids"]] == [2]
    assert second["pagination"]["has_more"] is False


async def test_an_auction_without_bids_has_an_empty_list_and_an_unknown_one_none(client: httpx.AsyncClient) -> None:
    auction = await opened(client)
    response = await client.get(f"{AUCTIONS}/{auction}/bids")
    assert response.json()["data"]["bids"] == []
    assert (await client.get(f"{AUCTIONS}/{uuid4()}/bids")).status_code == 404
    assert (await client.get(f"{AUCTIONS}/{auction}/bids", headers=as_user("nobody"))).status_code == 401


async def test_lists_use_their_indexes(pool: asyncpg.Pool, client: httpx.AsyncClient) -> None:
    await pool.execute(
        "INSERT INTO entities (entity_id, slot, kind, owner_id, status, due_at, created_at, window_ms) "
        "SELECT gen_random_uuid(), n % 1024, 'auction', "
        "('00000000-0000-4000-8000-' || lpad((n % 500)::text, 12, '0'))::uuid, "
        "CASE WHEN n % 50 = 0 THEN 'active' ELSE 'ended' END, NULL, n, 60000 FROM generate_series(1, 20000) n"
    )
    await pool.execute("ANALYZE entities")
    for where, index in (
        ("kind = 'auction'", "entities_newest"),
        ("kind = 'auction' AND status = 'active'", "entities_status"),
        ("kind = 'auction' AND owner_id = '00000000-0000-4000-8000-000000000007'", "entities_owner"),
    ):
        plan = await pool.fetch("EXPLAIN " + auctions._AUCTIONS.format(conditions=where, limit=20, offset=0))
        assert index in str(plan)


# When Postgres is not well


async def test_lists_say_that_postgres_is_away(world: World, database_url: str) -> None:
    pool = await asyncpg.create_pool(database_url, min_size=1, max_size=1)
    await pool.close()
    async with world.start(pool) as client:
        response = await client.get(AUCTIONS)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "UNAVAILABLE")
    assert response.headers["retry-after"] == "1"


async def test_a_list_does_not_wait_for_ever(pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auctions, "LIST_TIMEOUT_MS", 50)
    async with pool.acquire(), pool.acquire():
        with pytest.raises(CatalogueUnavailable):
            await list_auctions(pool, status=None, maker=None, after=None, offset=0, limit=20)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (asyncpg.AdminShutdownError("going away"), CatalogueUnavailable),
        (asyncpg.TooManyConnectionsError("full"), CatalogueUnavailable),
        (asyncpg.UndefinedTableError("no such table"), asyncpg.UndefinedTableError),
    ],
)
async def test_what_the_driver_raises_is_translated_once(
    pool: asyncpg.Pool, error: Exception, expected: type[Exception]
) -> None:
    with pytest.raises(expected):
        async with auctions._reading(pool):
            raise error
