"""The journal: what happened, appended under a fence, never changed.

Only the newest incarnation of a shard may write. Every write names the epoch that it believes in and does nothing
unless Postgres agrees, in the same statement: the row of `shards` is updated, so a stale writer waits for the lock and
then finds its epoch gone. (A fence that only read could let a stale insert commit after the new owner's replay.) The
same update is the shard's sign of life, and after a gap in these the fence is closed, too: time was lost that is owed
to auctions.

A write that was not taken, or of which nobody knows, is settled: under a new epoch, which ends whatever may still be on
its way under the old one, the journal says what it holds, and gets what it lacks.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Final, NamedTuple, Protocol, TypeVar
from uuid import UUID

import asyncpg

from actors.database import ERRORS, Database, is_passing
from actors.logs import get_logger
from engine.limits import (
    DATABASE_TIMEOUT_MS,
    OUTAGE_MS,
    RESUME_EVENTS_MAX,
    SECOND_MS,
    TAKEOVER_TIMEOUT_MS,
    WRITE_ROWS_PER_MS,
    WRITE_TIMEOUT_MS,
)

logger = get_logger(__name__)

_READ_TIMEOUT_S: Final = DATABASE_TIMEOUT_MS / SECOND_MS
_WRITE_TIMEOUT_S: Final = WRITE_TIMEOUT_MS / SECOND_MS
_CLAIM_PATIENCE_S: Final = TAKEOVER_TIMEOUT_MS / SECOND_MS

T = TypeVar("T")


class Fenced(Exception):
    """Another process owns the shard: this one must end."""


class Refused(Exception):
    """A write was not taken though it should be right: this process must end."""


class Unsettled(Exception):
    """A write was done or not, or the fence was closed: `settle` finds out. The sentence says what went wrong."""


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
    joined: UUID | None = None
    """Whose first bid in this auction it is; for writing only."""


class EntityRow(NamedTuple):
    """An entity as the rest of the system finds it: where it lives, whose it is, and when it is next due."""

    entity_id: UUID
    slot: int
    kind: str
    owner_id: UUID
    status: str
    due_at: int | None
    window_ms: int
    """So near to `due_at` an outage must be paid back."""
    created_at: int
    ended_at: int | None = None


class Life(NamedTuple):
    """What a write says of its shard. Times in milliseconds, by Postgres's clock."""

    alive_at: int
    """When the write was done: the shard's sign of life."""
    down_at: int | None
    """The last sign of life before an outage that is not paid back; None if all are."""


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
    """One process's way to the journal. Writes raise `Unsettled` or `Refused`, reads `Unreadable`."""

    epoch: int
    """The newest epoch in which this process owned the shard."""

    async def append(self, rows: Sequence[Row], entities: Sequence[EntityRow], paid_until: int | None = None) -> Life:
        """Store events and what they change of their entities: all of it, durably, or nothing.

        With `paid_until` they pay back an outage up to that time (milliseconds), and the fence need not be open.
        """

    async def check(self) -> Life:
        """Return if this process still owns the shard (and show that it lives)."""

    async def settle(self, rows: Sequence[Row], entities: Sequence[EntityRow], paid_until: int | None) -> Life:
        """After `Unsettled`: open the fence in a new epoch, and store what is missing of the write in question.

        Raises `Fenced` if another process owns the shard by now, and `Unsettled` if it must be called again.
        """

    async def save_snapshots(self, snapshots: Sequence[SnapshotRow]) -> None:
        """Keep committed states, of different entities; one that is older than the stored one is ignored."""

    async def load(self, entity_id: UUID, snapshot_version: int) -> Loaded:
        """Read an entity, from a snapshot of this version if there is one: empty if it never was."""

    async def read(self, entity_id: UUID, seq: int) -> Row | None:
        """Read one event."""

    async def deadlines(self) -> list[tuple[UUID, int]]:
        """The next deadline of every entity of this shard that has one."""

    async def closing(self, before: int) -> list[UUID]:
        """The entities of this shard that are within their windows at this time (milliseconds), or past their ends."""


# The fence, the sign of life and the guard of the inserts, in one.
_FENCE = f"""
    UPDATE shards SET alive_at = clock_timestamp()
    WHERE shard_id = $1 AND epoch = $2 AND alive_at >= clock_timestamp() - interval '{OUTAGE_MS} milliseconds'
    RETURNING alive_at, down_at"""  # noqa: S608 (a constant)
# If storing took long the outage goes on at `paid_until`.
_PAYING_FENCE = f"""
    UPDATE shards SET alive_at = clock_timestamp(), down_at = CASE
        WHEN clock_timestamp() > to_timestamp($26::bigint / 1000.0) + interval '{OUTAGE_MS} milliseconds'
        THEN to_timestamp($26::bigint / 1000.0) END
    WHERE shard_id = $1 AND epoch = $2
    RETURNING alive_at, down_at"""  # noqa: S608 (a constant)
_LIFE = (
    "(extract(epoch FROM alive_at) * 1000)::bigint AS alive_at, (extract(epoch FROM down_at) * 1000)::bigint AS down_at"
)
_APPENDED = """, appended AS (
    INSERT INTO journal (entity_id, seq, at, kind, version, body, hash, command_id)
    SELECT row.* FROM unnest($3::uuid[], $4::bigint[], $5::bigint[], $6::text[], $7::smallint[], $8::bytea[],
                             $9::bytea[], $10::bytea[]) AS row, owner
    RETURNING 1
)"""
_INDEXED = """, indexed AS (
    INSERT INTO entities (entity_id, slot, kind, owner_id, status, due_at, window_ms, created_at, ended_at)
    SELECT entity.* FROM unnest($11::uuid[], $12::smallint[], $13::text[], $14::uuid[], $15::text[], $16::bigint[],
                                $17::bigint[], $18::bigint[], $19::bigint[]) AS entity, owner
    ON CONFLICT (entity_id) DO UPDATE
    SET status = excluded.status, due_at = excluded.due_at, window_ms = excluded.window_ms,
        ended_at = excluded.ended_at
), hidden AS (
    INSERT INTO private (entity_id, seq, salt, body)
    SELECT part.* FROM unnest($20::uuid[], $21::bigint[], $22::bytea[], $23::bytea[]) AS part, owner
), joined AS (
    INSERT INTO bidders (user_id, entity_id)
    SELECT bidder.* FROM unnest($24::uuid[], $25::uuid[]) AS bidder, owner
    ON CONFLICT DO NOTHING
)"""
_COUNT = f" SELECT (SELECT count(*) FROM appended) AS appended, {_LIFE} FROM owner"  # noqa: S608 (a constant)
_APPEND_EVENTS = f"WITH owner AS ({_FENCE}){_APPENDED}{_COUNT}"
_APPEND_ALL = f"WITH owner AS ({_FENCE}){_APPENDED}{_INDEXED}{_COUNT}"
_PAY_BACK = f"WITH owner AS ({_PAYING_FENCE}){_APPENDED}{_INDEXED}{_COUNT}"
_CHECK = f"WITH owner AS ({_FENCE}) SELECT {_LIFE} FROM owner"  # noqa: S608 (a constant)
_SAVE_SNAPSHOTS = f"""WITH owner AS ({_FENCE}), saved AS (
    INSERT INTO snapshots (entity_id, seq, hash, last_at, version, body)
    SELECT snapshot.* FROM unnest($3::uuid[], $4::bigint[], $5::bytea[], $6::bigint[], $7::smallint[],
                                  $8::bytea[]) AS snapshot, owner
    ON CONFLICT (entity_id) DO UPDATE
    SET seq = excluded.seq, hash = excluded.hash, last_at = excluded.last_at, version = excluded.version,
        body = excluded.body
    WHERE snapshots.seq < excluded.seq
) SELECT {_LIFE} FROM owner"""  # noqa: S608 (a constant)
# What this process may still have on its way under its old epoch is waited for, and then finds that epoch gone.
_RAISE = f"""
WITH owner AS (
    UPDATE shards
    SET epoch = epoch + 1, backend_pid = $3, alive_at = clock_timestamp(), down_at = coalesce(down_at, alive_at)
    WHERE shard_id = $1 AND owner = $2
    RETURNING epoch, alive_at, down_at
) SELECT epoch, {_LIFE} FROM owner"""  # noqa: S608 (a constant)
_STORED = """
SELECT count(*) FROM unnest($1::uuid[], $2::bigint[], $3::bytea[]) AS row (entity_id, seq, hash)
JOIN journal USING (entity_id, seq, hash)"""
# A number may by now be another session's: only one that goes by this shard's name is ended, and not our own.
_END_SESSION = """
SELECT pg_terminate_backend(pid) FROM shards JOIN pg_stat_activity ON pid = backend_pid
WHERE shard_id = $1 AND application_name = $2 AND datname = current_database() AND pid <> $3"""
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
_CLOSING = """
SELECT entity_id FROM entities
WHERE due_at - window_ms < $2 AND slot IN (SELECT slot FROM slots WHERE shard_id = $1)"""


def row_of(record: asyncpg.Record) -> Row:
    """A row as `SELECT_ROWS` reads it."""
    *row, salt, text = record
    return Row._make((*row, None if salt is None else Private(salt, text), None))


def session_name(shard: int) -> str:
    """What Postgres knows the session by in which a shard writes."""
    return f"gavel shard {shard}"


class PostgresJournal:
    """The journal in Postgres, for one process that owns a shard. `readers` are for reading only.

    It writes on a connection of its own, so that appends never wait for reads.
    """

    def __init__(
        self,
        *,
        database: Database,
        writer: asyncpg.Connection,
        readers: asyncpg.Pool,
        shard: int,
        owner: UUID,
        epoch: int,
    ) -> None:
        self.epoch = epoch
        self._database = database
        self._writer = writer
        self._readers = readers
        self._shard = shard
        self._owner = owner

    async def append(self, rows: Sequence[Row], entities: Sequence[EntityRow], paid_until: int | None = None) -> Life:
        """See `Journal`."""
        columns = _columns([row[:8] for row in rows], 8)
        hidden = [(row.entity_id, row.seq, *row.private) for row in rows if row.private is not None]
        joined = [(row.joined, row.entity_id) for row in rows if row.joined is not None]
        if entities or hidden or joined or paid_until is not None:
            columns += _columns(entities, len(EntityRow._fields)) + _columns(hidden, 4) + _columns(joined, 2)
            if paid_until is not None:
                appended, *life = await self._write(_PAY_BACK, *columns, paid_until, rows=len(rows))
            else:
                appended, *life = await self._write(_APPEND_ALL, *columns, rows=len(rows))
        else:
            appended, *life = await self._write(_APPEND_EVENTS, *columns, rows=len(rows))
        assert appended == len(rows), "a statement stores all or nothing"
        return Life(*life)

    async def check(self) -> Life:
        """See `Journal`."""
        return Life(*await self._write(_CHECK))

    async def save_snapshots(self, snapshots: Sequence[SnapshotRow]) -> None:
        """See `Journal`."""
        await self._write(_SAVE_SNAPSHOTS, *_columns(snapshots, len(SnapshotRow._fields)))

    async def settle(self, rows: Sequence[Row], entities: Sequence[EntityRow], paid_until: int | None) -> Life:
        """See `Journal`."""
        # What comes late on the old connection must not be taken for the answer to something else.
        self._writer.terminate()
        try:
            self._writer = await self._database.connect(session_name(self._shard))
            life = await self._raise()
            stored = await self._writer.fetchval(
                _STORED,
                [row.entity_id for row in rows],
                [row.seq for row in rows],
                [row.hash for row in rows],
                timeout=_WRITE_TIMEOUT_S,
            )
        except ERRORS as error:
            raise _translated(error) from error
        if stored not in (0, len(rows)):
            raise Refused(f"of {len(rows)} events that were written together the journal holds {stored}")
        if stored == 0 and (rows or paid_until is not None):
            return await self.append(rows, entities, paid_until)
        return life

    async def _raise(self) -> Life:
        """Begin a new epoch, if this process still owns the shard, whatever holds its row."""
        own_pid = self._writer.get_server_pid()
        raising = self._writer.fetchrow(_RAISE, self._shard, self._owner, own_pid, timeout=_WRITE_TIMEOUT_S)
        found = await past_old_session(raising, self._readers, self._shard, own_pid)
        if found is None:
            raise Fenced
        self.epoch, *life = found
        return Life(*life)

    async def load(self, entity_id: UUID, snapshot_version: int) -> Loaded:
        """See `Journal`."""
        async with self._reading() as connection:
            found = await connection.fetchrow(_LOAD_SNAPSHOT, entity_id, snapshot_version)
            snapshot = None if found is None else SnapshotRow(*found)
            after = 0 if snapshot is None else max(0, snapshot.seq - RESUME_EVENTS_MAX)
            rows = await connection.fetch(_LOAD_ROWS, entity_id, after)
            # An id under which nothing happened is cheap, so that asking for such ids costs others little.
            commands = await connection.fetch(_LOAD_COMMANDS, entity_id) if rows or snapshot else []
        return Loaded(snapshot, [row_of(row) for row in rows], [(command_id, seq) for command_id, seq in commands])

    async def read(self, entity_id: UUID, seq: int) -> Row | None:
        """See `Journal`."""
        async with self._reading() as connection:
            found = await connection.fetchrow(_READ, entity_id, seq)
        return None if found is None else row_of(found)

    async def deadlines(self) -> list[tuple[UUID, int]]:
        """See `Journal`."""
        async with self._reading() as connection:
            return [(entity_id, due_at) for entity_id, due_at in await connection.fetch(_DEADLINES, self._shard)]

    async def closing(self, before: int) -> list[UUID]:
        """See `Journal`."""
        async with self._reading() as connection:
            return [entity_id for (entity_id,) in await connection.fetch(_CLOSING, self._shard, before)]

    async def close(self) -> None:
        """Close the connection on which it writes."""
        await self._writer.close()

    @contextlib.asynccontextmanager
    async def _reading(self) -> AsyncIterator[asyncpg.pool.PoolConnectionProxy]:
        """A connection for reading. What the driver raises is translated here, once; what is broken stays an error."""
        try:
            async with self._readers.acquire(timeout=_READ_TIMEOUT_S) as connection:
                yield connection
        except ERRORS as error:
            if not is_passing(error):
                raise
            raise Unreadable(f"{type(error).__name__}: {error}") from error

    async def _write(self, statement: str, *arguments: object, rows: int = 0) -> asyncpg.Record:
        timeout = _WRITE_TIMEOUT_S + rows / WRITE_ROWS_PER_MS / SECOND_MS
        try:
            found = await self._writer.fetchrow(statement, self._shard, self.epoch, *arguments, timeout=timeout)
        except ERRORS as error:
            raise _translated(error) from error
        if found is None:
            raise Unsettled("the fence is closed: another process owns the shard, or there was a gap in its life")
        return found


def _columns(rows: Sequence[Sequence[object]], width: int) -> list[Sequence[object]]:
    """Rows as columns, which `unnest` takes."""
    return list(zip(*rows, strict=True)) if rows else [()] * width


def _translated(error: Exception) -> Unsettled | Refused:
    sentence = f"{type(error).__name__}: {error}"
    return Unsettled(sentence) if is_passing(error) else Refused(sentence)


async def past_old_session(claim: Coroutine[None, None, T], pool: asyncpg.Pool, shard: int, own_pid: int) -> T:
    """Wait for a statement that claims a shard's row, and end the last session that wrote the shard if that takes long.

    It holds the lock, and nobody may be there to let it go.
    """
    claiming = asyncio.get_running_loop().create_task(claim)
    try:
        await asyncio.wait([claiming], timeout=_CLAIM_PATIENCE_S)
        if not claiming.done():
            with contextlib.suppress(*ERRORS):
                await end_session(pool, shard, own_pid)
        return await claiming
    finally:
        claiming.cancel()


async def end_session(pool: asyncpg.Pool, shard: int, own_pid: int) -> None:
    """End the session in which a shard was written last, unless it is `own_pid`'s."""
    logger.warning("the last session that wrote the shard holds its row: it is ended", shard=shard)
    await pool.execute(_END_SESSION, shard, session_name(shard), own_pid, timeout=_WRITE_TIMEOUT_S)
