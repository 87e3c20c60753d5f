"""The scenario `activate`: an engine on a journal that holds very many auctions, all of them asleep.

The engine was started on an empty journal; its journal is filled, and it is started again.
"""

import asyncio
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import uvloop

from loadtests import journal
from loadtests.clients import TIMEOUT_S, Client, connect, disconnect
from loadtests.measured import Latencies, LoadFailed, Options, Run
from loadtests.subjects import Engine, OwnEngine, Subject, memory_bytes

AUCTIONS: Final = 100_000
QUICK_AUCTIONS: Final = 1_000
TOUCHED: Final = 1_000
QUICK_TOUCHED: Final = 50


def run(subject: Subject, options: Options) -> list[Run]:
    """Fill a journal, start the engine on it, and touch some auctions for the first time. Raises `LoadFailed`."""
    if not isinstance(subject, OwnEngine) or subject.data_dir is None:
        raise LoadFailed("an engine that we did not start cannot be started again")
    auctions, touched = (QUICK_AUCTIONS, QUICK_TOUCHED) if options.quick else (AUCTIONS, TOUCHED)
    run = Run("activate", Engine.name, f"{auctions:,} auctions", options.number)
    run.figures["empty_ready_s"] = subject.ready_s
    empty_bytes = memory_bytes(subject.processes()["shard"])
    options.report(f"filling the journal with {auctions:,} auctions")
    ids = uvloop.run(_fill(subject.data_dir, auctions))
    options.report(f"starting the engine on {auctions:,} auctions")
    subject.restart()
    run.figures["ready_s"] = subject.ready_s
    run.figures["shards_bytes"] = memory_bytes(subject.processes()["shard"])
    run.figures["bytes_per_auction"] = (run.figures["shards_bytes"] - empty_bytes) / auctions
    options.report(f"touching {touched:,} auctions")
    run.latencies["first_touch"] = uvloop.run(_touch(subject, random.sample(ids, touched)))
    run.add_percentiles("first_touch")
    return [run]


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
