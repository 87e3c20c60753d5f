"""`gavel verify`: recomputes chains, states and winners from the journal alone, and names the first difference."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import asyncpg
import click
from rich.console import Console
from rich.table import Table

from actors.entities import SNAPSHOT_VERSION, decode_state
from actors.journal import SELECT_ROWS, Row, row_of
from engine.auction import due_at
from engine.audit import Audit
from gavel.errors import CommandError
from gavel.postgres import reachable_database, reason_of
from gavel.settings import load_settings

_PREFETCH: Final = 1_000
_ROWS = SELECT_ROWS + " WHERE $1::uuid IS NULL OR entity_id = $1 ORDER BY entity_id, seq"
_SNAPSHOT = "SELECT seq, hash, body FROM snapshots WHERE entity_id = $1 AND version = $2"
_ENTITY = "SELECT status, due_at FROM entities WHERE entity_id = $1"
_STRAYS = """
SELECT entity_id FROM (SELECT entity_id FROM entities UNION SELECT entity_id FROM snapshots) AS known
WHERE ($1::uuid IS NULL OR entity_id = $1)
AND NOT EXISTS (SELECT FROM journal WHERE journal.entity_id = known.entity_id)"""


@dataclass
class Report:
    """What was checked, and the first difference of each auction that has one."""

    auctions: int
    events: int
    differences: list[tuple[UUID, str]]


@click.command(
    epilog="""\b
Examples:
  gavel verify --all
  gavel verify 5f0c3f5e-8a53-4c0a-9d53-1f6f1a2b3c4d --data-dir ./data"""
)
@click.argument("auction", type=click.UUID, required=False)
@click.option("--all", "is_all", is_flag=True, help="Check every auction.")
@click.option("--data-dir", help="The engine's data folder.")
def command(auction: UUID | None, is_all: bool, data_dir: str | None) -> None:
    """Recompute an AUCTION's chain, state and winner from the journal alone.

    Reads only, so the engine may run or not. Ends with code 1 if anything differs.
    """
    if (auction is None) != is_all:
        raise click.UsageError("Name one auction, or say --all.")
    with reachable_database(load_settings(data_dir=data_dir)) as database_url:
        report = asyncio.run(_verify(database_url, auction))
    if report.auctions == 0 and not report.differences and auction is not None:
        raise CommandError(
            f"There is no auction {auction} in this journal; `gavel verify --all` checks those there are."
        )
    console = Console()
    if report.differences:
        table = Table("auction", "first difference")
        for entity_id, difference in report.differences:
            table.add_row(str(entity_id), difference)
        console.print(table)
        raise CommandError(
            f"{len(report.differences)} of {report.auctions} auctions differ from what the journal's rules say; "
            "restore them from a backup, or ask who has changed the database."
        )
    console.print(f"{report.auctions} auctions, {report.events} events: chains, states and winners are right.")


async def _verify(database_url: str, auction: UUID | None) -> Report:
    try:
        connection = await asyncpg.connect(database_url)
        try:
            return await verify(connection, auction)
        finally:
            await connection.close()
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, ValueError) as error:
        raise CommandError(
            f"The journal cannot be read ({reason_of(error)}); is this the engine's database?"
        ) from error


async def verify(connection: asyncpg.Connection, auction: UUID | None) -> Report:
    """Check one auction, or all (None), as they are at this moment."""
    report = Report(0, 0, [])
    # One snapshot of the database: an engine may be running on it.
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        report.differences += [
            (row["entity_id"], "it has no event at all") for row in await connection.fetch(_STRAYS, auction)
        ]
        async for entity_id, rows in _by_entity(connection, auction):
            report.auctions += 1
            report.events += len(rows)
            snapshot = await connection.fetchrow(_SNAPSHOT, entity_id, SNAPSHOT_VERSION)
            entity = await connection.fetchrow(_ENTITY, entity_id)
            try:
                difference = _first_difference(rows, snapshot, entity)
            except Exception as error:  # noqa: BLE001 (a forged row may break anything; the others are judged all the same)
                difference = f"it cannot be judged: {type(error).__name__}: {error}"
            if difference is not None:
                report.differences.append((entity_id, difference))
    return report


async def _by_entity(connection: asyncpg.Connection, auction: UUID | None) -> AsyncIterator[tuple[UUID, list[Row]]]:
    rows: list[Row] = []
    async for record in connection.cursor(_ROWS, auction, prefetch=_PREFETCH):
        row = row_of(record)
        if rows and rows[0].entity_id != row.entity_id:
            yield rows[0].entity_id, rows
            rows = []
        rows.append(row)
    if rows:
        yield rows[0].entity_id, rows


def _first_difference(rows: list[Row], snapshot: asyncpg.Record | None, entity: asyncpg.Record | None) -> str | None:
    audit = Audit()
    for row in rows:
        difference = audit.follow(row)
        if difference is not None:
            return difference
        if snapshot is not None and row.seq == snapshot["seq"]:
            if snapshot["hash"] != row.hash or decode_state(snapshot["body"]) != audit.state:
                return f"the snapshot at {row.seq} is not what the events up to it make"
            snapshot = None
    difference = audit.finish()
    if difference is not None:
        return difference
    if snapshot is not None:
        return f"there is a snapshot at {snapshot['seq']}, after the last event ({audit.seq})"
    assert audit.state is not None
    if entity is None or (entity["status"], entity["due_at"]) != (audit.state.status, due_at(audit.state)):
        return "its status or deadline in `entities` is not what its events make"
    return None
