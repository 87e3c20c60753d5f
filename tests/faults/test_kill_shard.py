"""One process dies under load: no bidder sees more of it than a late answer, no watcher a gap."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from uuid import UUID

import pytest

from engine.limits import COMMAND_TIMEOUT_MS
from tests.e2e.engine import Engine, running
from tests.e2e.live import Bidder, Watcher, open_auction
from tests.simulation.checker import check
from tests.simulation.history import Record

LANES = 8
BIDS = 40
"""In each lane before the fault, and after it."""
PROGRESS_S = 90

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with running() as engine:
        yield engine


class Lane:
    """An auction in which two bid in turn, each more than the other, so that every bid must be accepted."""

    def __init__(self, engine: Engine, auction: UUID) -> None:
        self.auction = auction
        self.history: list[Record] = []
        self.bidders = (Bidder(engine, self.history), Bidder(engine, self.history))
        self.watcher = Watcher(engine, auction, self.history)
        self.bids = 0
        self.slowest_s = 0.0
        self._changed = asyncio.Condition()
        self._is_over = False
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        await self.watcher.reached(1)
        minimum = 100
        while not self._is_over:
            began = time.monotonic()
            ack = await self.bidders[self.bids % 2].bid(self.auction, minimum)
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
            assert (ack["outcome"], ack["price"]) == ("leading", minimum)
            minimum = ack["minimum"]
            self.bids += 1
            async with self._changed:
                self._changed.notify_all()

    async def advanced(self, bids: int) -> None:
        """Wait until so many more bids were acknowledged."""
        waiter = asyncio.create_task(self._wait_for(self.bids + bids))
        await asyncio.wait((waiter, self.task), timeout=PROGRESS_S, return_when=asyncio.FIRST_COMPLETED)
        if self.task.done():
            self.task.result()
        assert waiter.done(), f"{self.auction} takes no bids any more"

    async def _wait_for(self, bids: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self.bids >= bids)

    async def finish(self) -> None:
        self._is_over = True
        await self.task

    async def close(self) -> None:
        self.task.cancel()
        with suppress(asyncio.CancelledError, AssertionError):
            await self.task
        await self.watcher.close()
        for bidder in self.bidders:
            await bidder.close()


@asynccontextmanager
async def bidding(engine: Engine) -> AsyncIterator[list[Lane]]:
    lanes = [Lane(engine, await open_auction(engine)) for _ in range(LANES)]
    try:
        await asyncio.gather(*(lane.advanced(BIDS) for lane in lanes))
        yield lanes
    finally:
        for lane in lanes:
            await lane.close()


async def judge(engine: Engine, lanes: list[Lane]) -> None:
    """What must hold after every fault."""
    await asyncio.gather(*(lane.finish() for lane in lanes))
    rows = engine.journal_rows()
    for lane in lanes:
        journaled = [row for row in rows if row.entity_id == lane.auction]
        assert sum(row.kind == "bid_placed" for row in journaled) == lane.bids
        await lane.watcher.reached(len(journaled))
    # A lane's records stand in the order of time, and lanes have nothing in common.
    assert check([record for lane in lanes for record in lane.history], rows, true_time=True) == []
    engine.verify()
    assert not engine.leaks()


def assert_no_errors(lanes: list[Lane]) -> None:
    """No bidder saw an error, unless a slow machine took longer than commands wait for a shard."""
    errors = [error for lane in lanes for bidder in lane.bidders for error in bidder.errors]
    if max(lane.slowest_s for lane in lanes) * 1_000 < COMMAND_TIMEOUT_MS:
        assert not errors
    assert {error["code"] for error in errors} <= {"unavailable"}


async def test_a_shard_dies(engine: Engine) -> None:
    epochs = engine.epochs()
    async with bidding(engine) as lanes:
        pid = engine.pid_of("shard-0")
        os.kill(pid, signal.SIGKILL)
        await asyncio.gather(*(lane.advanced(BIDS) for lane in lanes))
        assert_no_errors(lanes)
        assert all(bidder.connections == 1 for lane in lanes for bidder in lane.bidders)
        assert all(lane.watcher.connections == 1 for lane in lanes)
        await judge(engine, lanes)
    assert engine.epochs() == {0: epochs[0] + 1, 1: epochs[1]}
    assert engine.pid_of("shard-0") != pid


async def test_all_shards_die(engine: Engine) -> None:
    epochs = engine.epochs()
    async with bidding(engine) as lanes:
        for pid in [engine.pid_of("shard-0"), engine.pid_of("shard-1")]:
            os.kill(pid, signal.SIGKILL)
        await asyncio.gather(*(lane.advanced(BIDS) for lane in lanes))
        assert_no_errors(lanes)
        await judge(engine, lanes)
    assert engine.epochs() == {shard: epoch + 1 for shard, epoch in epochs.items()}


async def test_a_gateway_dies(engine: Engine) -> None:
    epochs = engine.epochs()
    async with bidding(engine) as lanes:
        pid = engine.pid_of("gateway-0")
        os.kill(pid, signal.SIGKILL)
        await asyncio.gather(*(lane.advanced(BIDS) for lane in lanes))
        assert all(bidder.connections > 1 for lane in lanes for bidder in lane.bidders)
        await judge(engine, lanes)
        assert all(lane.watcher.connections == 2 for lane in lanes)
        assert not [error for lane in lanes for bidder in lane.bidders for error in bidder.errors]
    assert engine.epochs() == epochs, "shards do not mind"
    assert engine.pid_of("gateway-0") != pid
