"""Lists of auctions and of their bids, out of Postgres. All the SQL for them stands here.

Postgres knows which auctions there are and what was journaled; how an auction stands, its shard says.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, NamedTuple
from uuid import UUID

import asyncpg

from actors.database import ERRORS, is_passing
from engine.auction import Status
from engine.events import BidPlaced, decode
from engine.limits import LIST_TIMEOUT_MS, SECOND_MS, STANDINGS_MAX, STANDINGS_MS
from gateway.catalogue import CatalogueUnavailable


class ListedAuction(NamedTuple):
    """An auction's place in the list: `created_at` in milliseconds."""

    auction: UUID
    created_at: int


class PlacedBid(NamedTuple):
    """One line of an auction's history, as everybody may see it. `price` in minor units, `at` in milliseconds."""

    seq: int
    at: int
    paddle: int
    price: int
    leader: int


# The queries

# Newest first, by one of the indexes `entities_newest`, `entities_status` and `entities_owner`, read backwards.
# The conditions are put together from the constants below, so that each combination is planned by itself; an
# "$1 IS NULL OR status = $1" could lose its index to a generic plan.
_AUCTIONS: Final = """
    SELECT entity_id, created_at FROM entities WHERE {conditions}
    ORDER BY created_at DESC, entity_id DESC LIMIT {limit} OFFSET {offset}
"""
_AUCTIONS_COUNT: Final = "SELECT count(*) FROM entities WHERE {conditions}"

# By the journal's primary key, backwards from the state that the caller has seen.
_BIDS: Final = """
    SELECT seq, at, kind, version, body FROM journal
    WHERE entity_id = $1 AND seq <= $2 AND kind = 'bid_placed'
    ORDER BY seq DESC LIMIT $3 OFFSET $4
"""

# A user's by the primary key of `bidders`; those that are open first, then the newest.
_JOINED: Final = f"""
    SELECT entity_id FROM bidders JOIN entities USING (entity_id)
    WHERE user_id = $1
    AND (ended_at IS NULL OR ended_at > (extract(epoch FROM clock_timestamp()) * 1000)::bigint - {STANDINGS_MS})
    ORDER BY ended_at IS NOT NULL, -created_at LIMIT {STANDINGS_MAX}
"""  # noqa: S608 (constants)


async def list_auctions(
    pool: asyncpg.Pool,
    *,
    status: Status | None,
    maker: UUID | None,
    after: ListedAuction | None,
    offset: int,
    limit: int,
) -> tuple[list[ListedAuction], int]:
    """Auctions, newest first, those that come `after` one if it is given, and how many there are in all.

    Raises `CatalogueUnavailable`.
    """
    conditions = ["kind = 'auction'"]
    arguments: list[object] = []
    if maker is not None:
        arguments.append(maker)
        conditions.append(f"owner_id = ${len(arguments)}")
    if status is not None:
        arguments.append(status)
        conditions.append(f"status = ${len(arguments)}")
    where = " AND ".join(conditions)
    async with _reading(pool) as connection:
        total = await connection.fetchval(_AUCTIONS_COUNT.format(conditions=where), *arguments)
        if after is not None:
            arguments += [after.created_at, after.auction]
            where += f" AND (created_at, entity_id) < (${len(arguments) - 1}, ${len(arguments)})"
        query = _AUCTIONS.format(conditions=where, limit=f"${len(arguments) + 1}", offset=f"${len(arguments) + 2}")
        rows = await connection.fetch(query, *arguments, limit, offset)
    return [ListedAuction(*row) for row in rows], total


async def list_bids(pool: asyncpg.Pool, auction: UUID, *, up_to: int, offset: int, limit: int) -> list[PlacedBid]:
    """The bids, newest first, of the auction as it was at seq `up_to`.

    A leader that changes its own maximum is no bid here. Raises `CatalogueUnavailable`.
    """
    async with _reading(pool) as connection:
        rows = await connection.fetch(_BIDS, auction, up_to, limit, offset)
    bids = []
    for row in rows:
        event = decode(row["kind"], row["version"], row["body"])
        assert isinstance(event, BidPlaced), "the query asks for these alone"
        bids.append(PlacedBid(row["seq"], row["at"], event.paddle, event.price, event.leader))
    return bids


async def list_joined(pool: asyncpg.Pool, user: UUID) -> list[UUID]:
    """The auctions in which a user bids, and those that are over since not long ago. Raises `CatalogueUnavailable`."""
    async with _reading(pool) as connection:
        return [auction for (auction,) in await connection.fetch(_JOINED, user)]


@asynccontextmanager
async def _reading(pool: asyncpg.Pool) -> AsyncIterator[asyncpg.pool.PoolConnectionProxy]:
    """A connection, for as long as a list may take. What the driver raises is translated here, once."""
    try:
        async with asyncio.timeout(LIST_TIMEOUT_MS / SECOND_MS), pool.acquire() as connection:
            yield connection
    except ERRORS as error:
        if is_passing(error):
            raise CatalogueUnavailable from error
        raise
