"""The scenario `recover`: a shard is killed under load, again and again; how long until bids are acknowledged again?

Until then means: until each auction under load, on whatever shard it lives, has acknowledged a bid that left after the
kill. At the end each acknowledgement must stand in the journal, under the hash that it named, once.
"""

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final
from uuid import UUID, uuid4

import msgspec
import psutil
import uvloop

from loadtests import journal
from loadtests.clients import Client, Pace, connect, disconnect
from loadtests.measured import NS_PER_S, GeneratorMeter, Latencies, LoadFailed, Options, Run, bottleneck_notes
from loadtests.subjects import Subject

KILLS: Final = 20
QUICK_KILLS: Final = 2
AUCTIONS: Final = 50
BIDDERS: Final = 2
"""Of each auction; they bid in turn. Of two, a bid that overtakes others is no reason to refuse these."""
RATE: Final = 1_000
"""Bids a second on all auctions together."""
CALM_S: Final = 0.5
"""So long bids are taken before the next kill."""
PATIENCE_S: Final = 30.0
STEP: Final = 1_000
"""By so much each maximum is over the one before."""
SERIES_NS: Final = NS_PER_S // 20


def run(subject: Subject, options: Options) -> list[Run]:
    """Kill the shards of a subject, one after another, under load. Raises `LoadFailed`."""
    return uvloop.run(_run(subject, options))


async def _run(subject: Subject, options: Options) -> list[Run]:
    kills = QUICK_KILLS if options.quick else KILLS
    load = _Load(subject, subject.open_auctions(AUCTIONS))
    recoveries = Latencies()
    pace = Pace(RATE, int(RATE * kills * PATIENCE_S), load.bid)
    try:
        await connect(load.bidders, subject.url)
        meter = GeneratorMeter()
        pace.start()
        await load.taken_everywhere(time.monotonic_ns())
        for number in range(kills):
            options.report(f"kill {number + 1} of {kills}")
            await asyncio.sleep(CALM_S)
            recoveries.add(await _kill(subject, load))
        pace.stop()
        await load.finish()
        cpu_percents = meter.figures()
    finally:
        pace.stop()
        disconnect(load.bidders)
    run = Run("recover", subject.name, f"{kills} kills, {RATE:,} bids/s", options.number)
    run.latencies = {"recovery": recoveries, "ack": load.latencies}
    for name in run.latencies:
        run.add_percentiles(name)
    run.figures["slowest_s"] = recoveries.max_ns / NS_PER_S
    run.figures |= {"acks": len(load.acked), "refused": load.refused.total(), "unanswered": len(load.waiting)}
    run.figures |= cpu_percents
    run.series["acks_per_second"] = load.series()
    run.notes = bottleneck_notes(run.figures)
    run.notes += [f"{count:,} bids were refused: {code}." for code, count in load.refused.items()]
    await _judge(subject, load, run)
    return [run]


async def _judge(subject: Subject, load: "_Load", run: Run) -> None:
    """Whether every acknowledged bid stands in the journal as it was acknowledged, and no bid twice."""
    assert subject.data_dir is not None, "we know its processes, so it is ours"
    async with journal.connected(subject.data_dir) as connection:
        stored = await journal.hashes(connection)
    run.figures["lost"] = sum(event_hash not in stored.get(bid, ()) for bid, event_hash in load.acked.items())
    run.figures["counted_twice"] = sum(len(stored.get(bid, ())) > 1 for bid in load.acked)


async def _kill(subject: Subject, load: "_Load") -> int:
    """Kill the shard that has lived longest; the nanoseconds until all auctions take bids again."""
    shards = (await asyncio.to_thread(subject.processes)).get("shard")
    if not shards:
        raise LoadFailed("the processes of an engine that we did not start are not known, so no shard can be killed")
    oldest = min(shards, key=lambda pid: psutil.Process(pid).create_time())
    killed_ns = time.monotonic_ns()
    os.kill(oldest, signal.SIGKILL)
    return await load.taken_everywhere(killed_ns) - killed_ns


class _Load:
    """Bids at a steady rate, each auction's in turn from its bidders; and what became of them."""

    def __init__(self, subject: Subject, auctions: Sequence[str]) -> None:
        self.bidders = [_Bidder(self, subject, auction) for _ in range(BIDDERS) for auction in auctions]
        self.acked: dict[bytes, bytes] = {}
        """The hash that each acknowledged bid was given, by the id under which the journal knows the bid."""
        self.latencies = Latencies()
        self.refused: Counter[str] = Counter()
        self.waiting: dict[int, int] = {}
        """When each bid left that is not answered, by its number."""
        self._auctions = len(auctions)
        self._number = 0
        self._began_ns = time.monotonic_ns()
        self._acked_ns: list[int] = []
        self._since_ns = 0
        self._taken_ns: dict[str, int] = {}
        """When each auction acknowledged a first bid that had left after `_since_ns`."""
        self._heard = asyncio.Event()
        """Set at every answer."""

    def bid(self, due_ns: int) -> None:
        """Send the next bid."""
        number = self._number
        self._number += 1
        self.waiting[number] = due_ns
        self.bidders[number % len(self.bidders)].bid(number)

    def answered(self, number: int, auction: str, command: bytes, answer: "_Answer", now_ns: int) -> None:
        """A bid has got its verdict."""
        due_ns = self.waiting.pop(number)
        self._heard.set()
        if answer.type != "ack":
            self.refused[answer.code] += 1
            return
        self.acked[command] = bytes.fromhex(answer.hash)
        self.latencies.add(now_ns - due_ns)
        self._acked_ns.append(now_ns)
        if due_ns > self._since_ns:
            self._taken_ns.setdefault(auction, now_ns)

    async def taken_everywhere(self, since_ns: int) -> int:
        """Wait until each auction has acknowledged a bid that left after this moment; when the last of them did."""
        self._since_ns, self._taken_ns = since_ns, {}
        if not await self._wait_until(lambda: len(self._taken_ns) == self._auctions):
            silent = self._auctions - len(self._taken_ns)
            raise LoadFailed(f"{silent} of {self._auctions} auctions took no bid for {PATIENCE_S:.0f} s")
        return max(self._taken_ns.values())

    async def finish(self) -> None:
        """Wait until all bids are answered, but not for ever."""
        await self._wait_until(lambda: not self.waiting)

    def series(self) -> list[tuple[float, float]]:
        """Acknowledgements a second over time."""
        counts = Counter((acked_ns - self._began_ns) // SERIES_NS for acked_ns in self._acked_ns)
        seconds = SERIES_NS / NS_PER_S
        return [(number * seconds, counts[number] / seconds) for number in range(max(counts, default=0) + 1)]

    async def _wait_until(self, is_so: Callable[[], bool]) -> bool:
        """Wait until something is so, which is looked at after each answer; False if it did not come to that."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not is_so():
                    self._heard.clear()
                    await self._heard.wait()
        except TimeoutError:
            return False
        return True


class _Answer(msgspec.Struct):
    type: str
    ref: int | None = None
    hash: str = ""
    code: str = ""


_read_answer: Final = msgspec.json.Decoder(_Answer).decode


class _Bidder(Client):
    """Bids in one auction, and sends again what may or may not have been taken."""

    def __init__(self, load: _Load, subject: Subject, auction: str) -> None:
        self._user = uuid4()
        super().__init__(subject.token(self._user, "viewer"), subject.framing)
        self._load = load
        self._auction = auction
        self._prefix = str(uuid4())[:-12]

    def bid(self, number: int) -> None:
        """Send the bid of this number, for the first time or again."""
        self.send(
            f'{{"op":"bid","ref":{number},"auction":"{self._auction}","bid_id":"{self._bid_id(number)}",'
            f'"max_amount":{STEP * (number + 1)}}}'.encode()
        )

    def on_message(self, message: bytes) -> None:
        now_ns = time.monotonic_ns()
        answer = _read_answer(message)
        if answer.ref is None or answer.ref not in self._load.waiting:
            return
        if answer.code == "outcome_unknown":
            self.bid(answer.ref)
            return
        command = self._user.bytes + UUID(self._bid_id(answer.ref)).bytes
        self._load.answered(answer.ref, self._auction, command, answer, now_ns)

    def _bid_id(self, number: int) -> str:
        return f"{self._prefix}{number:012x}"
