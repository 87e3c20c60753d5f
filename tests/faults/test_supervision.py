"""What an engine stands on dies under load: `gavel up` starts it again, and nothing acknowledged is lost."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from tests.e2e.engine import Engine, running, wait_until
from tests.e2e.live import open_auction
from tests.faults.test_kill_shard import Lane, judge

LANES = 2
BIDS = 20
"""In each lane before the fault, and after it."""

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with running() as engine:
        yield engine


@asynccontextmanager
async def bidding(engine: Engine) -> AsyncIterator[list[Lane]]:
    lanes = [Lane(engine, await open_auction(engine)) for _ in range(LANES)]
    try:
        await asyncio.gather(*(lane.advanced(BIDS) for lane in lanes))
        yield lanes
    finally:
        for lane in lanes:
            await lane.close()


async def test_postgres_dies(engine: Engine) -> None:
    shards, gateway = _shards(engine), engine.pid_of("gateway-0")
    async with bidding(engine) as lanes:
        os.kill(_postmaster(engine), signal.SIGKILL)
        await _said(engine, "Postgres runs again")
        await asyncio.gather(*(lane.advanced(BIDS) for lane in lanes))
        await judge(engine, lanes)
    assert _shards(engine) == shards, "shards live through it"
    assert engine.pid_of("gateway-0") == gateway
    assert engine.errors_path.read_text().count("Postgres has died") == 1


@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
async def test_the_head_of_ray_dies(engine: Engine, name: str) -> None:
    old = {process.pid for process in engine.processes() if process.name().startswith(("ray", "gcs"))}
    said = engine.errors_path.read_text().count("bids can be placed again")
    async with bidding(engine) as lanes:
        _kill(engine, name)
        await _said(engine, "bids can be placed again", said + 1)
        assert not old & {process.pid for process in engine.processes()}
        await asyncio.gather(*(lane.advanced(BIDS) for lane in lanes))
        await judge(engine, lanes)
    assert f"Ray's {name} has died" in engine.errors_path.read_text()
    assert engine.output_path.read_text() == f"ready {engine.url}\n"


async def test_a_signal_while_ray_starts_again(engine: Engine) -> None:
    _kill(engine, "raylet")
    await _said(engine, "Ray's raylet has died", 2)
    await asyncio.to_thread(engine.stop, signal.SIGINT, is_to_the_group=True)
    assert engine.errors_path.read_text().endswith("stopping\n")


async def test_a_signal_while_actors_start(engine: Engine) -> None:
    before = engine.errors_path
    starting = asyncio.create_task(asyncio.to_thread(engine.start))
    await asyncio.to_thread(wait_until, lambda: engine.errors_path != before, "it does not start")
    await _said(engine, "starting 2 shards")
    os.kill(engine._session, signal.SIGTERM)
    # It ends in good order, and was never ready.
    with pytest.raises(AssertionError, match="ended with 0"):
        await starting
    assert engine.output_path.read_text() == ""
    assert not engine.processes()
    assert not engine.leaks()


def _shards(engine: Engine) -> list[int]:
    return [engine.pid_of("shard-0"), engine.pid_of("shard-1")]


def _postmaster(engine: Engine) -> int:
    return int((engine.data_dir / "postgres" / "postmaster.pid").read_text().splitlines()[0])


def _kill(engine: Engine, name: str) -> None:
    (process,) = [process for process in engine.processes() if process.name() == name]
    process.kill()


async def _said(engine: Engine, sentence: str, times: int = 1) -> None:
    """Wait until `gavel up` has said something."""

    def is_said() -> bool:
        return engine.errors_path.exists() and engine.errors_path.read_text().count(sentence) >= times

    await asyncio.to_thread(wait_until, is_said, f"it did not say that {sentence}")
