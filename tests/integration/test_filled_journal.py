"""A journal that was filled past the engine is one that the engine could have written."""

import asyncpg
import pytest

from engine.commands import BID_COMMAND_ID_BYTES
from gavel.verify import verify
from loadtests.journal import BIDS, fill, hashes

AUCTIONS = 7


@pytest.fixture
async def connection(database_url: str, pool: asyncpg.Pool) -> asyncpg.Connection:
    """A connection to a journal that was filled; `pool` has brought its schema up to date."""
    connection = await asyncpg.connect(database_url)
    await fill(connection, AUCTIONS)
    return connection


async def test_verify_finds_nothing_in_it(connection: asyncpg.Connection) -> None:
    report = await verify(connection, None)
    assert (report.auctions, report.events, report.differences) == (AUCTIONS, AUCTIONS * (1 + BIDS), [])
    await connection.close()


async def test_each_command_stands_in_it_once_under_its_events_hash(connection: asyncpg.Connection) -> None:
    stored = await hashes(connection)
    assert sum(len(command) == BID_COMMAND_ID_BYTES for command in stored) == AUCTIONS * BIDS
    assert [len(events) for events in stored.values()] == [1] * (AUCTIONS * (1 + BIDS))
    await connection.close()
