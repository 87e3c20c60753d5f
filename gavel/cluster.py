"""Ray and our actors on it: started, watched over, started anew when Ray dies, and stopped.

A Ray that we only joined is watched over by whoever started it.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import psutil

from actors.bootstrap import Place
from engine.limits import MEBIBYTE
from gavel.errors import CommandError
from gavel.settings import Settings
from gavel.supervision import LOOK_S, PAUSE_S, Say, is_alive, is_done_before, persist

_START_S: Final = 60
_STOP_S: Final = 20
_KILL_S: Final = 10
_OBJECT_STORE_BYTES: Final = 200 * 1024 * 1024
_ENVIRONMENT: Final = {
    # Workers would run at nice 15 otherwise.
    "RAY_worker_niceness": "0",
    # A killed actor answers again after 1.0 s, not 1.7 s and more.
    "RAY_timeout_ms_task_wait_for_death_info": "50",
    # Nobody reads Ray's records of its calls, and writing the last of them takes 5 s if its head is dead.
    "RAY_task_events_report_interval_ms": "0",
}
_HEAD: Final = frozenset({"gcs_server", "raylet"})
"""Those of Ray's processes without which it is none."""


class Cluster:
    """Ray with the shards and gateways of one engine. After `stop` it is over."""

    def __init__(self, settings: Settings, place: Place, port: int, public_key: bytes, say: Say) -> None:
        self._settings = settings
        self._place = place
        self._port = port
        self._public_key = public_key
        self._say = say
        # Ray's start and end block. In this thread they come one after the other, even if nobody waits any more.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ray")
        self._folder: Path | None = None
        """Where our own Ray keeps its files."""
        self._head: dict[str, psutil.Process] = {}
        self._shards: list[Any] = []
        self._gateways: list[Any] = []

    async def start(self) -> None:
        """Return when bids can be placed. Raises `CommandError`."""
        self._say("starting Ray")
        await self._in_thread(self._start_ray)
        self._say(f"starting {self._settings.shards} shards and {self._settings.gateways} gateways")
        await self._start_actors()

    async def keep_running(self) -> None:
        """Start Ray and all actors anew whenever a part of Ray dies that nothing else would start again."""
        while True:
            name = await self._death()
            self._say(f"Ray's {name} has died: Ray, shards and gateways are started again")
            await persist(self._start_again, self._say)
            self._say("bids can be placed again")

    async def stop(self) -> None:
        """Stop gateways, then shards, so that no bid comes to a shard that is gone, and then Ray."""
        for actors in (self._gateways, self._shards):
            if actors and self._dead() is None:
                # One that is gone already needs no stopping: its work is in the journal.
                with contextlib.suppress(Exception):
                    async with asyncio.timeout(_STOP_S):
                        await asyncio.gather(*(actor.stop.remote() for actor in actors), return_exceptions=True)
                _kill(actors)
        await self._in_thread(self._end_ray)
        self._thread.shutdown()

    # Starting

    async def _start_again(self) -> None:
        self._shards, self._gateways = [], []
        await self._in_thread(self._end_ray)
        await self._in_thread(self._start_ray)
        await self._start_actors()

    def _start_ray(self) -> None:
        """Join the cluster that is named, or start a Ray of our own, in a folder of its own."""
        os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})
        # Read when Ray is imported: this process handles its signals itself; the actors shall go on to print their
        # stack.
        os.environ["RAY_DISABLE_FAILURE_SIGNAL_HANDLER"] = "1"
        import ray

        del os.environ["RAY_DISABLE_FAILURE_SIGNAL_HANDLER"]

        from actors import shard_actor
        from actors.ray_actor import NAMESPACE
        from gateway import gateway_actor

        own: dict[str, Any] = {}
        if self._settings.ray_address is None:
            self._folder = Path(tempfile.mkdtemp(prefix="gavel-ray-")).resolve()
            own = {
                "_temp_dir": str(self._folder),
                "include_dashboard": False,
                "object_store_memory": _OBJECT_STORE_BYTES,
                "resources": {
                    shard_actor.RESOURCE: self._settings.shards,
                    gateway_actor.RESOURCE: self._settings.gateways,
                },
            }
        try:
            ray.init(
                address=self._settings.ray_address or "local",
                namespace=NAMESPACE,
                log_to_driver=False,
                configure_logging=True,
                logging_level=logging.ERROR,
                **own,
            )
        except Exception as error:
            raise CommandError(f"Ray did not start ({type(error).__name__}: {error}).") from error
        if self._folder is not None:
            self._head = _head_of_ray()

    async def _start_actors(self) -> None:
        from ray.exceptions import RayError

        try:
            await self._in_thread(self._create_actors)
            ready = asyncio.gather(*(_ready(actor) for actor in self._shards + self._gateways))
            async with asyncio.timeout(_START_S):
                is_ready = await is_done_before(ready, self._death())
        except RayError as error:
            raise CommandError(f"Ray does not start the engine ({type(error).__name__}: {error}).") from error
        except TimeoutError:
            sentence = f"The engine did not start within {_START_S} s; {self._place.log_dir} says why."
            raise CommandError(sentence) from None
        if not is_ready:
            raise CommandError("Ray died while the engine started.")

    def _create_actors(self) -> None:
        from actors import shard_actor
        from gateway import gateway_actor

        memory_mb = self._settings.gateway_memory_mb
        door = gateway_actor.Door(
            host=self._settings.host,
            port=self._port,
            public_key=self._public_key,
            raised_addresses=self._settings.raised_addresses,
            memory_bytes_max=None if memory_mb is None else memory_mb * MEBIBYTE,
            gateways=self._settings.gateways,
            origins=self._settings.origins or "",
            tls_certificate=_text(self._settings.tls_certificate),
            tls_key=_text(self._settings.tls_key),
        )
        self._shards = [shard_actor.create(self._place, number) for number in range(self._settings.shards)]
        self._gateways = [gateway_actor.create(self._place, door, number) for number in range(self._settings.gateways)]

    # Watching and ending

    def _dead(self) -> str | None:
        """The name of a part of our Ray that is dead, if one is."""
        return next((name for name, process in self._head.items() if not is_alive(process)), None)

    async def _death(self) -> str:
        """Wait until a part of our Ray dies, and return its name."""
        while (name := self._dead()) is None:  # noqa: ASYNC110 (a process has no event to wait for)
            await asyncio.sleep(LOOK_S)
        return name

    def _end_ray(self) -> None:
        import ray

        # What was acknowledged is in the journal, and whoever lived on would keep its port and its memory.
        if self._folder is not None and self._dead() is not None:
            _kill_all_writing_in(self._folder)
        ray.shutdown()
        self._head = {}
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    async def _in_thread(self, call: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, call)


async def _ready(actor: Any) -> None:  # noqa: ANN401 (Ray's handles have no type)
    """Wait until an actor is ready, through restarts: its log says why it did not start at once."""
    from ray.exceptions import RayActorError

    while True:
        try:
            await actor.ready.remote()
        except RayActorError:
            await asyncio.sleep(PAUSE_S)
        else:
            return


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _kill(actors: list[Any]) -> None:
    import ray

    for actor in actors:
        with contextlib.suppress(Exception):
            ray.kill(actor, no_restart=True)


def _head_of_ray() -> dict[str, psutil.Process]:
    """Those processes of the Ray that we have just started without which it is none, by name."""
    head = {}
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            head[child.name()] = child
    if not head.keys() >= _HEAD:
        raise CommandError("Ray died while it started.")
    return {name: head[name] for name in _HEAD}


def _kill_all_writing_in(folder: Path) -> None:
    """Kill all processes of the Ray in this folder: those of a raylet that is dead are nobody's children any more."""
    deadline = time.monotonic() + _KILL_S
    while processes := _writing_in(folder):
        if time.monotonic() > deadline:
            raise CommandError(f"Processes of Ray do not end: {', '.join(str(one.pid) for one in processes)}.")
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(LOOK_S)


def _writing_in(folder: Path) -> list[psutil.Process]:
    """The processes, other than this one, that have a file in a folder open for writing: each of Ray's has its log."""
    found = []
    for process in psutil.process_iter():
        # What we may not look into is not ours.
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and any(
                # Not everywhere does the system say what a file was opened for.
                Path(file.path).is_relative_to(folder) and getattr(file, "mode", "w") != "r"
                for file in process.open_files()
            ):
                found.append(process)
    return found
