"""Plain clients of the live protocol, on the `websockets` library and nothing of Gavel's: they see every message.

`Bidder` and `Watcher` do what the protocol asks of a client (connect again, ask for what was missed, send again with
the same `bid_id`) and write down what they see, for `tests/simulation/checker.py` to judge.
"""

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from tests.e2e.engine import Engine
from tests.simulation.history import Connected, Events, Record, Sent, Subscribing, state, subscribed, verdict

Message = dict[str, Any]

ANSWER_S = 60
AGAIN_S = 0.1
AWAY = (OSError, TimeoutError, ConnectionClosed, InvalidHandshake)


class Live:
    """One conversation. What comes without the awaited `ref` is kept in `others`, in order."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.others: list[Message] = []
        self._refs = itertools.count(1)

    async def ask(self, message: Message) -> Message:
        """Send a message and wait for its answer."""
        ref = next(self._refs)
        await self.socket.send(json.dumps({**message, "ref": ref}))
        return await self.wait_for(lambda answer: answer.get("ref") == ref)

    async def wait_for(self, is_it: Callable[[Message], bool]) -> Message:
        """The next message that is the right one."""
        async with asyncio.timeout(ANSWER_S):
            while True:
                message = await self.receive()
                if is_it(message):
                    return message
                self.others.append(message)

    async def receive(self) -> Message:
        async with asyncio.timeout(ANSWER_S):
            message: Message = json.loads(await self.socket.recv())
        return message

    async def close_code(self) -> int | None:
        """With which code the server closes; what it says before goes to `others`."""
        async with asyncio.timeout(ANSWER_S):
            with suppress(ConnectionClosed):
                while True:
                    self.others.append(json.loads(await self.socket.recv()))
        return self.socket.close_code

    async def subscribe(self, auction: UUID, since: int | None = None) -> Message:
        message: Message = {"op": "subscribe", "topic": f"auction:{auction}"}
        return await self.ask(message if since is None else {**message, "since": since})

    async def bid(self, auction: UUID, bid_id: UUID | None = None, **amounts: object) -> Message:
        return await self.ask({"op": "bid", "auction": str(auction), "bid_id": str(bid_id or uuid4()), **amounts})


@asynccontextmanager
async def connected(engine: Engine, token: str | None = None) -> AsyncIterator[Live]:
    """A conversation after its hello, as a guest or with a token."""
    async with connect(engine.live_url, compression=None, max_size=None) as socket:
        live = Live(socket)
        welcome = await live.ask({"op": "hello"} if token is None else {"op": "hello", "token": token})
        assert welcome["type"] == "welcome", welcome
        yield live


async def call(
    engine: Engine, method: str, path: str, *, token: str | None = None, body: object = None
) -> httpx.Response:
    """One HTTP request."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    async with httpx.AsyncClient(timeout=ANSWER_S) as client:
        return await client.request(method, f"{engine.url}/api/v1{path}", headers=headers, json=body)


async def open_auction(engine: Engine, maker: UUID | None = None, **terms: object) -> UUID:
    """Open an auction that ends tomorrow and takes bids in steps of a cent, unless `terms` say otherwise."""
    body = {
        "title": "Walnut bowl",
        "currency": "USD",
        "starting_price": 1,
        "minimum_bid_increment": "0.01",
        "end_time": iso(timedelta(days=1)),
        **terms,
    }
    response = await call(engine, "POST", "/auctions", token=engine.token(maker or uuid4(), "maker"), body=body)
    assert response.status_code == 201, response.text
    return UUID(response.json()["data"]["auction_id"])


def iso(from_now: timedelta) -> str:
    """A moment from now, as the HTTP API takes it."""
    return (datetime.now(UTC) + from_now).isoformat(timespec="milliseconds")


class Bidder:
    """A user on a socket who, when it breaks, comes back and sends the unanswered bid again, with the same `bid_id`."""

    def __init__(self, engine: Engine, history: list[Record]) -> None:
        self.user = uuid4()
        self.errors: list[Message] = []
        """What was answered instead of a verdict."""
        self.connections = 0
        self._name = f"bidder {self.user}"
        self._history = history
        self._engine = engine
        self._token = engine.token(self.user)
        self._live: Live | None = None
        self._socket: ClientConnection | None = None

    async def bid(self, auction: UUID, amount: int) -> Message:
        """Bid until there is a verdict, which must be an ack."""
        bid_id = uuid4()
        while True:
            try:
                answer = await self._try(auction, bid_id, amount)
            except AWAY:
                # No wait for a condition, but a client's pause: the server is away.
                await asyncio.sleep(AGAIN_S)
                await self.close()
                continue
            if answer["type"] == "error":
                self.errors.append(answer)
                await asyncio.sleep(answer.get("retry_after_ms", 100) / 1_000)
                continue
            assert answer["type"] == "ack", answer
            return answer

    async def close(self) -> None:
        if self._socket is not None:
            await self._socket.close()
            self._live = self._socket = None

    async def _try(self, auction: UUID, bid_id: UUID, amount: int) -> Message:
        live = await self._connect()
        self._history.append(
            Sent(
                client=self._name,
                connection=self.connections,
                auction=auction,
                bid_id=bid_id,
                bidder=self.user,
                amount=amount,
                at=now_ms(),
            )
        )
        answer = await live.bid(auction, bid_id, amount=amount)
        assert not live.others, f"nobody asked for {live.others}"
        self._history.append(verdict(self._name, self.connections, auction, bid_id, answer, now_ms()))
        return answer

    async def _connect(self) -> Live:
        if self._live is None:
            self._socket = await connect(self._engine.live_url, compression=None)
            live = Live(self._socket)
            welcome = await live.ask({"op": "hello", "token": self._token})
            assert welcome["type"] == "welcome", welcome
            self._live = live
            self.connections += 1
        return self._live


class Watcher:
    """A guest that follows one auction, and after a broken connection asks for what it missed."""

    def __init__(self, engine: Engine, auction: UUID, history: list[Record]) -> None:
        self.auction = auction
        self.seq: int | None = None
        """The last `seq` that it has seen."""
        self.connections = 0
        self._name = f"watcher {uuid4()}"
        self._history = history
        self._engine = engine
        self._changed = asyncio.Condition()
        self._task = asyncio.create_task(self._run())

    async def reached(self, seq: int) -> None:
        """Wait until it has seen everything up to `seq`."""
        waiter = asyncio.ensure_future(self._wait_for(seq))
        done, _ = await asyncio.wait((waiter, self._task), timeout=ANSWER_S, return_when=asyncio.FIRST_COMPLETED)
        waiter.cancel()
        if self._task in done:
            self._task.result()
        assert waiter in done, f"the events of {self.auction} did not come; the last was {self.seq}"

    async def close(self) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def _wait_for(self, seq: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self.seq is not None and self.seq >= seq)

    async def _run(self) -> None:
        while True:
            with suppress(*AWAY):
                async with connected(self._engine) as live:
                    await self._follow(live)
            await asyncio.sleep(AGAIN_S)

    async def _follow(self, live: Live) -> None:
        self.connections += 1
        here: dict[str, Any] = {"client": self._name, "connection": self.connections}
        self._history.append(Connected(**here, user=None, at=now_ms()))
        self._history.append(Subscribing(**here, auction=self.auction, since=self.seq, at=now_ms()))
        answer = await live.subscribe(self.auction, self.seq)
        assert not live.others
        assert answer["type"] == "subscribed", answer
        self._history.append(subscribed(self._name, self.connections, self.auction, self.seq, answer, now_ms()))
        await self._saw(answer["seq"])
        async for text in live.socket:
            message = json.loads(text)
            match message["type"]:
                case "events":
                    self._history.append(Events(**here, auction=self.auction, events=message["events"], at=now_ms()))
                    await self._saw(message["events"][-1]["seq"])
                case "state":
                    self._history.append(state(self._name, self.connections, message, now_ms()))
                    await self._saw(message["seq"])
                case other:
                    assert other == "presence", message

    async def _saw(self, seq: int) -> None:
        self.seq = seq
        async with self._changed:
            self._changed.notify_all()


def now_ms() -> int:
    return time.time_ns() // 1_000_000
