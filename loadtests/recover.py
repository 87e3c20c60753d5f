"""The scenario `recover`: a shard is killed under load, again and again; how long until bids are acknowledged again?

Until then means: until each auction under load, on whatever shard it lives, has acknowledged a bid that left after the
kill. At the end each acknowledgement must stand in the journal, under the hash that it named, once.
"""

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from typing import Final
from uuid import UUID, uuid4

import msgspec
import uvloop

from loadtests.clients import Client, Pace, connect, disconnect
from loadtests.engine import Subject
from loadtests.journal import hashes
from loadtests.measured import NS_PER_S, GeneratorMeter, Latencies, LoadFailed, Options, Run, bottleneck_notes

KILLS: Final = 20
QUICK_KILLS: Final = 2
AUCTIONS: Final = 50
BIDDERS: Final = 2
"""Of each auction; they bid in turn."""
RATE: Final = 1_000
"""Bids a second on all auctions together."""
CALM_S: Final = 0.5
"""So long bids are taken before the next kill."""
PATIENCE_S: Final = 30.0
LOOK_S: Final = 0.01
STEP: Final = 1_000
"""By so much each maximum is over the one before: if two bids overtake one another, both are accepted all the same."""
SERIES_NS: Final = NS_PER_S // 20
NOT_TAKEN: Final = frozenset({"busy", "unavailable", "rate_limited"})


def run(subject: Subject, options: Options) -> list[Run]:
    """Put a load on a subject whose shards we may kill. Raises `LoadFailed`."""
    return [uvloop.run(_run(subject, options, subject.open_auctions(AUCTIONS)))]


async def _run(subject: Subject, options: Options, auctions: Sequence[str]) -> Run:
    kills = QUICK_KILLS if options.quick else KILLS
    load = _Load(subject, auctions)
    recoveries = Latencies()
    meter = GeneratorMeter()
    pace = Pace(RATE, int(RATE * kills * PATIENCE_S), load.bid)
    try:
        await connect(load.bidders, subject.url)
        pace.start()
        for number in range(kills):
            await _until(lambda: load.is_taken_since(load.began_ns), "bids are not acknowledged")
            await asyncio.sleep(CALM_S)
            options.report(f"kill {number + 1} of {kills}")
            recoveries.add(await _kill(subject, load, number))
        await asyncio.sleep(CALM_S)
        pace.stop()
        await _until(lambda: not load.open_bids, "bids are not answered")
    finally:
        pace.stop()
        disconnect(load.bidders)
    run = Run("recover", subject.name, f"{RATE:,} bids/s, {kills} kills", options.number)
    run.latencies = {"recovery": recoveries, "ack": load.latencies}
    for name in run.latencies:
        run.add_percentiles(name)
    run.figures |= {"acks": len(load.acked), "refused": load.refused.total(), "asked_again": load.asked_again}
    run.figures["generator_cpu_percent"] = meter.cpu_percent()
    run.series["acks_per_second"] = load.series()
    run.notes = bottleneck_notes(run.figures["generator_cpu_percent"], load.late)
    run.notes += [f"{count:,} bids were refused: {code}." for code, count in load.refused.items()]
    await _judge(subject, load, run)
    return run


async def _kill(subject: Subject, load: "_Load", number: int) -> int:
    """Kill a shard, another one each time; the nanoseconds until all auctions take bids again."""
    shards = sorted(subject.processes().get("shard", []))
    if not shards:
        raise LoadFailed("the processes of an engine that we did not start are not known, so no shard can be killed")
    doomed = shards[number % len(shards)]
    os.kill(doomed, signal.SIGKILL)
    killed_ns = time.perf_counter_ns()
    await _until(lambda: load.is_taken_since(killed_ns), "bids are not acknowledged again")
    return load.taken_again_ns(killed_ns) - killed_ns
