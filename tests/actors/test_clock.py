from typing import Self, cast

import asyncpg
import pytest

from actors.clock import Clock
from engine.limits import CLOCK_ROUND_TRIP_MS_MAX

MS = 1_000_000
AHEAD_MS = 1_700_000_000_000


class Monotonic:
    def __init__(self) -> None:
        self.ns = 5_000 * MS

    def __call__(self) -> int:
        return self.ns


class Postgres:
    """A pool and its one connection. The connection takes `wait_ms` to come by.

    It answers with its own time, `ahead_ms` before ours; each question takes one of `ways_ms` there, and as long back.
    """

    def __init__(self, monotonic: Monotonic, ahead_ms: int, *ways_ms: tuple[int, int], wait_ms: int = 0) -> None:
        self.monotonic = monotonic
        self.ahead_ms = ahead_ms
        self.ways_ms = list(ways_ms)
        self.wait_ms = wait_ms

    @property
    def pool(self) -> asyncpg.Pool:
        return cast(asyncpg.Pool, self)

    def acquire(self) -> Self:
        return self

    async def __aenter__(self) -> Self:
        self.monotonic.ns += self.wait_ms * MS
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self.ways_ms == [], "it was asked too few times"

    async def fetchval(self, query: str) -> int:
        assert "clock_timestamp()" in query, "now() is the time at which a transaction began"
        there_ms, back_ms = self.ways_ms.pop(0)
        self.monotonic.ns += there_ms * MS
        answer = self.monotonic.ns // MS + self.ahead_ms
        self.monotonic.ns += back_ms * MS
        return answer


def test_it_is_not_read_before_it_is_set() -> None:
    with pytest.raises(RuntimeError, match="before it was set"):
        Clock(Monotonic())()


async def test_it_follows_the_reference_whatever_the_way_there_takes() -> None:
    monotonic = Monotonic()
    clock = Clock(monotonic)
    await clock.synchronise(Postgres(monotonic, AHEAD_MS, *[(20, 20)] * 3).pool)
    assert clock() == AHEAD_MS + monotonic.ns // MS
    monotonic.ns += 1_234 * MS
    assert clock() == AHEAD_MS + monotonic.ns // MS


async def test_the_wait_for_a_connection_does_not_count() -> None:
    monotonic = Monotonic()
    clock = Clock(monotonic)
    await clock.synchronise(Postgres(monotonic, AHEAD_MS, *[(1, 1)] * 3, wait_ms=4_000).pool)
    assert clock() == AHEAD_MS + monotonic.ns // MS
    await clock.synchronise(Postgres(monotonic, AHEAD_MS + 500, *[(1, 1)] * 3, wait_ms=4_000).pool)
    assert clock() == AHEAD_MS + 500 + monotonic.ns // MS


async def test_the_quickest_of_three_readings_counts() -> None:
    monotonic = Monotonic()
    clock = Clock(monotonic)
    # Held up on one way only, a reading is off by half of that.
    await clock.synchronise(Postgres(monotonic, AHEAD_MS, (0, 30), (2, 2), (40, 0)).pool)
    assert clock() == AHEAD_MS + monotonic.ns // MS


async def test_slow_readings_count_only_while_there_is_no_other() -> None:
    monotonic = Monotonic()
    clock = Clock(monotonic)
    slow = CLOCK_ROUND_TRIP_MS_MAX + 2
    await clock.synchronise(Postgres(monotonic, AHEAD_MS, *[(0, slow)] * 3).pool)
    off_by = slow // 2
    assert clock() == AHEAD_MS + monotonic.ns // MS - off_by
    await clock.synchronise(Postgres(monotonic, AHEAD_MS + 500, *[(0, slow)] * 3).pool)
    assert clock() == AHEAD_MS + monotonic.ns // MS - off_by
    # One that is good enough mends it.
    await clock.synchronise(Postgres(monotonic, AHEAD_MS, (0, slow), (0, slow), (25, 25)).pool)
    assert clock() == AHEAD_MS + monotonic.ns // MS


def test_it_stands_still_rather_than_step_back() -> None:
    monotonic = Monotonic()
    clock = Clock(monotonic)
    clock.set(1_000, monotonic.ns, monotonic.ns)
    assert clock() == 1_000
    clock.set(900, monotonic.ns, monotonic.ns)
    assert clock() == 1_000
    monotonic.ns += 99 * MS
    assert clock() == 1_000
    monotonic.ns += 2 * MS
    assert clock() == 1_001


def test_it_steps_forward_at_once_and_counts_whole_milliseconds() -> None:
    monotonic = Monotonic()
    clock = Clock(monotonic)
    clock.set(1_000, monotonic.ns, monotonic.ns)
    clock.set(2_000, monotonic.ns, monotonic.ns)
    monotonic.ns += MS - 1
    assert clock() == 2_000
    monotonic.ns += 1
    assert clock() == 2_001
