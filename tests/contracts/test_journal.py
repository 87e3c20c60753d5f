"""What every journal promises: the one in Postgres, and its twin in memory."""

import asyncio
import hashlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from uuid import UUID, uuid4

import asyncpg
import pytest

from actors.directory import Directory, slot_of
from actors.entities import NO_SNAPSHOT
from actors.journal import (
    EntityRow,
    Fenced,
    Journal,
    PostgresJournal,
    Private,
    Refused,
    Row,
    SnapshotRow,
    Unreadable,
)
from actors.memory import MemoryJournal, MemoryStore
from engine.limits import RESUME_EVENTS_MAX, SLOTS
from tests.support.postgres import wait_for_lock, wait_until_idle

A, B = UUID(int=10), UUID(int=11)
MAKER = UUID(int=1)
NOW = 1_700_000_000_000


class Store(ABC):
    """What is durable, with the incarnations of shards that write to it. Two shards share the slots."""

    @abstractmethod
    async def take_over(self, shard: int = 0) -> int:
        """Raise a shard's epoch."""

    @abstractmethod
    async def journal(self, shard: int, epoch: int) -> Journal:
        """The journal, as one incarnation uses it."""

    @abstractmethod
    async def cut_off_append(self, journal: Journal, rows: list[Row]) -> None:
        """Begin an append and end its writer before it is done."""

    @abstractmethod
    async def private(self, entity_id: UUID) -> list[tuple[int, bytes]]:
        """The private parts of an entity."""

    @abstractmethod
    async def erase(self, entity_id: UUID) -> None:
        """Forget what a person wrote."""

    async def incarnation(self, shard: int = 0) -> Journal:
        """A journal that owns its shard."""
        return await self.journal(shard, await self.take_over(shard))


class Memory(Store):
    def __init__(self) -> None:
        owned = {shard: frozenset(range(shard, SLOTS, 2)) for shard in (0, 1)}
        self.store = MemoryStore(owned)

    async def take_over(self, shard: int = 0) -> int:
        return self.store.take_over(shard)

    async def journal(self, shard: int, epoch: int) -> Journal:
        return MemoryJournal(self.store, shard, epoch)

    async def cut_off_append(self, journal: Journal, rows: list[Row]) -> None:
        task = asyncio.create_task(journal.append(rows, []))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def private(self, entity_id: UUID) -> list[tuple[int, bytes]]:
        return [(seq, part.body) for (entity, seq), part in self.store.private.items() if entity == entity_id]

    async def erase(self, entity_id: UUID) -> None:
        self.store.private = {key: part for key, part in self.store.private.items() if key[0] != entity_id}


class Postgres(Store):
    def __init__(self, database_url: str, pool: asyncpg.Pool) -> None:
        self.database_url = database_url
        self.pool = pool
        self.writers: list[asyncpg.Connection] = []
        self.is_terminated = True

    async def take_over(self, shard: int = 0) -> int:
        epoch: int = await self.pool.fetchval(
            "UPDATE shards SET epoch = epoch + 1 WHERE shard_id = $1 RETURNING epoch", shard
        )
        return epoch

    async def journal(self, shard: int, epoch: int) -> Journal:
        writer = await asyncpg.connect(self.database_url)
        self.writers.append(writer)
        return PostgresJournal(writer, self.pool, shard, epoch)

    async def cut_off_append(self, journal: Journal, rows: list[Row]) -> None:
        """The append waits for the shard's row, which another transaction holds, when it is ended."""
        assert isinstance(journal, PostgresJournal)
        backend_pid = journal._writer.get_server_pid()
        async with self.pool.acquire() as other, other.transaction():
            await other.execute("SELECT FROM shards FOR UPDATE")
            task = asyncio.create_task(journal.append(rows, []))
            await wait_for_lock(self.pool, backend_pid)
            if self.is_terminated:
                await self.pool.execute("SELECT pg_terminate_backend($1)", backend_pid)
                with pytest.raises(Refused):
                    await task
            else:
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                await wait_until_idle(self.pool, backend_pid)

    async def private(self, entity_id: UUID) -> list[tuple[int, bytes]]:
        rows = await self.pool.fetch("SELECT seq, body FROM private WHERE entity_id = $1 ORDER BY seq", entity_id)
        return [(row["seq"], row["body"]) for row in rows]

    async def erase(self, entity_id: UUID) -> None:
        await self.pool.execute("DELETE FROM private WHERE entity_id = $1", entity_id)


@pytest.fixture
async def postgres(database_url: str, pool: asyncpg.Pool) -> AsyncIterator[Postgres]:
    store = Postgres(database_url, pool)
    await Directory(pool).lay_out(2)
    yield store
    for writer in store.writers:
        writer.terminate()


@pytest.fixture(params=["memory", "postgres"])
def store(request: pytest.FixtureRequest) -> Store:
    """Each in turn; Postgres is started only where it is asked for."""
    found: Store = Memory() if request.param == "memory" else request.getfixturevalue("postgres")
    return found


@pytest.fixture
async def journal(store: Store) -> Journal:
    return await store.incarnation()


def event(seq: int, entity: UUID = A, command_id: bytes | None = None, private: Private | None = None) -> Row:
    body = b'{"n":%d,"zero":"\\u0000"}\x00\xff' % seq
    return Row(entity, seq, NOW + seq, "bid_placed", 1, body, hashlib.sha256(body).digest(), command_id, private)


def indexed(entity: UUID = A, status: str = "active", due_at: int | None = NOW) -> EntityRow:
    return EntityRow(entity, slot_of(entity), "auction", MAKER, status, due_at, NOW)


def snapshot_at(seq: int, version: int = 1) -> SnapshotRow:
    return SnapshotRow(A, seq, bytes(32), NOW + seq, version, b"state at %d" % seq)


def slot_entity(shard: int) -> UUID:
    """An entity whose slot that shard serves."""
    return next(entity for entity in map(UUID, (str(uuid4()) for _ in range(1_000))) if slot_of(entity) % 2 == shard)


# Appending and reading


async def test_what_was_appended_is_read_back_as_it_was(journal: Journal) -> None:
    rows = [event(1, command_id=b"\x00" * 32), event(2), event(1, B, b"\xff" * 32), event(3, command_id=b"c")]
    await journal.append(rows, [indexed(), indexed(B)])
    await journal.append([event(4)], [])
    assert await journal.load(A, 1) == (None, [rows[0], rows[1], rows[3], event(4)], [(b"\x00" * 32, 1), (b"c", 3)])
    assert await journal.load(B, 1) == (None, [rows[2]], [(b"\xff" * 32, 1)])
    assert await journal.load(UUID(int=99), 1) == (None, [], [])


async def test_one_event_is_read_by_its_number(journal: Journal) -> None:
    await journal.append([event(1), event(2, command_id=b"two")], [indexed()])
    assert await journal.read(A, 2) == event(2, command_id=b"two")
    assert await journal.read(A, 3) is None
    assert await journal.read(B, 1) is None


async def test_commands_come_by_their_first_event(journal: Journal) -> None:
    await journal.append([event(1, command_id=b"one"), event(2), event(3, command_id=b"three"), event(4)], [indexed()])
    assert sorted((await journal.load(A, 1)).commands) == [(b"one", 1), (b"three", 3)]


async def test_a_number_that_exists_is_refused_and_nothing_of_that_append_is_stored(journal: Journal) -> None:
    await journal.append([event(1), event(2)], [indexed()])
    with pytest.raises(Refused):
        await journal.append([event(3), event(1, B), event(2)], [indexed(status="ended", due_at=None), indexed(B)])
    with pytest.raises(Refused):
        await journal.append([event(3), event(3)], [])
    with pytest.raises(Refused):
        await journal.append([event(0)], [])
    assert [row.seq for row in (await journal.load(A, 1)).rows] == [1, 2]
    assert await journal.load(B, 1) == (None, [], [])
    assert [entity for entity, _ in await journal.deadlines()] in ([A], [])
    await journal.append([event(3)], [])


async def test_large_appends_are_one(journal: Journal) -> None:
    rows = [event(seq) for seq in range(1, 2_001)]
    await journal.append(rows, [indexed()])
    assert (await journal.load(A, 1)).rows == rows


# Fencing


async def test_an_old_incarnation_can_do_nothing(store: Store) -> None:
    old = await store.incarnation()
    await old.append([event(1)], [indexed()])
    await old.check()
    new = await store.incarnation()
    with pytest.raises(Fenced):
        await old.append([event(2)], [indexed(status="ended", due_at=None)])
    with pytest.raises(Fenced):
        await old.append([event(2, private=Private(b"salt", b"text"))], [])
    with pytest.raises(Fenced):
        await old.check()
    with pytest.raises(Fenced):
        await old.save_snapshots([snapshot_at(1)])
    assert await new.load(A, 1) == (None, [event(1)], [])
    assert await store.private(A) == []
    await new.check()
    await new.append([event(2)], [])
    await new.save_snapshots([snapshot_at(2)])


async def test_a_takeover_of_another_shard_fences_nobody(store: Store) -> None:
    journal = await store.incarnation(0)
    other = await store.incarnation(1)
    await store.take_over(1)
    await journal.append([event(1)], [indexed()])
    with pytest.raises(Fenced):
        await other.check()


async def test_of_two_incarnations_that_race_never_both_append(store: Store) -> None:
    """What the new one reads after its takeover is final: no append of the old one may come to light later."""
    acknowledged, seq = 0, 0
    journal = await store.incarnation()
    for _ in range(25):
        old = journal

        async def append(old: Journal = old, seq: int = seq) -> int:
            for number in range(1, 4):
                try:
                    await old.append([event(seq + number)], [])
                except Fenced:
                    return number - 1
            return 3

        async def take_over() -> tuple[Journal, int]:
            new = await store.incarnation()
            read = len((await new.load(A, 1)).rows)
            await new.append([event(read + 1)], [])
            return new, read

        acknowledged, (journal, read) = await asyncio.gather(append(), take_over())
        assert read == seq + acknowledged
        seq = read + 1
    assert [row.seq for row in (await journal.load(A, 1)).rows] == list(range(1, seq + 1))


async def test_an_append_that_is_cut_off_leaves_nothing(store: Store) -> None:
    journal = await store.incarnation()
    await journal.append([event(1)], [indexed()])
    await store.cut_off_append(journal, [event(2, private=Private(b"salt", b"text")), event(1, B)])
    fresh = await store.incarnation()
    assert await fresh.load(A, 1) == (None, [event(1)], [])
    assert await fresh.load(B, 1) == (None, [], [])
    assert await store.private(A) == []
    await fresh.append([event(2)], [])


# Snapshots


async def test_an_entity_is_loaded_from_its_snapshot_and_what_came_after(journal: Journal) -> None:
    last = RESUME_EVENTS_MAX + 20
    rows = [event(seq, command_id=b"%d" % seq if seq % 500 == 1 else None) for seq in range(1, last + 1)]
    await journal.append(rows, [indexed()])
    await journal.save_snapshots([snapshot_at(last - 5)])
    loaded = await journal.load(A, 1)
    assert loaded.snapshot == snapshot_at(last - 5)
    # Also what a subscriber may have missed, and every command however old.
    assert loaded.rows == rows[last - 5 - RESUME_EVENTS_MAX :]
    assert sorted(loaded.commands) == [(b"1", 1), (b"1001", 1_001), (b"501", 501)]


async def test_a_snapshot_only_grows(journal: Journal) -> None:
    await journal.append([event(seq) for seq in range(1, 10)], [indexed()])
    await journal.save_snapshots([snapshot_at(5)])
    await journal.save_snapshots([snapshot_at(3)])
    await journal.save_snapshots([snapshot_at(5)._replace(body=b"another")])
    assert (await journal.load(A, 1)).snapshot == snapshot_at(5)
    await journal.save_snapshots([snapshot_at(6)])
    assert (await journal.load(A, 1)).snapshot == snapshot_at(6)


async def test_snapshots_of_several_are_saved_together_each_for_itself(journal: Journal) -> None:
    rows = [event(seq, entity) for entity in (A, B) for seq in range(1, 10)]
    await journal.append(rows, [indexed(), indexed(B)])
    await journal.save_snapshots([snapshot_at(5), snapshot_at(2)._replace(entity_id=B)])
    # One of the two is older than what is there: the other is saved all the same.
    await journal.save_snapshots([snapshot_at(4), snapshot_at(7)._replace(entity_id=B)])
    assert (await journal.load(A, 1)).snapshot == snapshot_at(5)
    assert (await journal.load(B, 1)).snapshot == snapshot_at(7)._replace(entity_id=B)


async def test_without_a_snapshot_all_is_read(journal: Journal) -> None:
    last = RESUME_EVENTS_MAX + 20
    rows = [event(seq) for seq in range(1, last + 1)]
    await journal.append(rows, [indexed()])
    await journal.save_snapshots([snapshot_at(last)])
    assert await journal.load(A, NO_SNAPSHOT) == (None, rows, [])


async def test_a_snapshot_of_another_version_is_ignored(journal: Journal) -> None:
    await journal.append([event(1), event(2)], [indexed()])
    await journal.save_snapshots([snapshot_at(1, version=2)])
    loaded = await journal.load(A, 1)
    assert (loaded.snapshot, len(loaded.rows)) == (None, 2)
    assert (await journal.load(A, 2)).snapshot == snapshot_at(1, version=2)


# Private parts


async def test_private_parts_come_with_their_events_and_can_be_erased(store: Store, journal: Journal) -> None:
    await journal.append([event(1), event(2, private=Private(b"salt", "grüß".encode()))], [indexed()])
    await journal.append([event(3, private=Private(b"more", b"text"))], [])
    assert await store.private(A) == [(2, "grüß".encode()), (3, b"text")]
    expected = [
        event(1),
        event(2, private=Private(b"salt", "grüß".encode())),
        event(3, private=Private(b"more", b"text")),
    ]
    assert (await journal.load(A, 1)).rows == expected
    assert await journal.read(A, 3) == expected[2]
    await store.erase(A)
    assert await store.private(A) == []
    assert (await journal.load(A, 1)).rows == [event(seq) for seq in (1, 2, 3)]
    assert await journal.read(A, 3) == event(3)


async def test_private_parts_of_a_refused_append_are_not_stored(store: Store, journal: Journal) -> None:
    await journal.append([event(1)], [indexed()])
    with pytest.raises(Refused):
        await journal.append([event(2, private=Private(b"salt", b"text")), event(1)], [])
    assert await store.private(A) == []


# Deadlines


async def test_deadlines_are_those_of_the_shards_own_slots(store: Store) -> None:
    journals = [await store.incarnation(0), await store.incarnation(1)]
    entities = [slot_entity(0), slot_entity(1)]
    for shard, journal in enumerate(journals):
        done = slot_entity(shard)
        await journal.append(
            [event(1, entities[shard]), event(1, done)],
            [indexed(entities[shard], due_at=NOW + shard), indexed(done, "ended", None)],
        )
    assert await journals[0].deadlines() == [(entities[0], NOW)]
    assert await journals[1].deadlines() == [(entities[1], NOW + 1)]


async def test_a_deadline_moves_and_goes_with_its_events(journal: Journal) -> None:
    mine = slot_entity(0)
    await journal.append([event(1, mine)], [indexed(mine, "scheduled", NOW)])
    await journal.append([event(2, mine)], [indexed(mine, "active", NOW + 500)])
    assert await journal.deadlines() == [(mine, NOW + 500)]
    await journal.append([event(3, mine)], [])
    assert await journal.deadlines() == [(mine, NOW + 500)]
    await journal.append([event(4, mine)], [indexed(mine, "ended", None)])
    assert await journal.deadlines() == []


# Postgres alone


async def test_postgres_a_cancelled_append_leaves_nothing(postgres: Postgres) -> None:
    postgres.is_terminated = False
    journal = await postgres.incarnation()
    await postgres.cut_off_append(journal, [event(1)])
    assert await journal.load(A, 1) == (None, [], [])


async def test_postgres_every_write_is_a_sign_of_life(postgres: Postgres) -> None:
    journal = await postgres.incarnation()
    for write in (
        journal.append([event(1)], []),
        journal.append([event(2)], [indexed()]),
        journal.check(),
        journal.save_snapshots([snapshot_at(2)]),
    ):
        await postgres.pool.execute("UPDATE shards SET alive_at = '-infinity'")
        await write
        assert await postgres.pool.fetchval("SELECT alive_at > '-infinity' FROM shards WHERE shard_id = 0")


async def test_postgres_an_append_that_takes_too_long_is_refused(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.journal.APPEND_TIMEOUT_S", 0.05)
    journal = await postgres.incarnation()
    async with postgres.pool.acquire() as other, other.transaction():
        await other.execute("SELECT FROM shards FOR UPDATE")
        with pytest.raises(Refused, match="TimeoutError"):
            await journal.append([event(1)], [])
        await wait_until_idle(postgres.pool, postgres.writers[0].get_server_pid())
    monkeypatch.undo()
    assert await journal.load(A, 1) == (None, [], [])


async def test_postgres_that_cannot_be_read_is_unreadable(postgres: Postgres) -> None:
    journal = await postgres.incarnation()
    await postgres.pool.execute("ALTER TABLE journal RENAME TO hidden")
    await postgres.pool.execute("ALTER TABLE entities RENAME TO hidden_too")
    try:
        for read in (journal.load(A, 1), journal.read(A, 1), journal.deadlines()):
            with pytest.raises(Unreadable):
                await read
    finally:
        await postgres.pool.execute("ALTER TABLE hidden RENAME TO journal")
        await postgres.pool.execute("ALTER TABLE hidden_too RENAME TO entities")
