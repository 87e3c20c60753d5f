"""The scenario `connect`: how fast sockets are let in, what they cost idle, and how fast all are back after a cut."""

import asyncio
import math
from contextlib import suppress
from typing import Final

import uvloop

from engine.limits import HEARTBEAT_MS, SECOND_MS
from loadtests.fanout import Bidders
from loadtests.measured import GeneratorMeter, Options, Run, bottleneck_notes
from loadtests.subjects import Subject, cpu_seconds, memory_bytes
from loadtests.watchers import Watchers

SOCKETS: Final = 10_000
QUICK_SOCKETS: Final = 500
IDLE_S: Final = 2 * HEARTBEAT_MS / SECOND_MS
"""Whole heartbeats, so that the pings and pongs of each socket are in it."""
QUICK_IDLE_S: Final = 0.5
SETTLE_S: Final = 1.0
RECONNECT_RATE: Final = 5
"""Bids a second while sockets come back, each of which goes to all that are back already."""
RECONNECT_MAX_S: Final = 60.0
DOORS: Final = ("gateway", "server")
"""The roles of processes that hold sockets."""


def run(subject: Subject, options: Options) -> list[Run]:
    """Connect sockets, leave them alone for a while, let them watch an auction, then cut them all at once.

    Raises `LoadFailed`.

    The subject has just been started: a server that has held sockets before keeps memory for more.
    """
    return uvloop.run(_run(subject, options))


async def _run(subject: Subject, options: Options) -> list[Run]:
    sockets, idle_s = (QUICK_SOCKETS, QUICK_IDLE_S) if options.quick else (SOCKETS, IDLE_S)
    (auction,) = subject.open_auctions(1)
    processes = subject.processes()
    doors = [pid for role in DOORS for pid in processes.get(role, [])]
    run = Run("connect", subject.name, f"{sockets:,} sockets", options.number)
    with Watchers(subject, sockets) as watchers:
        await watchers.ready()
        run.figures["empty_cpu_percent"] = await _cpu_percent(doors, idle_s / 10)
        without = memory_bytes(doors)
        both = {"doors": doors, "watchers": [watchers.pid]}
        before, meter = cpu_seconds(both), GeneratorMeter()
        options.report(f"connecting {sockets:,} sockets")
        seconds = await watchers.connect()
        after = cpu_seconds(both)
        run.figures |= meter.figures()
        run.figures["sockets_per_second"] = sockets / seconds
        run.figures["cpu_us_per_socket"] = 1_000_000 * (after["doors"] - before["doors"]) / sockets
        run.figures["generator_cpu_percent"] = 100 * (after["watchers"] - before["watchers"]) / seconds
        await asyncio.sleep(SETTLE_S)
        run.figures["bytes_per_socket"] = (memory_bytes(doors) - without) / sockets
        options.report(f"{sockets:,} sockets stand idle for {idle_s:g} s")
        run.figures["idle_cpu_percent"] = await _cpu_percent(doors, idle_s)
        await watchers.watch(auction)
        await asyncio.sleep(SETTLE_S)
        run.figures["bytes_per_watching_socket"] = (memory_bytes(doors) - without) / sockets
        options.report(f"{sockets:,} sockets are cut at once")
        again = await _reconnect(subject, options, watchers, sockets, auction)
    run.notes = bottleneck_notes(run.figures)
    if not doors:
        for name in (
            "empty_cpu_percent",
            "cpu_us_per_socket",
            "idle_cpu_percent",
            "bytes_per_socket",
            "bytes_per_watching_socket",
        ):
            run.figures[name] = math.nan
        run.notes.append("The processes of a server that we did not start are not known: no memory, no processor time.")
    return [run, again]


async def _reconnect(subject: Subject, options: Options, watchers: Watchers, sockets: int, auction: str) -> Run:
    """Cut all sockets at once, and have them subscribe again from where they were, while bids go on."""
    run = Run("connect", subject.name, f"{sockets:,} sockets cut at once", options.number)
    bidders = Bidders(subject, auction)
    await bidders.connect()
    bidding = asyncio.create_task(bidders.bid(RECONNECT_RATE, 0, RECONNECT_MAX_S))
    try:
        before, meter = cpu_seconds({"watchers": [watchers.pid]}), GeneratorMeter()
        back = await watchers.reconnect(auction)
        run.figures = {"reconnect_s": back.seconds, "recovered_percent": 100 * back.recovered / sockets}
        run.latencies["ack"] = bidders.load.acks
        run.add_percentiles("ack")
        seconds = cpu_seconds({"watchers": [watchers.pid]})["watchers"] - before["watchers"]
        run.figures |= meter.figures() | {"generator_cpu_percent": 100 * seconds / back.seconds}
    finally:
        bidding.cancel()
        with suppress(asyncio.CancelledError):
            await bidding
        bidders.disconnect()
    run.notes = bottleneck_notes(run.figures)
    return run


async def _cpu_percent(pids: list[int], seconds: float) -> float:
    """What processes take of a core, over so many seconds."""
    before = cpu_seconds({"": pids})[""]
    await asyncio.sleep(seconds)
    return 100 * (cpu_seconds({"": pids})[""] - before) / seconds
