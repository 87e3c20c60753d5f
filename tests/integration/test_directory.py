"""Who owns what: the tables `slots` and `shards` in a real Postgres."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

import asyncpg
import pytest

from actors import directory as directory_module
from actors import journal as journal_module
from actors.database import Postgres
from actors.directory import Directory, Owner, Taken
from actors.journal import end_session, session_name
from actors.network import WebSockets
from engine.limits import SLOTS
from tests.support.waiting import until

FIRST, SECOND = UUID(int=1), UUID(int=2)
PID = 4_711


@pytest.fixture
def directory(pool: asyncpg.Pool) -> Directory:
    return Directory(pool)


class Probe:
    """Stands in for knocking at an owner's address; counts, and tells when it is asked."""

    def __init__(self, refuses: bool) -> None:
        self.refuses = refuses
        self.asked: list[str] = []
        self.was_asked = asyncio.Event()

    async def __call__(self, address: str) -> bool:
        self.asked.append(address)
        self.was_asked.set()
        return self.refuses


async def never(address: str) -> bool:
    raise AssertionError(f"nobody had to knock at {address}")


@pytest.fixture(autouse=True)
def _claim_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_module, "CLAIM_RETRY_MS", 1)


@pytest.fixture
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is silent for long enough, so that whoever waits for silence waits for ever."""
    monkeypatch.setattr(directory_module, "OWNER_SILENT_MS", 1_000_000)


@pytest.fixture
async def listener() -> AsyncIterator[str]:
    server = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()
    await server.wait_closed()


async def alive_at(pool: asyncpg.Pool, shard: int = 0) -> int:
    found: int = await pool.fetchval(
        "SELECT (extract(epoch FROM alive_at) * 1000)::bigint FROM shards WHERE shard_id = $1", shard
    )
    return found


async def be_silent(pool: asyncpg.Pool, shard: int = 0) -> int:
    """Let a shard's last sign of life be long ago; when that was."""
    await pool.execute("UPDATE shards SET alive_at = alive_at - interval '2.1 s' WHERE shard_id = $1", shard)
    return await alive_at(pool, shard)


async def test_slots_are_dealt_in_turn(directory: Directory) -> None:
    await directory.lay_out(3)
    slots = await directory.slots()
    assert len(slots) == SLOTS
    assert slots[:7] == [0, 1, 2, 0, 1, 2, 0]
    assert sorted(await directory.owners()) == [Owner(shard, 1, None) for shard in range(3)]


async def test_the_same_deal_again_fences_nobody(directory: Directory) -> None:
    await directory.lay_out(2)
    taken = await directory.take_over(0, FIRST, PID, never)
    assert await directory.announce(0, FIRST, "127.0.0.1:1")
    await directory.lay_out(2)
    assert sorted(await directory.owners()) == [Owner(0, taken.epoch, "127.0.0.1:1"), Owner(1, 1, None)]


@pytest.mark.parametrize("shards", [1, 3])
async def test_another_deal_raises_every_epoch(directory: Directory, shards: int) -> None:
    await directory.lay_out(2)
    for shard, owner in enumerate((FIRST, SECOND)):
        await directory.take_over(shard, owner, PID, never)
    assert await directory.announce(0, FIRST, "127.0.0.1:1")
    await directory.lay_out(shards)
    assert set(await directory.slots()) == set(range(shards))
    owners = sorted(await directory.owners())
    assert [owner.shard for owner in owners] == list(range(shards))
    assert all(owner.address is None for owner in owners)
    # Also a shard that serves nothing any more is fenced.
    for shard, owner in enumerate((FIRST, SECOND)):
        assert not await directory.announce(shard, owner, "127.0.0.1:1")


@pytest.mark.parametrize("shards", [1, 3])
async def test_after_another_deal_all_owe_as_much_as_the_one_that_owes_most(
    directory: Directory, pool: asyncpg.Pool, shards: int
) -> None:
    """An auction may find itself on any shard, also on one that is new."""
    await directory.lay_out(2)
    for shard, owner in enumerate((FIRST, SECOND)):
        await directory.take_over(shard, owner, PID, never)
    await be_silent(pool, 0)
    await be_silent(pool, 1)
    oldest = await be_silent(pool, 1)
    await directory.lay_out(shards)
    for shard in range(shards):
        assert (await directory.take_over(shard, FIRST, PID, never)).down_at == oldest


async def test_a_shard_that_serves_nothing_any_more_puts_no_debt_on_another_deal(
    directory: Directory, pool: asyncpg.Pool
) -> None:
    await directory.lay_out(2)
    for shard, owner in enumerate((FIRST, SECOND)):
        await directory.take_over(shard, owner, PID, never)
    await be_silent(pool, 1)
    await directory.take_over(1, FIRST, PID, never)
    await directory.lay_out(1)
    await directory.take_over(0, FIRST, PID, never)
    # The one that serves all has paid.
    await pool.execute("UPDATE shards SET down_at = NULL WHERE shard_id = 0")
    down = await alive_at(pool, 0)
    await directory.lay_out(3)
    for shard in range(3):
        assert (await directory.take_over(shard, FIRST, PID, never)).down_at == down


async def test_a_deal_of_shards_that_never_lived_owes_nothing(directory: Directory) -> None:
    await directory.lay_out(1)
    await directory.lay_out(2)
    for shard in range(2):
        assert (await directory.take_over(shard, FIRST, PID, never)).down_at is None


async def test_another_deal_forgets_no_outage_that_is_not_paid(directory: Directory, pool: asyncpg.Pool) -> None:
    await directory.lay_out(2)
    for shard, owner in enumerate((FIRST, SECOND)):
        await directory.take_over(shard, owner, PID, never)
    down = await be_silent(pool, 0)
    assert (await directory.take_over(0, SECOND, PID, never)).down_at == down
    await directory.lay_out(3)
    for shard in range(3):
        assert (await directory.take_over(shard, FIRST, PID, never)).down_at == down


@pytest.mark.usefixtures("_patient")
async def test_a_shard_that_nobody_ever_owned_is_taken_at_once(directory: Directory, pool: asyncpg.Pool) -> None:
    await directory.lay_out(1)
    assert await directory.take_over(0, FIRST, PID, never) == Taken(2, None)
    row = await pool.fetchrow("SELECT epoch, owner, address, backend_pid, alive_at > '-infinity' FROM shards")
    assert row is not None
    assert tuple(row) == (2, FIRST, None, PID, True)


async def test_a_shard_that_was_never_dealt_cannot_be_taken(directory: Directory) -> None:
    await directory.lay_out(1)
    with pytest.raises(LookupError):
        await directory.take_over(1, FIRST, PID, never)


@pytest.mark.usefixtures("_patient")
async def test_an_owner_whose_address_refuses_is_gone_at_once(directory: Directory, pool: asyncpg.Pool) -> None:
    await directory.lay_out(1)
    epoch, _ = await directory.take_over(0, FIRST, PID, never)
    assert await directory.announce(0, FIRST, "127.0.0.1:9")
    down = await alive_at(pool)
    probe = Probe(refuses=True)
    # What the dead one could not pay for is owed, however short it was.
    assert await directory.take_over(0, SECOND, PID, probe) == Taken(epoch + 1, down)
    assert probe.asked == ["127.0.0.1:9"]
    assert (await directory.owners()) == [Owner(0, epoch + 1, None)]


async def test_a_living_owner_is_waited_for_until_it_is_silent(directory: Directory, pool: asyncpg.Pool) -> None:
    await directory.lay_out(1)
    epoch, _ = await directory.take_over(0, FIRST, PID, never)
    assert await directory.announce(0, FIRST, "127.0.0.1:9")
    probe = Probe(refuses=False)
    claiming = asyncio.create_task(directory.take_over(0, SECOND, PID, probe))
    for _ in range(3):
        probe.was_asked.clear()
        await probe.was_asked.wait()
    assert not claiming.done()
    assert (await directory.owners())[0].epoch == epoch
    down = await be_silent(pool)
    assert await claiming == Taken(epoch + 1, down)


async def test_an_owner_that_takes_no_links_yet_is_not_knocked_at(directory: Directory, pool: asyncpg.Pool) -> None:
    await directory.lay_out(1)
    await directory.take_over(0, FIRST, PID, never)
    claiming = asyncio.create_task(directory.take_over(0, SECOND, PID, never))
    await directory.owners()
    assert not claiming.done()
    await be_silent(pool)
    assert (await claiming).epoch == 3


async def test_an_outage_is_owed_from_its_beginning_however_often_the_shard_is_taken_over(
    directory: Directory, pool: asyncpg.Pool
) -> None:
    await directory.lay_out(1)
    await directory.take_over(0, FIRST, PID, never)
    down = await be_silent(pool)
    for owner in (SECOND, FIRST, SECOND):
        assert (await directory.take_over(0, owner, PID, never)).down_at == down
        await be_silent(pool)


@pytest.mark.usefixtures("_patient")
async def test_who_does_not_know_that_it_has_taken_over_does_so_again(directory: Directory) -> None:
    """The answer was lost; nobody else will come, and it need not wait for itself to be silent."""
    await directory.lay_out(1)
    first = await directory.take_over(0, FIRST, PID, never)
    assert (await directory.take_over(0, FIRST, PID, never)).epoch == first.epoch + 1


async def test_of_two_claimants_one_wins(directory: Directory, pool: asyncpg.Pool) -> None:
    await directory.lay_out(1)
    owners = [UUID(int=number) for number in range(4)]
    claims = {asyncio.create_task(directory.take_over(0, owner, PID, never)): owner for owner in owners}
    done, waiting = await asyncio.wait(claims, return_when=asyncio.FIRST_COMPLETED)
    winner = done.pop()
    assert not done
    assert (await winner).epoch == 2
    assert await pool.fetchval("SELECT owner FROM shards WHERE epoch = 2") == claims[winner]
    # The others stand by, and the next of them takes over when the winner goes.
    await directory.retire(0, claims[winner])
    done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    assert [(await claim).epoch for claim in done] == [3]
    for claim in waiting:
        claim.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_a_stale_owner_cannot_announce_itself_nor_retire_the_shard(directory: Directory) -> None:
    await directory.lay_out(1)
    await directory.take_over(0, FIRST, PID, never)
    await directory.retire(0, FIRST)
    epoch, _ = await directory.take_over(0, SECOND, PID, never)
    assert not await directory.announce(0, FIRST, "127.0.0.1:1")
    assert await directory.announce(0, SECOND, "127.0.0.1:2")
    await directory.retire(0, FIRST)
    assert await directory.owners() == [Owner(0, epoch, "127.0.0.1:2")]


async def test_who_has_settled_a_write_meanwhile_may_still_announce_itself_and_retire(
    directory: Directory, pool: asyncpg.Pool
) -> None:
    await directory.lay_out(1)
    epoch, _ = await directory.take_over(0, FIRST, PID, never)
    await pool.execute("UPDATE shards SET epoch = epoch + 1")
    assert await directory.announce(0, FIRST, "127.0.0.1:1")
    assert await directory.owners() == [Owner(0, epoch + 1, "127.0.0.1:1")]
    await directory.retire(0, FIRST)
    assert (await directory.take_over(0, SECOND, PID, never)).epoch == epoch + 2


@pytest.mark.usefixtures("_patient")
async def test_who_retires_need_not_be_waited_for(directory: Directory, pool: asyncpg.Pool) -> None:
    await directory.lay_out(1)
    epoch, _ = await directory.take_over(0, FIRST, PID, never)
    assert await directory.announce(0, FIRST, "127.0.0.1:1")
    await directory.retire(0, FIRST)
    assert await directory.owners() == [Owner(0, epoch, None)]
    down = await alive_at(pool)
    # Nor is it forgotten since when nobody is there.
    assert await directory.take_over(0, SECOND, PID, never) == Taken(epoch + 1, down)


@asynccontextmanager
async def holding(database_url: str, pool: asyncpg.Pool, name: str) -> AsyncIterator[asyncpg.Connection]:
    """A session that goes by this name holds the row of shard 0, whose owner is silent and wrote under its number."""
    connection = await Postgres(database_url).connect(name)
    try:
        await pool.execute(
            "UPDATE shards SET backend_pid = $1, alive_at = alive_at - interval '2.1 s' WHERE shard_id = 0",
            connection.get_server_pid(),
        )
        await connection.transaction().start()
        await connection.execute("SELECT FROM shards WHERE shard_id = 0 FOR UPDATE")
        yield connection
    finally:
        connection.terminate()


async def test_a_takeover_ends_the_session_that_holds_the_shards_row(
    directory: Directory, database_url: str, pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "_CLAIM_PATIENCE_S", 0.1)
    await directory.lay_out(2)
    await directory.take_over(0, FIRST, PID, never)
    other = await Postgres(database_url).connect(session_name(1))
    async with holding(database_url, pool, session_name(0)) as holder:
        assert (await directory.take_over(0, SECOND, PID, never)).epoch == 3
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)):
            await holder.execute("SELECT")
    # Another shard's session stays.
    assert await other.fetchval("SELECT 1") == 1
    await other.close()


async def test_a_takeover_ends_no_other_session_that_has_the_number_by_now(
    directory: Directory, database_url: str, pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory_module, "_TIMEOUT_S", 0.2)
    monkeypatch.setattr(journal_module, "_CLAIM_PATIENCE_S", 0.05)
    await directory.lay_out(1)
    await directory.take_over(0, FIRST, PID, never)
    tries = 0

    async def count(pool: asyncpg.Pool, shard: int, own_pid: int) -> None:
        nonlocal tries
        await end_session(pool, shard, own_pid)
        tries += 1

    monkeypatch.setattr(journal_module, "end_session", count)

    async with holding(database_url, pool, "gavel") as holder:
        claiming = asyncio.create_task(directory.take_over(0, SECOND, PID, never))
        await until(lambda: tries >= 2)
        assert await holder.fetchval("SELECT 1") == 1
        assert not claiming.done()
    assert (await claiming).epoch == 3


async def test_nobody_ends_the_session_in_which_it_will_write(
    directory: Directory, database_url: str, pool: asyncpg.Pool
) -> None:
    await directory.lay_out(1)
    own = await Postgres(database_url).connect(session_name(0))
    await pool.execute("UPDATE shards SET backend_pid = $1", own.get_server_pid())
    await end_session(pool, 0, own.get_server_pid())
    assert await own.fetchval("SELECT 1") == 1
    await own.close()


async def test_knocking(listener: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = WebSockets()
    assert not await network.refuses(listener)
    # A port that nobody listens at: taken, and given back.
    closed = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0)
    port = closed.sockets[0].getsockname()[1]
    closed.close()
    await closed.wait_closed()
    assert await network.refuses(f"127.0.0.1:{port}")

    async def unreachable(*arguments: object) -> None:
        raise OSError(113, "No route to host")

    # What cannot be reached may still live.
    monkeypatch.setattr(asyncio, "open_connection", unreachable)
    assert not await network.refuses(listener)
