"""Suspensions: from the command line, through Postgres, to the sockets of a real gateway."""

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import asyncpg
import pytest
from websockets.exceptions import ConnectionClosed

from actors.database import Postgres
from gateway import suspensions as suspensions_module
from gateway.suspensions import Suspensions, suspend
from gavel.errors import CommandError
from gavel.suspend import _suspend
from tests.integration.test_gateway import ANNA, BEN, Engine, running
from tests.support.postgres import OwnPostgres, own_postgres
from tests.support.waiting import until


@pytest.fixture
def postgres() -> Iterator[OwnPostgres]:
    with own_postgres() as postgres:
        yield postgres


async def test_a_suspended_user_is_closed_and_let_in_no_more_until_that_is_lifted(
    database_url: str, pool: asyncpg.Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GAVEL_SECRET", raising=False)
    async with running(database_url, pool, tmp_path) as engine:
        auction = await engine.open_auction()
        async with engine.client(ANNA) as anna, engine.client(BEN) as ben:
            assert (await anna.bid(auction, 1_000))["outcome"] == "leading"
            await _suspend(database_url, ANNA, is_lifted=False)
            with pytest.raises(ConnectionClosed) as closed:
                await anna.receive()
            assert closed.value.rcvd is not None
            assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4501, "This user is suspended.")
            # What was placed stands.
            assert (await ben.bid(auction, 2_000))["paddle"] == 2
        assert await status_of_a_bid(engine, auction) == 403
        await _suspend(database_url, ANNA, is_lifted=True)
        async with asyncio.timeout(20):
            while await status_of_a_bid(engine, auction) != 201:
                pass


async def status_of_a_bid(engine: Engine, auction: str) -> int:
    path = f"/api/v1/auctions/{auction}/bids"
    return (await engine.request("POST", path, ANNA, json={"bid_amount": "90.00"})).status_code


async def test_postgres_may_go_away_meanwhile(postgres: OwnPostgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspensions_module, "SUSPENSIONS_MS", 100)
    connection = await asyncpg.connect(postgres.url)
    await connection.execute("CREATE TABLE suspensions (user_id uuid PRIMARY KEY)")
    assert await suspend(connection, ANNA)
    pool = await Postgres(postgres.url).pool()
    suspended = Suspensions(pool)
    await suspended.read()
    following = asyncio.create_task(suspended.follow(lambda: None))
    try:
        postgres.crash()
        assert ANNA in suspended
        postgres.start()
        connection = await asyncpg.connect(postgres.url)
        await suspend(connection, BEN)
        await until(lambda: BEN in suspended)
        assert ANNA in suspended
        # What does not pass by itself is no reason to go on as if all were well.
        await connection.execute("DROP TABLE suspensions")
        with pytest.raises(asyncpg.UndefinedTableError):
            await following
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await connection.close()
        with contextlib.suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            await pool.close()


async def test_there_are_only_so_many(database_url: str, pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspensions_module, "SUSPENDED_MAX", 1)
    for user in (ANNA, ANNA):
        await _suspend(database_url, user, is_lifted=False)
    with pytest.raises(CommandError, match="lift some"):
        await _suspend(database_url, BEN, is_lifted=False)
    for user in (ANNA, UUID(int=9)):
        await _suspend(database_url, user, is_lifted=True)
    await _suspend(database_url, BEN, is_lifted=False)
    assert [tuple(row) for row in await pool.fetch("SELECT user_id FROM suspensions")] == [(BEN,)]
