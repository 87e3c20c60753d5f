"""`gavel verify` on a real journal: each auction is judged by itself, whatever was done to another."""

from uuid import UUID, uuid4

import asyncpg
import pytest

from actors.database import Postgres
from actors.directory import Directory
from actors.entities import Entity
from actors.journal import PostgresJournal, Row, session_name
from actors.network import WebSockets
from engine.auction import decide
from engine.commands import Command, command_id
from engine.rejections import Rejection
from gavel.verify import verify
from tests.engine.support import ANNA, BEN, NOW
from tests.support.shards import bid, opening

RIGHT, HARMED, LAST = (UUID(int=number) for number in (1, 2, 3))


@pytest.fixture
async def connection(database_url: str, pool: asyncpg.Pool) -> asyncpg.Connection:
    """A connection to a journal of three auctions with two bids each, and a snapshot of every one."""
    directory = Directory(pool)
    await directory.lay_out(1)
    database, owner = Postgres(database_url), uuid4()
    connection = await database.connect(session_name(0))
    taken = await directory.take_over(0, owner, connection.get_server_pid(), WebSockets().refuses)
    journal = PostgresJournal(
        database=database, writer=connection, readers=pool, shard=0, owner=owner, epoch=taken.epoch
    )
    for auction in (RIGHT, HARMED, LAST):
        entity = Entity(auction)
        rows: list[Row] = []
        commands: list[Command] = [
            opening(auction),
            bid(ANNA, 1_000, auction=auction),
            bid(BEN, 2_000, bid_id=2, auction=auction),
        ]
        for command in commands:
            decided = decide(entity.state, command, NOW)
            assert not isinstance(decided, Rejection)
            known_by = command_id(command)  # type: ignore[arg-type]  # None of them is what is due.
            rows += [entity.record(event, NOW, known_by, None)[1] for event in decided]
        await journal.append(rows, [entity.row()])
        await journal.save_snapshots([entity.snapshot_row()])
    return connection


async def test_what_is_right_is_right(connection: asyncpg.Connection) -> None:
    report = await verify(connection, None)
    assert (report.auctions, report.events, report.differences) == (3, 9, [])
    assert (await verify(connection, LAST)).events == 3
    assert (await verify(connection, UUID(int=9))).auctions == 0
    await connection.close()


@pytest.mark.parametrize(
    ("forgery", "difference"),
    [
        ("UPDATE snapshots SET body = '\\xc1' WHERE entity_id = $1", "it cannot be judged: "),
        (
            "UPDATE snapshots SET body = s.body FROM snapshots s WHERE snapshots.entity_id = $1 AND s.entity_id <> $1",
            "the snapshot at 3 is not what the events up to it make",
        ),
        ("UPDATE snapshots SET seq = 9 WHERE entity_id = $1", "there is a snapshot at 9"),
        ("UPDATE journal SET body = '{' WHERE entity_id = $1 AND seq = 2", "the hash of event 2"),
        ("UPDATE entities SET status = 'ended' WHERE entity_id = $1", "its status or deadline in `entities`"),
        ("DELETE FROM journal WHERE entity_id = $1", "it has no event at all"),
    ],
)
async def test_what_is_wrong_with_one_is_said_and_the_others_are_judged(
    connection: asyncpg.Connection, forgery: str, difference: str
) -> None:
    await connection.execute(forgery, HARMED)
    report = await verify(connection, None)
    ((auction, said),) = report.differences
    assert auction == HARMED
    assert said.startswith(difference)
    assert report.auctions == (2 if "no event" in difference else 3)
    await connection.close()
