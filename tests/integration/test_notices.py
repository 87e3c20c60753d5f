"""The topic `me`, through real sockets, a real gateway, a real shard and Postgres."""

from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from engine.limits import STANDINGS_MAX, STANDINGS_MS
from gateway.catalogue.auctions import list_joined
from tests.integration.test_gateway import ANNA, BEN, MAKER, Client, Engine, engine
from tests.support.waiting import until

__all__ = ["engine"]


async def follow(client: Client) -> list[dict[str, Any]]:
    """Subscribe to `me`: the standings."""
    subscribed = await client.ask({"op": "subscribe", "topic": "me"})
    assert (subscribed["type"], subscribed["topic"]) == ("subscribed", "me"), subscribed
    standings: list[dict[str, Any]] = subscribed["standings"]
    return standings


async def told(client: Client, count: int) -> list[tuple[str, int]]:
    """Wait until so many notices have come; the kind and the number of each."""
    while len(client.answers.get(None, [])) < count:
        await client.receive()
    assert {message["type"] for message in client.answers.get(None, [])} <= {"notice"}
    return [(notice["kind"], notice["seq"]) for notice in client.answers.get(None, [])]


def standing(auction: str, paddle: int, most: int, *, leads: bool, status: str = "active") -> dict[str, Any]:
    return {"auction": auction, "paddle": paddle, "max_amount": most, "is_leading": leads, "status": status}


async def test_all_connections_of_a_user_are_told_what_concerns_it(engine: Engine) -> None:
    auction = await engine.open_auction(soft_close=None)
    async with engine.client(ANNA) as phone, engine.client(ANNA) as desk, engine.client(BEN) as ben:
        for client in (phone, desk, ben):
            assert await follow(client) == []
        ack = await phone.bid(auction, 1_500)
        await ben.bid(auction, 2_000)
        # Over HTTP
        bid = await engine.request("POST", f"/api/v1/auctions/{auction}/bids", ANNA, json={"bid_amount": 30})
        assert bid.status_code == 201, bid.text
        ended = await engine.request("POST", f"/api/v1/auctions/{auction}/end", MAKER)
        assert ended.status_code == 200, ended.text
        for client in (phone, desk):
            assert await told(client, 4) == [("winning", 2), ("outbid", 3), ("winning", 4), ("won", 5)]
        assert await told(ben, 3) == [("winning", 3), ("outbid", 4), ("lost", 5)]
        outbid = phone.answers[None][1]
        assert outbid == {
            "type": "notice",
            "topic": "me",
            "kind": "outbid",
            "auction": auction,
            "seq": 3,
            "at": outbid["at"],
            "price": 2_000,
            "paddle": 1,
            "max_amount": 1_500,
            "minimum": 2_500,
            "end_time": ack["end_time"],
        }
        assert (ben.answers[None][2]["outcome"], ben.answers[None][2]["price"]) == ("sold", 3_000)


async def test_who_comes_back_is_told_how_it_stands(engine: Engine) -> None:
    first, second = await engine.open_auction(soft_close=None), await engine.open_auction()
    async with engine.client(ANNA) as anna, engine.client(BEN) as ben:
        await anna.bid(first, 1_500)
        await anna.bid(second, 1_500)
        await ben.bid(second, 2_000)
    async with engine.client(ANNA) as anna, engine.client(ANNA) as other:
        standings = await follow(anna)
        assert sorted(standings, key=str) == sorted(
            [standing(first, 1, 1_500, leads=True), standing(second, 1, 1_500, leads=False)], key=str
        )
        await engine.request("POST", f"/api/v1/auctions/{first}/end", MAKER)
        await told(anna, 1)
        assert standing(first, 1, 1_500, leads=True, status="ended") in await follow(other)
        # Who has unsubscribed is told no more.
        await other.ask({"op": "unsubscribe", "topic": "me"})
        await other.bid(second, 9_000)
        await told(anna, 2)
        await other.ask({"op": "ping"})
        assert None not in other.answers
    await until(lambda: engine.gateway._people._people == {})
    assert engine.shard is not None
    await until(lambda: not engine.shard.shard._followers.by_user)  # type: ignore[union-attr]


async def test_what_happens_while_a_link_is_broken_is_told_when_it_is_back(engine: Engine) -> None:
    auction, other = await engine.open_auction(), await engine.open_auction()
    async with engine.client(ANNA) as anna:
        await follow(anna)
        await anna.bid(auction, 1_500)
        await told(anna, 1)
        shard = engine.shard
        assert shard is not None
        # The shard decides this, commits it, and dies before anybody has heard of it.
        followers, shard.shard._followers.by_user = shard.shard._followers.by_user, {}
        assert list(followers) == [ANNA]
        async with engine.client(BEN) as ben:
            await ben.bid(auction, 2_000)
            await engine.request("POST", f"/api/v1/auctions/{other}/bids", ANNA, json={"bid_amount": 30})
            await engine.kill_shard()
            await engine.start_shard()
            assert sorted((await told(anna, 3))[1:]) == [("outbid", 3), ("winning", 2)]
            await ben.bid(other, 9_000)
            assert (await told(anna, 4))[3:] == [("outbid", 3)]


async def test_without_its_shard_a_user_is_told_to_come_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.link.COMMAND_TIMEOUT_MS", 100)
    await engine.kill_shard()
    await until(lambda: engine.gateway._router.unreachable() == [0])
    async with engine.client(ANNA) as anna:
        refused = await anna.ask({"op": "subscribe", "topic": "me"})
        assert (refused["type"], refused["code"]) == ("error", "unavailable")
        assert engine.gateway._people._people == {}
        await engine.start_shard()
        await engine.gateway._router.opened()
        assert await follow(anna) == []


# The list


async def test_the_auctions_of_a_user_are_those_that_are_not_long_over(pool: asyncpg.Pool) -> None:
    now = int(await pool.fetchval("SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint"))
    day_ms = int(timedelta(days=1).total_seconds() * 1_000)
    assert day_ms == STANDINGS_MS

    async def add(created_at: int, ended_at: int | None, user: UUID = ANNA) -> UUID:
        auction = uuid4()
        await pool.execute(
            "INSERT INTO entities (entity_id, slot, kind, owner_id, status, created_at, window_ms, ended_at) "
            "VALUES ($1, 0, 'auction', $2, 'active', $3, 0, $4)",
            auction,
            MAKER,
            created_at,
            ended_at,
        )
        await pool.execute("INSERT INTO bidders VALUES ($1, $2)", user, auction)
        return auction

    over_newer = await add(5, now - day_ms + 60_000)
    over_older = await add(4, now)
    open_older, open_newer = await add(1, None), await add(2, None)
    await add(9, now - day_ms - 60_000)
    await add(9, None, BEN)
    assert await list_joined(pool, ANNA) == [open_newer, open_older, over_newer, over_older]
    for _ in range(STANDINGS_MAX):
        await add(8, None)
    found = await list_joined(pool, ANNA)
    assert len(found) == STANDINGS_MAX
    assert not {over_newer, open_newer} & set(found)
