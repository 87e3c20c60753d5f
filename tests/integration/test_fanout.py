"""Real sockets at real gateways: who comes back, who is slow, who is many."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import picows
import pytest

from actors import shard as shard_module
from actors.messages import Watch
from gateway import gateway_actor
from gateway import socket as socket_module
from gateway.gateway_actor import Door, start_gateway
from tests.integration.test_gateway import ANNA, BEN, PUBLIC, Engine, free_port, running
from tests.support.waiting import until

KEPT = ("extended", "ended", "cancelled")
SMALL_BYTES = 4_096
"""What the kernel holds for a socket in these tests, so that little makes it one that is behind."""


class Viewer(picows.WSListener):
    """A guest on a light socket, who watches one auction and keeps what it is told."""

    def __init__(self, auction: str) -> None:
        self.auction = auction
        self.transport: picows.WSTransport
        self.messages: list[dict[str, Any]] = []
        self.seq: int | None = None
        self.closed: int | None = None
        self.is_gone = False

    def on_ws_connected(self, transport: picows.WSTransport) -> None:
        self.transport = transport
        self.say(op="hello")

    def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        if frame.msg_type == picows.WSMsgType.CLOSE:
            self.closed = int.from_bytes(frame.get_payload_as_bytes()[:2], "big")
            transport.disconnect()
        elif frame.msg_type == picows.WSMsgType.TEXT:
            self._take(json.loads(frame.get_payload_as_bytes()))

    def on_ws_disconnected(self, transport: picows.WSTransport) -> None:
        self.is_gone = True

    def _take(self, message: dict[str, Any]) -> None:
        """Whatever comes must follow on what came before."""
        match message["type"]:
            case "subscribed":
                self.seq = message["seq"]
            case "events":
                assert self.seq is not None
                seqs = [event["seq"] for event in message["events"]]
                assert seqs == list(range(self.seq + 1, self.seq + 1 + len(seqs)))
                self.seq = seqs[-1]
            case "state":
                assert self.seq is not None
                assert message["seq"] > self.seq
                message["after"], self.seq = self.seq, message["seq"]
            case "presence":
                return
        self.messages.append(message)

    def say(self, **message: Any) -> None:
        self.transport.send(picows.WSMsgType.TEXT, json.dumps(message))

    def subscribe(self, since: int | None = None) -> None:
        self.say(op="subscribe", topic=f"auction:{self.auction}", **({} if since is None else {"since": since}))

    def stop_reading(self) -> None:
        raw = self.transport.underlying_transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BYTES)
        self.transport.underlying_transport.pause_reading()

    def read_on(self) -> None:
        self.transport.underlying_transport.resume_reading()


@pytest.fixture
async def engine(
    database_url: str, pool: asyncpg.Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Engine]:
    monkeypatch.delenv("GAVEL_SECRET", raising=False)
    monkeypatch.setattr(gateway_actor, "SOCKET_KERNEL_BYTES", SMALL_BYTES)
    monkeypatch.setattr(socket_module, "SOCKET_BEHIND_BYTES", SMALL_BYTES)
    async with running(database_url, pool, tmp_path) as engine:
        yield engine


@asynccontextmanager
async def viewers(engine: Engine, auction: str, count: int, since: int | None = None) -> AsyncIterator[list[Viewer]]:
    """So many guests, who have asked for the auction; connected some at a time, as the kernel takes them."""
    guests = [Viewer(auction) for _ in range(count)]

    async def connect(guest: Viewer) -> None:
        await picows.ws_connect(lambda _request, _response: guest, f"ws://127.0.0.1:{engine.port}/v1/live")

    try:
        for start in range(0, count, 200):
            await asyncio.gather(*map(connect, guests[start : start + 200]))
        for guest in guests:
            guest.subscribe(since)
        yield guests
    finally:
        for guest in guests:
            guest.transport.disconnect(graceful=False)
        await until(lambda: all(guest.is_gone for guest in guests))


class Bidders:
    """Two who outbid one another."""

    def __init__(self, clients: list[Any], auction: str) -> None:
        self._clients = clients
        self._auction = auction
        self._amount = 1_000
        self.count = 0
        self.seq = 1

    async def bid(self, count: int = 1) -> None:
        """Bid so often, each bid acknowledged before the next."""
        for _ in range(count):
            self._clients.reverse()
            ack = await self._clients[0].bid(self._auction, self._amount, uuid4())
            assert ack["type"] == "ack", ack
            self._amount += 1_000
            self.count += 1
            self.seq = ack["seq"]


@asynccontextmanager
async def bidders(engine: Engine, auction: str) -> AsyncIterator[Bidders]:
    async with engine.client(ANNA) as anna, engine.client(BEN) as ben:
        yield Bidders([anna, ben], auction)


async def last_seq(engine: Engine, auction: str) -> int:
    last: int = await engine.pool.fetchval("SELECT max(seq) FROM journal WHERE entity_id = $1", UUID(auction))
    return last


async def kept(engine: Engine, auction: str, first: int, last: int) -> list[int]:
    """The events that are never dropped, by the journal."""
    rows = await engine.pool.fetch(
        "SELECT seq FROM journal WHERE entity_id = $1 AND seq BETWEEN $2 AND $3 AND kind = ANY($4) ORDER BY seq",
        UUID(auction),
        first,
        last,
        list(KEPT),
    )
    return [row["seq"] for row in rows]


async def test_a_socket_that_stops_reading_is_told_the_state_when_it_reads_on(engine: Engine) -> None:
    # So near to its end that bids extend it.
    auction = await engine.open_auction(seconds=60)
    async with viewers(engine, auction, 2) as (slow, fast), bidders(engine, auction) as bids:
        await until(lambda: slow.seq == fast.seq == 1)
        slow.stop_reading()
        while not any(client.is_behind for client in engine.gateway._sockets._open):
            await bids.bid()
        await bids.bid(20)
        last = await last_seq(engine, auction)
        await until(lambda: fast.seq == last)
        slow.read_on()
        await until(lambda: slow.seq == last)
        state = slow.messages[-1]
        assert state["type"] == "state"
        assert [event["seq"] for event in state["events"]] == await kept(engine, auction, state["after"] + 1, last)
        assert len(state["events"]) > 0
        assert state["snapshot"]["bids"] == bids.count
        # And on it goes without a gap.
        await bids.bid()
        last = await last_seq(engine, auction)
        await until(lambda: slow.seq == fast.seq == last)
        assert slow.messages[-1] == fast.messages[-1]
        assert slow.closed is fast.closed is None


async def test_those_who_stop_reading_hold_nobody_up(engine: Engine) -> None:
    auction = await engine.open_auction()
    async with viewers(engine, auction, 1_000) as guests, bidders(engine, auction) as bids:
        await until(lambda: all(guest.seq == 1 for guest in guests))
        slow, fast = guests[::10], [guest for number, guest in enumerate(guests) if number % 10]
        for guest in slow:
            guest.stop_reading()
        while sum(client.is_behind for client in engine.gateway._sockets._open) < len(slow):
            await bids.bid()
        await bids.bid(5)
        await until(lambda: all(guest.seq == bids.seq for guest in fast))
        assert all(client.seq is not None and client.seq < bids.seq for client in slow)
        for guest in slow:
            guest.read_on()
        await until(lambda: all(guest.seq == bids.seq for guest in guests))
        assert {guest.messages[-1]["type"] for guest in slow} == {"state"}
        assert all(guest.closed is None for guest in guests)


async def test_all_who_come_back_at_once_get_what_they_missed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Watch] = []
    watch = shard_module.Shard._watch

    def count(shard: Any, entity: Any, payload: Watch, *rest: Any) -> None:
        asked.append(payload)
        watch(shard, entity, payload, *rest)

    monkeypatch.setattr(shard_module.Shard, "_watch", count)
    auction = await engine.open_auction()
    async with bidders(engine, auction) as bids:
        await bids.bid(5)
        async with viewers(engine, auction, 2_000, since=3) as guests:
            await until(lambda: all(guest.seq is not None for guest in guests))
            for guest in guests:
                subscribed = guest.messages[-1]
                assert subscribed["recovered"] is True
                assert [event["seq"] for event in subscribed["events"]] == [4, 5, 6]
            assert asked == [Watch(UUID(auction), 3, [])]
            await bids.bid()
            await until(lambda: all(guest.seq == 7 for guest in guests))
            # Who comes back a little later, or with nothing, costs the shard nothing more.
            guests[0].subscribe(since=5)
            guests[1].subscribe()
            await until(lambda: all(guest.messages[-1]["type"] == "subscribed" for guest in guests[:2]))
            assert [event["seq"] for event in guests[0].messages[-1]["events"]] == [6, 7]
            assert guests[1].messages[-1]["snapshot"]["bids"] == 6
            assert len(asked) == 1


async def test_users_who_come_at_once_share_a_question(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Watch] = []
    watch = shard_module.Shard._watch

    def count(shard: Any, entity: Any, payload: Watch, *rest: Any) -> None:
        asked.append(payload)
        watch(shard, entity, payload, *rest)

    monkeypatch.setattr(shard_module.Shard, "_watch", count)
    auction = await engine.open_auction()
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(engine.client(ANNA if n == 0 else uuid4())) for n in range(20)]
        await clients[0].bid(auction, 1_000)
        answers = await asyncio.gather(*(client.subscribe(auction) for client in clients))
    assert answers[0]["you"] == {"paddle": 1, "max_amount": 1_000, "is_leading": True}
    assert [answer["seq"] for answer in answers] == [2] * 20
    assert not any("you" in answer for answer in answers[1:])
    assert len(asked) < 20
    assert sum(len(watch.viewers) for watch in asked) == 20


async def test_viewers_are_counted_across_gateways(engine: Engine) -> None:
    auction = await engine.open_auction()
    one_port, other_port = engine.port, free_port()
    other = await start_gateway(engine.place, Door(host="127.0.0.1", port=other_port, public_key=PUBLIC), "gateway-1")
    try:
        async with engine.client() as one:
            await one.subscribe(auction)
            await one.told_viewers(1)
            engine.port = other_port
            async with engine.client() as two, engine.client() as three:
                await two.subscribe(auction)
                await three.subscribe(auction)
                for client in (one, two, three):
                    await client.told_viewers(3)
            await one.told_viewers(1)
    finally:
        engine.port = one_port
        await other.stop()
