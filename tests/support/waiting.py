"""Waiting for conditions: whoever waits gives way to the loop, and gives up rather than hang."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

_TURNS_MAX = 10_000
_PATIENCE_S = 20


async def turns(condition: Callable[[], bool]) -> None:
    """Let the loop turn until the condition holds: for what needs no time, only turns of the loop."""
    for _ in range(_TURNS_MAX):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("the condition did not come to hold")


async def quiet() -> None:
    """Let the loop turn until all that can happen without time passing has happened."""
    for _ in range(50):
        await asyncio.sleep(0)


class LoopClock:
    """The running loop's clock, moved by a test: what waits for a time goes off when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loop = asyncio.get_running_loop()
        self._now_s = loop.time()
        monkeypatch.setattr(loop, "time", lambda: self._now_s)

    async def advance(self, ms: float) -> None:
        """Let so much time pass, and do what is due then."""
        self._now_s += ms / 1_000
        await quiet()


async def until(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds: for what comes over sockets."""
    async with asyncio.timeout(_PATIENCE_S):
        while not condition():  # noqa: ASYNC110 (what is waited for knows nothing of tests and their events)
            await asyncio.sleep(0.002)


async def until_true(condition: Callable[[], Awaitable[bool]]) -> None:
    """Ask again and again (of a database, say) until the answer is yes."""
    async with asyncio.timeout(_PATIENCE_S):
        while not await condition():
            pass
