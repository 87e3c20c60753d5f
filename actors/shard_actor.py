"""The Ray actor around a shard: placed, named and restarted by Ray. A thin shell."""

import asyncio
import logging
import os
from typing import Any, Final, NoReturn

import ray

from actors.bootstrap import Place, RunningShard, set_up_logging, start_shard
from actors.messages import Answer, Payload

logger = logging.getLogger(__name__)

NAMESPACE: Final = "gavel"
RESOURCE: Final = "gavel_shard"


def actor_name(number: int) -> str:
    """Under which name Ray knows a shard."""
    return f"shard-{number}"


def die(reason: str) -> NoReturn:
    """End this process at once: a state that was not journaled must not answer anybody."""
    logger.critical("this process ends: %s", reason)
    logging.shutdown()
    os._exit(1)


class ShardActor:
    """Starts its shard when Ray constructs it, so also after a restart."""

    def __init__(self, place: Place, number: int) -> None:
        set_up_logging(place, actor_name(number))
        self._starting = asyncio.get_running_loop().create_task(start_shard(place, number, die))
        self._starting.add_done_callback(_die_if_failed)

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


def _die_if_failed(starting: asyncio.Task[RunningShard]) -> None:
    if not starting.cancelled() and starting.exception() is not None:
        logger.error("the shard could not start", exc_info=starting.exception())
        die("the shard could not start")


def create(place: Place, number: int) -> Any:  # noqa: ANN401 (Ray's handles have no type)
    """Have Ray start a shard, and start it again whenever its process ends."""
    actor: Any = ray.remote(ShardActor)
    return actor.options(
        name=actor_name(number),
        namespace=NAMESPACE,
        lifetime="detached",
        num_cpus=0,
        resources={RESOURCE: 1},
        max_concurrency=1_000,
        max_restarts=-1,
        # A call that Ray reports as failed may have run: it is never repeated by Ray, only by a client with its id.
        max_task_retries=0,
    ).remote(place, number)
