"""The scenario `activate`: an engine on a journal that holds very many auctions, all of them asleep.

It starts engines of its own, on one folder: one on an empty journal, then one on the full one.
"""

import asyncio
import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import uvloop

from loadtests import journal
from loadtests.clients import TIMEOUT_S, Client, connect, disconnect
from loadtests.measured import Latencies, LoadFailed, Options, Run
from loadtests.subjects import Engine, memory_bytes, own_engine

AUCTIONS: Final = 100_000
QUICK_AUCTIONS: Final = 1_000
TOUCHED: Final = 1_000
QUICK_TOUCHED: Final = 50


def run(options: Options) -> list[Run]:
    """Fill a journal, start an engine on it, and touch some auctions for the first time. Raises `LoadFailed`."""
    auctions, touched = (QUICK_AUCTIONS, QUICK_TOUCHED) if options.quick else (AUCTIONS, TOUCHED)
    run = Run("activate", Engine.name, f"{auctions:,} auctions", options.number)
    with _folder() as data_dir:
        options.report("starting an engine on an empty journal")
        began = time.perf_counter()
        with own_engine(data_dir) as engine:
            run.figures["empty_ready_s"] = time.perf_counter() - began
            empty_bytes = memory_bytes(engine.processes()["shard"])
            options.report(f"filling its journal with {auctions:,} auctions")
            ids = uvloop.run(_fill(data_dir, auctions))
        options.report(f"starting an engine on {auctions:,} auctions")
        began = time.perf_counter()
        with own_engine(data_dir) as engine:
            run.figures["ready_s"] = time.perf_counter() - began
            run.figures["shards_bytes"] = memory_bytes(engine.processes()["shard"])
            run.figures["bytes_per_auction"] = (run.figures["shards_bytes"] - empty_bytes) / auctions
            options.report(f"touching {touched:,} auctions")
            run.latencies["first_touch"] = uvloop.run(_touch(engine, random.sample(ids, touched)))
    run.add_percentiles("first_touch")
    return [run]


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder for the data of several engines, one after another."""
    with tempfile.TemporaryDirectory(prefix="gavel-bench-") as folder:
        # Postgres, as another user, must be able to reach it.
        Path(folder).chmod(0o755)
        yield Path(folder) / "data"


async def _fill(data_dir: Path, auctions: int) -> list[UUID]:
    async with journal.connected(data_dir) as connection:
        return await journal.fill(connection, auctions)


async def _touch(engine: Engine, auctions: Sequence[UUID]) -> Latencies:
    """Subscribe to auctions that are asleep, one after another; from the request to the state."""
    toucher = _Toucher()
    latencies = Latencies()
    try:
        await connect([toucher], engine.url)
        async with asyncio.timeout(TIMEOUT_S):
            for auction in auctions:
                latencies.add(await toucher.touch(auction))
    except TimeoutError:
        raise LoadFailed("the engine does not answer subscriptions") from None
    finally:
        disconnect([toucher])
    return latencies


class _Toucher(Client):
    """Asks for one auction at a time."""

    def __init__(self) -> None:
        super().__init__()
        self._answer: asyncio.Future[tuple[int, dict[str, Any]]] = asyncio.get_running_loop().create_future()

    async def touch(self, auction: UUID) -> int:
        """Subscribe to an auction, and leave it again; how many nanoseconds its state took."""
        sent_ns = time.monotonic_ns()
        answered_ns, answer = await self._ask("subscribe", auction)
        if answer["type"] != "subscribed":
            raise LoadFailed(f"the engine shows no auction ({answer.get('message')})")
        await self._ask("unsubscribe", auction)
        return answered_ns - sent_ns

    async def _ask(self, op: str, auction: UUID) -> tuple[int, dict[str, Any]]:
        self._answer = asyncio.get_running_loop().create_future()
        self.send(json.dumps({"op": op, "ref": 1, "topic": f"auction:{auction}"}).encode())
        return await self._answer

    def on_message(self, message: bytes) -> None:
        now_ns = time.monotonic_ns()
        answer = json.loads(message)
        if answer.get("ref") == 1:
            self._answer.set_result((now_ns, answer))

    def on_lost(self) -> None:
        if not self._answer.done():
            self._answer.set_exception(LoadFailed(f"the engine closed a socket ({self.lost})"))
            self._answer.exception()
