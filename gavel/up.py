"""`gavel up`: starts everything that an engine needs, says when bids can be placed, and stops it in good order."""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final

import asyncpg
import click
from alembic.util import CommandError as MigrationError
from sqlalchemy.exc import SQLAlchemyError

import migrations
from actors.bootstrap import Place
from actors.directory import Directory
from gavel.errors import CommandError
from gavel.keys import KeyPair, ensure_keys, ensure_secret, secret_path
from gavel.postgres import EmbeddedPostgres, held, tune
from gavel.settings import Settings, load_settings

_START_S: Final = 60
_STOP_S: Final = 20
_RETRY_S: Final = 0.2
_OBJECT_STORE_BYTES: Final = 200 * 1024 * 1024
_RAY_ENVIRONMENT: Final = {
    # Workers would run at nice 15 otherwise.
    "RAY_worker_niceness": "0",
    # A killed actor answers again after 1.0 s, not 1.7 s and more.
    "RAY_timeout_ms_task_wait_for_death_info": "50",
}
_DATABASE_LOCK: Final = 0x676176656C75
_HOLD_TRIES: Final = 25
_DURABILITY: Final = ("fsync", "full_page_writes", "synchronous_commit")


@click.command(
    epilog="""\b
Examples:
  gavel up --demo
  gavel up --port 9000 --data-dir ./data --shards 4
  GAVEL_DATABASE_URL=postgresql://gavel@db/gavel gavel up"""
)
@click.option("--host", help="The address to listen on (default 127.0.0.1).")
@click.option("--port", type=int, help="The port to listen on; 0 takes a free one (default 8700).")
@click.option("--data-dir", help="The folder for keys, logs and the embedded Postgres.")
@click.option("--shards", type=int, help="How many processes hold auctions (default 2).")
@click.option("--gateways", type=int, help="How many processes hold sockets (default 1).")
@click.option("--demo", is_flag=True, help="Let simulated bidders bid on a few auctions.")
def command(demo: bool, **given: object) -> None:
    """Run the engine: database, shards and gateways. Ends on Ctrl-C or SIGTERM.

    Prints one line, `ready http://HOST:PORT`, when bids can be placed.
    """
    asyncio.run(_up(load_settings(**given), is_demo=demo))


async def _up(settings: Settings, *, is_demo: bool) -> None:
    stop = asyncio.Event()
    _on_signals(stop)
    async with contextlib.AsyncExitStack() as stack:
        log_dir = stack.enter_context(_data_folder(settings.data_dir))
        port = stack.enter_context(_reserved_port(settings.host, settings.port))
        keys = ensure_keys(settings.data_dir)
        database_url = settings.database_url or stack.enter_context(_embedded_postgres(settings.data_dir))
        await stack.enter_async_context(_prepared(database_url, settings))
        _provide_secret(settings)
        place = Place(
            database_url=database_url,
            secret_path=str(secret_path(settings.data_dir)),
            log_dir=str(log_dir),
            log_level=settings.log_level,
        )
        stack.enter_context(_ray(settings, stop))
        # Ray has put a handler of its own for SIGTERM, which prints a stack and aborts this process 3 s later.
        _on_signals(stop)
        if not stop.is_set():
            await stack.enter_async_context(_actors(settings, place, port, keys))
            url = settings.model_copy(update={"port": port}).url
            click.echo(f"ready {url}")
            if is_demo:
                await stack.enter_async_context(_demo(url, keys))
            _say(f"press Ctrl-C to stop; the description of the API is at {url}/docs")
        await stop.wait()
        _say("stopping")


def _provide_secret(settings: Settings) -> None:
    """Have the cluster's secret where our processes look for it: in the environment if it is given, else in a file."""
    ensure_secret(settings.data_dir, settings.secret)
    if settings.secret is not None:
        os.environ["GAVEL_SECRET"] = settings.secret.get_secret_value()


def _on_signals(stop: asyncio.Event) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)


@contextlib.contextmanager
def _data_folder(folder: Path) -> Iterator[Path]:
    """Hold the data folder for ourselves; yields the folder for logs."""
    with held(folder) as is_ours:
        if not is_ours:
            raise CommandError(
                f"Another engine runs in {folder}; stop it first, or name another folder with --data-dir."
            )
        log_dir = folder / "logs"
        log_dir.mkdir(exist_ok=True)
        yield log_dir


@contextlib.contextmanager
def _reserved_port(host: str, port: int) -> Iterator[int]:
    """Hold a port for the gateways, which share it; yields its number."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        # Without SO_REUSEPORT this fails if anybody else, another engine too, listens there.
        with socket.create_server((host, port), family=family) as probe:
            port = probe.getsockname()[1]
        with socket.socket(family, socket.SOCK_STREAM) as reserved:
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            reserved.bind((host, port))
            yield port
    except OSError as error:
        raise CommandError(
            f"{host}:{port} cannot be listened on ({error.strerror}); choose another port with --port."
        ) from error


@contextlib.contextmanager
def _embedded_postgres(data_dir: Path) -> Iterator[str]:
    _say("starting Postgres")
    postgres = EmbeddedPostgres(data_dir)
    url = postgres.start()
    try:
        yield url
    finally:
        postgres.stop()


@contextlib.asynccontextmanager
async def _prepared(database_url: str, settings: Settings) -> AsyncIterator[None]:
    """Check the database, hold it for ourselves, bring its schema up to date and deal the slots."""
    try:
        connection = await asyncpg.connect(database_url)
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, ValueError) as error:
        raise _unusable(error) from error
    try:
        await _prepare(connection, database_url, settings)
        yield
    finally:
        await connection.close()


async def _prepare(connection: asyncpg.Connection, database_url: str, settings: Settings) -> None:
    try:
        if settings.database_url is None:
            await tune(connection)
        for setting in _DURABILITY:
            if await connection.fetchval("SELECT current_setting($1)", setting) == "off":
                raise CommandError(
                    f"The database has {setting} off and would lose acknowledged bids; turn it on there."
                )
        await _hold(connection)
        await migrations.upgrade(database_url)
        async with asyncpg.create_pool(database_url, min_size=1, max_size=1) as pool:
            await Directory(pool).lay_out(settings.shards)
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, SQLAlchemyError, MigrationError) as error:
        raise _unusable(error) from error


async def _hold(connection: asyncpg.Connection) -> None:
    """Let no second engine deal the slots of this database: the lock lasts as long as this connection."""
    for _ in range(_HOLD_TRIES):
        if await connection.fetchval("SELECT pg_try_advisory_lock($1)", _DATABASE_LOCK):
            return
        # An engine that has just died may take Postgres a moment to notice.
        await asyncio.sleep(_RETRY_S)
    raise CommandError("Another engine runs on this database; stop it first, or use a database of its own.")


def _unusable(error: Exception) -> CommandError:
    return CommandError(f"The database cannot be used ({type(error).__name__}: {error}); check GAVEL_DATABASE_URL.")


@contextlib.contextmanager
def _ray(settings: Settings, stop: asyncio.Event) -> Iterator[None]:
    """Join the cluster that is named, or start a Ray of our own, in a folder of its own."""
    _say("starting Ray")
    os.environ.update({name: value for name, value in _RAY_ENVIRONMENT.items() if name not in os.environ})
    # Read when Ray is imported: this process handles its signals itself; the actors shall go on to print their stack.
    os.environ["RAY_DISABLE_FAILURE_SIGNAL_HANDLER"] = "1"
    import ray

    del os.environ["RAY_DISABLE_FAILURE_SIGNAL_HANDLER"]

    from actors import shard_actor
    from actors.ray_actor import NAMESPACE
    from gateway import gateway_actor

    folder = Path(tempfile.mkdtemp(prefix="gavel-ray-"))
    own: dict[str, Any] = {
        "_temp_dir": str(folder),
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
        "resources": {shard_actor.RESOURCE: settings.shards, gateway_actor.RESOURCE: settings.gateways},
    }
    # Ray speaks on standard output, which belongs to the line that says where the engine is.
    with _output_to_errors():
        try:
            ray.init(
                address=settings.ray_address or "local",
                namespace=NAMESPACE,
                log_to_driver=False,
                configure_logging=True,
                logging_level=logging.ERROR,
                **({} if settings.ray_address else own),
            )
        except SystemExit:
            # While Ray starts, SIGTERM comes to a handler of its own.
            stop.set()
    try:
        yield
    finally:
        with _output_to_errors():
            ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.asynccontextmanager
async def _actors(settings: Settings, place: Place, port: int, keys: KeyPair) -> AsyncIterator[None]:
    """Shards, then gateways; stopped the other way round, so that no bid comes to a shard that is gone."""
    from actors import shard_actor
    from gateway import gateway_actor

    _say(f"starting {settings.shards} shards and {settings.gateways} gateways")
    door = gateway_actor.Door(host=settings.host, port=port, public_key=keys.public_pem)
    shards = [shard_actor.create(place, number) for number in range(settings.shards)]
    gateways = [gateway_actor.create(place, door, number) for number in range(settings.gateways)]
    try:
        try:
            async with asyncio.timeout(_START_S):
                await asyncio.gather(*(_ready(actor) for actor in shards + gateways))
        except TimeoutError:
            raise CommandError(f"The engine did not start within {_START_S} s; {place.log_dir} says why.") from None
        yield
    finally:
        for actors in (gateways, shards):
            # One that is gone already needs no stopping: its work is in the journal.
            with contextlib.suppress(Exception):
                async with asyncio.timeout(_STOP_S):
                    await asyncio.gather(*(actor.stop.remote() for actor in actors), return_exceptions=True)
            _kill(actors)


async def _ready(actor: Any) -> None:  # noqa: ANN401 (Ray's handles have no type)
    """Wait until an actor is ready, through restarts: its log says why it did not start at once."""
    from ray.exceptions import RayActorError

    while True:
        try:
            await actor.ready.remote()
        except RayActorError:
            await asyncio.sleep(_RETRY_S)
        else:
            return


def _kill(actors: list[Any]) -> None:
    import ray

    for actor in actors:
        with contextlib.suppress(Exception):
            ray.kill(actor, no_restart=True)


@contextlib.asynccontextmanager
async def _demo(url: str, keys: KeyPair) -> AsyncIterator[None]:
    from gavel.demo import run_demo

    stop = asyncio.Event()
    task = asyncio.create_task(run_demo(url, keys.private_pem, stop, _say))
    try:
        yield
    finally:
        stop.set()
        await asyncio.wait([task], timeout=5)
        task.cancel()


@contextlib.contextmanager
def _output_to_errors() -> Iterator[None]:
    """Send what anybody writes to standard output, on whatever way, to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _say(sentence: str) -> None:
    click.echo(sentence, err=True)
