"""A WebSocket under gevent: the bytes by gevent's sockets, the protocol by the sans-I/O core of `websockets`.

It costs one `recv` for all frames that have arrived and 3 µs a frame, which is what lets one core carry thousands of
users; clients that block inside a library (`websocket-client`, `websockets.sync`) need several reads or a second
greenlet a socket.
"""

import time
from typing import Final
from urllib.parse import urlsplit

import gevent.socket
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.uri import parse_uri

READ_BYTES: Final = 64 * 1024
MESSAGE_BYTES_MAX: Final = 16 * 1024 * 1024
"""What we take from the server: a resumed subscription may bring a thousand events at once."""
TIMEOUT_S: Final = 10.0
"""For the handshake, and for a server that does not read what we send."""


class Disconnected(Exception):
    """The connection is over; `code` is the close code that the server gave, or None."""

    def __init__(self, reason: str, code: int | None = None) -> None:
        super().__init__(reason)
        self.code = code


class Socket:
    """A connection to `url` (`http://…`), made at once. When it is over, all but `close` raises `Disconnected`."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        try:
            self._connection = gevent.socket.create_connection((parts.hostname, parts.port or 80), TIMEOUT_S)
        except OSError as error:
            raise _disconnected(error) from error
        try:
            self._connection.setsockopt(gevent.socket.IPPROTO_TCP, gevent.socket.TCP_NODELAY, 1)
            self._protocol = ClientProtocol(parse_uri(f"ws://{parts.netloc}/v1/live"), max_size=MESSAGE_BYTES_MAX)
            # When bytes came last, those of pings included (`time.perf_counter_ns`).
            self.heard_ns = time.perf_counter_ns()
            # What has come of a message that is not whole yet.
            self._parts: list[bytes | bytearray | memoryview] = []
            self._shake_hands()
        except BaseException:
            self.close()
            raise

    def send(self, text: bytes) -> None:
        """Send a message."""
        self._check()
        self._protocol.send_text(text)
        self._flush()

    def receive(self, timeout_s: float) -> list[bytes]:
        """All messages that have come, as soon as there are any; none if none comes in time."""
        messages = self._messages()
        if not messages and self._read(timeout_s):
            messages = self._messages()
        return messages

    def close(self) -> None:
        """Cut the connection, as a lost network would."""
        self._connection.close()

    # The details

    def _shake_hands(self) -> None:
        self._protocol.send_request(self._protocol.connect())
        self._flush()
        while self._protocol.state is State.CONNECTING:
            if not self._read(TIMEOUT_S):
                raise Disconnected("the handshake was not answered")
            if self._protocol.handshake_exc is not None:
                raise Disconnected(str(self._protocol.handshake_exc))

    def _messages(self) -> list[bytes]:
        messages = []
        for event in self._protocol.events_received():
            if isinstance(event, Frame) and event.opcode in (Opcode.TEXT, Opcode.CONT):
                self._parts.append(event.data)
                if event.fin:
                    messages.append(b"".join(self._parts))
                    self._parts.clear()
        return messages

    def _read(self, timeout_s: float) -> bool:
        """Read once; False if nothing came in time. What the protocol answers by itself (a pong) is sent."""
        self._check()
        try:
            self._connection.settimeout(timeout_s)
            data = self._connection.recv(READ_BYTES)
        except (TimeoutError, BlockingIOError):
            return False
        except OSError as error:
            raise _disconnected(error) from error
        self.heard_ns = time.perf_counter_ns()
        if data:
            self._protocol.receive_data(data)
        else:
            self._protocol.receive_eof()
        self._flush()
        return True

    def _check(self) -> None:
        if self._protocol.state in (State.CLOSING, State.CLOSED):
            closed = self._protocol.close_rcvd
            if closed is None:
                raise Disconnected("cut without a close code")
            raise Disconnected(f"closed by the server with {closed.code}", closed.code)

    def _flush(self) -> None:
        try:
            for data in self._protocol.data_to_send():
                # An empty one stands for the end of what we send.
                if data:
                    self._connection.settimeout(TIMEOUT_S)
                    self._connection.sendall(data)
        except OSError as error:
            raise _disconnected(error) from error


def _disconnected(error: OSError) -> Disconnected:
    return Disconnected(error.strerror or str(error) or type(error).__name__)
