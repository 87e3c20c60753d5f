"""The journal: what happened, appended under a fence, never changed.

Only the newest incarnation of a shard may write. Every write names the epoch that it believes in and does nothing
unless Postgres agrees, in the same statement: the row of `shards` is updated, so a stale writer waits for the lock and
then finds its epoch gone. (A fence that only read could let a stale insert commit after the new owner's replay.)
"""

import asyncio
from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol
from uuid import UUID

import asyncpg

from engine.limits import RESUME_EVENTS_MAX

APPEND_TIMEOUT_S: Final = 2.0


class Fenced(Exception):
    """A newer incarnation owns the shard: this one must end."""


class Refused(Exception):
    """An append was not taken though it should be right, or its outcome is unknown: this incarnation must end."""


class Unreadable(Exception):
    """The database cannot be read just now."""


class Private(NamedTuple):
    """What a person wrote, kept beside its event so that it can be erased; the event holds the salted SHA-256."""

    salt: bytes
    body: bytes


class Row(NamedTuple):
    """One stored event."""

    entity_id: UUID
    seq: int
    at: int
    kind: str
    version: int
    body: bytes
    hash: bytes
    command_id: bytes | None = None
    private: Private | None = None


class EntityRow(NamedTuple):
    """An entity as the rest of the system finds it: where it lives, whose it is, and when it is next due."""

    entity_id: UUID
    slot: int
    kind: str
    owner_id: UUID
    status: str
    due_at: int | None
    created_at: int


class SnapshotRow(NamedTuple):
    """An entity's committed state after `seq`; `hash` and `last_at` are those of the event `seq`."""

    entity_id: UUID
    seq: int
    hash: bytes
    last_at: int
    version: int
    body: bytes


class Loaded(NamedTuple):
    """All that it takes to wake an entity."""

    snapshot: SnapshotRow | None
    rows: list[Row]
    """The events after the snapshot, and up to `RESUME_EVENTS_MAX` before its end, by rising `seq`."""
    commands: list[tuple[bytes, int]]
    """The id of every command that was accepted, with the `seq` of its first event."""


class Journal(Protocol):
    """One incarnation's way to the journal. Writes raise `Fenced` or `Refused`, reads `Unreadable`."""

    async def append(self, rows: Sequence[Row], entities: Sequence[EntityRow]) -> None:
        """Store events and what they change of their entities: all of it, durably, or nothing."""

    async def check(self) -> None:
        """Return if this incarnation still owns the shard (and show that it lives)."""

    async def save_snapshots(self, snapshots: Sequence[SnapshotRow]) -> None:
        """Keep committed states, of different entities; one that is older than the stored one is ignored."""

    async def load(self, entity_id: UUID, snapshot_version: int) -> Loaded:
        """Read an entity, from a snapshot of this version if there is one: empty if it never was."""

    async def read(self, entity_id: UUID, seq: int) -> Row | None:
        """Read one event."""

    async def deadlines(self) -> list[tuple[UUID, int]]:
        """The next deadline of every entity of this shard that has one."""


# `owner` is the fence, the sign of life and the guard of the inserts; `appended` counts what was stored.
_APPEND = """
WITH owner AS (
    UPDATE shards SET alive_at = clock_timestamp() WHERE shard_id = $1 AND epoch = $2 RETURNING 1
), appended AS (
    INSERT INTO journal (entity_id, seq, at, kind, version, body, hash, command_id)
    SELECT row.* FROM unnest($3::uuid[], $4::bigint[], $5::bigint[], $6::text[], $7::smallint[], $8::bytea[],
                             $9::bytea[], $10::bytea[]) AS row, owner
    RETURNING 1
)"""
_APPEND_EVENTS = _APPEND + " SELECT count(*) FROM appended"  # noqa: S608 (a constant)
_APPEND_ALL = (
    _APPEND  # noqa: S608 (a constant)
    + """, indexed AS (
    INSERT INTO entities (entity_id, slot, kind, owner_id, status, due_at, created_at)
    SELECT entity.* FROM unnest($11::uuid[], $12::smallint[], $13::text[], $14::uuid[], $15::text[], $16::bigint[],
                                $17::bigint[]) AS entity, owner
    ON CONFLICT (entity_id) DO UPDATE SET status = excluded.status, due_at = excluded.due_at
), hidden AS (
    INSERT INTO private (entity_id, seq, salt, body)
    SELECT part.* FROM unnest($18::uuid[], $19::bigint[], $20::bytea[], $21::bytea[]) AS part, owner
)
SELECT count(*) FROM appended"""
)
_CHECK = "UPDATE shards SET alive_at = clock_timestamp() WHERE shard_id = $1 AND epoch = $2 RETURNING 1"
_SAVE_SNAPSHOTS = """
WITH owner AS (
    UPDATE shards SET alive_at = clock_timestamp() WHERE shard_id = $1 AND epoch = $2 RETURNING 1
), saved AS (
    INSERT INTO snapshots (entity_id, seq, hash, last_at, version, body)
    SELECT snapshot.* FROM unnest($3::uuid[], $4::bigint[], $5::bytea[], $6::bigint[], $7::smallint[],
                                  $8::bytea[]) AS snapshot, owner
    ON CONFLICT (entity_id) DO UPDATE
    SET seq = excluded.seq, hash = excluded.hash, last_at = excluded.last_at, version = excluded.version,
        body = excluded.body
    WHERE snapshots.seq < excluded.seq
)
SELECT count(*) FROM owner"""
_LOAD_SNAPSHOT = """
SELECT entity_id, seq, hash, last_at, version, body FROM snapshots WHERE entity_id = $1 AND version = $2"""
SELECT_ROWS = """
SELECT entity_id, seq, at, kind, version, journal.body, hash, command_id, salt, private.body
FROM journal LEFT JOIN private USING (entity_id, seq)"""
_LOAD_ROWS = SELECT_ROWS + " WHERE entity_id = $1 AND seq > $2 ORDER BY seq"
_LOAD_COMMANDS = "SELECT command_id, seq FROM journal WHERE entity_id = $1 AND command_id IS NOT NULL"
_READ = SELECT_ROWS + " WHERE entity_id = $1 AND seq = $2"
_DEADLINES = """
SELECT entity_id, due_at FROM entities
WHERE due_at IS NOT NULL AND slot IN (SELECT slot FROM slots WHERE shard_id = $1)"""


def row_of(record: asyncpg.Record) -> Row:
    """A row as `SELECT_ROWS` reads it."""
    *row, salt, text = record
    return Row._make((*row, None if salt is None else Private(salt, text)))


class PostgresJournal:
    """The journal in Postgres, for one shard in one epoch.

    `writer` is a connection of its own, so that appends never wait for reads; `readers` is a pool.
    """

    def __init__(self, writer: asyncpg.Connection, readers: asyncpg.Pool, shard: int, epoch: int) -> None:
        self._writer = writer
        self._readers = readers
        self._shard = shard
        self._epoch = epoch
        self._writing = asyncio.Lock()

    async def append(self, rows: Sequence[Row], entities: Sequence[EntityRow]) -> None:
        """See `Journal`."""
        columns: list[Sequence[object]] = list(zip(*[row[:8] for row in rows], strict=True))
        hidden = [(row.entity_id, row.seq, *row.private) for row in rows if row.private is not None]
        if entities or hidden:
            columns += zip(*entities, strict=True) if entities else [()] * len(EntityRow._fields)
            columns += zip(*hidden, strict=True) if hidden else [()] * 4
            appended = await self._write(_APPEND_ALL, *columns)
        else:
            appended = await self._write(_APPEND_EVENTS, *columns)
        if appended != len(rows):
            raise Fenced

    async def check(self) -> None:
        """See `Journal`."""
        if await self._write(_CHECK) is None:
            raise Fenced

    async def save_snapshots(self, snapshots: Sequence[SnapshotRow]) -> None:
        """See `Journal`."""
        if await self._write(_SAVE_SNAPSHOTS, *zip(*snapshots, strict=True)) != 1:
            raise Fenced

    async def load(self, entity_id: UUID, snapshot_version: int) -> Loaded:
        """See `Journal`."""
        try:
            async with self._readers.acquire(timeout=APPEND_TIMEOUT_S) as connection:
                found = await connection.fetchrow(_LOAD_SNAPSHOT, entity_id, snapshot_version)
                snapshot = None if found is None else SnapshotRow(*found)
                after = 0 if snapshot is None else max(0, snapshot.seq - RESUME_EVENTS_MAX)
                rows = await connection.fetch(_LOAD_ROWS, entity_id, after)
                # An id under which nothing happened is cheap, so that asking for such ids costs others little.
                commands = await connection.fetch(_LOAD_COMMANDS, entity_id) if rows or snapshot else []
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise Unreadable(str(error)) from error
        return Loaded(snapshot, [row_of(row) for row in rows], [(command_id, seq) for command_id, seq in commands])

    async def read(self, entity_id: UUID, seq: int) -> Row | None:
        """See `Journal`."""
        try:
            found = await self._readers.fetchrow(_READ, entity_id, seq, timeout=APPEND_TIMEOUT_S)
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise Unreadable(str(error)) from error
        return None if found is None else row_of(found)

    async def deadlines(self) -> list[tuple[UUID, int]]:
        """See `Journal`."""
        try:
            return [(entity_id, due_at) for entity_id, due_at in await self._readers.fetch(_DEADLINES, self._shard)]
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise Unreadable(str(error)) from error

    async def _write(self, statement: str, *arguments: object) -> int | None:
        try:
            async with self._writing:
                found: int | None = await self._writer.fetchval(
                    statement, self._shard, self._epoch, *arguments, timeout=APPEND_TIMEOUT_S
                )
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise Refused(f"{type(error).__name__}: {error}") from error
        return found
