"""Which shard: requests go to the link of the shard that serves their auction."""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from uuid import UUID

from actors.directory import slot_of
from actors.link import Link
from actors.messages import Answer, Follow, Payload, Unfollow


class Router:
    """The links of one gateway, by shard. What is submitted in one turn of the loop leaves in batches."""

    def __init__(self, slots: Sequence[int]) -> None:
        self._slots = slots
        self._links: Mapping[int, Link] = {}

    def connect(self, links: Mapping[int, Link]) -> None:
        """Take over the links, one to each shard that serves a slot."""
        self._links = links

    def shard_of(self, entity_id: UUID) -> int:
        """The shard that serves this entity."""
        return self._slots[slot_of(entity_id)]

    @property
    def shards(self) -> Collection[int]:
        """All shards that serve a slot."""
        return self._links.keys()

    def submit(self, payload: Payload, on_answer: Callable[[Answer], None]) -> None:
        """Send a request on its way; `on_answer` gets its answer once, perhaps at once. Never raises."""
        self._links[self.shard_of(payload.auction)].submit(payload, on_answer)

    def submit_to(self, shard: int, payload: Follow | Unfollow, on_answer: Callable[[Answer], None]) -> None:
        """Tell one shard what is about no auction. Never raises."""
        self._links[shard].submit(payload, on_answer)

    async def ask(self, payload: Payload) -> Answer:
        """Submit a request and wait for its answer."""
        return await _answer_to(partial(self.submit, payload))

    async def ask_shard(self, shard: int, payload: Follow) -> Answer:
        """Tell one shard what is about no auction, and wait for its answer."""
        return await _answer_to(partial(self.submit_to, shard, payload))

    async def opened(self) -> None:
        """Wait until every shard can be reached."""
        await asyncio.gather(*(link.opened() for link in self._links.values()))

    def unreachable(self) -> list[int]:
        """The shards that cannot be reached at this moment."""
        return [shard for shard, link in self._links.items() if not link.is_open]

    async def close(self) -> None:
        """End the links."""
        await asyncio.gather(*(link.close() for link in self._links.values()))


async def _answer_to(submit: Callable[[Callable[[Answer], None]], None]) -> Answer:
    answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    def settle(value: Answer) -> None:
        # Whoever asked may have gone meanwhile, and its future with it.
        if not answer.done():
            answer.set_result(value)

    submit(settle)
    return await answer
