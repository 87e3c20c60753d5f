"""The in-memory twin of the journal: the same promises, without a database, for tests of what stands on it.

`MemoryStore` is what Postgres is to `PostgresJournal`; both pass one contract suite.
"""

import asyncio
from collections.abc import Callable, Sequence
from uuid import UUID, uuid4

from actors.directory import slot_of
from actors.journal import EntityRow, Fenced, Life, Loaded, Private, Refused, Row, SnapshotRow, Unsettled
from engine.limits import OUTAGE_MS, RESUME_EVENTS_MAX


class _Owned:
    """What `shards` says of a shard."""

    def __init__(self, alive_at: int) -> None:
        self.epoch = 0
        self.owner: UUID | None = None
        self.alive_at = alive_at
        self.down_at: int | None = None


class MemoryStore:
    """What is durable: shared by the owners of all shards. `owned` says which slots each shard serves.

    `clock` is the store's own, in milliseconds.
    """

    def __init__(self, owned: dict[int, frozenset[int]] | None = None, clock: Callable[[], int] = lambda: 0) -> None:
        self.owned = owned
        self.clock = clock
        self.shards: dict[int, _Owned] = {}
        self.journal: dict[UUID, dict[int, Row]] = {}
        self.entities: dict[UUID, EntityRow] = {}
        self.snapshots: dict[UUID, SnapshotRow] = {}
        self.private: dict[tuple[UUID, int], Private] = {}
        self.bidders: set[tuple[UUID, UUID]] = set()
        """Each user with each auction in which it bids."""

    def take_over(self, shard: int) -> UUID:
        """Give a shard a new owner."""
        now = self.clock()
        is_new = shard not in self.shards
        state = self.shards.setdefault(shard, _Owned(now))
        state.epoch += 1
        state.owner = uuid4()
        if not is_new and state.down_at is None:
            state.down_at = state.alive_at
        state.alive_at = now
        return state.owner


class MemoryJournal:
    """One owner's way to a `MemoryStore`. See `Journal` for its promises."""

    def __init__(self, store: MemoryStore, shard: int, owner: UUID) -> None:
        self._store = store
        self._shard = shard
        self._owner = owner
        self.epoch = store.shards[shard].epoch

    async def append(self, rows: Sequence[Row], entities: Sequence[EntityRow], paid_until: int | None = None) -> Life:
        """See `Journal`. All checks come before the first write, so that nothing is stored by halves."""
        await asyncio.sleep(0)
        store = self._store
        self._check_fence(is_paying=paid_until is not None)
        fresh = {(row.entity_id, row.seq) for row in rows}
        if len(fresh) < len(rows) or any(row.seq in store.journal.get(row.entity_id, {}) for row in rows):
            raise Refused("UniqueViolationError: an event with this seq exists")
        if any(row.seq < 1 for row in rows):
            raise Refused("CheckViolationError: seq begins at 1")
        for row in rows:
            store.journal.setdefault(row.entity_id, {})[row.seq] = row._replace(private=None, joined=None)
            if row.private is not None:
                store.private[row.entity_id, row.seq] = row.private
            if row.joined is not None:
                store.bidders.add((row.joined, row.entity_id))
        for entity in entities:
            known = store.entities.get(entity.entity_id, entity)
            store.entities[entity.entity_id] = known._replace(
                status=entity.status, due_at=entity.due_at, window_ms=entity.window_ms, ended_at=entity.ended_at
            )
        if paid_until is not None:
            store.shards[self._shard].down_at = paid_until if store.clock() > paid_until + OUTAGE_MS else None
        return self._sign()

    async def check(self) -> Life:
        """See `Journal`."""
        await asyncio.sleep(0)
        self._check_fence()
        return self._sign()

    async def settle(self, rows: Sequence[Row], entities: Sequence[EntityRow], paid_until: int | None) -> Life:
        """See `Journal`."""
        await asyncio.sleep(0)
        state = self._store.shards[self._shard]
        if state.owner != self._owner:
            raise Fenced
        state.epoch += 1
        self.epoch = state.epoch
        if state.down_at is None:
            state.down_at = state.alive_at
        life = self._sign()
        stored = [row for row in rows if self._is_stored(row)]
        if len(stored) not in (0, len(rows)):
            raise Refused(f"of {len(rows)} events that were written together the journal holds {len(stored)}")
        if not stored and (rows or paid_until is not None):
            return await self.append(rows, entities, paid_until)
        return life

    async def save_snapshots(self, snapshots: Sequence[SnapshotRow]) -> None:
        """See `Journal`."""
        await self.check()
        for snapshot in snapshots:
            known = self._store.snapshots.get(snapshot.entity_id)
            if known is None or known.seq < snapshot.seq:
                self._store.snapshots[snapshot.entity_id] = snapshot

    async def load(self, entity_id: UUID, snapshot_version: int) -> Loaded:
        """See `Journal`."""
        await asyncio.sleep(0)
        snapshot = self._store.snapshots.get(entity_id)
        if snapshot is not None and snapshot.version != snapshot_version:
            snapshot = None
        after = 0 if snapshot is None else max(0, snapshot.seq - RESUME_EVENTS_MAX)
        rows = [self._with_private(row) for _, row in sorted(self._store.journal.get(entity_id, {}).items())]
        commands = [(row.command_id, row.seq) for row in rows if row.command_id is not None]
        return Loaded(snapshot, [row for row in rows if row.seq > after], commands)

    async def read(self, entity_id: UUID, seq: int) -> Row | None:
        """See `Journal`."""
        await asyncio.sleep(0)
        row = self._store.journal.get(entity_id, {}).get(seq)
        return None if row is None else self._with_private(row)

    async def deadlines(self) -> list[tuple[UUID, int]]:
        """See `Journal`."""
        await asyncio.sleep(0)
        return [(entity.entity_id, entity.due_at) for entity in self._entities() if entity.due_at is not None]

    async def closing(self, before: int) -> list[UUID]:
        """See `Journal`."""
        await asyncio.sleep(0)
        return [
            entity.entity_id
            for entity in self._entities()
            if entity.due_at is not None and entity.due_at - entity.window_ms < before
        ]

    def _check_fence(self, *, is_paying: bool = False) -> None:
        state = self._store.shards[self._shard]
        is_fresh = is_paying or state.alive_at >= self._store.clock() - OUTAGE_MS
        if state.epoch != self.epoch or not is_fresh:
            raise Unsettled("the fence is closed")

    def _sign(self) -> Life:
        state = self._store.shards[self._shard]
        state.alive_at = self._store.clock()
        return Life(state.alive_at, state.down_at)

    def _is_stored(self, row: Row) -> bool:
        stored = self._store.journal.get(row.entity_id, {}).get(row.seq)
        return stored is not None and stored.hash == row.hash

    def _with_private(self, row: Row) -> Row:
        return row._replace(private=self._store.private.get((row.entity_id, row.seq)))

    def _entities(self) -> list[EntityRow]:
        owned = None if self._store.owned is None else self._store.owned.get(self._shard, frozenset())
        return [
            entity for entity in self._store.entities.values() if owned is None or slot_of(entity.entity_id) in owned
        ]
