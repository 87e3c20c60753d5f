"""The scenario `fanout`: many sockets watch one auction; how long until a bid is on all their screens?

Bids leave at a fixed rate from this process, which sees their acknowledgements as any client beside a crowd would.
Watchers have a process of their own.
"""

import asyncio
import time
from collections import Counter
from typing import Final
from uuid import uuid4

import msgspec
import uvloop

from loadtests.clients import Client, Framing, Pace, connect, disconnect
from loadtests.goals import DRAIN_S
from loadtests.measured import GeneratorMeter, Latencies, LoadFailed, Options, Run, bottleneck_notes
from loadtests.subjects import Subject, cpu_seconds
from loadtests.watchers import Bids, Screens, Watchers

SOCKETS: Final = 10_000
QUICK_SOCKETS: Final = 200
RATES: Final = (2, 20)
RATES_FOLDED: Final = (2, 20, 100)
"""For a server that folds bids while it is behind. Others would have to send a million frames a second at the highest
of these rates, and would fill the memory with what they cannot send."""
WARM_UP_S: Final = 5.0
SECONDS: Final = 20.0
QUICK_WARM_UP_S: Final = 0.25
QUICK_SECONDS: Final = 0.75
STEP: Final = 1_000
"""By so much each maximum is over the one before."""
ANSWER_TIMEOUT_S: Final = 30.0


def run(subject: Subject, options: Options) -> list[Run]:
    """Measure each rate once, on the same sockets. Raises `LoadFailed`."""
    return uvloop.run(_run(subject, options))


async def _run(subject: Subject, options: Options) -> list[Run]:
    sockets = QUICK_SOCKETS if options.quick else SOCKETS
    (auction,) = subject.open_auctions(1)
    bidders = Bidders(subject, auction)
    runs: list[Run] = []
    with Watchers(subject, sockets) as watchers:
        try:
            await watchers.ready()
            options.report(f"connecting {sockets:,} sockets")
            await watchers.connect()
            await watchers.watch(auction)
            await bidders.connect()
            for rate in RATES_FOLDED if subject.name == "gavel" else RATES:
                options.report(f"{rate} bids/s to {sockets:,} sockets")
                runs.append(await _measure(subject, options, bidders, watchers, rate))
                runs[-1].figures["sockets"] = sockets
        finally:
            bidders.disconnect()
    return runs


async def _measure(subject: Subject, options: Options, bidders: "Bidders", watchers: Watchers, rate: int) -> Run:
    """Put one rate of bids on, and have the backlog drained."""
    seconds, warm_up_s = (QUICK_SECONDS, QUICK_WARM_UP_S) if options.quick else (SECONDS, WARM_UP_S)
    processes = {**subject.processes(), "watchers": [watchers.pid]}
    before, meter = cpu_seconds(processes), GeneratorMeter()
    load = await bidders.bid(rate, warm_up_s, seconds)
    percents = {
        role: 100 * (after - before[role]) / (warm_up_s + seconds) for role, after in cpu_seconds(processes).items()
    }
    own = meter.figures()
    await load.answered()
    bids = load.bids()
    screens = await watchers.saw(bids)
    run = Run("fanout", subject.name, f"{rate} bids/s", options.number)
    run.latencies = {"ack": load.acks, "bid_to_screen": screens.latencies}
    run.series["bid_to_screen_p99_ms"] = screens.by_second
    run.figures = {
        "bids_per_second": len(bids.seqs) / seconds,
        "refused": load.refused.total(),
        "unanswered": len(load.waiting),
        "frames_per_second": screens.frames / (warm_up_s + seconds),
        "backlog": screens.backlog,
        "drained_s": screens.drained_s,
        "missing": screens.missing,
        "lost_sockets": screens.lost,
        "late_p99_ms": load.late.percentile_ms(99),
        "generator_cpu_percent": percents.pop("watchers"),
        "bidders_cpu_percent": own["generator_cpu_percent"],
        "machine_cpu_percent": own["machine_cpu_percent"],
        **{f"{role}_cpu_percent": percent for role, percent in percents.items()},
    }
    for name in run.latencies:
        run.add_percentiles(name)
    run.notes = bottleneck_notes(run.figures) + _notes(load, screens)
    return run


def _notes(load: "Load", screens: Screens) -> list[str]:
    notes = [f"{count} bids were refused: {code}." for code, count in load.refused.items()]
    if load.waiting:
        notes.append(f"{len(load.waiting):,} bids were not answered.")
    if screens.missing:
        notes.append(f"{screens.missing:,} pairs of a bid and a socket never came together.")
    if load.waiting or screens.missing:
        notes.append("What never came counts until we gave up: the latencies were at least what is said.")
    if screens.drained_s > DRAIN_S:
        notes.append(f"It did not keep up: what had piled up took {screens.drained_s:.1f} s more.")
    if screens.lost:
        notes.append(f"The server closed {screens.lost:,} sockets.")
    return notes


class Load:
    """Bids at one rate, and what became of them."""

    def __init__(self, number: int, warm_up: int) -> None:
        self.first = number
        """The number of its first bid; and so many of them only warm up."""
        self.warm_up = warm_up
        self.scheduled_ns: list[int] = []
        self.seqs: dict[int, int] = {}
        """The `seq` of each bid that was acknowledged, by its number."""
        self.acks = Latencies()
        self.late = Latencies()
        self.refused: Counter[str] = Counter()
        self.waiting: set[int] = set()
        """The numbers of those that are not answered."""
        self.ended_ns = 0
        self.is_given_up = False
        self._is_answered = asyncio.Event()

    def sent(self, scheduled_ns: int, now_ns: int) -> None:
        """A bid has left."""
        self.waiting.add(self.first + len(self.scheduled_ns))
        self.scheduled_ns.append(scheduled_ns)
        self.late.add(now_ns - scheduled_ns)

    def taken(self, number: int, seq: int, now_ns: int) -> None:
        """A bid was acknowledged."""
        self.seqs[number] = seq
        if number >= self.first + self.warm_up:
            self.acks.add(now_ns - self.scheduled_ns[number - self.first])
        self._count(number)

    def not_taken(self, number: int, code: str) -> None:
        """A bid was refused."""
        self.refused[code] += 1
        self._count(number)

    def _count(self, number: int) -> None:
        self.waiting.discard(number)
        if not self.waiting and self.ended_ns:
            self._is_answered.set()

    async def answered(self) -> None:
        """Wait until every bid is answered, but not for ever: then one counts as having taken so long."""
        if not self.waiting:
            return
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await self._is_answered.wait()
        except TimeoutError:
            self.is_given_up = True
            now_ns = time.monotonic_ns()
            for due_ns in self._unanswered_ns():
                self.acks.add(now_ns - due_ns)

    def bids(self) -> Bids:
        """Those that count."""
        measured = sorted((seq, number) for number, seq in self.seqs.items() if number >= self.first + self.warm_up)
        scheduled_ns = [self.scheduled_ns[number - self.first] for _, number in measured]
        return Bids([seq for seq, _ in measured], scheduled_ns, self.ended_ns, self._unanswered_ns())

    def _unanswered_ns(self) -> list[int]:
        """When those that count were to leave that are not answered."""
        return [
            self.scheduled_ns[number - self.first]
            for number in sorted(self.waiting)
            if number >= self.first + self.warm_up
        ]


class Bidders:
    """Two sockets that bid in turn, so that the lead changes with every bid.

    Since there are only two, a bid that overtakes others is no reason to refuse these: each is over the last one of its
    own bidder, and thus over the price.
    """

    def __init__(self, subject: Subject, auction: str) -> None:
        self._url = subject.url
        prefix = str(uuid4())[:-12]
        self._bid = f'{{"op":"bid","ref":%d,"auction":"{auction}","bid_id":"{prefix}%012x","max_amount":%d}}'.encode()
        self._clients = [_Bidder(self, subject.token(uuid4(), "viewer"), subject.framing) for _ in range(2)]
        self._number = 0
        self.load = Load(0, 0)

    async def connect(self) -> None:
        """Connect them. Raises `LoadFailed`."""
        await connect(self._clients, self._url)

    def disconnect(self) -> None:
        """Close their sockets."""
        disconnect(self._clients)

    async def bid(self, rate: int, warm_up_s: float, seconds: float) -> Load:
        """Bid at a rate; return when the last bid has left."""
        self.load = load = Load(self._number, int(rate * warm_up_s))
        pace = Pace(rate, load.warm_up + int(rate * seconds), self._send)
        pace.start()
        try:
            await pace.done.wait()
            # The last one has its interval, too.
            await asyncio.sleep(1 / rate)
        finally:
            pace.stop()
        load.ended_ns = time.monotonic_ns()
        if any(client.lost is not None for client in self._clients):
            raise LoadFailed("the server closed a bidder's socket")
        return load

    def _send(self, scheduled_ns: int) -> None:
        number = self._number
        self._number += 1
        client = self._clients[number % len(self._clients)]
        self.load.sent(scheduled_ns, time.monotonic_ns())
        client.send(self._bid % (number, number, STEP * (number + 1)))


class _Answer(msgspec.Struct):
    type: str
    ref: int | None = None
    seq: int = 0
    code: str = ""


_read_answer: Final = msgspec.json.Decoder(_Answer).decode


class _Bidder(Client):
    def __init__(self, bidders: Bidders, token: str, framing: Framing) -> None:
        super().__init__(token, framing)
        self._bidders = bidders

    def on_message(self, message: bytes) -> None:
        now_ns = time.monotonic_ns()
        answer = _read_answer(message)
        load = self._bidders.load
        # What comes after its load was given up, or is over, counts no more.
        if answer.ref is None or answer.ref < load.first or load.is_given_up:
            return
        if answer.type == "ack":
            load.taken(answer.ref, answer.seq, now_ns)
        elif answer.type in ("rejected", "error"):
            load.not_taken(answer.ref, answer.code)
