"""What every journal promises: the one in Postgres, its twin in memory, and the one in Postgres on a simulated server.

Tests that are named for Postgres need the real server.
"""

import asyncio
import hashlib
import importlib
import re
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from actors import database
from actors import journal as journal_module
from actors.directory import Directory, slot_of
from actors.entities import NO_SNAPSHOT
from actors.journal import (
    _LIFE,
    EntityRow,
    Fenced,
    Journal,
    Life,
    PostgresJournal,
    Private,
    Refused,
    Row,
    SnapshotRow,
    Unreadable,
    Unsettled,
    end_session,
    session_name,
)
from actors.memory import MemoryJournal, MemoryStore
from engine.limits import OUTAGE_MS, RESUME_EVENTS_MAX, SLOTS
from tests.simulation.postgres import SCHEMAS, Schema, SimulatedPostgres
from tests.simulation.world import Guest, World
from tests.support.postgres import wait_for_lock, wait_until_idle
from tests.support.waiting import until, until_true

A, B = UUID(int=10), UUID(int=11)
MAKER, ANNA, BEN = UUID(int=1), UUID(int=2), UUID(int=3)
NOW = 1_700_000_000_000


class Store(ABC):
    """What is durable, with the owners of shards that write to it. Two shards share the slots."""

    @abstractmethod
    async def take_over(self, shard: int = 0) -> UUID:
        """Give a shard a new owner."""

    @abstractmethod
    async def journal(self, shard: int, owner: UUID) -> Journal:
        """The journal, as an owner uses it from the newest epoch on."""

    @abstractmethod
    async def pass_time(self, ms: int) -> int:
        """Let time pass without a sign of life; by how much less the store now counts what was before."""

    @abstractmethod
    async def now(self) -> int:
        """The store's clock."""

    @abstractmethod
    async def life(self, shard: int = 0) -> Life:
        """A shard's last sign of life, and the start of the outage that it owes."""

    @abstractmethod
    async def cut_off_append(self, journal: Journal, rows: list[Row]) -> None:
        """Begin an append and end its writer before it is done."""

    @abstractmethod
    async def private(self, entity_id: UUID) -> list[tuple[int, bytes]]:
        """The private parts of an entity."""

    @abstractmethod
    async def bidders(self) -> set[tuple[UUID, UUID]]:
        """Each user with each entity in which it bids."""

    @abstractmethod
    async def ended_at(self, entity_id: UUID) -> int | None:
        """When an entity was over."""

    @abstractmethod
    async def erase(self, entity_id: UUID) -> None:
        """Forget what a person wrote."""

    async def incarnation(self, shard: int = 0) -> Journal:
        """A journal that owns its shard."""
        return await self.journal(shard, await self.take_over(shard))


class Memory(Store):
    def __init__(self) -> None:
        owned = {shard: frozenset(range(shard, SLOTS, 2)) for shard in (0, 1)}
        self.time = NOW
        self.store = MemoryStore(owned, lambda: self.time)

    async def take_over(self, shard: int = 0) -> UUID:
        return self.store.take_over(shard)

    async def journal(self, shard: int, owner: UUID) -> Journal:
        return MemoryJournal(self.store, shard, owner)

    async def pass_time(self, ms: int) -> int:
        self.time += ms
        return 0

    async def now(self) -> int:
        return self.time

    async def life(self, shard: int = 0) -> Life:
        state = self.store.shards[shard]
        return Life(state.alive_at, state.down_at)

    async def cut_off_append(self, journal: Journal, rows: list[Row]) -> None:
        task = asyncio.create_task(journal.append(rows, []))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def private(self, entity_id: UUID) -> list[tuple[int, bytes]]:
        return [(seq, part.body) for (entity, seq), part in self.store.private.items() if entity == entity_id]

    async def bidders(self) -> set[tuple[UUID, UUID]]:
        return self.store.bidders

    async def ended_at(self, entity_id: UUID) -> int | None:
        return self.store.entities[entity_id].ended_at

    async def erase(self, entity_id: UUID) -> None:
        self.store.private = {key: part for key, part in self.store.private.items() if key[0] != entity_id}


class Postgres(Store):
    def __init__(self, way: database.Database, pool: asyncpg.Pool) -> None:
        self.database = way
        self.pool = pool
        self.writers: list[asyncpg.Connection] = []
        self.journals: list[PostgresJournal] = []
        self.is_terminated = True

    async def take_over(self, shard: int = 0) -> UUID:
        owner, taken = uuid4(), None
        while taken is None:
            epoch = await self.pool.fetchval("SELECT epoch FROM shards WHERE shard_id = $1", shard)
            taken = await Directory(self.pool)._try(shard, epoch, owner, 0)
        return owner

    async def journal(self, shard: int, owner: UUID) -> PostgresJournal:
        writer = await self.database.connect(session_name(shard))
        journal = PostgresJournal(
            database=self.database,
            writer=writer,
            readers=self.pool,
            shard=shard,
            owner=owner,
            epoch=await self.pool.fetchval(
                "UPDATE shards SET backend_pid = $2 WHERE shard_id = $1 RETURNING epoch",
                shard,
                writer.get_server_pid(),
            ),
        )
        self.writers.append(writer)
        self.journals.append(journal)
        return journal

    async def incarnation(self, shard: int = 0) -> PostgresJournal:
        return await self.journal(shard, await self.take_over(shard))

    async def pass_time(self, ms: int) -> int:
        """The clock cannot be moved: what was, was longer ago."""
        await self.pool.execute(
            "UPDATE shards SET alive_at = alive_at - $1 * interval '1 ms', down_at = down_at - $1 * interval '1 ms'", ms
        )
        return ms

    async def now(self) -> int:
        now: int = await self.pool.fetchval("SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint")
        return now

    async def life(self, shard: int = 0) -> Life:
        found = await self.pool.fetchrow(f"SELECT {_LIFE} FROM shards WHERE shard_id = $1", shard)
        assert found is not None
        return Life(*found)

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
                with pytest.raises(Unsettled):
                    await task
            else:
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                await wait_until_idle(self.pool, backend_pid)

    async def private(self, entity_id: UUID) -> list[tuple[int, bytes]]:
        rows = await self.pool.fetch("SELECT seq, body FROM private WHERE entity_id = $1 ORDER BY seq", entity_id)
        return [(row["seq"], row["body"]) for row in rows]

    async def bidders(self) -> set[tuple[UUID, UUID]]:
        return {(user, entity) for user, entity in await self.pool.fetch("SELECT user_id, entity_id FROM bidders")}

    async def ended_at(self, entity_id: UUID) -> int | None:
        found: int | None = await self.pool.fetchval("SELECT ended_at FROM entities WHERE entity_id = $1", entity_id)
        return found

    async def erase(self, entity_id: UUID) -> None:
        await self.pool.execute("DELETE FROM private WHERE entity_id = $1", entity_id)

    def close(self) -> None:
        for writer in [*self.writers, *(journal._writer for journal in self.journals)]:
            writer.terminate()


@pytest.fixture
async def postgres(database_url: str, pool: asyncpg.Pool) -> AsyncIterator[Postgres]:
    store = Postgres(database.Postgres(database_url), pool)
    await Directory(pool).lay_out(2)
    yield store
    store.close()


@pytest.fixture
async def simulated(seed: int) -> AsyncIterator[Postgres]:
    """The server on which simulated engines run; it must do what the real one does."""
    with World(seed) as world:
        server, guest = SimulatedPostgres(world), Guest(world, "test")
        # Simulated time passes as fast as it can: what is slow there would be an outage.
        server.slow_chance = 0
        living = asyncio.create_task(guest.live())
        way = server.database(guest)
        store = Postgres(way, await way.pool())
        await Directory(store.pool).lay_out(2)
        yield store
        living.cancel()
        store.close()
        guest.kill()


@pytest.fixture(params=["memory", "postgres", "simulated"])
def store(request: pytest.FixtureRequest) -> Store:
    """Each in turn; a server is started only where it is asked for."""
    found: Store = Memory() if request.param == "memory" else request.getfixturevalue(request.param)
    return found


@pytest.fixture
async def journal(store: Store) -> Journal:
    return await store.incarnation()


def event(seq: int, entity: UUID = A, command_id: bytes | None = None, private: Private | None = None) -> Row:
    body = b'{"n":%d,"zero":"\\u0000"}\x00\xff' % seq
    return Row(entity, seq, NOW + seq, "bid_placed", 1, body, hashlib.sha256(body).digest(), command_id, private)


def indexed(entity: UUID = A, status: str = "active", due_at: int | None = NOW, window_ms: int = 60_000) -> EntityRow:
    return EntityRow(entity, slot_of(entity), "auction", MAKER, status, due_at, window_ms, NOW)


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


async def test_who_bids_where_is_noted_with_the_first_bid(store: Store) -> None:
    journal = await store.incarnation()
    await journal.append([event(1), event(2)._replace(joined=ANNA)], [indexed()])
    # Also where nothing else needs the longer statement, several at once, and for who is noted already.
    await journal.append([event(3)._replace(joined=BEN), event(1, B)._replace(joined=ANNA)], [])
    await journal.append([event(4)._replace(joined=ANNA)], [])
    assert await store.bidders() == {(ANNA, A), (BEN, A), (ANNA, B)}
    assert [row.joined for row in (await journal.load(A, 1)).rows] == [None] * 4
    await store.take_over()
    with pytest.raises(Unsettled):
        await journal.append([event(5)._replace(joined=MAKER)], [])
    assert len(await store.bidders()) == 3


async def test_what_is_settled_notes_who_bids(store: Store) -> None:
    journal = await store.incarnation()
    await journal.settle([event(1)._replace(joined=ANNA)], [indexed()], None)
    assert await store.bidders() == {(ANNA, A)}


async def test_an_entity_says_since_when_it_is_over(store: Store) -> None:
    journal = await store.incarnation()
    await journal.append([event(1)], [indexed()])
    assert await store.ended_at(A) is None
    await journal.append([event(2)], [indexed(status="ended", due_at=None)._replace(ended_at=NOW)])
    assert await store.ended_at(A) == NOW


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
    for write in (
        old.append([event(2)], [indexed(status="ended", due_at=None)]),
        old.append([event(2, private=Private(b"salt", b"text"))], []),
        old.append([event(2)], [], await store.now()),
        old.check(),
        old.save_snapshots([snapshot_at(1)]),
    ):
        with pytest.raises(Unsettled):
            await write
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
    with pytest.raises(Unsettled):
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
                except Unsettled:
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


# Outages


async def test_a_write_says_when_it_was_done(store: Store) -> None:
    journal = await store.incarnation()
    for write in (journal.append([event(1)], []), journal.append([event(2)], [indexed()]), journal.check()):
        before = await store.now()
        life = await write
        assert before <= life.alive_at <= await store.now()
        assert life == await store.life()


async def test_a_gap_in_the_signs_of_life_closes_the_fence_and_settling_opens_it(store: Store) -> None:
    journal = await store.incarnation()
    await journal.append([event(1)], [indexed(due_at=NOW)])
    await store.pass_time(OUTAGE_MS + 1)
    for write in (
        journal.append([event(2)], []),
        journal.append([event(2, private=Private(b"salt", b"text"))], [indexed(status="ended", due_at=None)]),
        journal.check(),
        journal.save_snapshots([snapshot_at(1)]),
    ):
        with pytest.raises(Unsettled):
            await write
    assert await journal.load(A, 1) == (None, [event(1)], [])
    assert await store.private(A) == []
    await journal.settle([], [], None)
    await journal.check()
    await journal.save_snapshots([snapshot_at(1)])
    await journal.append([event(2)], [])
    assert await journal.load(A, 1) == (snapshot_at(1), [event(1), event(2)], [])


async def test_a_short_gap_closes_nothing(store: Store) -> None:
    journal = await store.incarnation()
    await journal.append([event(1)], [])
    for write in (journal.append([event(2)], []), journal.check(), journal.save_snapshots([snapshot_at(1)])):
        await store.pass_time(OUTAGE_MS // 2)
        await write
    assert (await store.life()).down_at is None


async def test_a_gap_in_one_shards_life_is_not_anothers(store: Store) -> None:
    journal, other = await store.incarnation(0), await store.incarnation(1)
    await store.pass_time(OUTAGE_MS + 1)
    await journal.settle([], [], None)
    with pytest.raises(Unsettled):
        await other.check()
    assert (await store.life(1)).down_at is None


async def test_who_never_lived_owes_nothing(store: Store) -> None:
    journal = await store.incarnation()
    assert (await journal.check()).down_at is None


async def test_time_is_owed_from_the_last_sign_of_life_until_it_is_paid(store: Store) -> None:
    journal = await store.incarnation()
    down = (await journal.append([event(1)], [indexed()])).alive_at
    down -= await store.pass_time(5_000)
    life = await journal.settle([], [], None)
    assert life == await store.life()
    assert life.down_at == down
    assert life.alive_at >= down + 5_000
    # Neither what is written now, nor another outage, nor another owner changes that.
    assert (await journal.append([event(2)], [])).down_at == down
    assert (await journal.check()).down_at == down
    down -= await store.pass_time(5_000)
    assert (await journal.settle([event(3)], [], None)).down_at == down
    down -= await store.pass_time(5_000)
    journal = await store.incarnation()
    assert (await journal.check()).down_at == down
    down -= await store.pass_time(5_000)
    assert (await journal.settle([], [], None)).down_at == down
    journal = await store.incarnation()
    assert (await journal.append([event(4)], [], await store.now())).down_at is None
    assert (await journal.check()).down_at is None
    # And the next outage is owed from its own beginning.
    down = (await store.life()).alive_at - await store.pass_time(5_000)
    assert (await journal.settle([], [], None)).down_at == down


async def test_an_outage_may_be_paid_without_a_row_and_behind_a_closed_fence(store: Store) -> None:
    journal = await store.incarnation()
    await store.pass_time(5_000)
    await journal.settle([], [], None)
    await store.pass_time(5_000)
    life = await journal.append([], [], await store.now())
    assert life.down_at is None
    assert life == await store.life()
    await journal.check()


async def test_an_outage_is_paid_with_its_rows_or_not_at_all(store: Store) -> None:
    journal = await store.incarnation()
    await journal.append([event(1)], [indexed(due_at=NOW)])
    await store.pass_time(5_000)
    down = (await journal.settle([], [], None)).down_at
    with pytest.raises(Refused):
        await journal.append([event(2), event(1)], [indexed(due_at=NOW + 500)], await store.now())
    assert (await store.life()).down_at == down is not None
    assert await journal.load(A, 1) == (None, [event(1)], [])
    paid = await journal.append([event(2)], [indexed(due_at=NOW + 500)], await store.now())
    assert paid.down_at is None
    assert await store.life() == paid
    assert await journal.load(A, 1) == (None, [event(1), event(2)], [])


async def test_an_outage_that_was_paid_late_goes_on_where_it_was_paid_to(store: Store) -> None:
    journal = await store.incarnation()
    await store.pass_time(5_000)
    await journal.settle([], [], None)
    paid_until = await store.now() - OUTAGE_MS - 1
    life = await journal.append([event(1)], [indexed()], paid_until)
    assert life.down_at == paid_until
    assert (await journal.check()).down_at == paid_until


async def test_who_was_overtaken_pays_nothing(store: Store) -> None:
    old = await store.incarnation()
    await old.check()
    await store.pass_time(5_000)
    new = await store.incarnation()
    down = (await store.life()).down_at
    with pytest.raises(Unsettled):
        await old.append([event(1)], [], await store.now())
    assert (await new.check()).down_at == down is not None
    assert await new.load(A, 1) == (None, [], [])


# Settling


async def test_settling_stores_what_is_missing(store: Store) -> None:
    mine = slot_entity(0)
    rows = [event(1, mine, b"one", Private(b"salt", b"text")), event(2, mine), event(1, B, b"b")]
    journal = await store.incarnation()
    await store.pass_time(OUTAGE_MS + 1)
    with pytest.raises(Unsettled):
        await journal.append(rows, [indexed(mine)])
    epoch = journal.epoch
    await journal.settle(rows, [indexed(mine)], None)
    assert journal.epoch == epoch + 1
    assert await journal.load(mine, 1) == (None, rows[:2], [(b"one", 1)])
    assert await journal.load(B, 1) == (None, rows[2:], [(b"b", 1)])
    assert await journal.deadlines() == [(mine, NOW)]
    await journal.append([event(3, mine)], [])


async def test_settling_stores_nothing_twice(store: Store) -> None:
    rows = [event(1, command_id=b"one", private=Private(b"salt", b"text")), event(2), event(1, B)]
    journal = await store.incarnation()
    await journal.append(rows, [indexed()])
    for epoch in (journal.epoch + 1, journal.epoch + 2):
        life = await journal.settle(rows, [indexed()], None)
        assert journal.epoch == epoch
        assert life == await store.life()
        assert await journal.load(A, 1) == (None, rows[:2], [(b"one", 1)])
    await journal.append([event(3)], [])


async def test_settling_of_what_paid_an_outage_pays_it_once(store: Store) -> None:
    journal = await store.incarnation()
    await store.pass_time(5_000)
    await journal.settle([], [], None)
    paid_until = await store.now()
    paid = await journal.append([event(1)], [indexed()], paid_until)
    # It was stored: what is owed since then is owed from then on.
    life = await journal.settle([event(1)], [indexed()], paid_until)
    assert life.down_at == paid.alive_at
    assert await journal.load(A, 1) == (None, [event(1)], [])


@pytest.mark.parametrize("rows", [[], [event(1)]])
async def test_settling_pays_an_outage_that_was_not_paid(store: Store, rows: list[Row]) -> None:
    journal = await store.incarnation()
    await store.pass_time(5_000)
    life = await journal.settle(rows, [], await store.now())
    assert life == await store.life()
    assert life.down_at is None
    assert await journal.load(A, 1) == (None, rows, [])


async def test_settling_may_be_called_again_and_again(store: Store) -> None:
    journal = await store.incarnation()
    for gap in (0, OUTAGE_MS + 1, 0):
        await store.pass_time(gap)
        await journal.settle([], [], None)
    await journal.settle([event(1)], [indexed()], None)
    await journal.check()
    assert await journal.load(A, 1) == (None, [event(1)], [])


async def test_what_is_still_on_its_way_under_the_old_epoch_stores_nothing_after_settling(store: Store) -> None:
    owner = await store.take_over()
    late, journal = await store.journal(0, owner), await store.journal(0, owner)
    await journal.settle([event(1)], [indexed()], None)
    for rows in ([event(1)], [event(2)]):
        with pytest.raises(Unsettled):
            await late.append(rows, [])
    assert await journal.load(A, 1) == (None, [event(1)], [])


async def test_who_does_not_own_the_shard_is_fenced_when_it_settles(store: Store) -> None:
    old = await store.incarnation()
    new = await store.incarnation()
    life = await store.life()
    with pytest.raises(Fenced):
        await old.settle([event(1)], [indexed()], None)
    assert await store.life() == life
    assert await new.load(A, 1) == (None, [], [])
    await new.check()


async def test_what_was_written_together_and_is_there_in_part_is_refused(store: Store) -> None:
    journal = await store.incarnation()
    await journal.append([event(1)], [indexed()])
    with pytest.raises(Refused, match=r"of 2 events .* holds 1"):
        await journal.settle([event(1), event(2)], [], None)
    assert await journal.load(A, 1) == (None, [event(1)], [])


async def test_what_is_there_in_the_place_of_what_was_written_is_refused(store: Store) -> None:
    journal = await store.incarnation()
    await journal.append([event(1)], [indexed()])
    with pytest.raises(Refused):
        await journal.settle([event(1)._replace(hash=bytes(32))], [], None)
    assert await journal.load(A, 1) == (None, [event(1)], [])


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


async def test_closing_is_what_is_within_its_window_or_past_its_end(journal: Journal) -> None:
    near, far, done = (slot_entity(0) for _ in range(3))
    await journal.append(
        [event(1, entity) for entity in (near, far, done)],
        [
            indexed(near, due_at=NOW + 1_000, window_ms=500),
            indexed(far, due_at=NOW + 1_000, window_ms=100),
            indexed(done, "ended", None, 500),
        ],
    )
    assert await journal.closing(NOW + 500) == []
    assert await journal.closing(NOW + 501) == [near]
    assert sorted(await journal.closing(NOW + 2_000)) == sorted([near, far])
    # The window is that of the newest row.
    await journal.append([event(2, near)], [indexed(near, due_at=NOW + 1_000, window_ms=400)])
    assert await journal.closing(NOW + 600) == []


async def test_closing_are_the_shards_own(store: Store) -> None:
    journals = [await store.incarnation(0), await store.incarnation(1)]
    entities = [slot_entity(0), slot_entity(1)]
    for entity, journal in zip(entities, journals, strict=True):
        await journal.append([event(1, entity)], [indexed(entity)])
    assert [await journal.closing(NOW) for journal in journals] == [[entity] for entity in entities]


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
        journal.append([event(3)], [], NOW),
        journal.check(),
        journal.save_snapshots([snapshot_at(2)]),
        journal.settle([], [], None),
    ):
        await postgres.pass_time(OUTAGE_MS // 2)
        before = await postgres.now()
        await write
        assert (await postgres.life()).alive_at >= before


async def test_postgres_of_those_who_saw_the_same_epoch_one_takes_over(postgres: Postgres) -> None:
    directory = Directory(postgres.pool)
    epoch = await postgres.pool.fetchval("SELECT epoch FROM shards WHERE shard_id = 0")
    tries = await asyncio.gather(*(directory._try(0, epoch, uuid4(), 0) for _ in range(3)))
    assert [taken.epoch for taken in tries if taken is not None] == [epoch + 1]


async def test_postgres_a_takeover_waits_for_an_append_that_is_under_way(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it could be stored after the new owner has read the journal."""
    monkeypatch.setattr(journal_module, "_CLAIM_PATIENCE_S", 20)
    old = await postgres.incarnation()
    async with postgres.pool.acquire() as other:
        in_the_way = other.transaction()
        await in_the_way.start()
        await other.execute("INSERT INTO journal VALUES ($1, 1, 0, '', 1, '', '')", A)
        appending = asyncio.create_task(old.append([event(1)], []))
        await wait_for_lock(postgres.pool, old._writer.get_server_pid())
        taking = asyncio.create_task(postgres.take_over())

        async def waits() -> bool:
            waiting: int = await other.fetchval("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
            return waiting == 2 or taking.done()

        await until_true(waits)
        assert not taking.done()
        await in_the_way.rollback()
    await appending
    new = await postgres.journal(0, await taking)
    assert await new.load(A, 1) == (None, [event(1)], [])


@asynccontextmanager
async def holding(pool: asyncpg.Pool) -> AsyncIterator[None]:
    """Another transaction holds the rows of all shards."""
    async with pool.acquire() as other, other.transaction():
        await other.execute("SELECT FROM shards FOR UPDATE")
        yield


async def test_postgres_a_write_that_is_not_answered_in_time_is_unsettled(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = await postgres.incarnation()
    with monkeypatch.context() as patched:
        patched.setattr(journal_module, "_WRITE_TIMEOUT_S", 0.05)
        async with holding(postgres.pool):
            for write in (
                journal.append([event(1)], []),
                journal.check(),
                journal.save_snapshots([snapshot_at(1)]),
            ):
                with pytest.raises(Unsettled, match="TimeoutError"):
                    await write
                await wait_until_idle(postgres.pool, journal._writer.get_server_pid())
    await journal.settle([event(1)], [indexed()], None)
    assert await journal.load(A, 1) == (None, [event(1)], [])


@asynccontextmanager
async def failing(pool: asyncpg.Pool, sqlstate: str) -> AsyncIterator[None]:
    """What is added to the journal meets an error."""
    await pool.execute(
        "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION 'it fails' USING ERRCODE = '{sqlstate}'; END $$"
    )
    await pool.execute("CREATE TRIGGER fail BEFORE INSERT ON journal EXECUTE FUNCTION fail()")
    try:
        yield
    finally:
        await pool.execute("DROP FUNCTION fail CASCADE")


@pytest.mark.parametrize(
    "sqlstate", ["08000", "08003", "08006", "40001", "40P01", "53100", "53200", "53300", "57014", "57P01", "57P03"]
)
async def test_postgres_an_error_that_passes_is_settled(postgres: Postgres, sqlstate: str) -> None:
    journal = await postgres.incarnation()
    async with failing(postgres.pool, sqlstate):
        with pytest.raises(Unsettled, match="it fails"):
            await journal.append([event(1)], [indexed()])
        with pytest.raises(Unsettled, match="it fails"):
            await journal.settle([event(1)], [indexed()], None)
    assert await journal.load(A, 1) == (None, [], [])
    await journal.settle([event(1)], [indexed()], None)
    assert await journal.load(A, 1) == (None, [event(1)], [])


@pytest.mark.parametrize("sqlstate", ["22000", "23505", "25006", "42501", "55P03", "58030", "XX000"])
async def test_postgres_an_error_that_stays_is_refused(postgres: Postgres, sqlstate: str) -> None:
    journal = await postgres.incarnation()
    async with failing(postgres.pool, sqlstate):
        with pytest.raises(Refused, match="it fails"):
            await journal.append([event(1)], [indexed()])
        with pytest.raises(Refused, match="it fails"):
            await journal.settle([event(1)], [indexed()], None)
    assert await journal.load(A, 1) == (None, [], [])


async def test_postgres_what_is_of_the_wrong_type_is_refused(postgres: Postgres) -> None:
    journal = await postgres.incarnation()
    for wrong in (event(1)._replace(body="text"), event(1)._replace(seq=1 << 63), event(1)._replace(kind="\0")):  # type: ignore[arg-type]
        with pytest.raises(Refused):
            await journal.append([wrong], [])
    await journal.append([event(1)], [])


@pytest.mark.parametrize("when", ["idle", "waiting"])
async def test_postgres_a_session_that_was_ended_is_settled_in_another(postgres: Postgres, when: str) -> None:
    journal = await postgres.incarnation()
    if when == "waiting":
        await postgres.cut_off_append(journal, [event(1)])
    else:
        await postgres.pool.execute("SELECT pg_terminate_backend($1)", journal._writer.get_server_pid())
    # At first the driver may not have noticed that the server said goodbye.
    for _ in range(2):
        with pytest.raises(Unsettled):
            await journal.append([event(1)], [])
    await journal.settle([event(1)], [indexed()], None)
    assert await postgres.pool.fetchval("SELECT backend_pid FROM shards WHERE shard_id = 0") == (
        journal._writer.get_server_pid()
    )
    await journal.append([event(2)], [])
    assert await journal.load(A, 1) == (None, [event(1), event(2)], [])


@pytest.mark.parametrize(
    ("setting", "error"), [("statement_timeout", Unsettled), ("lock_timeout", Refused), (None, Unsettled)]
)
async def test_postgres_a_statement_that_its_server_gives_up(
    postgres: Postgres, setting: str | None, error: type[Exception]
) -> None:
    journal = await postgres.incarnation()
    if setting is not None:
        await journal._writer.execute(f"SET {setting} = '20ms'")
    async with holding(postgres.pool):
        appending = asyncio.create_task(journal.append([event(1)], []))
        if setting is None:
            backend_pid = journal._writer.get_server_pid()
            await wait_for_lock(postgres.pool, backend_pid)
            await postgres.pool.execute("SELECT pg_cancel_backend($1)", backend_pid)
        with pytest.raises(error):
            await appending
    assert await journal.load(A, 1) == (None, [], [])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionRefusedError(), Unsettled),
        (TimeoutError(), Unsettled),
        (asyncpg.TooManyConnectionsError("sorry, too many clients already"), Unsettled),
        (asyncpg.CannotConnectNowError("the database system is starting up"), Unsettled),
        (asyncpg.InterfaceError("connection is closed"), Unsettled),
        (asyncpg.InvalidPasswordError("password authentication failed"), Refused),
    ],
)
async def test_postgres_that_cannot_be_connected_to(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: type[Exception]
) -> None:
    journal = await postgres.incarnation()

    async def fail(name: str) -> asyncpg.Connection:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(postgres.database, "connect", fail)
        for _ in range(2):
            with pytest.raises(expected):
                await journal.settle([event(1)], [indexed()], None)
    await journal.settle([event(1)], [indexed()], None)
    assert await journal.load(A, 1) == (None, [event(1)], [])


async def test_postgres_settling_waits_for_an_append_that_is_still_on_its_way(postgres: Postgres) -> None:
    """The server does not notice that the client is gone: it stores what it was sent, and settling finds it."""
    journal = await postgres.incarnation()
    async with holding(postgres.pool):
        appending = asyncio.create_task(journal.append([event(1)], [indexed()]))
        await wait_for_lock(postgres.pool, journal._writer.get_server_pid())
        settling = asyncio.create_task(journal.settle([event(1)], [indexed()], None))
        with pytest.raises(Unsettled):
            await appending
        await until(lambda: journal._writer not in postgres.writers)
        await wait_for_lock(postgres.pool, journal._writer.get_server_pid())
    await settling
    assert await journal.load(A, 1) == (None, [event(1)], [])
    await journal.append([event(2)], [])


async def test_postgres_an_append_that_waited_behind_the_settling_stores_nothing(postgres: Postgres) -> None:
    owner = await postgres.take_over()
    late, journal = await postgres.journal(0, owner), await postgres.journal(0, owner)
    async with holding(postgres.pool):
        settling = asyncio.create_task(journal.settle([event(1)], [indexed()], None))
        await until(lambda: journal._writer not in postgres.writers)
        await wait_for_lock(postgres.pool, journal._writer.get_server_pid())
        appending = asyncio.create_task(late.append([event(1), event(2)], [indexed(status="ended", due_at=None)]))
        await wait_for_lock(postgres.pool, late._writer.get_server_pid())
    await settling
    with pytest.raises(Unsettled):
        await appending
    assert await journal.load(A, 1) == (None, [event(1)], [])


@asynccontextmanager
async def stuck(postgres: Postgres, shard: int, name: str) -> AsyncIterator[asyncpg.Connection]:
    """A session that goes by this name holds the shard's row, and its number stands there."""
    connection = await postgres.database.connect(name)
    try:
        await postgres.pool.execute(
            "UPDATE shards SET backend_pid = $2 WHERE shard_id = $1", shard, connection.get_server_pid()
        )
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute("SELECT FROM shards WHERE shard_id = $1 FOR UPDATE", shard)
        yield connection
    finally:
        connection.terminate()


async def is_there(pool: asyncpg.Pool, backend_pid: int) -> bool:
    return bool(await pool.fetchval("SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1)", backend_pid))


async def test_postgres_settling_ends_the_session_that_holds_the_shards_row(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "_CLAIM_PATIENCE_S", 0.1)
    journal = await postgres.incarnation(0)
    async with stuck(postgres, 1, session_name(1)) as other, stuck(postgres, 0, session_name(0)) as holder:
        # The claim waits meanwhile: it need not be repeated.
        await journal.settle([event(1)], [indexed()], None)
        holder_pid = holder.get_server_pid()

        async def is_gone() -> bool:
            return not await is_there(postgres.pool, holder_pid)

        await until_true(is_gone)
        # Another shard's stays.
        assert await is_there(postgres.pool, other.get_server_pid())
    assert await journal.load(A, 1) == (None, [event(1)], [])


async def test_postgres_settling_ends_no_other_session_that_has_the_number_by_now(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = await postgres.incarnation(0)
    with monkeypatch.context() as patched:
        patched.setattr(journal_module, "_CLAIM_PATIENCE_S", 0.05)
        patched.setattr(journal_module, "_WRITE_TIMEOUT_S", 0.2)
        for name in ("gavel", session_name(1)):
            async with stuck(postgres, 0, name) as holder:
                with pytest.raises(Unsettled):
                    await journal.settle([], [], None)
                assert await holder.fetchval("SELECT 1") == 1
    await journal.settle([], [], None)


async def test_postgres_settling_ends_no_session_in_another_database(postgres: Postgres, database_url: str) -> None:
    """A server may serve several houses, whose shards go by the same names."""
    await postgres.incarnation(0)
    elsewhere = await asyncpg.connect(
        database_url, database="template1", server_settings={"application_name": session_name(0)}
    )
    try:
        await postgres.pool.execute("UPDATE shards SET backend_pid = $1 WHERE shard_id = 0", elsewhere.get_server_pid())
        await end_session(postgres.pool, 0, 0)
        assert await elsewhere.fetchval("SELECT 1") == 1
    finally:
        elsewhere.terminate()


async def test_postgres_a_large_write_is_given_more_time(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes back with very much to pay would never be through with it otherwise."""
    journal = await postgres.incarnation()
    backend_pid = journal._writer.get_server_pid()
    with monkeypatch.context() as patched:
        patched.setattr(journal_module, "_WRITE_TIMEOUT_S", 0.05)
        patched.setattr(journal_module, "WRITE_ROWS_PER_MS", 0.000_1)
        async with holding(postgres.pool):
            with pytest.raises(Unsettled, match="TimeoutError"):
                await journal.check()
            await wait_until_idle(postgres.pool, backend_pid)
            appending = asyncio.create_task(journal.append([event(1), event(2)], []))
            await wait_for_lock(postgres.pool, backend_pid)
            # Longer than one of no rows is waited for.
            await asyncio.wait([appending], timeout=0.1)
        await appending
    assert await journal.load(A, 1) == (None, [event(1), event(2)], [])


async def test_postgres_that_cannot_be_read_now_is_unreadable(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = await postgres.incarnation()
    monkeypatch.setattr(journal_module, "_READ_TIMEOUT_S", 0.02)
    async with AsyncExitStack() as taken:
        for _ in range(postgres.pool.get_max_size()):
            await taken.enter_async_context(postgres.pool.acquire())
        for read in (journal.load(A, 1), journal.read(A, 1), journal.deadlines(), journal.closing(NOW)):
            with pytest.raises(Unreadable, match="TimeoutError"):
                await read
    assert await journal.load(A, 1) == (None, [], [])


@pytest.mark.parametrize("sqlstate", ["53200", "57014", "57P01"])
async def test_postgres_a_read_that_meets_an_error_that_passes_is_unreadable(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch, sqlstate: str
) -> None:
    journal = await postgres.incarnation()
    failing = f"DO $$ BEGIN RAISE EXCEPTION 'it fails' USING ERRCODE = '{sqlstate}'; END $$"

    async def fail(self: object, statement: str, *arguments: object) -> None:
        await postgres.pool.execute(failing)

    with monkeypatch.context() as patched:
        for name in ("fetch", "fetchrow"):
            patched.setattr(asyncpg.Connection, name, fail)
        for read in (journal.load(A, 1), journal.read(A, 1), journal.deadlines(), journal.closing(NOW)):
            with pytest.raises(Unreadable, match="it fails"):
                await read
    assert await journal.load(A, 1) == (None, [], [])


async def test_postgres_that_is_broken_is_not_unreadable(postgres: Postgres) -> None:
    journal = await postgres.incarnation()
    await postgres.pool.execute("ALTER TABLE journal RENAME TO hidden")
    await postgres.pool.execute("ALTER TABLE entities RENAME TO hidden_too")
    try:
        for read in (journal.load(A, 1), journal.read(A, 1), journal.deadlines(), journal.closing(NOW)):
            # That does not pass: it is a fault, and not to be waited for.
            with pytest.raises(asyncpg.UndefinedTableError):
                await read
    finally:
        await postgres.pool.execute("ALTER TABLE hidden RENAME TO journal")
        await postgres.pool.execute("ALTER TABLE hidden_too RENAME TO entities")


async def test_postgres_knows_who_bid_before_that_was_noted(postgres: Postgres) -> None:
    """The step of the schema that brings the table fills it from the journal."""
    journal = await postgres.incarnation()
    bids = [event(seq, command_id=user.bytes + uuid4().bytes) for seq, user in ((2, ANNA), (3, BEN), (4, ANNA))]
    opened = event(1, command_id=b"open" + MAKER.bytes + uuid4().bytes)
    await journal.append([opened, *bids, event(5)], [indexed(status="ended", due_at=None), indexed(B)])
    step = importlib.import_module("migrations.versions.0003_bidders")
    for statement in step._CHANGES.split(";\n"):
        if statement.strip().startswith(("INSERT", "UPDATE")):
            await postgres.pool.execute(statement)
    assert await postgres.bidders() == {(ANNA, A), (BEN, A)}
    assert (await postgres.ended_at(A), await postgres.ended_at(B)) == (NOW + 5, None)


async def columns_of(pool: asyncpg.Pool, table: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    """A table's columns in their order, and what stands in them unless something is given."""
    rows = await pool.fetch(
        "SELECT column_name, column_default FROM information_schema.columns "
        "WHERE table_schema = 'public' AND table_name = $1 ORDER BY ordinal_position",
        table,
    )
    values = {"0": 0, "'-infinity'::timestamp with time zone": float("-inf")}
    return tuple(row[0] for row in rows), {row[0]: values[row[1]] for row in rows if row[1] is not None}


async def test_postgres_has_the_tables_that_the_simulated_server_has(pool: asyncpg.Pool) -> None:
    """Whoever changes the schema changes both."""
    tables = [
        table
        for (table,) in await pool.fetch(
            "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'"
        )
        # What only doors read (Alembic's own aside) is not simulated: simulated clients have no door.
        if table not in ("alembic_version", "suspensions")
    ]
    constraints = await pool.fetch(
        "SELECT conrelid::regclass::text, contype::text, conkey, confrelid::regclass::text, pg_get_constraintdef(oid) "
        "FROM pg_constraint WHERE connamespace = 'public'::regnamespace"
    )
    found = {}
    for table in tables:
        columns, defaults = await columns_of(pool, table)
        key, at_least, references = 0, {}, ("", 0)
        for _, kind, numbers, other, text in (row for row in constraints if row[0] == table):
            if kind == "p":
                assert numbers == list(range(1, len(numbers) + 1))
                key = len(numbers)
            elif kind == "f":
                references = (other, numbers[0] - 1)
            elif kind == "c" and (bound := re.search(r"(\w+) (>=?) (\d+)", text)):
                at_least[bound[1]] = int(bound[3]) + (bound[2] == ">")
        found[table] = Schema(columns, key, defaults, at_least, references)
    assert found == SCHEMAS
