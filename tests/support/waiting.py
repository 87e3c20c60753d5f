"""Waiting for conditions: whoever waits gives way to the loop, and gives up rather than hang."""

import asyncio
from collections.abc import Awaitable, Callable

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
