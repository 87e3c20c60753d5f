"""Who owns what: the tables `slots` and `shards` in a real Postgres."""

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest

from actors import directory as directory_module
from actors.directory import Directory, Owner
from engine.limits import SLOTS


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
    monkeypatch.setattr(directory_module, "_CLAIM_INTERVAL_S", 0.001)


@pytest.fixture
async def listener() -> AsyncIterator[str]:
    server = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()
    await server.wait_closed()


async def test_slots_are_dealt_in_turn(directory: Directory) -> None:
    await directory.lay_out(3)
    slots = await directory.slots()
    assert len(slots) == SLOTS
    assert slots[:7] == [0, 1, 2, 0, 1, 2, 0]
    assert sorted(await directory.owners()) == [Owner(shard, 1, None) for shard in range(3)]


async def test_the_same_deal_again_fences_nobody(directory: Directory) -> None:
    await directory.lay_out(2)
    epoch = await directory.take_over(0, 1, never)
    assert await directory.announce(0, epoch, "127.0.0.1:1")
    await directory.lay_out(2)
    assert sorted(await directory.owners()) == [Owner(0, epoch, "127.0.0.1:1"), Owner(1, 1, None)]


@pytest.mark.parametrize("shards", [1, 3])
async def test_another_deal_raises_every_epoch(directory: Directory, shards: int) -> None:
    await directory.lay_out(2)
    epochs = [await directory.take_over(shard, 1, never) for shard in range(2)]
    assert await directory.announce(0, epochs[0], "127.0.0.1:1")
    await directory.lay_out(shards)
    assert set(await directory.slots()) == set(range(shards))
    owners = sorted(await directory.owners())
    assert [owner.shard for owner in owners] == list(range(shards))
    assert all(owner.address is None for owner in owners)
    # Also a shard that serves nothing any more is fenced.
    for shard, epoch in enumerate(epochs):
        assert not await directory.announce(shard, epoch, "127.0.0.1:1")


async def test_a_shard_that_nobody_ever_owned_is_taken_at_once(directory: Directory, pool: asyncpg.Pool) -> None:
    await directory.lay_out(1)
    assert await directory.take_over(0, 4_711, never) == 2
    row = await pool.fetchrow("SELECT epoch, address, backend_pid, alive_at > '-infinity' FROM shards")
    assert row is not None
    assert tuple(row) == (2, None, 4_711, True)


async def test_a_shard_that_was_never_dealt_cannot_be_taken(directory: Directory) -> None:
    await directory.lay_out(1)
    with pytest.raises(LookupError):
        await directory.take_over(1, 1, never)


async def test_an_owner_whose_address_refuses_is_gone_at_once(directory: Directory) -> None:
    await directory.lay_out(1)
    epoch = await directory.take_over(0, 1, never)
    assert await directory.announce(0, epoch, "127.0.0.1:9")
    probe = Probe(refuses=True)
    assert await directory.take_over(0, 2, probe) == epoch + 1
    assert probe.asked == ["127.0.0.1:9"]
    assert (await directory.owners()) == [Owner(0, epoch + 1, None)]


async def test_a_living_owner_is_waited_for_until_it_is_silent(directory: Directory, pool: asyncpg.Pool) -> None:
    await directory.lay_out(1)
    epoch = await directory.take_over(0, 1, never)
    assert await directory.announce(0, epoch, "127.0.0.1:9")
    probe = Probe(refuses=False)
    claiming = asyncio.create_task(directory.take_over(0, 2, probe))
    for _ in range(3):
        probe.was_asked.clear()
        await probe.was_asked.wait()
    assert not claiming.done()
    assert (await directory.owners())[0].epoch == epoch
    await pool.execute("UPDATE shards SET alive_at = clock_timestamp() - interval '2.1 s'")
    assert await claiming == epoch + 1


async def test_an_owner_that_takes_no_links_yet_is_not_knocked_at(directory: Directory, pool: asyncpg.Pool) -> None:
    await directory.lay_out(1)
    await directory.take_over(0, 1, never)
    claiming = asyncio.create_task(directory.take_over(0, 2, never))
    await directory.owners()
    assert not claiming.done()
    await pool.execute("UPDATE shards SET alive_at = '-infinity'")
    assert await claiming == 3


async def test_of_two_claimants_one_wins(directory: Directory, pool: asyncpg.Pool) -> None:
    await directory.lay_out(1)
    claims = [asyncio.create_task(directory.take_over(0, number, never)) for number in range(4)]
    done, waiting = await asyncio.wait(claims, return_when=asyncio.FIRST_COMPLETED)
    winner = done.pop()
    assert not done
    assert await winner == 2
    assert await pool.fetchval("SELECT epoch FROM shards") == 2
    # The others stand by, and the next of them takes over when the winner goes.
    await directory.retire(0, 2)
    done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    assert [await claim for claim in done] == [3]
    for claim in waiting:
        claim.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_a_stale_incarnation_cannot_announce_itself_nor_retire_the_shard(directory: Directory) -> None:
    await directory.lay_out(1)
    stale = await directory.take_over(0, 1, never)
    await directory.retire(0, stale)
    epoch = await directory.take_over(0, 2, never)
    assert not await directory.announce(0, stale, "127.0.0.1:1")
    assert await directory.announce(0, epoch, "127.0.0.1:2")
    await directory.retire(0, stale)
    assert await directory.owners() == [Owner(0, epoch, "127.0.0.1:2")]


async def test_who_retires_need_not_be_waited_for(directory: Directory) -> None:
    await directory.lay_out(1)
    epoch = await directory.take_over(0, 1, never)
    assert await directory.announce(0, epoch, "127.0.0.1:1")
    await directory.retire(0, epoch)
    assert await directory.owners() == [Owner(0, epoch, None)]
    assert await directory.take_over(0, 2, never) == epoch + 1


async def test_knocking(listener: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not await directory_module._refuses(listener)
    # A port that nobody listens at: taken, and given back.
    closed = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0)
    port = closed.sockets[0].getsockname()[1]
    closed.close()
    await closed.wait_closed()
    assert await directory_module._refuses(f"127.0.0.1:{port}")

    async def unreachable(*arguments: object) -> None:
        raise OSError(113, "No route to host")

    # What cannot be reached may still live.
    monkeypatch.setattr(asyncio, "open_connection", unreachable)
    assert not await directory_module._refuses(listener)
