"""Shards for these tests, which end with them."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from actors.memory import MemoryStore
from actors.messages import AuctionView
from tests.support.shards import House, Start, opening


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    houses = []

    async def start(store: MemoryStore | None = None, **options: Any) -> House:
        house = House(store, **options)
        houses.append(house)
        await house.start()
        return house

    yield start
    for house in houses:
        await house.kill()


@pytest.fixture
async def house(start: Start) -> House:
    """A shard in which one auction is open."""
    house = await start()
    assert isinstance(await house.ask(opening()), AuctionView)
    return house
