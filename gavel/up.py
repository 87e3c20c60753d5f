"""`gavel up`: starts everything that an engine needs, says when bids can be placed, and stops it in good order."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final, TextIO

import asyncpg
import click
from alembic.util import CommandError as MigrationError
from sqlalchemy.exc import SQLAlchemyError

import migrations
from actors.bootstrap import Place
from actors.database import ERRORS
from actors.directory import Directory
from actors.logs import log_to_terminal
from engine.limits import FILES_RESERVED, SOCKETS_MAX
from gateway.room import raise_file_limit, sockets_for
from gavel.archive import KEEP_MB, Archive, claim
from gavel.certificate import check_certificate
from gavel.cluster import Cluster
from gavel.errors import CommandError
from gavel.keys import KeyPair, ensure_keys, ensure_secret, secret_path
from gavel.postgres import EmbeddedPostgres, held, reason_of, tune
from gavel.settings import Settings, load_settings
from gavel.supervision import LOOK_S, PAUSE_S, beside, is_done_before, pauses, persist

_DATABASE_LOCK: Final = 0x676176656C75
_SESSION: Final = "SELECT pid, backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()"
_END_SESSION: Final = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = $1 AND backend_start = $2"
_HOLD_TRIES: Final = 25
_HOLD_LOOK_S: Final = 1
_ANSWER_S: Final = 5
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
@click.option("--archive-dir", help="A folder to copy the embedded Postgres's log to, for `gavel restore`.")
@click.option("--shards", type=int, help="How many processes hold auctions (default 2).")
@click.option("--gateways", type=int, help="How many processes hold sockets (default 1).")
@click.option("--demo", is_flag=True, help="Let simulated bidders bid on a few auctions.")
def command(demo: bool, **given: object) -> None:
    """Run the engine: database, shards and gateways. Ends on Ctrl-C or SIGTERM.

    Prints one line, `ready http://HOST:PORT`, when bids can be placed; with TLS `ready https://HOST:PORT`.
    """
    settings = load_settings(**given)
    check_certificate(settings.tls_certificate, settings.tls_key)
    log_to_terminal()
    asyncio.run(_up(settings, is_demo=demo))


async def _up(settings: Settings, *, is_demo: bool) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, _stop, stop)
    async with contextlib.AsyncExitStack() as stack:
        if await is_done_before(_start(settings, stack, stop, is_demo=is_demo), stop.wait()):
            await stop.wait()


def _stop(stop: asyncio.Event) -> None:
    if not stop.is_set():
        _say("stopping")
        stop.set()


async def _start(settings: Settings, stack: contextlib.AsyncExitStack, stop: asyncio.Event, *, is_demo: bool) -> None:
    """Start everything, in order, and have `stack` stop it. What it cannot do without sets `stop` when it fails."""
    log_dir = stack.enter_context(_data_folder(settings.data_dir))
    output = stack.enter_context(_output_of_our_own(log_dir))
    port = stack.enter_context(_reserved_port(settings.host, settings.port))
    # Whatever is started from here on may open as many.
    files = raise_file_limit()
    keys = ensure_keys(settings.data_dir)
    _provide_secret(settings)
    database_url = settings.database_url
    if database_url is not None and settings.archive_dir is not None:
        raise CommandError(
            "GAVEL_ARCHIVE_DIR is for the embedded Postgres; unset it, and have the server archive its log itself."
        )
    if database_url is None:
        database_url = await stack.enter_async_context(_embedded_postgres(settings, stop))
    await stack.enter_async_context(_held_database(database_url, settings, stop))
    place = Place(
        database_url=database_url,
        secret_path=str(secret_path(settings.data_dir)),
        log_dir=str(log_dir),
        log_level=settings.log_level,
    )
    await stack.enter_async_context(_running_cluster(Cluster(settings, place, port, keys.public_pem, _say), stop))
    url = settings.model_copy(update={"port": port}).url
    click.echo(f"ready {url}", file=output)
    if is_demo:
        await stack.enter_async_context(_demo(url, keys))
    _say_how_many_sockets(files)
    _say(f"press Ctrl-C to stop; the description of the API is at {url}/docs")


def _say_how_many_sockets(files: int) -> None:
    """Say so if a gateway has fewer than it could, for want of files."""
    sockets = sockets_for(files)
    if sockets < SOCKETS_MAX:
        _say(
            f"a gateway has room for {sockets:,} sockets, since a process may open {files:,} files here; "
            f"`ulimit -n {SOCKETS_MAX + FILES_RESERVED}` before the start makes room for {SOCKETS_MAX:,}"
        )


def _provide_secret(settings: Settings) -> None:
    """Have the cluster's secret where our processes look for it: in the environment if it is given, else in a file."""
    ensure_secret(settings.data_dir, settings.secret)
    if settings.secret is not None:
        os.environ["GAVEL_SECRET"] = settings.secret.get_secret_value()


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


@contextlib.asynccontextmanager
async def _embedded_postgres(settings: Settings, stop: asyncio.Event) -> AsyncIterator[str]:
    """Start the embedded Postgres, and start it again whenever it dies; yields its URL."""
    async with contextlib.AsyncExitStack() as stack:
        archive = None
        if settings.archive_dir is not None:
            claim(settings.data_dir, settings.archive_dir)
            archive = Archive(settings.archive_dir, _say)
            stack.push_async_callback(archive.close)
        _say("starting Postgres")
        postgres = EmbeddedPostgres(settings.data_dir)
        stack.callback(postgres.stop)
        url = await asyncio.to_thread(postgres.start)
        await stack.enter_async_context(beside(_keep_postgres(postgres), stop))
        if archive is not None:
            await stack.enter_async_context(beside(archive.keep(url), stop))
        yield url


async def _keep_postgres(postgres: EmbeddedPostgres) -> None:
    while True:
        await asyncio.sleep(LOOK_S)
        if postgres.has_died():
            _say("Postgres has died: it is started again")
            await persist(lambda: asyncio.to_thread(postgres.start), _say)
            _say("Postgres runs again")


@contextlib.asynccontextmanager
async def _held_database(database_url: str, settings: Settings, stop: asyncio.Event) -> AsyncIterator[None]:
    """Check the database and hold it for ourselves, bring its schema up to date and deal the slots."""
    hold = _Hold(database_url)
    try:
        try:
            await hold.take()
            if settings.database_url is None:
                await hold.tune(keep_mb=0 if settings.archive_dir is None else KEEP_MB)
            await migrations.upgrade(database_url)
            async with asyncpg.create_pool(database_url, min_size=1, max_size=1) as pool:
                await Directory(pool).lay_out(settings.shards)
        except (*ERRORS, ValueError, SQLAlchemyError, MigrationError) as error:
            raise CommandError(
                f"The database cannot be used ({reason_of(error)}); check GAVEL_DATABASE_URL."
            ) from error
        async with beside(hold.keep(), stop):
            yield
    finally:
        await hold.end()


class _Hold:
    """Lets no second engine deal the slots of a database: a lock that lasts as long as the session that took it."""

    def __init__(self, database_url: str) -> None:
        self._database_url = database_url
        self._connection: asyncpg.Connection | None = None
        self._session: asyncpg.Record | None = None

    async def take(self) -> None:
        """Take the lock in a new session.

        Raises one of `ERRORS`, or `CommandError` if the database is none for us: it is another engine's, or unsafe.
        """
        await self.end()
        self._connection = connection = await asyncpg.connect(self._database_url)
        for setting in _DURABILITY:
            if await connection.fetchval("SELECT current_setting($1)", setting) == "off":
                raise CommandError(
                    f"The database has {setting} off and would lose acknowledged bids; turn it on there."
                )
        if self._session is not None:
            # Where only the network broke, our old session may live on and hold the lock.
            await connection.execute(_END_SESSION, *self._session)
        self._session = await connection.fetchrow(_SESSION)
        for _ in range(_HOLD_TRIES):
            if await connection.fetchval("SELECT pg_try_advisory_lock($1)", _DATABASE_LOCK):
                return
            # An engine that has just died may take Postgres a moment to notice.
            await asyncio.sleep(PAUSE_S)
        raise CommandError("Another engine runs on this database; stop it first, or use a database of its own.")

    async def tune(self, keep_mb: int) -> None:
        """Set what an embedded Postgres is to do otherwise."""
        assert self._connection is not None
        await tune(self._connection, keep_mb)

    async def keep(self) -> None:
        """Take the lock again, in a new session, whenever the one that holds it has ended. Raises `CommandError`."""
        assert self._connection is not None
        while True:
            await asyncio.sleep(_HOLD_LOOK_S)
            try:
                await self._connection.execute("SELECT 1", timeout=_ANSWER_S)
            except ERRORS:
                await self._take_again()

    async def end(self) -> None:
        """End the session, whatever state it is in."""
        if self._connection is not None:
            with contextlib.suppress(*ERRORS):
                await self._connection.close(timeout=_ANSWER_S)
            self._connection = None

    async def _take_again(self) -> None:
        for pause_s in pauses():
            try:
                await self.take()
            except ERRORS:
                await asyncio.sleep(pause_s)
            else:
                return


@contextlib.asynccontextmanager
async def _running_cluster(cluster: Cluster, stop: asyncio.Event) -> AsyncIterator[None]:
    try:
        await cluster.start()
        async with beside(cluster.keep_running(), stop):
            yield
    finally:
        await cluster.stop()


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
def _output_of_our_own(log_dir: Path) -> Iterator[TextIO]:
    """Keep standard output for the line that says where the engine is; what Ray prints there at any time is logged."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w") as output:
        with (log_dir / "ray.log").open("ab") as log:
            os.dup2(log.fileno(), 1)
        try:
            yield output
        finally:
            sys.stdout.flush()
            os.dup2(output.fileno(), 1)


def _say(sentence: str) -> None:
    click.echo(sentence, err=True)
