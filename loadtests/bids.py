"""The scenario `bids`: how many bids a second there can be, and how long one takes when there are fewer.

Closed loop, on one hot auction: each socket bids again as soon as its last bid is answered. Open loop, over many
auctions: bids leave at a fixed rate whatever the answers do, and each is timed from the moment at which it was due.
Only acknowledgements count. Client and server share the machine, so a bid costs one `bytes %` and one write, and its
answer is recognised by its first bytes.
"""

import asyncio
import gc
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final
from uuid import uuid4

import numpy as np
import uvloop

from loadtests.clients import Client, Pace, connect, disconnect
from loadtests.measured import NS_PER_S, GeneratorMeter, Latencies, LoadFailed, Options, Run, bottleneck_notes
from loadtests.subjects import Subject, cpu_seconds

SOCKETS: Final = 500
AUCTIONS: Final = 1_000
QUICK_SOCKETS: Final = 50
QUICK_AUCTIONS: Final = 100
QUICK_SECONDS: Final = 0.75
SECONDS: Final = 6.0
"""Of each load, its warm-up included."""
WARM_UP: Final = 1 / 6
"""This share of a load, at its beginning, is not measured."""
RATES: Final = (100, 1_000, 10_000)
QUICK_RATES: Final = (100,)
KEPT_UP: Final = 0.9
"""A subject that acknowledges less than this share of what it is sent is spared higher rates."""

DRAIN_S: Final = 5.0
"""So long after a load its last answers may come."""
TICKS_PER_SECOND: Final = 1_000
"""A higher rate sends several bids at each tick, which spares the generator half its time."""
SERIES_S: Final = 0.25

_US_NS: Final = 1_000
_ACK: Final = b'{"type":"ack"'
_ACK_REF: Final = b'{"type":"ack","ref":'


@dataclass
class Measured:
    """What one load measured."""

    seconds: float
    """How long it was measured: without the warm-up."""
    acks: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """By code."""
    unanswered: int = 0
    latencies: Latencies = field(default_factory=Latencies)
    """Of acknowledged bids; one without an answer counts as having taken until we gave up."""
    late: Latencies | None = None
    """How long after its time a bid left; None in a closed loop."""
    series: list[tuple[float, float]] = field(default_factory=list)
    """Acknowledgements a second over time."""
    cpu_percents: dict[str, float] = field(default_factory=dict)
    """See `GeneratorMeter`."""
    cpu_us_per_ack: dict[str, float] = field(default_factory=dict)
    """What the server took for each acknowledgement, by role of its processes."""

    @property
    def acks_per_second(self) -> float:
        return self.acks / self.seconds

    def to_run(self, scenario: str, subject: Subject, load: str, number: int) -> Run:
        """As a run of a scenario."""
        run = Run(scenario, subject.name, load, number, latencies={"ack": self.latencies})
        run.figures["acks_per_second"] = self.acks_per_second
        run.add_percentiles("ack")
        run.figures |= {"refused": self.refused.total(), "unanswered": self.unanswered}
        run.figures |= {f"refused_{code}": count for code, count in self.refused.items()}
        run.figures |= self.cpu_percents
        if self.late is not None:
            run.figures["late_p99_ms"] = self.late.percentile_ms(99)
        if self.cpu_us_per_ack:
            run.figures["cpu_us_per_ack"] = sum(self.cpu_us_per_ack.values())
        run.figures |= {f"{role}_cpu_us_per_ack": cost for role, cost in self.cpu_us_per_ack.items()}
        run.series["acks_per_second"] = self.series
        run.notes = bottleneck_notes(run.figures)
        return run


def run(subject: Subject, options: Options) -> list[Run]:
    """Put all loads on a subject, one after another. Raises `LoadFailed`."""
    hot, *others = subject.open_auctions(1 + (QUICK_AUCTIONS if options.quick else AUCTIONS))
    return uvloop.run(_run(subject, options, hot, others))


async def _run(subject: Subject, options: Options, hot: str, others: Sequence[str]) -> list[Run]:
    seconds, sockets, rates = (
        (QUICK_SECONDS, QUICK_SOCKETS, QUICK_RATES) if options.quick else (SECONDS, SOCKETS, RATES)
    )
    load = f"closed loop, {sockets} sockets"
    options.report(load)
    measured = await ClosedLoop(subject, hot).run(sockets, seconds)
    runs = [measured.to_run("bids", subject, load, options.number)]
    opened = OpenLoop(subject, others)
    await opened.connect(sockets)
    try:
        for rate in rates:
            load = f"{rate:,} bids/s"
            options.report(load)
            measured = await opened.run(seconds, rate)
            runs.append(measured.to_run("bids", subject, load, options.number))
            if measured.acks_per_second < KEPT_UP * rate:
                runs[-1].notes.append(
                    f"{measured.acks_per_second:,.0f} of {rate:,} bids/s were acknowledged; higher rates were left out."
                )
                break
    finally:
        opened.disconnect()
    return runs


class ClosedLoop:
    """One auction, and sockets that each bid again as soon as they are answered."""

    def __init__(self, subject: Subject, auction: str) -> None:
        self._subject = subject
        # A socket's bids differ in the moment at which they are made, so that serves as the end of `bid_id`, too. As
        # the amount it only rises: the engine has good reason to take every bid.
        self.bid = f'{{"op":"bid","ref":1,"auction":"{auction}","bid_id":"{_prefix()}%012x","max_amount":%d}}'.encode()
        self.began_ns = 0
        self.deadline_ns = 0
        self.sent_ns: list[int] = []
        self.acked_ns: list[int] = []
        self.refused: Counter[str] = Counter()
        self.lost: str | None = None
        self._at_rest = 0
        self._bidders: list[_ClosedBidder] = []
        self._done = asyncio.Event()

    async def run(self, sockets: int, seconds: float) -> Measured:
        """Connect, bid for so many seconds, and close."""
        subject = self._subject
        self._bidders = [_ClosedBidder(self, subject) for _ in range(sockets)]
        try:
            await connect(self._bidders, subject.url)
            cpu_before, meter = cpu_seconds(subject.processes()), _meter()
            self.began_ns = time.monotonic_ns()
            self.deadline_ns = self.began_ns + int(seconds * NS_PER_S)
            for bidder in self._bidders:
                bidder.bid()
            await asyncio.sleep(seconds)
            cpu_percents = meter.figures()
            await _wait(self._done)
            cpu_after = cpu_seconds(subject.processes())
        finally:
            disconnect(self._bidders)
        if self.lost is not None:
            raise LoadFailed(f"the server closed a socket ({self.lost})")
        return _measured(
            np.array(self.sent_ns, dtype=np.int64),
            np.array(self.acked_ns, dtype=np.int64),
            self.began_ns,
            seconds,
            refused=self.refused,
            unanswered=sockets - self._at_rest,
            cpu_percents=cpu_percents,
            cpu_us_per_ack=_per_ack(cpu_before, cpu_after, len(self.acked_ns)),
        )

    def rest(self) -> None:
        """Called for each socket when it was answered after the end."""
        self._at_rest += 1
        if self._at_rest == len(self._bidders):
            self._done.set()

    def end(self, lost: str) -> None:
        """Called when a socket was closed."""
        if not self._done.is_set():
            self.lost = lost
            self._done.set()


class _ClosedBidder(Client):
    def __init__(self, load: ClosedLoop, subject: Subject) -> None:
        super().__init__(subject.token(uuid4(), "viewer"), subject.framing)
        self._load = load
        self._sent_ns = 0

    def bid(self) -> None:
        load = self._load
        self._sent_ns = now_ns = time.monotonic_ns()
        at_us = (now_ns - load.began_ns) // _US_NS + 1
        self.send(load.bid % (at_us, at_us))

    def on_message(self, message: bytes) -> None:
        now_ns = time.monotonic_ns()
        load = self._load
        retry_ms = 0
        if message.startswith(_ACK):
            load.sent_ns.append(self._sent_ns)
            load.acked_ns.append(now_ns)
        else:
            verdict = json.loads(message)
            if verdict["type"] == "ack":
                load.sent_ns.append(self._sent_ns)
                load.acked_ns.append(now_ns)
            elif verdict["type"] in {"rejected", "error"}:
                load.refused[verdict["code"]] += 1
                # Whoever is told to come back later does; other refusals only cost this bid.
                retry_ms = verdict.get("retry_after_ms", 0)
            else:
                return
        if now_ns > load.deadline_ns:
            load.rest()
        elif retry_ms:
            asyncio.get_running_loop().call_later(retry_ms / 1_000, self.bid)
        else:
            self.bid()

    def on_lost(self) -> None:
        self._load.end(str(self.lost))


class OpenLoop:
    """Many auctions, and sockets that take turns in bidding at a fixed rate. One load after another can be put on."""

    def __init__(self, subject: Subject, auctions: Sequence[str]) -> None:
        self._subject = subject
        self._bids = [
            f'{{"op":"bid","ref":%d,"auction":"{auction}","bid_id":"{_prefix()}%012x","max_amount":%d}}'.encode()
            for auction in auctions
        ]
        self._bidders: list[_OpenBidder] = []
        self._began_ns = time.monotonic_ns()
        self._sent = 0
        # Of the load that is on: its first bid's number, and of each of its bids the moments.
        self._first = 0
        self._due_ns: list[int] = []
        self._late_ns: list[int] = []
        self._acked_ns: list[int] = []
        self._refused: Counter[str] = Counter()
        self._answered = 0
        self._expected = 0
        self._done = asyncio.Event()
        self._lost: str | None = None

    async def connect(self, sockets: int) -> None:
        """Open the sockets, each as a user of its own."""
        self._bidders = [_OpenBidder(self, self._subject) for _ in range(sockets)]
        await connect(self._bidders, self._subject.url)

    def disconnect(self) -> None:
        """Close all sockets."""
        disconnect(self._bidders)

    async def run(self, seconds: float, rate: int) -> Measured:
        """Bid `rate` times a second, for so many seconds."""
        ticks = min(rate, TICKS_PER_SECOND)
        per_tick = rate // ticks
        self._begin(int(seconds * ticks) * per_tick)
        pace = Pace(ticks, int(seconds * ticks), lambda due_ns: self._send(due_ns, per_tick))
        cpu_before, meter = cpu_seconds(self._subject.processes()), _meter()
        began_ns = time.monotonic_ns()
        pace.start()
        try:
            await pace.done.wait()
            cpu_percents = meter.figures()
            await _wait(self._done)
        finally:
            pace.stop()
        cpu_after = cpu_seconds(self._subject.processes())
        if self._lost is not None:
            raise LoadFailed(f"the server closed a socket ({self._lost})")
        acked_ns = np.array(self._acked_ns, dtype=np.int64)
        late = Latencies()
        late.add_many(self._late_ns)
        return _measured(
            np.array(self._due_ns, dtype=np.int64),
            acked_ns,
            began_ns,
            seconds,
            refused=self._refused,
            unanswered=self._expected - self._answered,
            late=late,
            cpu_percents=cpu_percents,
            cpu_us_per_ack=_per_ack(cpu_before, cpu_after, int(np.count_nonzero(acked_ns > 0))),
        )

    def _begin(self, expected: int) -> None:
        # Numbers go on, so that an answer to an earlier load is known as one.
        self._first = self._sent
        self._expected, self._answered = expected, 0
        self._due_ns, self._late_ns, self._acked_ns = [], [], []
        self._refused = Counter()
        self._done.clear()

    def _send(self, due_ns: int, count: int) -> None:
        bids, bidders = self._bids, self._bidders
        for number in range(self._sent, self._sent + count):
            now_ns = time.monotonic_ns()
            self._due_ns.append(due_ns)
            self._late_ns.append(now_ns - due_ns)
            self._acked_ns.append(0)
            # An auction's next bid comes from another bidder than its last one.
            turn, auction = divmod(number, len(bids))
            bidder = bidders[(number + turn) % len(bidders)]
            bidder.send(bids[auction] % (number, number, (now_ns - self._began_ns) // _US_NS + 1))
        self._sent += count

    def answer(self, message: bytes) -> None:
        """Called with each message."""
        now_ns = time.monotonic_ns()
        if message.startswith(_ACK_REF):
            number, code = int(message[len(_ACK_REF) : message.index(b",", len(_ACK_REF))]), None
        else:
            verdict = json.loads(message)
            if verdict["type"] not in {"ack", "rejected", "error"}:
                return
            number, code = verdict.get("ref", -1), verdict.get("code")
        if number < self._first:
            return
        if code is None:
            self._acked_ns[number - self._first] = now_ns
        else:
            self._acked_ns[number - self._first] = -1
            self._refused[code] += 1
        self._answered += 1
        if self._answered == self._expected:
            self._done.set()

    def end(self, lost: str) -> None:
        """Called when a socket was closed."""
        if not self._done.is_set():
            self._lost = lost
            self._done.set()


class _OpenBidder(Client):
    def __init__(self, load: OpenLoop, subject: Subject) -> None:
        super().__init__(subject.token(uuid4(), "viewer"), subject.framing)
        self._load = load

    def on_message(self, message: bytes) -> None:
        self._load.answer(message)

    def on_lost(self) -> None:
        self._load.end(str(self.lost))


def _measured(
    sent_ns: "np.ndarray[tuple[int], np.dtype[np.int64]]",
    acked_ns: "np.ndarray[tuple[int], np.dtype[np.int64]]",
    began_ns: int,
    seconds: float,
    *,
    refused: Counter[str],
    unanswered: int,
    cpu_percents: dict[str, float],
    cpu_us_per_ack: dict[str, float],
    late: Latencies | None = None,
) -> Measured:
    """Put together what was measured. `acked_ns` is 0 where there was no answer and -1 where it was a refusal."""
    measured = Measured(
        seconds * (1 - WARM_UP), refused=refused, unanswered=unanswered, late=late, cpu_us_per_ack=cpu_us_per_ack
    )
    measured.cpu_percents = cpu_percents
    begin_ns, end_ns = began_ns + int(seconds * WARM_UP * NS_PER_S), began_ns + int(seconds * NS_PER_S)
    measured.acks = int(np.count_nonzero((acked_ns >= begin_ns) & (acked_ns < end_ns)))
    warm = (sent_ns >= begin_ns) & (acked_ns >= 0)
    until_ns = np.where(acked_ns[warm] == 0, time.monotonic_ns(), acked_ns[warm])
    measured.latencies.add_many(until_ns - sent_ns[warm])
    steps = int(seconds / SERIES_S)
    counts, edges = np.histogram((acked_ns - began_ns) / NS_PER_S, bins=steps, range=(0, steps * SERIES_S))
    measured.series = [(float(edge), float(count / SERIES_S)) for edge, count in zip(edges, counts, strict=False)]
    return measured


def _per_ack(before: dict[str, float], after: dict[str, float], acks: int) -> dict[str, float]:
    return {role: (after[role] - before.get(role, 0)) * 1e6 / max(1, acks) for role in after}


def _prefix() -> str:
    return str(uuid4())[:-12]


def _meter() -> GeneratorMeter:
    """Begin to measure ourselves, with a garbage collector that need not look at what was there before."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    return GeneratorMeter()


async def _wait(done: asyncio.Event) -> None:
    try:
        async with asyncio.timeout(DRAIN_S):
            await done.wait()
    except TimeoutError:
        pass
