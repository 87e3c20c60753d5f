"""Virtual time, simulated processes, and the scheduler: what happens next is decided by one seed.

A `World` is a clock and a heap of events. A `Process` is an operating-system process with an event loop of asyncio's
kind: tasks, futures, locks and timeouts of the real code run on it unchanged. Everything happens in one thread.
"""

import asyncio
import gc
import os
import random
import traceback
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from heapq import heappop, heappush
from random import Random
from types import TracebackType
from typing import Any, Final, NamedTuple, NoReturn, Self, TypeVar, cast

T = TypeVar("T")

START_US: Final = 1_767_225_600_000_000
"""True time when a world begins: 2026-01-01, UTC."""
SECOND_US: Final = 1_000_000
_PPM: Final = 1_000_000
_UPTIME_NS_MAX: Final = 10 * 24 * 3_600 * 1_000_000_000
_GUEST_TURNS: Final = 20
"""So many turns of asyncio's loop a guest gets to answer what has happened, before more does."""
_HANDLES_MAX: Final = 1_000_000
"""A process that runs so many callbacks while no time passes never ends."""


class ProcessDied(BaseException):
    """Unwinds the code of a process that ended itself; no `except Exception` holds it up."""


class Fault(NamedTuple):
    """An exception that nobody handled: a bug."""

    at_us: int
    process: str
    text: str


class World:
    """All that is simulated, at one moment of true time. A context: leaving it ends all processes."""

    def __init__(self, seed: int, on_trace: Callable[[str], None] | None = None) -> None:
        self.seed = seed
        self.random = Random(seed)
        self.now_us = START_US
        """True time in microseconds since the epoch, UTC."""
        self.processes: list[Process] = []
        self.faults: list[Fault] = []
        """To be read when the world is closed: some show only then."""
        self.shared: dict[type, Any] = {}
        """What the parts of this world have in common, by type."""
        self.is_tracing = on_trace is not None
        self.heap: list[tuple[int, float, Callable[..., object], tuple[Any, ...]]] = []
        """When, the tie's seeded order, what and with which arguments."""
        self._on_trace = on_trace
        self._is_stopped = False
        self._is_closed = False
        self._urandom = os.urandom
        self._random_state = random.getstate()
        self._is_collecting = gc.isenabled()

    def __enter__(self) -> Self:
        """Make the random bytes of the real code (and its `uuid4`), and its random numbers, follow from the seed."""
        os.urandom = Random(f"bytes {self.seed}").randbytes
        random.seed(f"numbers {self.seed}")
        # When garbage is collected must not matter: not while the world runs, and then only what it left.
        gc.disable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        os.urandom = self._urandom
        random.setstate(self._random_state)
        if self._is_collecting:
            gc.enable()

    def at(self, when_us: int, callback: Callable[..., object], *arguments: object) -> None:
        """Have something happen at a time, outside of any process."""
        heappush(self.heap, (when_us, self.random.random(), callback, arguments))

    def after(self, delay_us: int, callback: Callable[..., object], *arguments: object) -> None:
        """Have something happen in a while, outside of any process."""
        heappush(self.heap, (self.now_us + delay_us, self.random.random(), callback, arguments))

    def run(self, until: int) -> None:
        """Let everything happen that happens up to this time (microseconds), or until `stop`."""
        self._is_stopped = False
        outer = asyncio._get_running_loop()
        heap = self.heap
        try:
            while heap and heap[0][0] <= until:
                self.now_us, _, callback, arguments = heappop(heap)
                callback(*arguments)
                if self._is_stopped:
                    return
        finally:
            asyncio._set_running_loop(outer)
        self.now_us = max(self.now_us, until)

    def stop(self) -> None:
        """End `run` after what happens at this moment."""
        self._is_stopped = True

    def trace(self, process: str, text: str) -> None:
        """Tell whoever follows; to be called only while `is_tracing`."""
        if self._on_trace is not None:
            self._on_trace(f"{(self.now_us - START_US) / SECOND_US:12.6f} {process:<12} {text}")

    def close(self) -> None:
        """End all processes without a trace of them. A second call does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        self._on_trace = None
        self.is_tracing = False
        # Lost tasks and exceptions that nobody fetched tell of themselves when they are collected.
        gc.collect()
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.bury()
        self.heap.clear()
        self.shared.clear()


class Handle:
    """A callback in the line of a process, or on its timer."""

    __slots__ = ("_arguments", "_callback", "_context", "is_cancelled", "when")

    def __init__(
        self, callback: Callable[..., object], arguments: tuple[Any, ...], context: Context | None, when: float = 0.0
    ) -> None:
        self._callback = callback
        self._arguments = arguments
        self._context = copy_context() if context is None else context
        self.is_cancelled = False
        self.when = when

    def cancel(self) -> None:
        self.is_cancelled = True
        self._arguments = ()

    def cancelled(self) -> bool:
        return self.is_cancelled

    def run(self) -> None:
        self._context.run(self._callback, *self._arguments)


class Process:
    """One operating-system process, and the event loop in it.

    Of `asyncio.AbstractEventLoop` it has what tasks, futures and timers need. Its callbacks run in the order in which
    they became ready, and take no time; with `turn_us`, what was ready at one time keeps it busy for so long.
    """

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.turn_us = 0
        self.is_dead = False
        self.is_paused = False
        self.deaths: list[str] = []
        """Why it ended itself, if it did."""
        self.on_death: list[Callable[[], None]] = []
        """What the kernel does when this process ends: called once, outside of it."""
        self._ready: deque[Handle] = deque()
        self._timers: list[tuple[int, int, Handle]] = []
        """When by this process's own clock (nanoseconds), the order of creation, and what."""
        self._timers_made = 0
        self._turn_us: int | None = None
        """When its next turn is, if one is due."""
        self._alarm_us: int | None = None
        """When the world looks after its timers next."""
        self._busy_until_us = 0
        self._clock_us = world.now_us
        self._clock_ns = world.random.randrange(_UPTIME_NS_MAX)
        self._rate_ppm = _PPM
        self._left: set[asyncio.Task[Any]] = set()
        self._loop = cast("asyncio.AbstractEventLoop", self)
        world.processes.append(self)

    # Life and death

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a coroutine in this process. An exception that ends it is a fault."""
        task = self.create_task(work)
        task.add_done_callback(self._note_end)
        return task

    def kill(self) -> None:
        """End at once: nothing of it ever runs again."""
        if self.is_dead:
            return
        self.is_dead = True
        if self.world.is_tracing:
            self.world.trace(self.name, "ends")
        # Kept to the world's end: what is left of its tasks must not be collected, and so unwound, in the midst of it.
        self._left = asyncio.all_tasks(self._loop)
        self._ready.clear()
        self._timers.clear()
        for tell in self.on_death:
            tell()
        self.on_death.clear()

    def die(self, reason: str) -> NoReturn:
        """End from within, as `os._exit` does."""
        if self.world.is_tracing:
            self.world.trace(self.name, f"ends itself: {reason}")
        self.deaths.append(reason)
        self.kill()
        raise ProcessDied(reason)

    def pause(self) -> None:
        """Stop (as by SIGSTOP): nothing of it runs, its connections stay open."""
        if self.world.is_tracing:
            self.world.trace(self.name, "is paused")
        self.is_paused = True

    def resume(self) -> None:
        """Go on after `pause`; what came meanwhile, and which timers came due, is found now."""
        if self.world.is_tracing:
            self.world.trace(self.name, "goes on")
        self.is_paused = False
        self._wake()

    def bury(self) -> None:
        """Unwind what is left of a dead process. Nothing that it does now has any effect."""
        outer = asyncio._get_running_loop()
        asyncio._set_running_loop(self._loop)
        try:
            for task in self._left:
                coroutine = task.get_coro()
                try:
                    coroutine.close()
                except (Exception, ProcessDied):  # noqa: S112, BLE001 (code that goes on after its end)
                    continue
        finally:
            asyncio._set_running_loop(outer)
        self._left.clear()

    # Its clock

    def monotonic_ns(self) -> int:
        """The process's own clock, which drifts against true time."""
        return self._clock_ns + (self.world.now_us - self._clock_us) * self._rate_ppm // 1_000

    def set_drift(self, ppm: int) -> None:
        """Go faster than true time by so many millionths from now on, or slower."""
        self._clock_ns, self._clock_us = self.monotonic_ns(), self.world.now_us
        self._rate_ppm = _PPM + ppm
        self._arm()

    def jump(self, duration_ns: int) -> None:
        """Put the clock forward."""
        assert duration_ns >= 0
        self._clock_ns += duration_ns
        self._arm()

    # The event loop

    def time(self) -> float:
        return self.monotonic_ns() / 1e9

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> Handle:
        handle = Handle(callback, args, context)
        if not self.is_dead:
            self._ready.append(handle)
            if self._turn_us is None:
                self._wake()
        return handle

    call_soon_threadsafe = call_soon

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Handle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Handle:
        handle = Handle(callback, args, context, when)
        if not self.is_dead:
            self._timers_made += 1
            timer = (int(when * 1e9), self._timers_made, handle)
            heappush(self._timers, timer)
            if self._timers[0] is timer:
                self._arm()
        return handle

    def soon(self, handle: Handle) -> None:
        """Have the kernel put something in this process's line."""
        if not self.is_dead:
            self._ready.append(handle)
            if self._turn_us is None:
                self._wake()

    def receive(self, handle: Handle) -> None:
        """Do the same as an event of the world: something has come from outside, data to read, say."""
        if not self.is_dead:
            self._ready.append(handle)
            if self._turn_us is None:
                if self._busy_until_us <= self.world.now_us:
                    self._turn()
                else:
                    self._wake()

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self._loop)

    def create_task(self, coro: Coroutine[Any, Any, T], *, name: str | None = None, **options: Any) -> asyncio.Task[T]:
        if self.is_dead:
            # So that nobody misses its beginning.
            coro.close()
        return asyncio.Task(coro, loop=self._loop, name=name or self.name, **options)

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return not self.is_dead

    def is_closed(self) -> bool:
        return self.is_dead

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Take down what nobody handled."""
        if self.is_dead:
            return
        error = context.get("exception")
        text = str(context.get("message", ""))
        if error is not None:
            text += "\n" + "".join(traceback.format_exception(error))
        self.world.faults.append(Fault(self.world.now_us, self.name, text))
        if self.world.is_tracing:
            self.world.trace(self.name, f"FAULT {text}")

    def _note_end(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.call_exception_handler({"message": "a task of the process ended", "exception": error})

    def _arm(self) -> None:
        """Have the timers looked after when the first one is due, by whichever clock that is now."""
        timers = self._timers
        while timers and timers[0][2].is_cancelled:
            heappop(timers)
        if timers:
            delay_ns = timers[0][0] - self._clock_ns
            # Rounded up, since no timer goes off early.
            when_us = max(self._clock_us - (-delay_ns * 1_000 // self._rate_ppm), self.world.now_us)
            if self._alarm_us is None or when_us < self._alarm_us:
                self._alarm_us = when_us
                heappush(self.world.heap, (when_us, self.world.random.random(), self._ring, ()))

    def _ring(self) -> None:
        # Otherwise an earlier alarm has replaced this one.
        if self._alarm_us == self.world.now_us:
            self._alarm_us = None
            if self.is_paused or (self._timers and self._timers[0][0] <= self.monotonic_ns()):
                self._wake()
            else:
                self._arm()

    def _wake(self) -> None:
        """Have a turn as soon as may be."""
        if self._turn_us is None:
            self._turn_us = max(self.world.now_us, self._busy_until_us)
            heappush(self.world.heap, (self._turn_us, self.world.random.random(), self._turn, ()))

    def _turn(self) -> None:
        """Run all that is ready and due."""
        world = self.world
        if self.is_paused or self.is_dead:
            self._turn_us = None
            return
        self._turn_us = world.now_us
        timers = self._timers
        ready = self._ready
        if timers:
            now_ns = self.monotonic_ns()
            while timers and timers[0][0] <= now_ns:
                ready.append(heappop(timers)[2])
        events._set_running_loop(self._loop)
        handles = 0
        while ready and not self.is_paused:
            handle = ready.popleft()
            if handle.is_cancelled:
                continue
            try:
                handle.run()
            except ProcessDied:
                pass
            except Exception as error:  # noqa: BLE001 (whatever it is, it is taken down)
                self.call_exception_handler({"message": "a callback failed", "exception": error})
            handles += 1
            if handles == _HANDLES_MAX:
                raise RuntimeError(f"{self.name} runs on and on while no time passes")
        events._set_running_loop(None)
        self._busy_until_us = world.now_us + self.turn_us
        # Until here, what became ready needed no further turn.
        self._turn_us = None
        if self._alarm_us is None:
            self._arm()


class Guest(Process):
    """A process whose code runs on asyncio's own loop: a test that was written for the real thing.

    Simulated time passes while `live` runs, as fast as there is something to happen.
    """

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().create_future()

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Handle:
        handle = Handle(callback, args, context)
        self.world.after(int(delay * SECOND_US), self._go_off, handle)
        return handle

    def _go_off(self, handle: Handle) -> None:
        if not (handle.is_cancelled or self.is_dead):
            handle.run()

    async def live(self) -> NoReturn:
        """Let happen what happens next, again and again, whenever the loop has nothing else to do."""
        while True:
            heap = self.world.heap
            while heap and heap[0][2] == self._go_off and heap[0][3][0].is_cancelled:
                # For what does not happen no time passes.
                heappop(heap)
            if heap:
                self.world.run(heap[0][0])
            for _ in range(_GUEST_TURNS):
                await asyncio.sleep(0)
