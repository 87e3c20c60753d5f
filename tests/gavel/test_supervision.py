"""Starting again what has died, and what goes on beside."""

import asyncio
import os
from itertools import islice

import psutil
import pytest

from gavel import supervision
from gavel.errors import CommandError
from gavel.supervision import beside, is_alive, is_done_before, pauses, persist


def test_pauses_grow_up_to_a_bound() -> None:
    assert list(islice(pauses(), 7)) == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]


def test_this_process_is_alive() -> None:
    assert is_alive(psutil.Process(os.getpid()))


async def test_a_start_is_tried_until_it_succeeds_and_each_new_failure_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "PAUSE_S", 0)
    failures = ["no room", "no room", "no power", "no room"]
    said: list[str] = []

    async def start() -> None:
        if failures:
            raise CommandError(failures.pop(0))

    await persist(start, said.append)
    assert said == ["no room", "no power", "no room"]
    assert not failures


async def test_work_is_done_unless_something_else_comes_first() -> None:
    never, over = asyncio.Event(), asyncio.Event()
    over.set()
    assert await is_done_before(over.wait(), never.wait())
    assert not await is_done_before(never.wait(), over.wait())
    # Somebody who is asked to stop, and is just ready, is not ready.
    assert not await is_done_before(over.wait(), over.wait())


async def test_work_that_fails_raises() -> None:
    with pytest.raises(CommandError, match="no power"):
        await is_done_before(_fail(), asyncio.Event().wait())


async def test_work_that_is_not_over_is_cancelled() -> None:
    cancelled = asyncio.Event()
    begun = asyncio.Event()

    async def work() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    assert not await is_done_before(work(), begun.wait())
    assert cancelled.is_set()


async def test_what_goes_on_beside_ends_with_the_block() -> None:
    stop = asyncio.Event()
    async with beside(asyncio.Event().wait(), stop):
        assert not stop.is_set()


async def test_what_fails_beside_stops_the_rest_and_is_raised_at_the_end() -> None:
    stop = asyncio.Event()
    with pytest.raises(CommandError, match="no power"):
        async with beside(_fail(), stop):
            await stop.wait()


async def _fail() -> None:
    raise CommandError("no power")
