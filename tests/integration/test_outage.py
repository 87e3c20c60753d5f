"""A shard whose real Postgres goes away and comes back: the same process goes on, and nothing is lost."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import NoReturn
from uuid import UUID, uuid4

import asyncpg
import pytest

from actors.bootstrap import Host, RunningShard, start_shard
from actors.database import Postgres
from actors.directory import Directory
from actors.journal import SELECT_ROWS, Row, row_of
from actors.messages import AuctionView, BidAccepted, GetAuction
from actors.network import WebSockets
from engine.audit import Audit
from engine.commands import PlaceBid
from engine.events import Extended, decode
from engine.limits import OUTAGE_MS
from engine.rejections import Rejection
from migrations import upgrade
from tests.engine.support import ANNA, BEN, CLEO
from tests.support.postgres import TABLES, OwnPostgres
from tests.support.shards import accepted, bid, code, opening, viewed
from tests.support.waiting import until

AUCTION, CLOSING = UUID(int=1), UUID(int=2)
HOUR_MS = 3_600_000
PAUSE_S = 0.005
"""Between the bids of one bidder, so that the others have their turns."""


def die(reason: str) -> NoReturn:
    raise AssertionError(f"the shard died: {reason}")


@pytest.fixture(scope="module")
def own_postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnPostgres]:
    postgres = OwnPostgres(tmp_path_factory.mktemp("outages"))
    try:
        asyncio.run(upgrade(postgres.url))
        yield postgres
    finally:
        postgres.stop()


@pytest.fixture
async def running(own_postgres: OwnPostgres) -> AsyncIterator[RunningShard]:
    """A shard that owns all slots, with one auction that goes on for an hour."""
    async with asyncpg.create_pool(own_postgres.url, min_size=1, max_size=2) as pool:
        await pool.execute(f"TRUNCATE {TABLES}")
        await Directory(pool).lay_out(1)
    host = Host(WebSockets(), Postgres(own_postgres.url), b"a secret", "127.0.0.1", time.monotonic_ns)
    running = await start_shard(host, 0, die)
    await open_auction(running, AUCTION, HOUR_MS)
    yield running
    await running.stop()


async def open_auction(running: RunningShard, auction: UUID, lasts_ms: int) -> int:
    """Open an auction without soft close; when it ends."""
    end_time = running.shard._clock() + lasts_ms
    viewed(await running.shard.ask(opening(auction, uuid4(), start_time=None, end_time=end_time)))
    return end_time


class Bidders:
    """People who bid all the time, each one bid after another; what was refused for now they send again."""

    def __init__(self, running: RunningShard) -> None:
        self.running = running
        self.verdicts: dict[tuple[UUID, UUID], BidAccepted | Rejection] = {}
        self.refusals: list[str] = []
        self._amount = 1_000
        self._tasks = [asyncio.create_task(self._bid(bidder)) for bidder in (ANNA, BEN, CLEO)]

    async def _bid(self, bidder: UUID) -> None:
        while True:
            self._amount += 500
            await self._place(PlaceBid(auction=AUCTION, bidder=bidder, bid_id=uuid4(), max_amount=self._amount))
            await asyncio.sleep(PAUSE_S)

    async def _place(self, command: PlaceBid) -> None:
        while True:
            answer = await self.running.shard.ask(command)
            if not isinstance(answer, Rejection) or not answer.is_transient:
                assert not isinstance(answer, AuctionView)
                self.verdicts[command.bidder, command.bid_id] = answer  # type: ignore[assignment]
                return
            self.refusals.append(answer.code)
            await asyncio.sleep(PAUSE_S)

    async def go_on(self, verdicts: int = 50) -> None:
        """Wait until there are so many verdicts more."""
        wanted = len(self.verdicts) + verdicts
        await until(lambda: len(self.verdicts) >= wanted or any(task.done() for task in self._tasks))
        assert not any(task.done() for task in self._tasks)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def check(self, rows: list[Row]) -> None:
        """Each acknowledged bid is in the journal once and with that verdict; no refused one is."""
        placed = {row.command_id: row for row in rows[1:] if row.command_id is not None}
        assert len(placed) == len([row for row in rows[1:] if row.command_id is not None])
        acknowledged = {}
        for (bidder, bid_id), verdict in self.verdicts.items():
            if isinstance(verdict, BidAccepted):
                acknowledged[bidder.bytes + bid_id.bytes] = verdict
        # Of those that were under way when they stopped each may be there or not.
        unknown = placed.keys() - acknowledged.keys()
        assert len(unknown) <= len(self._tasks)
        assert acknowledged.keys() <= placed.keys()
        for known_by, verdict in acknowledged.items():
            row = placed[known_by]
            assert (verdict.seq, verdict.hash, verdict.at) == (row.seq, row.hash, row.at)


async def journal(postgres: OwnPostgres, auction: UUID) -> list[Row]:
    """An auction's rows, all of which must be right."""
    connection = await asyncpg.connect(postgres.url)
    records = await connection.fetch(f"{SELECT_ROWS} WHERE entity_id = $1 ORDER BY seq", auction)
    await connection.close()
    rows, audit = [row_of(record) for record in records], Audit()
    assert [row.seq for row in rows] == list(range(1, len(rows) + 1))
    for row in rows:
        assert audit.follow(row) is None
    assert audit.finish() is None
    return rows


def outages(rows: list[Row]) -> list[tuple[int, int]]:
    """When time was given back, and until when the auction goes on."""
    events = [(row.at, decode(row.kind, row.version, row.body)) for row in rows]
    return [(at, event.end_time) for at, event in events if isinstance(event, Extended) and event.reason == "outage"]


@pytest.fixture
async def bidders(running: RunningShard) -> AsyncIterator[Bidders]:
    bidders = Bidders(running)
    await bidders.go_on()
    yield bidders
    await bidders.stop()


async def owner_and_epoch(postgres: OwnPostgres) -> tuple[UUID, int]:
    connection = await asyncpg.connect(postgres.url)
    owner, epoch = await connection.fetchrow("SELECT owner, epoch FROM shards")  # type: ignore[misc]
    await connection.close()
    return owner, epoch


async def test_sessions_that_are_ended_under_way_cost_nobody_a_bid(
    own_postgres: OwnPostgres, running: RunningShard, bidders: Bidders
) -> None:
    owner, epoch = await owner_and_epoch(own_postgres)
    operator = await asyncpg.connect(own_postgres.url)
    for times in range(1, 6):
        ended = await operator.fetchval(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
            "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )
        assert ended >= 1
        await until(lambda epoch=epoch + times: running._journal.epoch >= epoch)  # type: ignore[misc]
        await bidders.go_on()
    await operator.close()
    await bidders.stop()
    bidders.check(await journal(own_postgres, AUCTION))
    assert await owner_and_epoch(own_postgres) == (owner, running._journal.epoch)


async def test_a_session_that_is_ended_while_nothing_happens_is_replaced(
    own_postgres: OwnPostgres, running: RunningShard
) -> None:
    epoch = running._journal.epoch
    operator = await asyncpg.connect(own_postgres.url)
    await operator.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
    )
    await operator.close()
    # The next sign of life finds out.
    await until(lambda: running._journal.epoch > epoch and not running.shard._is_away)
    assert accepted(await running.shard.ask(bid(ANNA, 1_000, auction=AUCTION))).seq == 2
    assert viewed(await running.shard.ask(GetAuction(AUCTION, None))).seq == 2


async def test_a_crash_of_postgres_ends_no_shard_and_loses_no_bid(
    own_postgres: OwnPostgres, running: RunningShard, bidders: Bidders
) -> None:
    owner, epoch = await owner_and_epoch(own_postgres)
    end_time = await open_auction(running, CLOSING, 3_000)
    await asyncio.to_thread(own_postgres.crash)
    await until(lambda: running.shard._is_away)
    assert code(await running.shard.ask(GetAuction(AUCTION, None))) == "unavailable"
    # The end of one auction comes and goes while there is no Postgres.
    await until(lambda: running.shard._clock() > end_time + 100)
    await asyncio.to_thread(own_postgres.start)
    await bidders.go_on()
    await bidders.stop()

    bidders.check(await journal(own_postgres, AUCTION))
    assert set(bidders.refusals) == {"unavailable"}
    same_owner, newer_epoch = await owner_and_epoch(own_postgres)
    assert same_owner == owner
    assert newer_epoch == running._journal.epoch > epoch
    rows = await journal(own_postgres, CLOSING)
    assert [row.kind for row in rows] == ["opened", "extended"]
    [(back, moved)] = outages(rows)
    assert back > end_time
    # The time that it had left was more than OUTAGE_MS when Postgres went away.
    assert moved - back > OUTAGE_MS
    assert accepted(await running.shard.ask(bid(ANNA, 1_000, auction=CLOSING))).end_time == moved


async def test_postgres_may_crash_again_and_again(
    own_postgres: OwnPostgres, running: RunningShard, bidders: Bidders
) -> None:
    for _ in range(2):
        await asyncio.to_thread(own_postgres.crash)
        await asyncio.to_thread(own_postgres.start)
        await bidders.go_on(20)
    await bidders.stop()
    bidders.check(await journal(own_postgres, AUCTION))


async def test_a_process_that_was_stopped_gives_back_the_time(
    own_postgres: OwnPostgres, running: RunningShard, bidders: Bidders
) -> None:
    end_time = await open_auction(running, CLOSING, 700)
    epoch = running._journal.epoch
    # Nothing of this process goes on meanwhile, as after a SIGSTOP.
    time.sleep(1.6)  # noqa: ASYNC251
    await until(lambda: running._journal.epoch > epoch and not running.shard._is_away)
    rows = await journal(own_postgres, CLOSING)
    assert [row.kind for row in rows] == ["opened", "extended"]
    [(back, moved)] = outages(rows)
    assert end_time < back < moved
    await bidders.go_on()
    await bidders.stop()
    bidders.check(await journal(own_postgres, AUCTION))
