"""Sockets of clients, many in one process and each as cheap as Python allows, and a clock that makes them send."""

import asyncio
import ctypes
import itertools
import json
import math
import os
import resource
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from picows import WSError, WSFrame, WSListener, WSMsgType, WSTransport, ws_connect

from loadtests.measured import NS_PER_S, LoadFailed

CONNECT_AT_ONCE: Final = 50
TIMEOUT_S: Final = 15.0
SOCKETS_PER_ADDRESS: Final = 10_000
"""An address has some 28,000 ports for clients, and a closed connection keeps its port for a minute."""

_NUMBERS: Final = itertools.count()
"""Of this process's sockets."""
_BLOCKS: Final = 250
"""An octet of an address may have so many values, 1 and up."""


def _same(message: bytes) -> bytes:
    return message


@dataclass(frozen=True)
class Framing:
    """How a server wraps the messages of the live protocol; plain WebSocket texts, unless said otherwise."""

    path: str = "/v1/live"
    encode: Callable[[bytes], bytes] = _same
    decode: Callable[[bytes], bytes | None] = _same
    """Gives the message in a text, or None if that text is the framing's own."""
    replies: Mapping[bytes, bytes] = field(default_factory=dict)
    """What is to be said to texts of the framing's own, by their first byte."""
    opened_by: bytes | None = None
    """A server's text that begins so says that messages may be sent; None: at once."""


PLAIN: Final = Framing()


class Client(WSListener):
    """One socket, which says hello by itself. A subclass is handed each message by `on_message`."""

    def __init__(self, token: str | None = None, framing: Framing = PLAIN) -> None:
        """`token` None: a guest, who may watch but not act."""
        self.welcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the server has answered our hello; or failed, with `LoadFailed`."""
        self.lost: str | None = None
        """Why the socket is closed, if it is."""
        self.transport: WSTransport
        self._token = token
        self._framing = framing
        self._is_plain = framing is PLAIN
        self._close_code: int | None = None

    def send(self, message: bytes) -> None:
        """Send one message of the live protocol."""
        self.transport.send(WSMsgType.TEXT, message if self._is_plain else self._framing.encode(message))

    def on_message(self, message: bytes) -> None:
        """Called with each message after the welcome."""

    def on_lost(self) -> None:
        """Called when the socket is closed; `lost` says why."""

    # Called by picows

    def on_ws_connected(self, transport: WSTransport) -> None:
        self.transport = transport
        if self._framing.opened_by is None:
            self._say_hello()

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        if frame.msg_type != WSMsgType.TEXT:
            if frame.msg_type == WSMsgType.CLOSE:
                # Not `get_close_code`, whose type does not know the codes of applications.
                self._close_code = int.from_bytes(frame.get_payload_as_bytes()[:2], "big")
                transport.disconnect()
            return
        text = frame.get_payload_as_bytes()
        message = text if self._is_plain else self._unwrap(text)
        if message is None:
            return
        if self.welcome.done():
            self.on_message(message)
        else:
            self._on_first(json.loads(message))

    def on_ws_disconnected(self, transport: WSTransport) -> None:  # noqa: ARG002 - picows's signature
        self.lost = "without a close code" if self._close_code is None else f"close code {self._close_code}"
        if not self.welcome.done():
            self.welcome.set_exception(LoadFailed(f"the server closed a socket ({self.lost})"))
        self.on_lost()

    # Details

    def _say_hello(self) -> None:
        hello: dict[str, Any] = {"op": "hello", "ref": 0}
        if self._token is not None:
            hello["token"] = self._token
        self.send(json.dumps(hello).encode())

    def _unwrap(self, text: bytes) -> bytes | None:
        framing = self._framing
        message = framing.decode(text)
        if message is None:
            if (reply := framing.replies.get(text[:1])) is not None:
                self.transport.send(WSMsgType.TEXT, reply)
            if framing.opened_by is not None and text.startswith(framing.opened_by):
                self._say_hello()
        return message

    def _on_first(self, message: dict[str, Any]) -> None:
        if message.get("type") == "welcome":
            self.welcome.set_result(None)
        else:
            self.welcome.set_exception(LoadFailed(f"the server refuses us ({message.get('message')})"))


async def connect(clients: Sequence[Client], url: str, at_once: int = CONNECT_AT_ONCE) -> None:
    """Connect all clients to the server at `url` (http://host:port), and wait for their welcomes. Raises `LoadFailed`.

    The 10,001st socket of this process and those after it come from other addresses of the loopback network, which are
    not those of the process before it: ports that are still kept there would be looked through, one by one.
    """
    for first in range(0, len(clients), at_once):
        some = clients[first : first + at_once]
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await asyncio.gather(*(_connect(client, url) for client in some))
                await asyncio.gather(*(client.welcome for client in some))
        except (OSError, TimeoutError, asyncio.InvalidStateError, WSError) as error:
            raise LoadFailed(f"the server does not answer ({str(error) or type(error).__name__})") from error


def disconnect(clients: Sequence[Client]) -> None:
    """Close all sockets."""
    for client in clients:
        # Those that never came to be have no transport.
        with suppress(AttributeError):
            client.transport.disconnect()


def raise_file_limit() -> int:
    """Let this process open as many files, and thus sockets, as it may at all. Returns how many that are."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


async def _connect(client: Client, url: str) -> None:
    address = next(_NUMBERS) // SOCKETS_PER_ADDRESS
    source: dict[str, Any] = {}
    if address:
        high, low = divmod(os.getpid() % _BLOCKS**2, _BLOCKS)
        source["local_addr"] = f"127.{high + 1}.{low + 1}.{address % _BLOCKS + 1}", 0
    parts = urlsplit(url)
    scheme = "wss" if parts.scheme == "https" else "ws"
    await ws_connect(lambda: client, f"{scheme}://{parts.netloc}{client._framing.path}", **source)


class Pace:
    """Calls back at given moments, some 50 µs late, by a timer of Linux's: those of the event loop count whole ms.

    The moments are k / `per_second` seconds after `start`, for k = 0 to `count` - 1.
    """

    def __init__(self, per_second: float, count: int, call: Callable[[int], None]) -> None:
        """`call` is given the scheduled time, of `time.monotonic_ns`, as often as moments have passed."""
        self._step_ns = NS_PER_S / per_second
        self._count = count
        self._call = call
        self._called = 0
        self._began_ns = 0
        self._timer = -1
        self.done = asyncio.Event()

    def start(self) -> None:
        """The first moment is now. To be called once, in the event loop."""
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            self._timer = libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        except AttributeError:
            raise LoadFailed("a load at a fixed rate needs Linux, whose timers are precise") from None
        # struct itimerspec: the interval, then the first expiration, each in seconds and nanoseconds. The timer need
        # not stay in step by itself: each time it only makes us look at the clock. But it must never be before it: what
        # is not due yet waits for the next expiration.
        step = divmod(math.ceil(self._step_ns), NS_PER_S)
        self._began_ns = time.monotonic_ns()
        libc.timerfd_settime(self._timer, 0, struct.pack("qqqq", *step, 0, 1), None)
        asyncio.get_running_loop().add_reader(self._timer, self._tick)

    def stop(self) -> None:
        """Call back no more."""
        if self._timer >= 0:
            asyncio.get_running_loop().remove_reader(self._timer)
            os.close(self._timer)
            self._timer = -1
        self.done.set()

    def _tick(self) -> None:
        os.read(self._timer, 8)
        passed = int((time.monotonic_ns() - self._began_ns) / self._step_ns) + 1
        for number in range(self._called, min(passed, self._count)):
            self._call(self._began_ns + int(number * self._step_ns))
        self._called = min(passed, self._count)
        if self._called == self._count:
            self.stop()
