"""The load generator `bids`: one hot auction, many sockets, as cheap for the machine as Python allows.

Two loads. Closed loop: each socket bids again as soon as its last bid is answered, which finds how many a second the
engine takes. Open loop: bids leave at a fixed rate whatever the answers do, which finds how long one takes when there
is no queue. Only acknowledgements count. Client and server share the machine, so a bid costs one `bytes %` and one
write, and its answer is recognised by its first bytes.
"""

import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
from picows import WSFrame, WSListener, WSMsgType, WSTransport, ws_connect

from engine.commands import Role
from gateway.tokens import issue

SOCKETS: Final = 500
SECONDS: Final = 5.0
RATE: Final = 100
TOKEN_TTL_S: Final = 60 * 60
CONNECT_AT_ONCE: Final = 50
TIMEOUT_S: Final = 15.0
HEAD_BYTES: Final = 13
"""Of an answer: as far as its type."""


class LoadFailed(Exception):
    """The load could not be put on; the sentence says why."""


@dataclass
class Measured:
    """What one load measured. Latencies in nanoseconds, from the write of a bid to the reading of its `ack`."""

    seconds: float
    acks: int = 0
    """Within the measured seconds; the latencies and the refusals are those of all bids."""
    refused: Counter[str] = field(default_factory=Counter)
    latencies_ns: list[int] = field(default_factory=list)
    unanswered: int = 0

    @property
    def acks_per_second(self) -> float:
        return self.acks / self.seconds

    def percentile_ms(self, percent: float) -> float:
        """The latency under which so many percent of the acknowledgements came; 100 is the maximum."""
        if not self.latencies_ns:
            return float("nan")
        ranked = sorted(self.latencies_ns)
        return ranked[min(len(ranked) - 1, int(len(ranked) * percent / 100))] / 1_000_000


async def measure(
    url: str, private_pem: bytes, *, sockets: int = SOCKETS, seconds: float = SECONDS, rate: int = RATE
) -> tuple[Measured, Measured]:
    """Put both loads on the engine at `url`: closed loop, then open loop. Raises `LoadFailed`."""
    swarm = Swarm(await open_auction(url, private_pem))
    try:
        await swarm.connect(url, private_pem, sockets)
        return await swarm.closed_loop(seconds), await swarm.open_loop(seconds, rate)
    except (OSError, TimeoutError) as error:
        raise LoadFailed(f"the engine does not answer ({str(error) or type(error).__name__})") from error
    finally:
        swarm.disconnect()


async def open_auction(url: str, private_pem: bytes) -> str:
    """Open the hot auction: every minor unit is a step, and no bid moves its end. Returns its id."""
    end = datetime.now(UTC) + timedelta(days=1)
    body = {
        "title": "The hot auction of the benchmark",
        "currency": "USD",
        "starting_price": "0.01",
        "minimum_bid_increment": "0.01",
        "end_time": end.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "soft_close": None,
    }
    headers = {"Authorization": f"Bearer {_token(private_pem, 'maker')}", "Idempotency-Key": str(uuid4())}
    try:
        async with httpx.AsyncClient(timeout=TIMEOUT_S) as http:
            response = await http.post(f"{url.rstrip('/')}/api/v1/auctions", headers=headers, json=body)
        return str(response.json()["data"]["auction_id"])
    except httpx.TransportError as error:
        raise LoadFailed(f"the engine at {url} cannot be reached ({error})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise LoadFailed(f"the engine at {url} opens no auction (HTTP {response.status_code})") from error


class Swarm:
    """All sockets, and the one load that is running on them."""

    def __init__(self, auction: str) -> None:
        # The bids differ in a counter (which is `ref` and the end of `bid_id`) and in the amount.
        prefix = str(uuid4())[:-12]
        self._bid = (f'{{"op":"bid","ref":%d,"auction":"{auction}","bid_id":"{prefix}%012x","max_amount":%d}}').encode()
        self._bidders: list[Bidder] = []
        self._began_ns = 0
        self.sent = 0
        self.in_flight = 0
        self.deadline_ns = 0
        self.is_closed_loop = False
        self.measured = Measured(0)
        self.idle = asyncio.Event()
        self.lost: str | None = None

    async def connect(self, url: str, private_pem: bytes, sockets: int) -> None:
        """Open the sockets, each as a user of its own."""
        live = f"ws://{urlsplit(url).netloc}/v1/live"
        for first in range(0, sockets, CONNECT_AT_ONCE):
            count = min(CONNECT_AT_ONCE, sockets - first)
            bidders = [Bidder(self, _token(private_pem, "viewer")) for _ in range(count)]
            self._bidders += bidders
            await asyncio.gather(*(ws_connect(lambda one=bidder: one, live) for bidder in bidders))
            async with asyncio.timeout(TIMEOUT_S):
                await asyncio.gather(*(bidder.welcome for bidder in bidders))
        self._began_ns = time.perf_counter_ns()

    def disconnect(self) -> None:
        """Close all sockets."""
        self.lost = "closed"
        for bidder in self._bidders:
            if bidder.transport is not None:
                bidder.transport.disconnect()

    async def closed_loop(self, seconds: float) -> Measured:
        """Every socket bids as soon as its last bid is answered."""
        self._begin(seconds, is_closed_loop=True)
        for bidder in self._bidders:
            bidder.bid()
        return await self._finish(seconds)

    async def open_loop(self, seconds: float, rate: int) -> Measured:
        """One bid every 1 / `rate` seconds, from one socket after another, whatever the answers do."""
        loop = asyncio.get_running_loop()
        self._begin(seconds, is_closed_loop=False)
        began = loop.time()
        for number in range(int(seconds * rate)):
            bidder = self._bidders[number % len(self._bidders)]
            # Written late by at most a tick of the loop's timers, since nothing here waits for an answer.
            loop.call_at(began + number / rate, bidder.bid)
        return await self._finish(seconds)

    def _begin(self, seconds: float, *, is_closed_loop: bool) -> None:
        self.measured = Measured(seconds)
        self.is_closed_loop = is_closed_loop
        self.deadline_ns = time.perf_counter_ns() + int(seconds * 1_000_000_000)
        self.idle.clear()

    async def _finish(self, seconds: float) -> Measured:
        await asyncio.sleep(seconds)
        if self.in_flight:
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    await self.idle.wait()
            except TimeoutError:
                self.measured.unanswered = self.in_flight
        if self.lost is not None:
            raise LoadFailed(f"the engine closed a socket ({self.lost})")
        return self.measured

    def next_bid(self, now_ns: int) -> bytes:
        """The bytes of a bid that the engine has good reason to take: its maximum is the time, which only rises."""
        self.sent += 1
        return self._bid % (self.sent, self.sent, (now_ns - self._began_ns) // 1_000 + 1)


class Bidder(WSListener):
    """One socket: says hello, then bids when told to, or after each answer."""

    def __init__(self, swarm: Swarm, token: str) -> None:
        self.transport: WSTransport | None = None
        self.welcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._swarm = swarm
        self._token = token
        self._sent_ns = 0
        self._close_code: int | None = None
        # In the open loop a slow answer may still be out when the socket's turn comes again.
        self._sent_by_ref: dict[int, int] = {}

    def on_ws_connected(self, transport: WSTransport) -> None:
        self.transport = transport
        transport.send(WSMsgType.TEXT, json.dumps({"op": "hello", "ref": 0, "token": self._token}).encode())

    def on_ws_disconnected(self, transport: WSTransport) -> None:  # noqa: ARG002 - picows's signature
        reason = "without a close code" if self._close_code is None else f"close code {self._close_code}"
        self._swarm.lost = self._swarm.lost or reason
        self._swarm.idle.set()
        if not self.welcome.done():
            self.welcome.set_exception(LoadFailed(f"the engine closed a socket ({reason})"))

    def bid(self) -> None:
        """Send a bid."""
        swarm, transport = self._swarm, self.transport
        assert transport is not None
        swarm.in_flight += 1
        now_ns = time.perf_counter_ns()
        bid = swarm.next_bid(now_ns)
        if swarm.is_closed_loop:
            self._sent_ns = now_ns
        else:
            self._sent_by_ref[swarm.sent] = now_ns
        transport.send(WSMsgType.TEXT, bid)

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        if frame.msg_type != WSMsgType.TEXT:
            if frame.msg_type == WSMsgType.CLOSE:
                # Not `get_close_code`, whose type does not know the codes of applications.
                self._close_code = int.from_bytes(frame.get_payload_as_bytes()[:2], "big")
                transport.disconnect()
            return
        now_ns = time.perf_counter_ns()
        payload = frame.get_payload_as_bytes()
        swarm = self._swarm
        if swarm.is_closed_loop and payload[:HEAD_BYTES] == b'{"type":"ack"':
            swarm.measured.latencies_ns.append(now_ns - self._sent_ns)
            swarm.in_flight -= 1
            if now_ns < swarm.deadline_ns:
                swarm.measured.acks += 1
                self.bid()
            elif swarm.in_flight == 0:
                swarm.idle.set()
            return
        self._on_message(json.loads(payload), now_ns)

    def _on_message(self, message: dict[str, Any], now_ns: int) -> None:
        """Everything but the usual answer of the closed loop."""
        swarm, kind = self._swarm, message.get("type")
        if kind == "welcome":
            self.welcome.set_result(None)
            return
        if kind == "error" and not self.welcome.done():
            self.welcome.set_exception(LoadFailed(f"the engine refuses us ({message.get('message')})"))
            return
        if kind not in ("ack", "rejected", "error"):
            return
        sent_ns = self._sent_ns if swarm.is_closed_loop else self._sent_by_ref.pop(message["ref"])
        swarm.in_flight -= 1
        if kind == "ack":
            swarm.measured.latencies_ns.append(now_ns - sent_ns)
            # The open loop sends a fixed number, so there an answer counts whenever it comes.
            swarm.measured.acks += now_ns < swarm.deadline_ns or not swarm.is_closed_loop
        else:
            swarm.measured.refused[message["code"]] += 1
        if swarm.is_closed_loop and now_ns < swarm.deadline_ns:
            # Whoever is told to come back later does; other refusals only cost this bid.
            asyncio.get_running_loop().call_later(message.get("retry_after_ms", 0) / 1_000, self._bid_in_time)
        elif swarm.in_flight == 0:
            swarm.idle.set()

    def _bid_in_time(self) -> None:
        if time.perf_counter_ns() < self._swarm.deadline_ns:
            self.bid()


def _token(private_pem: bytes, role: Role) -> str:
    return issue(private_pem, uuid4(), role, TOKEN_TTL_S, time.time_ns() // 1_000_000)
