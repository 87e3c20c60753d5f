"""What all our Ray actors have in common: how Ray is to keep them, and how one ends."""

import asyncio
import logging
import os
from collections.abc import Coroutine
from typing import Any, Final, NoReturn, TypeVar

import ray

from actors.logs import get_logger
from engine.limits import ACTOR_CALLS_MAX

logger = get_logger(__name__)

NAMESPACE: Final = "gavel"

T = TypeVar("T")


def spawn(actor_class: type, name: str, resource: str, *arguments: object) -> Any:  # noqa: ANN401 (Ray's handles have no type)
    """Have Ray start an actor under this name, and start it again whenever its process ends."""
    actor: Any = ray.remote(actor_class)
    return actor.options(
        name=name,
        namespace=NAMESPACE,
        lifetime="detached",
        num_cpus=0,
        resources={resource: 1},
        max_concurrency=ACTOR_CALLS_MAX,
        max_restarts=-1,
        # A call that Ray reports as failed may have run: it is never repeated by Ray, only by a client with its id.
        max_task_retries=0,
    ).remote(*arguments)


def begin(start: Coroutine[None, None, T]) -> asyncio.Task[T]:
    """Start an actor's work when Ray constructs it, so also after a restart; a failed start ends the process."""
    starting = asyncio.get_running_loop().create_task(start)
    starting.add_done_callback(die_if_failed)
    return starting


def die(reason: str) -> NoReturn:
    """End this process at once: a state that was not journaled must not answer anybody."""
    logger.critical("this process ends", reason=reason)
    logging.shutdown()
    os._exit(1)


def die_if_failed(task: asyncio.Task[Any]) -> None:
    """End this process if something that it cannot do without has failed: Ray starts it anew."""
    if not task.cancelled() and task.exception() is not None:
        logger.error("a task failed", exc_info=task.exception())
        die(f"a task failed: {task.exception()!r}")
