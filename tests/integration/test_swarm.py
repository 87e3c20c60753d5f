"""The Locust swarm against a server that breaks its promises, and where it refuses to go."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import uvicorn
from fastapi import FastAPI, WebSocket
from starlette.websockets import WebSocketDisconnect

from tests.support.swarm import run_swarm
from tests.support.waiting import until

SNAPSHOT = {"status": "active", "price": 100, "minimum": 125, "leader": None, "end_time": 4_102_444_800_000}


def event(seq: int, price: int, kind: str = "bid_placed") -> dict[str, Any]:
    return {"seq": seq, "at": 0, "kind": kind, "paddle": 9, "price": price, "leader": 9, "minimum": price + 25}


def forge() -> FastAPI:
    """It loses one event, doubles another, lets the price fall, and acknowledges bids that nobody gets to see."""
    app = FastAPI()

    @app.post("/api/v1/auctions", status_code=201)
    async def open_auction() -> dict[str, Any]:
        return {"success": True, "data": {"auction_id": str(uuid4()), "status": "active"}}

    @app.websocket("/v1/live")
    async def live(socket: WebSocket) -> None:
        await socket.accept()
        with suppress(WebSocketDisconnect):
            while True:
                await answer(socket, await socket.receive_json())

    return app


async def answer(socket: WebSocket, message: dict[str, Any]) -> None:
    match message["op"]:
        case "hello":
            await socket.send_json({"type": "welcome"})
        case "subscribe":
            topic = message["topic"]
            head = {"topic": topic, "ref": message["ref"], "seq": 1, "recovered": False, "snapshot": SNAPSHOT}
            await socket.send_json({"type": "subscribed", **head})
            for one in (event(2, 200), event(4, 300), event(4, 300), event(5, 150)):
                await socket.send_json({"type": "events", "topic": topic, "events": [one]})
        case "bid":
            ack = {"ref": message["ref"], "seq": 99, "paddle": 1, "max_amount": 500}
            await socket.send_json({"type": "ack", **ack})
            end = {"topic": f"auction:{message['auction']}", "events": [event(6, 300, kind="ended")]}
            await socket.send_json({"type": "events", **end})


@pytest.fixture
async def forger() -> AsyncIterator[str]:
    server = uvicorn.Server(uvicorn.Config(forge(), port=0, ws="websockets-sansio", log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        await until(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


async def test_broken_promises_are_failures(forger: str, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("a-maker\na-bidder\n")
    options = ["--tokens", str(tokens), "-u", "2", "-r", "2", "-t", "3s", "--auctions", "1", "--bid-every-s", "0.2"]
    table = await asyncio.to_thread(run_swarm, tmp_path, "-H", forger, *options, "Bidder")
    assert table.code == 1, table.log
    assert table.failures.keys() == {"check: order", "check: price", "check: acknowledged"}, table.log
    for sentence in ("Events are missing.", "An event came again", "A price fell.", "An acknowledged bid is not in"):
        assert sentence in table.log


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-H", "http://192.0.2.1:8700"], ["not this machine", "--anywhere"]),
        (["-H", "https://127.0.0.1"], ["http://127.0.0.1:8700"]),
        (["--auctions", "0"], ["--auctions is from 1"]),
        (["--data-dir", "/nowhere"], ["/nowhere", "gavel up"]),
        (["--tokens", "/nowhere"], ["/nowhere"]),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    table = run_swarm(tmp_path, "-t", "1s", *arguments)
    assert table.code == 1
    assert "Traceback" not in table.log
    (sentence,) = (line for line in table.log.splitlines() if line.startswith("gavel: "))
    assert all(word in sentence for word in words), sentence
