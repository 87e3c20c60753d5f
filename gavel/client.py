"""The clients' shared part: one live connection that survives the server's restarts, and calls of the HTTP API.

`watch`, `replay` and the demonstration stand on it. It speaks the live protocol as anybody else would: nothing in here
is a privilege of ours.
"""

import asyncio
import itertools
import json
import random
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import urlsplit
from uuid import UUID

import httpx
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from gavel.errors import CommandError

Message = dict[str, Any]
"""One JSON object of the live protocol."""

BACKOFF_MIN_S: Final = 0.2
BACKOFF_MAX_S: Final = 10.0
PATIENCE_S: Final = 60.0
OPEN_TIMEOUT_S: Final = 10.0
TOO_MANY_WAIT_S: Final = 60.0
MESSAGE_BYTES_MAX: Final = 16 * 1024 * 1024
"""What we take from the server: a resumed subscription may bring a thousand events at once."""

OVER: Final = ("ended", "cancelled")
"""The status of an auction in which nothing happens any more, and the event that brings it."""

DRAINING, TOO_MANY = 4000, 4502
FINAL_CLOSES: Final = {
    1009: "a message was too large for it",
    4500: "it does not take us for a client of its protocol",
    4501: "it does not accept our token, or our user is suspended; issue a new one with the key in its data folder "
    "(--data-dir)",
}
"""Close codes after which connecting again would end the same way."""

TRANSIENT: Final = frozenset({"busy", "rate_limited", "too_many", "unavailable", "outcome_unknown"})
"""Answers after which the same bid, with the same `bid_id`, is to be sent again."""


class LiveClient:
    """A live connection. `async with` it; it then connects again by itself for as long as it has patience.

    Whatever the server sends to a topic (`subscribed`, `events`, `state`, `presence`, `notice`, …) goes to
    `on_message`, in order: each event once, none missing but those that a `state` covers. After `patience_s` without a
    connection, or a close that is final, all that waits raises `CommandError`.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        on_message: Callable[[Message], None] | None = None,
        backoff_max_s: float = BACKOFF_MAX_S,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.url = _live_url(url)
        self.connections = 0
        self._token = token
        self._on_message = on_message
        self._backoff_max_s = backoff_max_s
        self._patience_s = patience_s
        self._refs = itertools.count(1)
        self._socket: ClientConnection | None = None
        self._waiting: dict[int, tuple[Message, asyncio.Future[Message]]] = {}
        self._topics: dict[str, int | None] = {}
        self._resubscriptions: dict[str, asyncio.Task[None]] = {}
        self._clock_offset_ms = 0.0
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._task is not None
        tasks = [self._task, *self._resubscriptions.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def reconnects(self) -> int:
        """How often the connection was made anew."""
        return max(0, self.connections - 1)

    def now_ms(self) -> float:
        """The server's clock, as far as we know it; its error is at most half a round trip."""
        return _now_ms() + self._clock_offset_ms

    async def gave_up(self) -> None:
        """Wait until the connection is given up, which raises `CommandError`."""
        assert self._task is not None
        await asyncio.shield(self._task)

    async def subscribe(self, topic: str) -> Message:
        """Subscribe for as long as this client lives; its `subscribed`, which `on_message` has seen too.

        Raises `CommandError` where the server does not know the topic.
        """
        answer = await self._ask_until_taken({"op": "subscribe", "topic": topic})
        if answer["type"] != "subscribed":
            raise CommandError(f"The server refuses {topic}: {answer.get('message') or answer.get('code')}")
        return answer

    async def unsubscribe(self, topic: str) -> None:
        """End a subscription."""
        if topic in self._topics:
            del self._topics[topic]
            await self._ask({"op": "unsubscribe", "topic": topic})

    async def bid(
        self, auction: UUID, bid_id: UUID, *, amount: int | None = None, max_amount: int | None = None
    ) -> Message:
        """Bid, and wait for the verdict: an `ack`, a `rejected`, or an `error` that sending again would not change.

        What is not answered, or refused for the moment, is sent again with the same `bid_id`.
        """
        bid: Message = {"op": "bid", "auction": str(auction), "bid_id": str(bid_id)}
        bid |= {"amount": amount} if amount is not None else {"max_amount": max_amount}
        return await self._ask_until_taken(bid)

    # Asking

    async def _ask_until_taken(self, message: Message) -> Message:
        loop = asyncio.get_running_loop()
        began = loop.time()
        for attempt in itertools.count():
            answer = await self._ask(message)
            is_transient = answer.get("is_transient", answer.get("code") in TRANSIENT)
            if answer["type"] not in ("rejected", "error") or not is_transient:
                return answer
            if loop.time() - began > self._patience_s:
                raise CommandError(
                    f"The server at {self.url} goes on refusing ({answer.get('code')}); try again when it is well."
                )
            await asyncio.sleep(max(answer.get("retry_after_ms", 0) / 1_000, self._backoff_s(attempt)))
        raise AssertionError("unreachable")

    async def _ask(self, message: Message) -> Message:
        """Send a message and wait for its answer, over as many connections as it takes."""
        assert self._task is not None, "the client is not entered"
        if self._task.done():
            await self.gave_up()
        ref = next(self._refs)
        message = {**message, "ref": ref}
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[ref] = (message, answer)
        try:
            if self._socket is not None:
                # On a connection that breaks now, it is sent again when there is a new one.
                with suppress(ConnectionClosed):
                    await self._socket.send(json.dumps(message))
            return await answer
        finally:
            del self._waiting[ref]

    # Connecting

    async def _run(self) -> None:
        try:
            await self._keep_connected()
        except Exception as error:
            for _, answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(error)
            raise

    async def _keep_connected(self) -> None:
        loop = asyncio.get_running_loop()
        attempt = 0
        last_seen = loop.time()
        while True:
            began = self.connections
            reason, code = await self._connect_once()
            was_connected = self.connections > began
            if was_connected:
                last_seen = loop.time()
            if code in FINAL_CLOSES:
                raise CommandError(f"The server at {self.url} closed the connection: {FINAL_CLOSES[code]}.")
            if loop.time() - last_seen > self._patience_s:
                raise CommandError(
                    f"The server at {self.url} cannot be reached ({reason}); start it with `gavel up`, or name "
                    "another with --url."
                )
            # The first of its kind only: a gateway that goes on draining must not be asked without a pause.
            is_at_once = code == DRAINING and was_connected and attempt == 0
            attempt = 1 if was_connected else attempt + 1
            if not is_at_once:
                await asyncio.sleep(TOO_MANY_WAIT_S if code == TOO_MANY else self._backoff_s(attempt))

    def _backoff_s(self, attempt: int) -> float:
        """A pause that grows, and differs from client to client so that they do not come back all at once."""
        ceiling = min(self._backoff_max_s, BACKOFF_MIN_S * 2 ** min(attempt, 16))
        return random.uniform(min(BACKOFF_MIN_S, ceiling), ceiling)  # noqa: S311 - jitter

    async def _connect_once(self) -> tuple[str, int | None]:
        """Connect and stay until the end of the connection; why it ended, and its close code if it had one."""
        try:
            async with connect(
                self.url, open_timeout=OPEN_TIMEOUT_S, max_size=MESSAGE_BYTES_MAX, compression=None
            ) as socket:
                try:
                    await self._begin(socket)
                    async for text in socket:
                        self._receive(json.loads(text))
                finally:
                    self._socket = None
                return "it closed the connection", socket.close_code
        except ConnectionClosed as closed:
            code = None if closed.rcvd is None else closed.rcvd.code
            return "it closed the connection", code
        except InvalidStatus as error:
            status = error.response.status_code
            if httpx.codes.is_client_error(status) and status != httpx.codes.TOO_MANY_REQUESTS:
                raise CommandError(f"{self.url} answers with HTTP {status}; name Gavel's address with --url.") from None
            return f"HTTP {status}", None
        except (OSError, InvalidHandshake, TimeoutError) as error:
            return str(error) or type(error).__name__, None

    async def _begin(self, socket: ClientConnection) -> None:
        """Say hello, ask for the time, and take up again what was under way."""
        hello: Message = {"op": "hello", "ref": 0}
        await socket.send(json.dumps(hello if self._token is None else {**hello, "token": self._token}))
        async with asyncio.timeout(OPEN_TIMEOUT_S):
            welcome = json.loads(await socket.recv())
        if welcome.get("code") in TRANSIENT:
            raise ConnectionError(welcome.get("message"))
        if welcome.get("type") != "welcome":
            raise CommandError(f"The server at {self.url} refuses us: {welcome.get('message') or welcome}")
        await socket.send(json.dumps({"op": "time", "t0": int(_now_ms()), "ref": 0}))
        self.connections += 1
        for topic in self._topics:
            # One that the last connection did not answer is among those that wait, and is sent again with them.
            if topic not in self._resubscriptions:
                self._resubscribe(topic)
        # From here on others send by themselves; what waits by now is ours to send.
        waiting = [message for message, _ in self._waiting.values()]
        self._socket = socket
        for message in waiting:
            await socket.send(json.dumps(message))

    # Receiving

    def _receive(self, message: Message) -> None:
        match message["type"]:
            case "time":
                t0, t1, t2, t3 = message["t0"], message["t1"], message["t2"], _now_ms()
                self._clock_offset_ms = ((t1 - t0) + (t2 - t3)) / 2
                return
            case "subscribed" | "state":
                self._topics[message["topic"]] = message.get("seq")
            case "events":
                if not self._is_next(message):
                    return
        if self._on_message is not None:
            self._on_message(message)
        waiting = self._waiting.get(message.get("ref", 0))
        if waiting is not None and not waiting[1].done():
            waiting[1].set_result(message)

    def _is_next(self, message: Message) -> bool:
        """Drop the events that we have; subscribe again where some are missing, which the protocol rules out."""
        topic, last = message["topic"], self._topics.get(message["topic"])
        if last is None:
            return True
        message["events"] = [event for event in message["events"] if event["seq"] > last]
        if not message["events"]:
            return False
        if message["events"][0]["seq"] != last + 1:
            if topic not in self._resubscriptions:
                self._resubscribe(topic)
            return False
        self._topics[topic] = message["events"][-1]["seq"]
        return True

    def _resubscribe(self, topic: str) -> None:
        """Go on with a topic from the last `seq` that we have seen."""

        async def resubscribe() -> None:
            since = self._topics.get(topic)
            message: Message = {"op": "subscribe", "topic": topic}
            try:
                answer = await self._ask_until_taken(message if since is None else {**message, "since": since})
            except CommandError:
                return  # `_run` has told everybody.
            finally:
                del self._resubscriptions[topic]
            if answer["type"] != "subscribed":
                self._topics.pop(topic, None)

        self._resubscriptions[topic] = asyncio.create_task(resubscribe())


class Api:
    """The HTTP API, with patience for a server that is away or refuses for the moment. `async with` it."""

    def __init__(self, url: str, *, patience_s: float = PATIENCE_S, backoff_max_s: float = BACKOFF_MAX_S) -> None:
        self.url = _base_url(url)
        self._patience_s = patience_s
        self._backoff_max_s = backoff_max_s
        self._http = httpx.AsyncClient(timeout=OPEN_TIMEOUT_S)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def call(
        self, method: str, path: str, *, token: str | None = None, key: UUID | None = None, body: Message | None = None
    ) -> Message:
        """The `data` of an answer. `key` makes it safe to ask again. Raises `ApiRefusal`, a `CommandError`."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        if key is not None:
            headers["Idempotency-Key"] = str(key)
        for attempt in itertools.count():
            answer, reason = await self._try(method, f"{self.url}/api/v1{path}", headers, body)
            if answer is not None:
                return answer
            pause_s = min(self._backoff_max_s, BACKOFF_MIN_S * 2 ** min(attempt, 16))
            if loop.time() - began + pause_s > self._patience_s:
                raise CommandError(
                    f"The server at {self.url} cannot be reached ({reason}); start it with `gavel up`, or name "
                    "another with --url."
                )
            await asyncio.sleep(pause_s * random.uniform(0.5, 1))  # noqa: S311 - jitter
        raise AssertionError("unreachable")

    async def _try(
        self, method: str, url: str, headers: dict[str, str], body: Message | None
    ) -> tuple[Message | None, str]:
        """The `data` of an answer, or None and why it is worth asking again."""
        try:
            response = await self._http.request(method, url, headers=headers, json=body)
        except httpx.TransportError as error:
            return None, str(error) or type(error).__name__
        if response.status_code in (httpx.codes.TOO_MANY_REQUESTS, *range(502, 505)):
            return None, f"HTTP {response.status_code}"
        try:
            answer = response.json()
            if answer["success"]:
                return answer["data"] or {}, ""
            error_of = answer["error"]
            raise ApiRefusal(response.status_code, str(error_of["code"]), str(error_of["message"]))
        except (ValueError, KeyError, TypeError):
            raise CommandError(
                f"{url} answers with HTTP {response.status_code}, not as Gavel would; name its address with --url."
            ) from None


class ApiRefusal(CommandError):
    """The server understood and said no."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"The server refuses ({status} {code}): {message}")
        self.status = status
        self.code = code


def follow(snapshot: Message, message: Message) -> Message:
    """An auction's public snapshot after a message of its topic (`subscribed`, `events` or `state`)."""
    if "snapshot" in message:
        return dict(message["snapshot"])
    snapshot = dict(snapshot)
    for event in message.get("events", ()):
        # `ended` without a sale has no price, which does not undo the one that was reached.
        snapshot.update({name: value for name, value in event.items() if name in snapshot and value is not None})
        if event["kind"] in OVER:
            snapshot["status"] = event["kind"]
    return snapshot


def _base_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        # Reading the port checks it.
        is_address = parts.scheme in ("http", "https") and parts.hostname is not None and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        raise CommandError(f"{url!r} is not an address of Gavel; write it like http://127.0.0.1:8700.")
    return url.rstrip("/")


def _live_url(url: str) -> str:
    # http becomes ws, and https wss.
    return f"ws{_base_url(url).removeprefix('http')}/v1/live"


def _now_ms() -> float:
    return time.time_ns() / 1_000_000
