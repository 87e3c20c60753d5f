"""The scenario `timers`: of many open auctions, many are over within one second; how late does a client hear of it?

Both ends of that span are read from this machine's clock, which the engine's embedded Postgres reads, too.
"""

import asyncio
import json
import time
from datetime import UTC, datetime
from typing import Any, Final

import uvloop

from engine.limits import SECOND_MS, SUBSCRIPTIONS_MAX
from loadtests.clients import Client, connect, disconnect
from loadtests.measured import NS_PER_MS, GeneratorMeter, Latencies, LoadFailed, Options, Run, bottleneck_notes
from loadtests.subjects import Subject

OPEN: Final = 10_000
DUE: Final = 1_000
QUICK_OPEN: Final = 200
QUICK_DUE: Final = 100
MOMENTS: Final = 50
"""So many different ends, evenly over one second."""
AHEAD_MS: Final = 2_000
"""So long before the first end all should be open and watched, if opening goes on as fast as before."""
PATIENCE_S: Final = 30.0


def run(subject: Subject, options: Options) -> list[Run]:
    """Open auctions, watch those that are soon due, and wait for their ends. Raises `LoadFailed`."""
    return uvloop.run(_run(subject, options))


async def _run(subject: Subject, options: Options) -> list[Run]:
    opened, due = (QUICK_OPEN, QUICK_DUE) if options.quick else (OPEN, DUE)
    options.report(f"opening {opened:,} auctions")
    began_ns = time.monotonic_ns()
    subject.open_auctions(opened - due)
    ms_per_auction = (time.monotonic_ns() - began_ns) / NS_PER_MS / (opened - due)
    ends_ms = _open_due(subject, due, time.time_ns() // NS_PER_MS + AHEAD_MS + int(2 * due * ms_per_auction))
    auctions = list(ends_ms)
    watchers = [_Watcher(auctions[first : first + SUBSCRIPTIONS_MAX]) for first in range(0, due, SUBSCRIPTIONS_MAX)]
    try:
        await connect(watchers, subject.url)
        for watcher in watchers:
            await watcher.watch()
        options.report(f"{due:,} of them end within one second")
        meter = GeneratorMeter()
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*(watcher.over for watcher in watchers))
        cpu_percents = meter.figures()
    except TimeoutError:
        raise LoadFailed("not all auctions could be watched before their ends, or ended") from None
    finally:
        disconnect(watchers)
    run = Run("timers", subject.name, f"{due:,} of {opened:,} auctions in one second", options.number)
    late = run.latencies["ended_late"] = Latencies()
    late_ns = [
        heard_ns - ends_ms[auction] * NS_PER_MS
        for watcher in watchers
        for auction, heard_ns in watcher.heard_ns.items()
    ]
    late.add_many(max(0, ns) for ns in late_ns)
    run.add_percentiles("ended_late")
    run.figures["early"] = sum(ns < 0 for ns in late_ns)
    run.figures |= cpu_percents
    run.notes = bottleneck_notes(run.figures)
    if run.figures["early"]:
        run.notes.append(f"{run.figures['early']:,} auctions were over before their end.")
    return [run]


def _open_due(subject: Subject, due: int, first_ms: int) -> dict[str, int]:
    """Open auctions that end within one second from `first_ms` on; the end of each, in milliseconds."""
    ends_ms = {}
    for moment in range(MOMENTS):
        end_ms = first_ms + moment * SECOND_MS // MOMENTS
        end_time = datetime.fromtimestamp(end_ms / SECOND_MS, UTC).isoformat(timespec="milliseconds")
        ends_ms.update(dict.fromkeys(subject.open_auctions(due // MOMENTS, end_time=end_time), end_ms))
    return ends_ms


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
