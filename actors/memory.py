"""The in-memory twin of the journal: the same promises, without a database.

`MemoryStore` is what Postgres is to `PostgresJournal`; both pass one contract suite. It serves tests and simulations.
"""

import asyncio
from collections.abc import Sequence
from uuid import UUID

from actors.directory import slot_of
from actors.journal import EntityRow, Fenced, Loaded, Private, Refused, Row, SnapshotRow
from engine.limits import RESUME_EVENTS_MAX


class MemoryStore:
    """What is durable: shared by the incarnations of all shards. `owned` says which slots each shard serves."""

    def __init__(self, owned: dict[int, frozenset[int]] | None = None) -> None:
        self.owned = owned
        self.epochs: dict[int, int] = {}
        self.journal: dict[UUID, dict[int, Row]] = {}
        self.entities: dict[UUID, EntityRow] = {}
        self.snapshots: dict[UUID, SnapshotRow] = {}
        self.private: dict[tuple[UUID, int], Private] = {}

    def take_over(self, shard: int) -> int:
        """Raise the epoch of a shard and return it."""
        self.epochs[shard] = self.epochs.get(shard, 0) + 1
        return self.epochs[shard]


class MemoryJournal:
    """One incarnation's way to a `MemoryStore`. See `Journal` for its promises."""

    def __init__(self, store: MemoryStore, shard: int, epoch: int) -> None:
        self._store = store
        self._shard = shard
        self._epoch = epoch

    async def append(self, rows: Sequence[Row], entities: Sequence[EntityRow]) -> None:
        """See `Journal`. All checks come before the first write, so that nothing is stored by halves."""
        await self.check()
        store = self._store
        fresh = {(row.entity_id, row.seq) for row in rows}
        if len(fresh) < len(rows) or any(row.seq in store.journal.get(row.entity_id, {}) for row in rows):
            raise Refused("UniqueViolationError: an event with this seq exists")
        if any(row.seq < 1 for row in rows):
            raise Refused("CheckViolationError: seq begins at 1")
        for row in rows:
            store.journal.setdefault(row.entity_id, {})[row.seq] = row._replace(private=None)
            if row.private is not None:
                store.private[row.entity_id, row.seq] = row.private
        for entity in entities:
            known = store.entities.get(entity.entity_id)
            store.entities[entity.entity_id] = (
                entity if known is None else known._replace(status=entity.status, due_at=entity.due_at)
            )

    async def check(self) -> None:
        """See `Journal`."""
        await asyncio.sleep(0)
        if self._store.epochs.get(self._shard) != self._epoch:
            raise Fenced

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

    def _with_private(self, row: Row) -> Row:
        return row._replace(private=self._store.private.get((row.entity_id, row.seq)))

    async def deadlines(self) -> list[tuple[UUID, int]]:
        """See `Journal`."""
        await asyncio.sleep(0)
        owned = None if self._store.owned is None else self._store.owned.get(self._shard, frozenset())
        return [
            (entity.entity_id, entity.due_at)
            for entity in self._store.entities.values()
            if entity.due_at is not None and (owned is None or slot_of(entity.entity_id) in owned)
        ]
