"""What is to be done for many sockets, in slices, so that acknowledgements pass in between."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, TypeVar

from actors.logs import get_logger
from engine.limits import SOCKETS_PER_SLICE

logger = get_logger(__name__)

Item = TypeVar("Item")


class _Work(NamedTuple):
    items: Iterator[Any]
    act: Callable[[Any], None]
    done: Callable[[], None] | None


class Slices:
    """Does one slice of all that is to be done in each turn of the loop; whoever has more to do goes to the end."""

    def __init__(self, per_slice: int = SOCKETS_PER_SLICE) -> None:
        self._per_slice = per_slice
        self._line: deque[_Work] = deque()
        self._left = per_slice
        """Of this turn's slice."""
        self._is_at_work = False

    def run(self, items: Sequence[Item], act: Callable[[Item], None], done: Callable[[], None] | None = None) -> None:
        """Do something with each item, and then `done`: at once, as far as this turn's slice goes."""
        self._line.append(_Work(iter(items), act, done))
        if not self._is_at_work:
            self._work()

    def _work(self) -> None:
        self._is_at_work = True
        is_slice_new = self._left == self._per_slice
        while self._line and self._left > 0:
            work = self._line.popleft()
            items = list(islice(work.items, self._left))
            is_over = len(items) < self._left
            self._left -= len(items)
            for item in items:
                _guard(work.act, item)
            if not is_over:
                self._line.append(work)
            elif work.done is not None:
                _guard(work.done)
        self._is_at_work = False
        if is_slice_new:
            asyncio.get_running_loop().call_soon(self._next_slice)

    def _next_slice(self) -> None:
        self._left = self._per_slice
        if self._line:
            self._work()


def _guard(act: Callable[..., None], *args: object) -> None:
    """One client's trouble is not another's, nor its topic's."""
    try:
        act(*args)
    except Exception:
        logger.exception("something could not be done for a socket")
