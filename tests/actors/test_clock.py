from typing import cast

import asyncpg
import pytest

from actors.clock import Clock

MS = 1_000_000


class Monotonic:
    def __init__(self) -> None:
        self.ns = 5_000 * MS

    def __call__(self) -> int:
        return self.ns


class Postgres:
    """Answers with its own time; the question takes `way_ms` there and `way_ms` back."""

    def __init__(self, monotonic: Monotonic, ahead_ms: int, way_ms: int) -> None:
        self.monotonic = monotonic
        self.ahead_ms = ahead_ms
        self.way_ms = way_ms

    async def fetchval(self, query: str) -> int:
        assert "clock_timestamp()" in query, "now() is the time at which a transaction began"
        self.monotonic.ns += self.way_ms * MS
        answer = self.monotonic.ns // MS + self.ahead_ms
        self.monotonic.ns += self.way_ms * MS
        return answer


def test_it_is_not_read_before_it_is_set() -> None:
    with pytest.raises(RuntimeError, match="before it was set"):
        Clock(Monotonic())()


async def test_it_follows_the_reference_whatever_the_way_there_takes() -> None:
    monotonic = Monotonic()
    clock = Clock(monotonic)
    await clock.synchronise(cast(asyncpg.Connection, Postgres(monotonic, ahead_ms=1_700_000_000_000, way_ms=40)))
    assert clock() == 1_700_000_000_000 + monotonic.ns // MS
    monotonic.ns += 1_234 * MS
    assert clock() == 1_700_000_000_000 + monotonic.ns // MS


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
