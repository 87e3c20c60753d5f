"""The Ray actor around a shard: placed, named and restarted by Ray. A thin shell."""

import asyncio
from typing import Any, Final

from actors.bootstrap import Place, set_up_logging, start_shard
from actors.messages import Answer, Payload
from actors.ray_actor import begin, die, spawn

RESOURCE: Final = "gavel_shard"


class ShardActor:
    """Takes its shard over when Ray constructs it."""

    def __init__(self, place: Place, number: int) -> None:
        set_up_logging(place, actor_name(number))
        self._starting = begin(start_shard(place, number, die))

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


def actor_name(number: int) -> str:
    """Under which name Ray knows a shard."""
    return f"shard-{number}"


def create(place: Place, number: int) -> Any:  # noqa: ANN401 (Ray's handles have no type)
    """Have Ray keep this shard running."""
    return spawn(ShardActor, actor_name(number), RESOURCE, place, number)
