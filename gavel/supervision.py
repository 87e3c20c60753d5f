"""What it takes to watch over what we started: whether it lives, and starting it again until that succeeds."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from typing import Any, Final

import psutil

from gavel.errors import CommandError

LOOK_S: Final = 0.1
"""How often a process is looked at."""
PAUSE_S: Final = 0.2
PAUSE_MAX_S: Final = 5.0

Say = Callable[[str], None]
"""Tells the person at the terminal something, in one sentence."""


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs; one that is dead and that nobody has asked after yet does not."""
    try:
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def pauses() -> Iterator[float]:
    """Seconds to wait before each next try: ever longer, up to a bound."""
    return (min(PAUSE_S * 2**tries, PAUSE_MAX_S) for tries in itertools.count())


async def persist(start: Callable[[], Awaitable[object]], say: Say) -> None:
    """Start something, and try until that succeeds; a failure that is not the same as the one before is said."""
    said = None
    for pause_s in pauses():
        try:
            await start()
        except CommandError as error:
            if str(error) != said:
                said = str(error)
                say(said)
        else:
            return
        await asyncio.sleep(pause_s)


async def is_done_before(work: Awaitable[object], other: Awaitable[object]) -> bool:
    """Do some work, unless something else comes first; whether it was done. What is not over by then is cancelled.

    Raises what the work raises.
    """
    working, waiting = asyncio.ensure_future(work), asyncio.ensure_future(other)
    try:
        await asyncio.wait((working, waiting), return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return False
        working.result()
        return True
    finally:
        working.cancel()
        waiting.cancel()
        await asyncio.gather(working, waiting, return_exceptions=True)


@contextlib.asynccontextmanager
async def beside(work: Coroutine[Any, Any, object], stop: asyncio.Event) -> AsyncIterator[None]:
    """Have some work go on beside. Should it fail, `stop` is set, and its failure raised at the end."""
    task = asyncio.create_task(work)
    task.add_done_callback(lambda _: stop.set())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
