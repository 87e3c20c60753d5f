"""The peers of the benchmark: each speaks the live protocol and keeps its rules, over real sockets."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psutil
import pytest

from gavel.postgres import EmbeddedPostgres
from loadtests.clients import Client, connect, disconnect
from loadtests.measured import LoadFailed
from loadtests.peers import IN_JAVASCRIPT, NAMES, Peer, running_peer, why_not
from tests.support.waiting import until

# On a busy machine Ray takes its time to start.
pytestmark = pytest.mark.timeout(120)

AUCTIONS = 20

Message = dict[str, Any]


@pytest.fixture(scope="module", params=NAMES)
def peer(request: pytest.FixtureRequest) -> Iterator[Peer]:
    if (reason := why_not(request.param)) is not None:
        pytest.skip(reason)
    with running_peer(request.param, AUCTIONS) as running:
        yield running


class Bidder(Client):
    """A client that asks, and waits for what it gets."""

    def __init__(self, peer: Peer, user: UUID) -> None:
        super().__init__(peer.token(user, "viewer"), peer.framing)
        self._messages: asyncio.Queue[Message] = asyncio.Queue()

    def on_message(self, message: bytes) -> None:
        self._messages.put_nowait(json.loads(message))

    async def receive(self) -> Message:
        async with asyncio.timeout(20):
            return await self._messages.get()

    async def ask(self, op: str, **fields: Any) -> Message:
        self.send(json.dumps({"op": op, "ref": op, **fields}).encode())
        return await self.receive()

    async def bid(self, auction: str, bid_id: UUID | None = None, **amount: int) -> Message:
        return await self.ask("bid", auction=auction, bid_id=str(bid_id or uuid4()), **amount)


@asynccontextmanager
async def bidders(peer: Peer, count: int) -> AsyncIterator[list[Bidder]]:
    clients = [Bidder(peer, uuid4()) for _ in range(count)]
    try:
        await connect(clients, peer.url)
        yield clients
    finally:
        disconnect(clients)


def open_auction(peer: Peer) -> str:
    (auction,) = peer.open_auctions(1)
    return auction


async def test_a_bid_gets_an_ack_and_its_retry_the_same_one(peer: Peer) -> None:
    auction, bid_id = open_auction(peer), uuid4()
    async with bidders(peer, 1) as (bidder,):
        ack = await bidder.bid(auction, bid_id, max_amount=100)
        assert ack["type"] == "ack"
        assert ack["ref"] == "bid"
        assert (ack["auction"], ack["bid_id"]) == (auction, str(bid_id))
        expected = {"seq": 2, "outcome": "leading", "price": 1, "paddle": 1, "max_amount": 100, "minimum": 2}
        assert {key: ack[key] for key in expected} == expected

        assert await bidder.bid(auction, bid_id, max_amount=500) == ack
        subscribed = await bidder.ask("subscribe", topic=f"auction:{auction}")
        assert subscribed["seq"] == 2
        assert subscribed["snapshot"]["bids"] == 1


async def test_bids_by_several_follow_the_rules(peer: Peer) -> None:
    auction = open_auction(peer)
    async with bidders(peer, 2) as (first, second):
        await first.bid(auction, max_amount=100)

        outbid = await second.bid(auction, max_amount=50)
        assert (outbid["outcome"], outbid["price"], outbid["paddle"]) == ("outbid", 51, 2)
        leading = await second.bid(auction, max_amount=200)
        assert (leading["outcome"], leading["price"], leading["paddle"]) == ("leading", 101, 2)
        raised = await second.bid(auction, max_amount=300)
        assert (raised["outcome"], raised["price"], raised["seq"]) == ("leading", 101, 5)
        not_raised = await second.bid(auction, max_amount=300)
        assert (not_raised["type"], not_raised["code"]) == ("rejected", "max_not_raised")
        exact = await first.bid(auction, amount=400)
        assert (exact["outcome"], exact["price"], exact["paddle"], exact["minimum"]) == ("leading", 400, 1, 401)


async def test_a_bid_that_is_too_low_is_rejected_and_so_is_its_retry(peer: Peer) -> None:
    auction, bid_id = open_auction(peer), uuid4()
    async with bidders(peer, 2) as (first, second):
        await first.bid(auction, amount=100)

        rejected = await second.bid(auction, bid_id, amount=100)
        assert (rejected["type"], rejected["code"], rejected["minimum"]) == ("rejected", "bid_too_low", 101)
        assert await second.bid(auction, bid_id, amount=500) == rejected
        subscribed = await second.ask("subscribe", topic=f"auction:{auction}")
        assert subscribed["snapshot"]["price"] == 100


async def test_what_does_not_exist_and_what_is_not_understood_is_refused(peer: Peer) -> None:
    async with bidders(peer, 1) as (bidder,):
        assert (await bidder.bid(str(uuid4()), amount=100))["code"] == "not_found"
        assert (await bidder.ask("subscribe", topic=f"auction:{uuid4()}"))["code"] == "not_found"
        assert (await bidder.bid(open_auction(peer)))["code"] == "bad_request"
        assert (await bidder.ask("sing"))["code"] == "unknown_op"


async def test_watchers_see_each_accepted_bid_in_order(peer: Peer) -> None:
    if peer.name not in IN_JAVASCRIPT:
        pytest.skip(f"{peer.name} does not broadcast")
    auction = open_auction(peer)
    topic = f"auction:{auction}"
    async with bidders(peer, 3) as (bidder, *watchers):
        for watcher in watchers:
            subscribed = await watcher.ask("subscribe", topic=topic)
            assert (subscribed["topic"], subscribed["seq"], subscribed["recovered"]) == (topic, 1, False)
            assert subscribed["snapshot"]["minimum"] == 1

        acks = [await bidder.bid(auction, max_amount=amount) for amount in (10, 10, 20)]
        assert [ack["type"] for ack in acks] == ["ack", "rejected", "ack"]
        for watcher in watchers:
            frames = [await watcher.receive() for _ in range(2)]
            assert all((frame["type"], frame["topic"]) == ("events", topic) for frame in frames)
            events = [event for frame in frames for event in frame["events"]]
            assert [(event["seq"], event["kind"]) for event in events] == [(2, "bid_placed"), (3, "private")]
            assert (events[0]["price"], events[0]["leader"], events[0]["bids"]) == (1, 1, 1)


def test_a_peer_has_the_auctions_that_it_was_started_with(peer: Peer) -> None:
    with pytest.raises(LoadFailed, match="reserve_price"):
        peer.open_auctions(1, reserve_price="5.00")
    with pytest.raises(LoadFailed, match="too few"):
        peer.open_auctions(AUCTIONS + 1)


# The last one for each peer, which it ends.
async def test_a_peer_ends_on_sigterm_with_all_that_it_has_started(peer: Peer) -> None:
    processes = [psutil.Process(pid) for pids in peer.processes().values() for pid in pids]
    (server,) = peer.processes()["server"]
    async with bidders(peer, 1):
        os.kill(server, signal.SIGTERM)
        await until(lambda: not any(is_alive(process) for process in processes))


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def test_row_lock_has_on_disk_what_it_has_acknowledged(tmp_path: Path) -> None:
    bid_id = uuid4()
    user = uuid4()
    with running_peer("row_lock", 1, tmp_path) as peer:
        (auction,) = peer.open_auctions(1)
        bidder = Bidder(peer, user)
        await connect([bidder], peer.url)
        ack = await bidder.bid(auction, bid_id, max_amount=100)
        (server,) = peer.processes()["server"]
        os.kill(server, signal.SIGKILL)
    # The peer did not come to do it.
    EmbeddedPostgres(tmp_path).stop()

    with running_peer("row_lock", 1, tmp_path) as peer:
        bidder = Bidder(peer, user)
        await connect([bidder], peer.url)
        assert await bidder.bid(auction, bid_id, max_amount=500) == ack
        disconnect([bidder])
