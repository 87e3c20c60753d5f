"""Watching sockets in a process of their own, beside a server that sends what it is told to."""

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

import pytest
from websockets.asyncio.server import ServerConnection, serve

from loadtests.clients import PLAIN, Framing
from loadtests.measured import NS_PER_S, LoadFailed
from loadtests.subjects import Subject
from loadtests.watchers import Bids, Watchers

SOCKETS = 3


class Server:
    """Welcomes everybody; `subscribed` is what it says to a subscription: if it is empty, it hangs up."""

    def __init__(self) -> None:
        self.subscribed: dict[str, Any] = {"type": "subscribed", "ref": 1, "topic": "auction:a", "seq": 1}
        self.subscribed["recovered"] = False
        self.sockets: list[ServerConnection] = []
        self.since: list[int | None] = []
        """What each subscription named."""

    async def handle(self, socket: ServerConnection) -> None:
        self.sockets.append(socket)
        async for text in socket:
            message = json.loads(text)
            if message["op"] == "hello":
                await socket.send(_text({"type": "welcome"}))
                continue
            self.since.append(message.get("since"))
            if not self.subscribed:
                return
            await socket.send(_text(self.subscribed))

    async def send(self, message: dict[str, Any]) -> None:
        for socket in self.sockets:
            await socket.send(_text(message))


@dataclass
class _Subject:
    url: str
    framing: Framing = PLAIN


def _text(message: dict[str, Any]) -> str:
    return json.dumps(message, separators=(",", ":"))


@asynccontextmanager
async def _watching(server: Server) -> AsyncIterator[Watchers]:
    async with serve(server.handle, "127.0.0.1", 0) as listening:
        port = next(iter(listening.sockets)).getsockname()[1]
        subject = cast("Subject", _Subject(f"http://127.0.0.1:{port}"))
        with Watchers(subject, SOCKETS) as watchers:
            await watchers.ready()
            assert await watchers.connect() > 0
            yield watchers


def _bids(*seqs: int) -> Bids:
    now_ns = time.monotonic_ns()
    return Bids(seqs, [now_ns] * len(seqs), ended_ns=now_ns + 60 * NS_PER_S)


async def test_they_see_bids_in_events_and_in_states() -> None:
    server = Server()
    async with _watching(server) as watchers:
        await watchers.watch("a")
        bids = _bids(2, 3, 5)
        await server.send({"type": "events", "topic": "auction:a", "events": [{"seq": 2}, {"seq": 3, "price": 7}]})
        await server.send({"type": "presence", "topic": "auction:a", "viewers": 3})
        # What happened before stands under `events` of a state, too.
        await server.send(
            {"type": "state", "topic": "auction:a", "seq": 6, "snapshot": {"title": '"seq":9'}, "events": [{"seq": 4}]}
        )
        screens = await watchers.saw(bids)
        assert screens.latencies.count == 3 * SOCKETS
        assert (screens.frames, screens.missing, screens.lost) == (2 * SOCKETS, 0, 0)


async def test_sockets_that_are_closed_miss_what_comes() -> None:
    server = Server()
    async with _watching(server) as watchers:
        await watchers.watch("a")
        await server.sockets.pop().close(4001)
        await server.send({"type": "events", "topic": "auction:a", "events": [{"seq": 2}]})
        screens = await watchers.saw(_bids(2))
        # The one that is missing counts, too, until it was given up.
        assert (screens.latencies.count, screens.missing, screens.lost) == (SOCKETS, 1, 1)


async def test_sockets_that_are_cut_come_back_to_where_they_were() -> None:
    server = Server()
    async with _watching(server) as watchers:
        await watchers.watch("a")
        await server.send({"type": "events", "topic": "auction:a", "events": [{"seq": 2}]})
        assert (await watchers.saw(_bids(2))).frames == SOCKETS
        server.sockets.clear()
        server.subscribed |= {"seq": 4, "recovered": True}
        back = await watchers.reconnect("a")
        assert back.recovered == SOCKETS
        assert server.since == [None] * SOCKETS + [2] * SOCKETS
        await server.send({"type": "events", "topic": "auction:a", "events": [{"seq": 5}]})
        screens = await watchers.saw(_bids(5))
        assert (screens.frames, screens.missing, screens.lost) == (SOCKETS, 0, 0)


async def test_a_server_that_lets_nobody_watch_is_named() -> None:
    server = Server()
    server.subscribed = {"type": "error", "ref": 1, "code": "busy", "message": "too much"}
    async with _watching(server) as watchers:
        with pytest.raises(LoadFailed, match="too much"):
            await watchers.watch("a")


async def test_a_server_that_hangs_up_on_those_who_would_watch_is_named() -> None:
    server = Server()
    server.subscribed = {}
    async with _watching(server) as watchers:
        with pytest.raises(LoadFailed, match="closed a watching socket"):
            await watchers.watch("a")
