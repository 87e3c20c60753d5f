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
        self._worst: dict[str, float] = {}
        self._workers: dict[str, dict[str, float]] = {}
        self._greenlet = gevent.Greenlet()
        environment.events.test_start.add_listener(self._start)
        environment.events.test_stop.add_listener(self._stop)
        environment.events.report_to_master.add_listener(self._report)
        environment.events.worker_report.add_listener(self._collect)

    def _start(self, **_named: object) -> None:
        self._greenlet.kill()
        self._worst = {}
        self._workers.clear()
        self._greenlet = gevent.spawn(self._watch)

    def _stop(self, **_named: object) -> None:
        self._greenlet.kill()
        if self._is_worker:
            return
        for worker, worst in (self._workers or {"this process": self._worst}).items():
            # A run that is over within the first seconds has no figures.
            if worst:
                level = logging.WARNING if is_bottleneck(worst) else logging.INFO
                logger.log(level, "%s, at its worst: %s", worker, sentence(worst))

    def _report(self, data: dict[str, Any], **_named: object) -> None:
        data["generator"] = self._worst

    def _collect(self, client_id: str, data: dict[str, Any], **_named: object) -> None:
        # A worker that has not begun yet has nothing to say.
        if worst := data.get("generator"):
            self._workers[client_id] = worst

    def _watch(self) -> None:
        was_bottleneck = False
        while True:
            began_s, cpu_began_s = time.perf_counter(), time.process_time()
            lates_ms = []
            due_s = began_s
            while due_s < began_s + WINDOW_S:
                due_s = max(due_s, time.perf_counter()) + BEAT_S
                gevent.sleep(due_s - time.perf_counter())
                lates_ms.append((time.perf_counter() - due_s) * 1_000)
            cpu_percent = (time.process_time() - cpu_began_s) / (time.perf_counter() - began_s) * 100
            window = {"cpu_percent": cpu_percent, "late_p99_ms": sorted(lates_ms)[int(len(lates_ms) * 0.99)]}
            self._worst = {name: max(value, self._worst.get(name, 0.0)) for name, value in window.items()}
            if is_bottleneck(window) and not was_bottleneck:
                logger.warning("%s", sentence(window))
            was_bottleneck = is_bottleneck(window)


def is_bottleneck(figures: dict[str, float]) -> bool:
    """Whether a generator with these figures spoils the measurement."""
    return figures["cpu_percent"] > CPU_PERCENT_MAX or figures["late_p99_ms"] > LATE_MS_MAX


def sentence(figures: dict[str, float]) -> str:
    """These figures for people."""
    shown = f"{figures['cpu_percent']:.0f} % of a core, p99 of its greenlets {figures['late_p99_ms']:.1f} ms late"
    if not is_bottleneck(figures):
        return f"the generator kept up ({shown})"
    if figures["cpu_percent"] > CPU_PERCENT_MAX:
        way_out = "give it more processes (--processes) or machines, or fewer users"
    else:
        way_out = "something else took its core, or it did much at once; leave it one, or bring users more slowly (-r)"
    return f"the generator is the bottleneck ({shown}): it measures its own delay, too; {way_out}"
