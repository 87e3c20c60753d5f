"""Whether the generator itself is the bottleneck: its share of a core, and how late its greenlets wake.

A generator that is late makes every figure look worse than the engine is: it reads answers late. It must say so.
"""

import logging
import time
from typing import Any, Final

import gevent
from locust.env import Environment
from locust.runners import WorkerRunner

logger = logging.getLogger("gavel.swarm")

BEAT_S: Final = 0.02
WINDOW_S: Final = 2.0
LATE_MS_MAX: Final = 25.0
"""How late the latest of 100 wakings may be; half of what a person would notice."""
CPU_PERCENT_MAX: Final = 90.0
"""Where Locust warns, too."""


class Generator:
    """Watches this process while a test runs, and says how it does; the master says it of its workers."""

    def __init__(self, environment: Environment) -> None:
        self._is_worker = isinstance(environment.runner, WorkerRunner)
        # The worst figures of all windows, how many there were, and in how many it was the bottleneck.
        self._figures: dict[str, float] = {}
        self._workers: dict[str, dict[str, float]] = {}
        self._greenlet = gevent.Greenlet()
        environment.events.test_start.add_listener(self._start)
        environment.events.test_stopping.add_listener(self._stop)
        environment.events.test_stop.add_listener(self._conclude)
        environment.events.report_to_master.add_listener(self._report)
        environment.events.worker_report.add_listener(self._collect)

    def _start(self, **_named: object) -> None:
        self._greenlet.kill()
        self._figures = {}
        self._workers.clear()
        self._greenlet = gevent.spawn(self._watch)

    def _stop(self, **_named: object) -> None:
        # Ending all users at once takes its time, and nothing is measured any more.
        self._greenlet.kill()

    def _conclude(self, **_named: object) -> None:
        if self._is_worker:
            return
        for name, figures in (self._workers or {"this process": self._figures}).items():
            # A run that is over within the first seconds has none.
            if figures:
                level = logging.WARNING if figures["bottlenecks"] else logging.INFO
                logger.log(level, "%s: %s", name, conclusion(figures))

    def _report(self, data: dict[str, Any], **_named: object) -> None:
        data["generator"] = self._figures

    def _collect(self, client_id: str, data: dict[str, Any], **_named: object) -> None:
        # A worker that has not begun yet has nothing to say.
        if figures := data.get("generator"):
            self._workers[client_id] = figures

    def _watch(self) -> None:
        was_bottleneck = False
        while True:
            cpu_percent, late_ms = _window()
            is_bottleneck = cpu_percent > CPU_PERCENT_MAX or late_ms > LATE_MS_MAX
            if is_bottleneck and not was_bottleneck:
                logger.warning("the generator is the bottleneck: %s", _shown(cpu_percent, late_ms))
            was_bottleneck = is_bottleneck
            before = self._figures
            self._figures = {
                "cpu_percent": max(cpu_percent, before.get("cpu_percent", 0)),
                "late_ms": max(late_ms, before.get("late_ms", 0)),
                "windows": before.get("windows", 0) + 1,
                "bottlenecks": before.get("bottlenecks", 0) + is_bottleneck,
            }


def _window() -> tuple[float, float]:
    """This process's share of a core in the next seconds, in percent, and how late its greenlets wake (p99, ms)."""
    began_s, cpu_began_s = time.perf_counter(), time.process_time()
    lates_s = []
    due_s = began_s
    while due_s < began_s + WINDOW_S:
        due_s = max(due_s, time.perf_counter()) + BEAT_S
        gevent.sleep(due_s - time.perf_counter())
        lates_s.append(time.perf_counter() - due_s)
    cpu_percent = (time.process_time() - cpu_began_s) / (time.perf_counter() - began_s) * 100
    return cpu_percent, sorted(lates_s)[int(len(lates_s) * 0.99)] * 1_000


def conclusion(figures: dict[str, float]) -> str:
    """How a generator has done, for people."""
    shown = _shown(figures["cpu_percent"], figures["late_ms"])
    if not figures["bottlenecks"]:
        return f"the generator kept up; at its worst {shown}"
    if figures["cpu_percent"] > CPU_PERCENT_MAX:
        way_out = "give it more processes (--processes) or machines, or fewer users"
    else:
        way_out = "others took its core, or it did much at once: leave it one, or bring users more slowly (-r)"
    share = f"{figures['bottlenecks']:.0f} of {figures['windows']:.0f} times {WINDOW_S:.0f} s"
    return (
        f"the generator was the bottleneck in {share}, and measured its own delay, too; at its worst {shown}; {way_out}"
    )


def _shown(cpu_percent: float, late_ms: float) -> str:
    return f"{cpu_percent:.0f} % of a core, greenlets {late_ms:.0f} ms late (p99)"
