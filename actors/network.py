"""The network between our processes: WebSockets of binary frames."""

import asyncio
from collections.abc import Callable
from typing import Protocol

import picows

from engine.limits import LINK_FRAME_BYTES_MAX, LINK_GREETING_MS, PROBE_TIMEOUT_MS, SECOND_MS


class Listening(Protocol):
    """An address at which connections are taken."""

    address: str
    """`host:port`."""

    def close(self) -> None:
        """Take no more connections."""


class Network(Protocol):
    """How a process reaches others, and is reached."""

    async def listen(self, make_listener: Callable[[], picows.WSListener], host: str) -> Listening:
        """Take connections at a free port, each with a listener of its own."""

    async def connect(self, listener: picows.WSListener, address: str) -> None:
        """Connect to `host:port`. Raises `OSError` or `picows.WSError`."""

    async def refuses(self, address: str) -> bool:
        """Whether nothing listens at `host:port` any more. A peer that does not answer in time may still live."""


class WebSockets:
    """The network that there is."""

    async def listen(self, make_listener: Callable[[], picows.WSListener], host: str) -> Listening:
        """See `Network`."""
        server = await picows.ws_create_server(
            lambda _request: make_listener(),
            host,
            0,
            max_frame_size=LINK_FRAME_BYTES_MAX,
            websocket_handshake_timeout=LINK_GREETING_MS / SECOND_MS,
            logger_name="link",
        )
        return _Listening(server, host)

    async def connect(self, listener: picows.WSListener, address: str) -> None:
        """See `Network`."""
        transport, _ = await picows.ws_connect(
            lambda _request, _response: listener,
            f"ws://{address}/",
            max_frame_size=LINK_FRAME_BYTES_MAX,
            websocket_handshake_timeout=LINK_GREETING_MS / SECOND_MS,
            logger_name="link",
        )
        # picows says nothing of a peer that goes in the middle of the handshake.
        if transport.is_disconnected:
            raise ConnectionResetError(f"{address} broke the connection off")

    async def refuses(self, address: str) -> bool:
        """See `Network`."""
        host, _, port = address.rpartition(":")
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_MS / SECOND_MS):
                _, writer = await asyncio.open_connection(host, int(port))
        except ConnectionRefusedError:
            return True
        except (OSError, TimeoutError):
            return False
        writer.close()
        return False


class _Listening:
    def __init__(self, server: asyncio.Server, host: str) -> None:
        self._server = server
        self.address = f"{host}:{server.sockets[0].getsockname()[1]}"

    def close(self) -> None:
        self._server.close()
