"""What is done for many, a slice in each turn of the loop."""

import asyncio

import pytest

from engine.limits import SOCKETS_PER_SLICE
from gateway.slices import Slices
from tests.support.waiting import quiet


async def test_all_together_do_one_slice_a_turn() -> None:
    slices = Slices(per_slice=100)
    done: list[tuple[str, int]] = []
    for name in "abc":
        slices.run(range(60), lambda item, name=name: done.append((name, item)))  # type: ignore[misc]
    assert len(done) == 100
    await asyncio.sleep(0)
    assert len(done) == 180
    assert sorted(done) == [(name, item) for name in "abc" for item in range(60)]


async def test_what_is_dear_is_done_in_smaller_slices() -> None:
    slices = Slices(per_slice=2)
    done: list[int] = []
    for item in range(5):
        slices.run([item], done.append)
    assert done == [0, 1]
    await asyncio.sleep(0)
    assert done == [0, 1, 2, 3]
    await asyncio.sleep(0)
    assert done == [0, 1, 2, 3, 4]


async def test_small_work_passes_what_is_large() -> None:
    slices = Slices()
    order: list[str] = []
    slices.run(range(5 * SOCKETS_PER_SLICE), lambda _: None, lambda: order.append("large"))
    slices.run(range(3), lambda _: None, lambda: order.append("small"))
    slices.run([], lambda _: None, lambda: order.append("nothing"))
    await quiet()
    assert order == ["small", "nothing", "large"]


async def test_what_is_added_meanwhile_is_done_as_well() -> None:
    slices = Slices()
    done: list[int] = []
    slices.run([1, 2], done.append, lambda: slices.run([3], done.append))
    assert done == [1, 2, 3]


async def test_a_fault_in_one_holds_up_no_other(caplog: pytest.LogCaptureFixture) -> None:
    slices = Slices()
    done: list[float] = []
    slices.run([1, 0, 2], lambda item: done.append(1 / item), lambda: done.append(-1))
    assert done == [1, 0.5, -1]
    assert "could not be done for a socket" in caplog.text
