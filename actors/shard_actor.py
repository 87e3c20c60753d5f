"""The Ray actor around a shard: placed, named and restarted by Ray. A thin shell."""

import asyncio
from typing import Any, Final

from actors.bootstrap import Place, RunningShard, host_of, set_up_logging, settle_memory, start_shard
from actors.messages import Answer, Payload
from actors.ray_actor import begin, die, spawn

RESOURCE: Final = "gavel_shard"


class ShardActor:
    """Takes its shard over when Ray constructs it."""

    def __init__(self, place: Place, number: int) -> None:
        set_up_logging(place, actor_name(number))
        self._starting = begin(_start(place, number))

    async def ready(self) -> None:
        """Return when the shard takes links."""
        await asyncio.shield(self._starting)

    async def submit(self, payload: Payload) -> Answer:
        """The way in for Ray tasks and notebooks: the same turn as a link's."""
        running = await asyncio.shield(self._starting)
        return await running.shard.ask(payload)

    async def stop(self) -> None:
        """Commit, answer, keep snapshots and hand the shard back."""
        running = await asyncio.shield(self._starting)
        await running.stop()


async def _start(place: Place, number: int) -> RunningShard:
    running = await start_shard(host_of(place), number, die)
    settle_memory()
    return running


def actor_name(number: int) -> str:
    """Under which name Ray knows a shard."""
    return f"shard-{number}"


def create(place: Place, number: int) -> Any:  # noqa: ANN401 (Ray's handles have no type)
    """Have Ray keep this shard running."""
    return spawn(ShardActor, actor_name(number), RESOURCE, place, number)
