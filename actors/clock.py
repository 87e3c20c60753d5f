"""The one clock: Postgres's, taken at start and each minute, advanced monotonically in between."""

import time
from collections.abc import Callable
from typing import Final

import asyncpg

from engine.limits import CLOCK_ROUND_TRIP_MS_MAX

_READINGS: Final = 3
_NOW_MS: Final = "SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint"


class Clock:
    """Milliseconds since the epoch (UTC), as Postgres counts them. It stands still rather than step back."""

    def __init__(self, monotonic_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._monotonic_ns = monotonic_ns
        self._offset_ns: int | None = None
        self._latest_ms = 0

    def __call__(self) -> int:
        """The time now. Raises `RuntimeError` before the first synchronisation."""
        if self._offset_ns is None:
            raise RuntimeError("the clock was read before it was set by Postgres's")
        now = (self._monotonic_ns() + self._offset_ns) // 1_000_000
        self._latest_ms = max(self._latest_ms, now)
        return self._latest_ms

    def set(self, reference_ms: int, asked_ns: int, answered_ns: int) -> None:
        """Take over a reading of the reference clock, asked and answered at these monotonic times."""
        self._offset_ns = reference_ms * 1_000_000 - (asked_ns + answered_ns) // 2

    async def synchronise(self, pool: asyncpg.Pool) -> None:
        """Read Postgres's clock and follow it from here on.

        Of a few readings the quickest counts, and none that is slow, unless there is no other.
        """
        readings = []
        async with pool.acquire() as connection:
            for _ in range(_READINGS):
                asked_ns = self._monotonic_ns()
                reference_ms = await connection.fetchval(_NOW_MS)
                answered_ns = self._monotonic_ns()
                readings.append((answered_ns - asked_ns, reference_ms, asked_ns, answered_ns))
        round_trip_ns, *quickest = min(readings)
        if self._offset_ns is None or round_trip_ns <= CLOCK_ROUND_TRIP_MS_MAX * 1_000_000:
            self.set(*quickest)
