"""The journal of an engine with an embedded Postgres: filled with auctions, and read, past the engine.

What is filled in is decided, hashed and encoded by the engine's own code, so that `gavel verify` accepts it; only the
way into the tables is shorter.
"""

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final
from uuid import UUID, uuid4

import asyncpg

from actors.entities import Entity
from actors.journal import EntityRow, Row
from engine.auction import decide
from engine.commands import OpenAuction, PlaceBid, Terms, command_id
from engine.increments import flat
from engine.limits import DAY_MS, HOUR_MS
from engine.rejections import Rejection
from loadtests.measured import LoadFailed

BIDS: Final = 2
"""In each auction."""
ENTITIES_AT_ONCE: Final = 5_000
_COLUMNS: Final = Row._fields[:8]
"""Of the table `journal`; what a person wrote lies elsewhere."""
_COMMANDS: Final = "SELECT command_id, hash FROM journal WHERE command_id IS NOT NULL"


@asynccontextmanager
async def connected(data_dir: Path) -> AsyncIterator[asyncpg.Connection]:
    """A connection to the embedded Postgres of an engine that runs in this folder.

    What goes wrong with it, also while it is used, raises `LoadFailed`.
    """
    try:
        connection = await asyncpg.connect(f"postgresql://postgres@/postgres?host={data_dir / 'postgres'}")
        try:
            yield connection
        finally:
            await connection.close()
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise LoadFailed(f"the journal cannot be reached ({error})") from error


async def fill(connection: asyncpg.Connection, auctions: int) -> list[UUID]:
    """Store so many open auctions that end in a month, with `BIDS` bids each. Returns their ids."""
    ids = [uuid4() for _ in range(auctions)]
    for first in range(0, auctions, ENTITIES_AT_ONCE):
        rows: list[Row] = []
        entities: list[EntityRow] = []
        for auction in ids[first : first + ENTITIES_AT_ONCE]:
            entity = Entity(auction)
            rows += _history(entity)
            entities.append(entity.row())
        await _copy(connection, rows, entities)
    # What Postgres does by itself within a minute.
    await connection.execute("VACUUM ANALYZE journal, entities")
    return ids


async def hashes(connection: asyncpg.Connection) -> dict[bytes, list[bytes]]:
    """The hashes of the events under which each command was stored, by its id; there should be one each."""
    stored: dict[bytes, list[bytes]] = {}
    for known_by, event_hash in await connection.fetch(_COMMANDS):
        stored.setdefault(known_by, []).append(event_hash)
    return stored


async def _copy(connection: asyncpg.Connection, rows: Sequence[Row], entities: Sequence[EntityRow]) -> None:
    async with connection.transaction():
        records = [row[: len(_COLUMNS)] for row in rows]
        await connection.copy_records_to_table("journal", records=records, columns=_COLUMNS)
        await connection.copy_records_to_table("entities", records=entities, columns=EntityRow._fields)


def _history(entity: Entity) -> Iterator[Row]:
    """An auction that was opened an hour ago, and the bids since."""
    now = time.time_ns() // 1_000_000
    terms = Terms(
        title="One of many auctions",
        currency="USD",
        starting_price=100,
        increments=flat(100),
        start_time=None,
        end_time=now + 30 * DAY_MS,
    )
    opening = OpenAuction(auction=entity.id, maker=uuid4(), request_id=uuid4(), terms=terms)
    bids = [
        PlaceBid(auction=entity.id, bidder=uuid4(), bid_id=uuid4(), max_amount=100 * number)
        for number in range(1, BIDS + 1)
    ]
    commands: list[OpenAuction | PlaceBid] = [opening, *bids]
    for command in commands:
        decided = decide(entity.state, command, now - HOUR_MS)
        assert not isinstance(decided, Rejection), decided.message
        known_by: bytes | None = command_id(command)
        for event in decided:
            yield entity.record(event, now - HOUR_MS, known_by, None)[1]
            known_by = None
