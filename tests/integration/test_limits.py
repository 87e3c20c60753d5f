"""Limits on real sockets: who is over one is told so, and nobody else suffers."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import httpx
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.frames import Frame, Opcode

from actors import link as link_module
from engine.limits import CONNECTION_MESSAGES_RATE, MEBIBYTE, RATE_REFUSALS_MAX, USER_BIDS_RATE, Rate
from gateway import rates as rates_module
from gateway import socket as socket_module
from gateway.gateway_actor import Door, RunningGateway, start_gateway
from gateway.rates import Rates
from gateway.room import MemoryGauge
from gateway.socket import Sockets
from tests.integration.test_gateway import ANNA, BEN, PUBLIC, Client, Engine, engine, free_port, token
from tests.integration.test_socket import AUCTION, Gateway, answer, closed, raw_client, running
from tests.support.postgres import wait_for_lock
from tests.support.waiting import until

__all__ = ["engine"]

PING = '{"op":"ping","ref":"ping"}'


@pytest.fixture
async def limited() -> AsyncIterator[Gateway]:
    """A gateway at which no address is raised, and whose clock stands still."""
    async with running(Sockets(rates=Rates(()))) as gateway:
        yield gateway


async def ping(client: ClientConnection) -> Any:
    await client.send(PING)
    return await answer(client)


async def use_up(client: ClientConnection) -> None:
    """Send all that a connection may at once; its hello was the first."""
    for _ in range(CONNECTION_MESSAGES_RATE.burst - 1):
        await client.send(PING)
    for _ in range(CONNECTION_MESSAGES_RATE.burst - 1):
        assert (await answer(client))["type"] == "pong"


def bid(ref: Any) -> str:
    return json.dumps({"op": "bid", "auction": str(AUCTION), "bid_id": str(uuid4()), "amount": 100, "ref": ref})


# Rates


async def test_a_connection_over_its_rate_is_told_when_to_come_back(limited: Gateway) -> None:
    async with limited.client() as client, limited.client() as other:
        await use_up(client)
        error = await ping(client)
        assert (error["type"], error["code"], error["ref"], error["retry_after_ms"]) == (
            "error",
            "rate_limited",
            "ping",
            50,
        )
        assert (await ping(other))["type"] == "pong"
        limited.now += error["retry_after_ms"]
        assert (await ping(client))["type"] == "pong"
        assert (await ping(client))["code"] == "rate_limited"


@pytest.mark.parametrize("ref", ["null", '"' + "ö" * 64 + '"', "9007199254740991"])
async def test_a_refusal_echoes_the_ref(limited: Gateway, ref: str) -> None:
    async with limited.client() as client:
        await use_up(client)
        await client.send(f'{{"op":"ping","x":[{{"ref":1}}],"ref":{ref}}}')
        assert (await answer(client)).get("ref") == json.loads(ref)


@pytest.mark.parametrize("text", ["nothing", '{"ref":true}', "[" * 1_000, "{}"])
async def test_what_is_refused_need_not_be_well_formed(limited: Gateway, text: str) -> None:
    async with limited.client() as client:
        await use_up(client)
        await client.send(text)
        error = await answer(client)
        assert (error["code"], error.get("ref")) == ("rate_limited", None)


async def test_who_goes_on_in_spite_of_refusals_is_closed(limited: Gateway) -> None:
    async with limited.client() as client, limited.client() as other:
        await use_up(client)
        for _ in range(RATE_REFUSALS_MAX):
            await client.send(PING)
        assert await closed(client) == 4502
        assert (await ping(other))["type"] == "pong"


async def test_refusals_of_long_ago_are_forgiven(limited: Gateway) -> None:
    async with limited.client() as client:
        for _ in range(3):
            # An hour later, so that the rate has recovered as well.
            limited.now += 3_600_000
            await ping(client)
            await use_up(client)
            for _ in range(RATE_REFUSALS_MAX - 1):
                assert (await ping(client))["code"] == "rate_limited"


@pytest.mark.parametrize(
    "flood",
    [Frame(Opcode.PING, b""), Frame(Opcode.PONG, b""), Frame(Opcode.CONT, b"", fin=False)],
    ids=["pings", "pongs", "fragments"],
)
async def test_a_flood_of_other_frames_is_closed(limited: Gateway, flood: Frame) -> None:
    async with limited.client() as client:
        client.transport.write(Frame(Opcode.TEXT, b"", fin=False).serialize(mask=True))
        client.transport.write(flood.serialize(mask=True) * (CONNECTION_MESSAGES_RATE.burst + RATE_REFUSALS_MAX))
        assert await closed(client) == 4502


async def test_a_users_bids_count_over_all_its_connections(limited: Gateway) -> None:
    hello = json.dumps({"op": "hello", "token": limited.token()})
    async with limited.client(hello) as one, limited.client(hello) as two:
        for ref in range(USER_BIDS_RATE.burst):
            client = (one, two)[ref % 2]
            await client.send(bid(ref))
            assert (await answer(client))["type"] == "ack"
        await two.send(bid("over"))
        error = await answer(two)
        assert (error["type"], error["code"], error["ref"], error["retry_after_ms"]) == (
            "error",
            "rate_limited",
            "over",
            100,
        )
        limited.now += error["retry_after_ms"]
        await one.send(bid("again"))
        assert (await answer(one))["type"] == "ack"
    assert len(limited.router.payloads) == USER_BIDS_RATE.burst + 1


async def test_an_addresss_messages_count_over_all_its_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates_module, "ADDRESS_MESSAGES_RATE", Rate(2, burst=5))
    async with running(Sockets(rates=Rates(()))) as gateway, gateway.client() as one, gateway.client() as two:
        assert [(await ping(client))["type"] for client in (one, two, one, two)] == ["pong", "pong", "pong", "error"]
        gateway.now += 500
        assert (await ping(two))["type"] == "pong"


async def test_an_address_that_connects_too_often_is_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates_module, "ADDRESS_CONNECTIONS_RATE", Rate(1, burst=2))
    async with running(Sockets(rates=Rates(()))) as gateway, gateway.client() as one:
        async with gateway.client():
            pass
        async with gateway.client(hello=None) as late:
            assert await closed(late) == 4502
        assert (await ping(one))["type"] == "pong"
        gateway.now += 1_000
        async with gateway.client():
            pass


async def test_an_address_with_too_many_connections_is_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates_module, "ADDRESS_CONNECTIONS_MAX", 2)
    async with running(Sockets(rates=Rates(()))) as gateway, gateway.client() as one:
        async with gateway.client() as two:
            async with gateway.client(hello=None) as three:
                assert await closed(three) == 4502
            assert [(await ping(client))["type"] for client in (one, two)] == ["pong", "pong"]
        async with gateway.client():
            pass


async def test_a_raised_address_is_free() -> None:
    async with running() as gateway, gateway.client() as client:
        for _ in range(3):
            await use_up(client)


async def test_of_too_many_connections_the_newest_are_cut_and_nobody_suffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket_module, "CLOSE_TIMEOUT_MS", 60_000)
    async with running(Sockets(1), connections_max=3) as gateway, gateway.client() as client:
        connections = gateway.server.server_state.connections
        # One does not ask, and one is told that there is no room, and stays.
        _, idle = await asyncio.open_connection("127.0.0.1", gateway.port)
        _, refused = await raw_client(gateway)
        await until(lambda: len(connections) == 3)
        reader, late = await asyncio.open_connection("127.0.0.1", gateway.port)
        assert await reader.read() == b""
        assert (await ping(client))["type"] == "pong"
        idle.close()
        await until(lambda: len(connections) < 3)
        async with httpx.AsyncClient() as http:
            assert (await http.get(f"http://127.0.0.1:{gateway.port}/")).status_code == 200
        refused.close()
        late.close()


# A whole gateway


@asynccontextmanager
async def second_gateway(engine: Engine, **door: Any) -> AsyncIterator[tuple[RunningGateway, int]]:
    port = free_port()
    gateway = await start_gateway(
        engine.place, Door(host="127.0.0.1", port=port, public_key=PUBLIC, **door), "gateway-1"
    )
    try:
        yield gateway, port
    finally:
        await gateway.stop()


@asynccontextmanager
async def client_of(port: int) -> AsyncIterator[Client]:
    async with connect(f"ws://127.0.0.1:{port}/v1/live") as connection:
        client = Client(connection)
        assert (await client.ask({"op": "hello", "token": token(ANNA)}))["type"] == "welcome"
        yield client


async def test_bids_over_http_count_beside_those_on_sockets(engine: Engine) -> None:
    auction = await engine.open_auction()
    async with second_gateway(engine, raised_addresses="") as (gateway, port), client_of(port) as anna:
        # Anna has bid so much that it will take her an hour.
        while not gateway._sockets._rates.bid("192.0.2.1", ANNA, gateway._clock() + 3_600_000):
            pass
        assert (await anna.bid(auction, 1_000))["code"] == "rate_limited"
        address = f"http://127.0.0.1:{port}/api/v1/auctions/{auction}/bids"
        response = await engine.request("POST", address, ANNA, json={"bid_amount": "20.00"})
        assert (response.status_code, response.json()["error"]["code"]) == (429, "RATE_LIMITED")
        assert int(response.headers["Retry-After"]) * 1_000 >= response.json()["error"]["retry_after_ms"] > 3_000_000
        # Another address in a header does not help.
        elsewhere = {"X-Forwarded-For": "192.0.2.1", "Authorization": f"Bearer {token(ANNA)}"}
        async with httpx.AsyncClient(headers=elsewhere) as anna_again:
            assert (await anna_again.post(address, json={"bid_amount": "20.00"})).status_code == 429
    # Where its address is raised, the same user may.
    async with engine.client(ANNA) as anna:
        assert (await anna.bid(auction, 4_000))["type"] == "ack"


async def test_without_memory_nobody_is_let_in_and_nobody_suffers(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    auction = await engine.open_auction()
    async with second_gateway(engine, memory_bytes_max=MEBIBYTE) as (gateway, port):
        await turned_away(gateway, port)
        filled = 0
        gateway._memory = MemoryGauge(1_000, lambda: filled)
        gateway._look_at_memory()
        async with client_of(port) as anna:
            filled = 1_001
            await turned_away(gateway, port)
            assert (await anna.bid(auction, 1_000))["type"] == "ack"
        filled = 900
        gateway._look_at_memory()
        async with client_of(port):
            pass
    assert caplog.text.count("memory is short: nobody is let in") == 2
    assert caplog.text.count("there is memory again") == 2


async def turned_away(gateway: RunningGateway, port: int) -> None:
    gateway._look_at_memory()
    async with connect(f"ws://127.0.0.1:{port}/v1/live") as late:
        assert await closed(late) == 4502


async def test_a_full_line_answers_busy_and_recovers(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    auction = await engine.open_auction()
    monkeypatch.setattr(link_module, "LINK_LINE_MAX", 2)
    shard = engine.shard
    assert shard is not None
    async with engine.client(ANNA) as anna, engine.client(BEN) as ben:
        async with engine.pool.acquire() as other, other.transaction():
            # Nothing commits while this lock is held: what is placed stays in line.
            await other.execute("SELECT FROM shards FOR UPDATE")
            taken = [
                await anna.send({"op": "bid", "auction": auction, "bid_id": str(uuid4()), "amount": amount})
                for amount in (1_000, 2_000)
            ]
            await wait_for_lock(engine.pool, shard._journal._writer.get_server_pid())
            await until(lambda: _in_flight(engine) == 2)
            bid_id = uuid4()
            # A long `ref` makes a long refusal.
            ref = "b" * 64
            await ben.connection.send(
                json.dumps({"op": "bid", "auction": auction, "bid_id": str(bid_id), "amount": 3_000, "ref": ref})
            )
            busy = await ben.answer(ref)
            assert (busy["type"], busy["code"], busy["retry_after_ms"]) == ("error", "busy", 250)
            # What else it asks for is answered when it has rested.
            assert (await ben.ask({"op": "ping"}))["type"] == "pong"
            # Another is not kept waiting, nor told to.
            assert (await anna.ask({"op": "ping"}))["type"] == "pong"
        assert [(await anna.answer(ref))["type"] for ref in taken] == ["ack", "ack"]
        await until(lambda: _in_flight(engine) == 0)
        # A refusal for lack of room is no verdict: the same bid may be placed now, or once the shard has looked about.
        while (verdict := await ben.bid(auction, 3_000, bid_id))["type"] == "error":
            assert verdict["code"] == "unavailable"
        assert (verdict["type"], verdict["seq"]) == ("ack", 4)


async def test_bids_that_follow_a_busy_in_one_delivery_are_refused(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    auction = await engine.open_auction()
    async with engine.client(ANNA) as anna:
        bid = {"op": "bid", "auction": auction, "bid_id": str(uuid4()), "amount": 1_000}
        with monkeypatch.context() as full:
            full.setattr(link_module, "LINK_LINE_MAX", 0)
            _send_together(anna, {**bid, "ref": "first"}, {**bid, "ref": "second"}, {"op": "ping", "ref": "third"})
            answers = [await anna.answer(ref) for ref in ("first", "second")]
            assert (await anna.answer("third"))["type"] == "pong"
        assert [(one["type"], one["code"], one["retry_after_ms"]) for one in answers] == [("error", "busy", 250)] * 2
        assert (await anna.bid(auction, 1_000))["type"] == "ack"


async def test_of_the_bids_that_came_while_it_rested_the_last_is_taken(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    auction = await engine.open_auction()
    async with engine.client(ANNA) as anna:
        with monkeypatch.context() as full:
            full.setattr(link_module, "LINK_LINE_MAX", 0)
            assert (await anna.bid(auction, 1_000))["code"] == "busy"
        bids = [
            {"op": "bid", "ref": str(amount), "auction": auction, "bid_id": str(uuid4()), "amount": amount}
            for amount in (1_000, 2_000, 3_000)
        ]
        _send_together(anna, *bids, {"op": "ping", "ref": "ping"}, bids[0] | {"ref": "last"})
        answers = {ref: await anna.answer(ref) for ref in ("1000", "2000", "3000", "ping", "last")}
        assert [one.get("code", one["type"]) for one in answers.values()] == ["busy"] * 3 + ["pong", "ack"]


async def test_who_leaves_while_it_rests_leaves_nothing_behind(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    auction = await engine.open_auction()
    monkeypatch.setattr(link_module, "LINK_LINE_MAX", 0)
    async with engine.client(ANNA) as anna:
        assert (await anna.bid(auction, 1_000))["code"] == "busy"
        anna.connection.transport.abort()
    await until(lambda: len(engine.gateway._sockets) == 0)


def _send_together(client: Client, *messages: dict[str, Any]) -> None:
    """Send messages so that they are read at once."""
    frames = [Frame(Opcode.TEXT, json.dumps(message).encode()) for message in messages]
    client.connection.transport.write(b"".join(frame.serialize(mask=True) for frame in frames))


def _in_flight(engine: Engine) -> int:
    return sum(len(link._in_flight) for link in engine.gateway._router._links.values())
