"""Sockets that watch one auction, in a process of their own: which bid came to whose screen, and when.

A socket's frame costs this process a search for its last `seq`, a comparison and three numbers in an array; what these
say about latencies is computed after the load.
"""

import array
import asyncio
import gc
import json
import multiprocessing
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import uvloop

from loadtests.clients import PLAIN, Client, Framing, connect, disconnect, raise_file_limit
from loadtests.measured import NS_PER_S, Latencies, LoadFailed
from loadtests.subjects import Subject

AT_ONCE: Final = 200
"""So many sockets connect or subscribe at the same time."""
SUBSCRIBE_TIMEOUT_S: Final = 15.0
DRAIN_TIMEOUT_S: Final = 60.0
LOOK_S: Final = 0.05
END_TIMEOUT_S: Final = 5.0
FRAMES_AT_ONCE: Final = 100_000
"""Frames whose latencies are computed in one go."""

_EVENTS: Final = b'{"type":"events"'
_STATE: Final = b'{"type":"state"'
_SEQ: Final = b'"seq":'

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Bids:
    """Bids that were acknowledged, by rising `seq`; times of `time.monotonic_ns`, which all processes share."""

    seqs: Sequence[int]
    scheduled_ns: Sequence[int]
    """When each was to leave."""
    ended_ns: int
    """When the load was over."""
    unanswered_ns: Sequence[int] = ()
    """When those were to leave that were not answered at all, and are on no screen for all we know."""


@dataclass
class Screens:
    """What became of all pairs of a bid and a socket."""

    latencies: Latencies = field(default_factory=Latencies)
    """From the scheduled time of a bid to the first frame on a socket whose `seq` reaches the bid's; or to when we gave
    up, for a pair that never came."""
    by_second: list[tuple[float, float]] = field(default_factory=list)
    """The p99 in milliseconds of the bids of each second since the first."""
    backlog: int = 0
    """Pairs that were still to come when the load was over."""
    drained_s: float = 0.0
    """How long after the end of the load the last pair came."""
    missing: int = 0
    """Pairs that never came."""
    frames: int = 0
    """Those that came before the load was over."""
    lost: int = 0
    """Sockets that the server has closed."""


@dataclass(frozen=True)
class Cut:
    """Says that all sockets are to be closed at once, and to come back to an auction."""

    auction: str


@dataclass(frozen=True)
class Back:
    """That all sockets are back."""

    seconds: float
    """From the cut to the answer to the last subscription."""
    recovered: int
    """So many were given what they had missed; the others the whole state."""


class Watchers:
    """So many sockets in another process. `with` them: at the end that process is gone."""

    def __init__(self, subject: Subject, sockets: int) -> None:
        spawning = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawning.Pipe()
        arguments = (theirs, subject.url, subject.framing, sockets)
        self._process = spawning.Process(target=_main, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """The id of their process."""
        assert self._process.pid is not None
        return self._process.pid

    async def ready(self) -> None:
        """Return when their process can begin."""
        await self._answer()

    async def connect(self) -> float:
        """Connect them all, as guests; how many seconds it took until the last was welcomed. Raises `LoadFailed`."""
        seconds = await self._ask(None)
        assert isinstance(seconds, float)
        return seconds

    async def watch(self, auction: str) -> None:
        """Have them all subscribe to an auction. Raises `LoadFailed`."""
        await self._ask(auction)

    async def reconnect(self, auction: str) -> Back:
        """Close all sockets at once, and have them watch an auction again from where they were. Raises `LoadFailed`."""
        back = await self._ask(Cut(auction))
        assert isinstance(back, Back)
        return back

    async def saw(self, bids: Bids) -> Screens:
        """Wait until they have all seen the last of these bids, and say when they saw which."""
        screens = await self._ask(bids)
        assert isinstance(screens, Screens)
        return screens

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # They end when nobody can ask them any more, unless they still wait for the last question's answer.
        self._pipe.close()
        self._process.join(END_TIMEOUT_S)
        self._process.terminate()
        self._process.join()

    async def _ask(self, question: "str | Bids | Cut | None") -> object:
        self._pipe.send(question)
        return await self._answer()

    async def _answer(self) -> object:
        try:
            answer = await asyncio.to_thread(self._pipe.recv)
        except EOFError:
            raise LoadFailed("the process of the watching sockets has died") from None
        if isinstance(answer, LoadFailed):
            raise answer
        return answer


# Their process


class _Record:
    """What all sockets together have seen."""

    def __init__(self) -> None:
        self.numbers = array.array("q")
        """Three numbers a frame: when it came, and after which `seq` up to which it brought its socket."""
        self.frame = b""
        self.seq = 0
        """The last frame, and its `seq`: most of them come to all sockets alike."""


class _Watcher(Client):
    def __init__(self, record: _Record, framing: Framing) -> None:
        super().__init__(None, framing)
        self.seq = -1
        """The last one that it has seen."""
        self.is_recovered = False
        """Whether it was given what it had missed."""
        self.subscribed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._record = record
        self._note = record.numbers.append

    def successor(self) -> "_Watcher":
        """Another socket that has seen as much."""
        watcher = _Watcher(self._record, self._framing)
        watcher.seq = self.seq
        return watcher

    def on_message(self, message: bytes) -> None:
        now_ns = time.monotonic_ns()
        record = self._record
        if message == record.frame:
            seq = record.seq
        elif message.startswith(_EVENTS):
            seq = _number_after(message, message.rfind(_SEQ))
            record.frame, record.seq = message, seq
        elif message.startswith(_STATE):
            seq = _number_after(message, message.find(_SEQ))
            record.frame, record.seq = message, seq
        else:
            self._on_other(json.loads(message))
            return
        if seq > self.seq:
            self._note(now_ns)
            self._note(self.seq)
            self._note(seq)
            self.seq = seq

    def on_lost(self) -> None:
        if not self.subscribed.done():
            self.subscribed.set_exception(LoadFailed(f"the server closed a watching socket ({self.lost})"))
            # Nobody asks when it is lost before it was to subscribe.
            self.subscribed.exception()

    def _on_other(self, message: dict[str, Any]) -> None:
        match message["type"]:
            case "subscribed":
                self.seq = message["seq"]
                self.is_recovered = message["recovered"]
                self.subscribed.set_result(None)
            case "error" if not self.subscribed.done():
                self.subscribed.set_exception(LoadFailed(f"the server lets nobody watch ({message['message']})"))


def _number_after(message: bytes, place: int) -> int:
    """The number behind the `"seq":` at this place."""
    first = last = place + len(_SEQ)
    while message[last : last + 1].isdigit():
        last += 1
    return int(message[first:last])


def _main(pipe: "Connection[Any, Any]", url: str, framing: Framing, sockets: int) -> None:
    # Ctrl-C is for whoever started us, and closes our pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Unpickled it is another object, though the same in all its parts.
    uvloop.run(_serve(pipe, url, PLAIN if framing == PLAIN else framing, sockets))


async def _serve(pipe: "Connection[Any, Any]", url: str, framing: Framing, sockets: int) -> None:
    """Do what the other end of the pipe asks for, until it is closed."""
    raise_file_limit()
    # Nothing here makes cycles, and looking for them among so many objects would take long.
    gc.disable()
    record = _Record()
    watchers = [_Watcher(record, framing) for _ in range(sockets)]
    pipe.send(None)
    try:
        while True:
            question = await asyncio.to_thread(pipe.recv)
            try:
                pipe.send(await _answer(question, watchers, record, url))
            except LoadFailed as failure:
                pipe.send(failure)
    except (EOFError, BrokenPipeError):
        disconnect(watchers)


async def _answer(question: str | Bids | Cut | None, watchers: list[_Watcher], record: _Record, url: str) -> object:
    match question:
        case Bids():
            return await _saw(question, watchers, record)
        case str():
            await _watch(question, watchers)
            return None
        case Cut():
            return await _reconnect(question, watchers, url)
        case None:
            began_ns = time.monotonic_ns()
            await connect(watchers, url, AT_ONCE)
            return (time.monotonic_ns() - began_ns) / NS_PER_S


async def _watch(auction: str, watchers: list[_Watcher]) -> None:
    for first in range(0, len(watchers), AT_ONCE):
        await _subscribe(auction, watchers[first : first + AT_ONCE])


async def _reconnect(cut: Cut, watchers: list[_Watcher], url: str) -> Back:
    began_ns = time.monotonic_ns()
    disconnect(watchers)
    watchers[:] = [watcher.successor() for watcher in watchers]
    await asyncio.gather(*(_come_back(cut.auction, watcher, url) for watcher in watchers))
    seconds = (time.monotonic_ns() - began_ns) / NS_PER_S
    return Back(seconds, sum(watcher.is_recovered for watcher in watchers))


async def _come_back(auction: str, watcher: _Watcher, url: str) -> None:
    await connect([watcher], url)
    await _subscribe(auction, [watcher])


async def _subscribe(auction: str, watchers: Sequence[_Watcher]) -> None:
    """Have them all watch an auction, from what they have seen of it on."""
    for watcher in watchers:
        since = {} if watcher.seq < 0 else {"since": watcher.seq}
        watcher.send(json.dumps({"op": "subscribe", "ref": 1, "topic": f"auction:{auction}", **since}).encode())
    try:
        async with asyncio.timeout(SUBSCRIBE_TIMEOUT_S):
            await asyncio.gather(*(watcher.subscribed for watcher in watchers))
    except TimeoutError:
        raise LoadFailed(f"the server lets nobody watch within {SUBSCRIBE_TIMEOUT_S:.0f} s") from None


async def _saw(bids: Bids, watchers: list[_Watcher], record: _Record) -> Screens:
    deadline = time.monotonic() + DRAIN_TIMEOUT_S
    last = bids.seqs[-1] if bids.seqs else 0
    # To tell each of them what it waits for would make each of its frames dearer.
    while _are_behind(watchers, last) and time.monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(LOOK_S)
    frames = np.array(record.numbers, dtype=np.int64).reshape(-1, 3)
    del record.numbers[:]
    screens = screens_of(frames, bids, len(watchers), time.monotonic_ns())
    screens.lost = sum(watcher.lost is not None for watcher in watchers)
    return screens


def _are_behind(watchers: Iterable[_Watcher], seq: int) -> bool:
    return any(watcher.seq < seq and watcher.lost is None for watcher in watchers)


# What the frames say


def screens_of(frames: Numbers, bids: Bids, sockets: int, given_up_ns: int) -> Screens:
    """What became of the pairs of `bids` and so many sockets.

    Args:
        frames: a row a frame: when it came, and after which `seq` (exclusive) up to which (inclusive) it brought its
            socket.
        bids: see there.
        sockets: how many watch.
        given_up_ns: until when we waited for pairs that never came.
    """
    screens = Screens(frames=int((frames[:, 0] <= bids.ended_ns).sum()))
    seqs, scheduled_ns = np.array(bids.seqs, dtype=np.int64), np.array(bids.scheduled_ns, dtype=np.int64)
    first_ns = min([*bids.scheduled_ns, *bids.unanswered_ns], default=0)
    seen = np.zeros(len(seqs), dtype=np.int64)
    in_time = 0
    last_ns = bids.ended_ns
    by_second: dict[int, Latencies] = {}
    for came_ns, numbers in _pairs(frames, seqs):
        seen += np.bincount(numbers, minlength=len(seqs))
        in_time += int((came_ns <= bids.ended_ns).sum())
        last_ns = max(last_ns, int(came_ns.max()))
        due_ns = scheduled_ns[numbers]
        seconds = (due_ns - first_ns) // NS_PER_S
        for second in np.unique(seconds):
            chosen = seconds == second
            by_second.setdefault(int(second), Latencies()).add_many((came_ns - due_ns)[chosen])
    screens.missing = len(seqs) * sockets - int(seen.sum())
    screens.backlog = len(seqs) * sockets - in_time
    screens.drained_s = (last_ns - bids.ended_ns) / NS_PER_S
    never = [(int(due_ns), sockets - int(count)) for due_ns, count in zip(scheduled_ns, seen, strict=True)]
    never += [(due_ns, sockets) for due_ns in bids.unanswered_ns]
    for left_ns, count in never:
        if count:
            by_second.setdefault((left_ns - first_ns) // NS_PER_S, Latencies()).add(given_up_ns - left_ns, count)
    for second, latencies in sorted(by_second.items()):
        screens.by_second.append((float(second), latencies.percentile_ms(99)))
        screens.latencies.merge(latencies)
    return screens


def _pairs(frames: Numbers, seqs: Numbers) -> Iterator[tuple[Numbers, Numbers]]:
    """When a frame brought a bid to a socket, and which of the bids, from 0; for all pairs, some at a time."""
    for first in range(0, len(frames), FRAMES_AT_ONCE):
        came_ns, after, up_to = frames[first : first + FRAMES_AT_ONCE].T
        begins, ends = np.searchsorted(seqs, after, "right"), np.searchsorted(seqs, up_to, "right")
        counts = ends - begins
        # For each frame the bids from its first on: begin, begin + 1, …
        steps = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        if len(steps):
            yield np.repeat(came_ns, counts), np.repeat(begins, counts) + steps
