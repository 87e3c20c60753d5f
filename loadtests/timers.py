"""The scenario `timers`: of many open auctions, many are over within one second; how late does a client hear of it?

Both ends of that span are read from this machine's clock, which the engine's embedded Postgres reads, too.
"""

import asyncio
import json
import time
from datetime import UTC, datetime
from typing import Any, Final

import uvloop

from engine.limits import SUBSCRIPTIONS_MAX
from loadtests.clients import Client, connect, disconnect
from loadtests.engine import Subject
from loadtests.measured import NS_PER_MS, GeneratorMeter, Latencies, LoadFailed, Options, Run, bottleneck_notes

OPEN: Final = 10_000
DUE: Final = 1_000
QUICK_OPEN: Final = 400
QUICK_DUE: Final = 100
MOMENTS: Final = 50
"""So many different ends, evenly over one second."""
SPREAD_MS: Final = 1_000
AHEAD_MS: Final = 8_000
QUICK_AHEAD_MS: Final = 3_000
"""The first end, after the first of these auctions was opened: by then all must be open, and be watched."""
PATIENCE_S: Final = 30.0


def run(subject: Subject, options: Options) -> list[Run]:
    """Open auctions, watch those that are soon due, and wait for their ends. Raises `LoadFailed`."""
    opened, due, ahead_ms = (QUICK_OPEN, QUICK_DUE, QUICK_AHEAD_MS) if options.quick else (OPEN, DUE, AHEAD_MS)
    options.report(f"opening {opened:,} auctions")
    subject.open_auctions(opened - due)
    first_ms = time.time_ns() // NS_PER_MS + ahead_ms
    ends: dict[str, int] = {}
    for moment in range(MOMENTS):
        end_ms = first_ms + moment * SPREAD_MS // MOMENTS
        end_time = datetime.fromtimestamp(end_ms / 1_000, UTC).isoformat(timespec="milliseconds")
        for auction in subject.open_auctions(due // MOMENTS, end_time=end_time):
            ends[auction] = end_ms
    return [uvloop.run(_run(subject, options, opened, ends))]


async def _run(subject: Subject, options: Options, opened: int, ends: dict[str, int]) -> Run:
    auctions = list(ends)
    watchers = [
        _Watcher(auctions[first : first + SUBSCRIPTIONS_MAX]) for first in range(0, len(auctions), SUBSCRIPTIONS_MAX)
    ]
    try:
        await connect(watchers, subject.url)
        for watcher in watchers:
            await watcher.watch()
        is_early = time.time_ns() // NS_PER_MS < min(ends.values())
        options.report(f"{len(ends):,} of them end within one second")
        meter = GeneratorMeter()
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*(watcher.over for watcher in watchers))
        percent = meter.cpu_percent()
    except TimeoutError:
        raise LoadFailed("not all auctions ended in time, or could be watched") from None
    finally:
        disconnect(watchers)
    run = Run("timers", subject.name, f"{len(ends):,} of {opened:,} auctions in one second", options.number)
    late = run.latencies["end"] = Latencies()
    late.add_many(
        max(0, heard_ns - ends[auction] * NS_PER_MS)
        for watcher in watchers
        for auction, heard_ns in watcher.heard_ns.items()
    )
    run.add_percentiles("end")
    run.figures["generator_cpu_percent"] = percent
    run.notes = bottleneck_notes(percent)
    if not is_early:
        run.notes.append("Opening and watching took so long that some were over by then.")
    return run


class _Watcher(Client):
    """Watches some auctions until they are over."""

    def __init__(self, auctions: list[str]) -> None:
        super().__init__()
        self.heard_ns: dict[str, int] = {}
        """When we heard that an auction was over, by the machine's clock."""
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._auctions = auctions
        self._subscribed = 0
        self._is_watching = asyncio.Event()

    async def watch(self) -> None:
        """Subscribe to all of them. Raises `TimeoutError`."""
        for auction in self._auctions:
            self.send(json.dumps({"op": "subscribe", "ref": 1, "topic": f"auction:{auction}"}).encode())
        async with asyncio.timeout(PATIENCE_S):
            await self._is_watching.wait()

    def on_message(self, message: bytes) -> None:
        now_ns = time.time_ns()
        self._take(json.loads(message), now_ns)

    def on_lost(self) -> None:
        if not self.over.done():
            self.over.set_exception(LoadFailed(f"the server closed a socket ({self.lost})"))

    def _take(self, message: dict[str, Any], now_ns: int) -> None:
        if message["type"] == "subscribed":
            self._subscribed += 1
            if self._subscribed == len(self._auctions):
                self._is_watching.set()
        # A `state` names under `events` the ends that it covers.
        elif any(event["kind"] == "ended" for event in message.get("events", ())):
            self.heard_ns[message["topic"].removeprefix("auction:")] = now_ns
            if len(self.heard_ns) == len(self._auctions) and not self.over.done():
                self.over.set_result(None)
