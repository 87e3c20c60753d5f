"""Bytes and frames: the only file that touches a client's socket. What is said on it is decided in `session.py`.

uvicorn takes the connection and reads the HTTP request; an upgrade it hands to the class that `make_protocol` makes (as
its `ws=`), which is picows's WebSocket protocol with a `ClientSocket` as its listener.
"""

import asyncio
import logging
import struct
from collections.abc import Callable, Container, Iterable
from functools import partial
from random import uniform
from typing import Any, Final, Protocol, cast
from uuid import UUID, uuid4

from picows import (
    WSAutoPingStrategy,
    WSCloseCode,
    WSFrame,
    WSListener,
    WSMsgType,
    WSTransport,
    WSUpgradeRequest,
    WSUpgradeResponse,
    WSUpgradeResponseWithListener,
)
from picows.picows import WSProtocol  # type: ignore[attr-defined]  # Public, though its stub does not name it.
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from actors.logs import get_logger
from actors.messages import Answer, Payload
from engine.limits import (
    BUSY_READ_MS,
    BUSY_REST_MS,
    CLOSE_REASON_BYTES_MAX,
    CLOSE_TIMEOUT_MS,
    CONNECTIONS_PER_SLICE,
    FRAME_BYTES_MAX,
    HEADERS_TIMEOUT_MS,
    HELLO_TIMEOUT_MS,
    SECOND_MS,
    SOCKET_BEHIND_BYTES,
    SOCKET_BEHIND_MS_MAX,
    SOCKET_WRITE_BYTES_MAX,
    SOCKETS_MAX,
)
from engine.rejections import BUSY, Rejection
from gateway.origins import Origins
from gateway.rates import Rates, Visit, rate_limited
from gateway.session import (
    Close,
    FollowUser,
    Intent,
    PendingBid,
    PendingSubscription,
    Ping,
    Refuse,
    Send,
    Session,
    Submit,
    Subscribe,
    UnfollowUser,
    Unsubscribe,
    Verify,
)
from gateway.slices import Slices
from gateway.wire import Standing, Subscribed

logger = get_logger(__name__)

PATH: Final = b"/v1/live"
SUBPROTOCOL: Final = "gavel.v1"
_WRONG_ORIGIN: Final = b"Pages of this origin may not connect here; GAVEL_ORIGINS lists those that may."

# RFC 6455, section 7.4.1
_OK: Final = 1000
_PROTOCOL_ERROR: Final = 1002
_MESSAGE_TOO_BIG: Final = 1009

_COPIED_BYTES: Final = 8_192
"""picows copies messages up to this size before it writes them."""
_HEADER_BYTES: Final = 14
"""The room that picows wants before a message to write a frame's header into."""
_TEXT: Final = WSMsgType.TEXT
_TEXT_HEADER: Final = 0x81
"""A text message in one frame (RFC 6455, section 5.2)."""
_EXTENDED: Final = 126
"""Stands for a length from here on up to `_SHORT_BYTES`, which follows in two bytes."""
_SHORT_BYTES: Final = 65_535


# What a socket needs


class Router(Protocol):
    """Where bids go."""

    def submit(self, payload: Payload, on_answer: Callable[[Answer], None]) -> None:
        """Hand in; `on_answer` is called once, perhaps before this returns. Never raises."""
        ...


class Sink(Protocol):
    """What a fan-out sends to: a `ClientSocket`."""

    is_behind: bool
    """Much of what it was sent is unread. Until `Fanout.catch_up` nothing but answers should be sent to it."""

    def send(self, frame: bytes) -> None:
        """Write a text message; does nothing once the socket is closed. Never raises."""
        ...

    def close_as_too_slow(self) -> None:
        """Close: the client comes back and asks for what it missed."""
        ...


class Fanout(Protocol):
    """Where a topic's events come from."""

    def subscribe(
        self,
        topic: UUID,
        viewer: UUID | None,
        since: int | None,
        sink: Sink,
        on_subscribed: Callable[[Subscribed | Rejection], None],
        /,
    ) -> None:
        """Have `on_subscribed` called once, before any later event is sent to `sink`."""
        ...

    def unsubscribe(self, topic: UUID, sink: Sink, /) -> None:
        """Send no more events of `topic` to `sink`."""
        ...

    def catch_up(self, sink: Sink, /) -> None:
        """Send `sink`, which was behind, what it missed."""
        ...

    def drop(self, sink: Sink, /) -> None:
        """Forget `sink`, and what it has asked for."""
        ...


class People(Protocol):
    """Where a user's notices come from."""

    def follow(self, user: UUID, sink: Sink, on_subscribed: Callable[[list[Standing] | Rejection], None], /) -> None:
        """Have `on_subscribed` called once, before any later notice is sent to `sink`."""
        ...

    def drop(self, sink: Sink, /) -> None:
        """Send no more notices to `sink`."""
        ...


class Sockets:
    """The open sockets of a gateway; at most `sockets_max` are let in, and no address more than its rates allow."""

    def __init__(self, sockets_max: int = SOCKETS_MAX, rates: Rates | None = None) -> None:
        self.sockets_max = sockets_max
        self.is_draining = False
        self.is_short_of_memory = False
        """While it is, nobody is let in."""
        self._rates = rates or Rates()
        self._open: dict[ClientSocket, Visit] = {}
        self._due: dict[int, dict[ClientSocket, None]] = {}
        """Those for which something is due, by the second. So a tick costs nothing for all others."""
        self._slices = Slices()

    def __len__(self) -> int:
        return len(self._open)

    def tick(self, now: int) -> None:
        """Let sockets do what is due; to be called about once a second."""
        for second in sorted(self._due):
            if second * SECOND_MS <= now:
                self._slices.run(tuple(self._due.pop(second)), partial(self._tick, now=now))

    def suspensions_changed(self) -> None:
        """Have each socket see if its user is among the suspended by now."""
        self._slices.run(tuple(self._open), ClientSocket.suspensions_changed)

    def drain(self) -> None:
        """Close all sockets, and whatever still connects: this gateway is going away."""
        self.is_draining = True
        for socket in tuple(self._open):
            socket.drain()

    def add(self, socket: "ClientSocket", address: str, now: int) -> Visit | None:
        """Let a socket in; None if the house is full, or too many come from its address."""
        if len(self._open) >= self.sockets_max or self.is_short_of_memory:
            return None
        visit = self._rates.enter(address, now)
        if visit is not None:
            self._open[socket] = visit
            self._schedule(socket)
        return visit

    def discard(self, socket: "ClientSocket") -> None:
        """Forget a socket that is closed or closing."""
        visit = self._open.pop(socket, None)
        if visit is not None:
            self._rates.leave(visit)
            self._due.get(socket.due_s, {}).pop(socket, None)

    def _tick(self, socket: "ClientSocket", now: int) -> None:
        if socket in self._open:
            try:
                socket.tick(now)
            finally:
                if socket in self._open:
                    self._schedule(socket)

    def _schedule(self, socket: "ClientSocket") -> None:
        socket.due_s = -(-socket.due_at // SECOND_MS)
        self._due.setdefault(socket.due_s, {})[socket] = None


def make_protocol(
    router: Router,
    fanout: Fanout,
    people: People,
    verify: Verify,
    clock: Callable[[], int],
    sockets: Sockets,
    origins: Origins,
    suspended: Container[UUID] = frozenset(),
) -> type[asyncio.Protocol]:
    """Make the class that uvicorn takes as `ws=`. `clock` gives milliseconds since the epoch."""

    def listener(request: WSUpgradeRequest) -> WSUpgradeResponseWithListener:
        if request.path.partition(b"?")[0] != PATH:
            not_found = WSUpgradeResponse.create_error_response(404, b"There is no WebSocket here; it is at /v1/live.")
            return WSUpgradeResponseWithListener(not_found, None)
        if not request.headers.get("Sec-WebSocket-Version", "").isascii():
            # picows would repeat it in its answer, and fail to.
            wrong = WSUpgradeResponse.create_error_response(400, b"The version of the WebSocket protocol is 13.")
            return WSUpgradeResponseWithListener(wrong, None)
        if not all(origins.admit(one, request.headers.get("Host", "")) for one in request.headers.getall("Origin", [])):
            forbidden = WSUpgradeResponse.create_error_response(403, _WRONG_ORIGIN)
            return WSUpgradeResponseWithListener(forbidden, None)
        # Firefox sends "keep-alive, Upgrade". uvicorn has found the word in the list; picows takes only the word alone.
        request.headers["Connection"] = "Upgrade"
        offered = ",".join(request.headers.getall("Sec-WebSocket-Protocol", [])).split(",")
        is_offered = SUBPROTOCOL in (name.strip() for name in offered)
        response = WSUpgradeResponse.create_101_response(
            {"Sec-WebSocket-Protocol": SUBPROTOCOL} if is_offered else None
        )
        session = Session(uuid4(), verify, clock(), suspended)
        socket = ClientSocket(router, fanout, people, session, clock, sockets)
        return WSUpgradeResponseWithListener(response, socket)

    class LiveProtocol(_LiveProtocol):
        listener_factory = staticmethod(listener)

    return LiveProtocol


class ClientSocket(WSListener):
    """One client's socket: carries its session's intents out, and brings it what comes."""

    __slots__ = (
        "_behind_since",
        "_clock",
        "_cut",
        "_fanout",
        "_fragments",
        "_held",
        "_is_closing",
        "_is_paused",
        "_people",
        "_rest",
        "_router",
        "_session",
        "_sockets",
        "_visit",
        "due_s",
        "is_behind",
        "transport",
    )

    transport: WSTransport
    due_s: int
    """In which second its next tick is to come."""
    _visit: Visit

    def __init__(
        self,
        router: Router,
        fanout: Fanout,
        people: People,
        session: Session,
        clock: Callable[[], int],
        sockets: Sockets,
    ) -> None:
        self._router = router
        self._fanout = fanout
        self._people = people
        self._session = session
        self._clock = clock
        self._sockets = sockets
        self._fragments: bytearray | None = None
        self._is_closing = False
        self._rest: asyncio.TimerHandle | None = None
        self._held: Submit | None = None
        """The last bid that came while it rests."""
        self._cut: asyncio.TimerHandle | None = None
        self.is_behind = False
        self._behind_since: int | None = None
        self._is_paused = False
        """Much is unread at this moment, as the transport says."""

    # From the gateway

    def send(self, frame: bytes) -> None:
        """Write a text message; does nothing once the socket is closed."""
        if len(frame) <= _COPIED_BYTES:
            self.transport.send(_TEXT, frame)
        else:
            # Of a larger message picows leaves the header in a buffer that its next message overwrites, perhaps before
            # the loop has written it out.
            self.transport.send_reuse_external_bytearray(_TEXT, bytearray(_HEADER_BYTES) + frame, _HEADER_BYTES)
        if self.is_behind:
            self._check_budget()

    def close_as_too_slow(self) -> None:
        """Close: the client comes back and asks for what it missed."""
        self._run(self._session.too_slow())

    @property
    def due_at(self) -> int:
        """When `tick` has something to do, in milliseconds; what comes meanwhile may put it off."""
        due_at = self._session.due_at
        return due_at if self._behind_since is None else min(due_at, self._behind_since + SOCKET_BEHIND_MS_MAX + 1)

    def tick(self, now: int) -> None:
        """Do what is due."""
        if self._behind_since is not None and now - self._behind_since > SOCKET_BEHIND_MS_MAX:
            self.close_as_too_slow()
        else:
            self._run(self._session.tick(now))

    def suspensions_changed(self) -> None:
        """Close, if the user is among the suspended by now."""
        self._run(self._session.suspensions_changed())

    def drain(self) -> None:
        """Close, since this gateway is going away."""
        self._run(self._session.drained())

    # From picows

    def on_ws_connected(self, transport: WSTransport) -> None:
        self.transport = transport
        # Crossing this calls `pause_writing`, which spares us asking at every message; `resume_writing` comes at a
        # quarter of it.
        transport.underlying_transport.set_write_buffer_limits(high=SOCKET_BEHIND_BYTES)
        # None if the peer is gone already.
        peer = transport.underlying_transport.get_extra_info("peername")
        visit = self._sockets.add(self, peer[0] if peer else "", self._clock())
        if visit is None:
            self._run(self._session.too_many())
            return
        self._visit = visit
        if self._sockets.is_draining:
            self.drain()

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        kind = frame.msg_type
        if kind == WSMsgType.CLOSE:
            self._close(_OK, "")
            transport.disconnect()
        elif self._is_closing or transport.is_close_frame_sent:
            # picows closes by itself, too: after a frame against the rules.
            return
        elif frame.rsv1 or frame.rsv2 or frame.rsv3:
            self._close(_PROTOCOL_ERROR, "No extension was negotiated.")
        elif kind == WSMsgType.TEXT and frame.fin and self._fragments is None:
            data, now = frame.get_payload_as_bytes(), self._clock()
            if retry_after_ms := self._visit.message(now):
                self._run(self._session.rate_limited(data, retry_after_ms, now))
            else:
                self._run(self._session.text_received(data, now))
        elif kind == WSMsgType.PING:
            self._count()
            if not self._is_closing:
                # Not left to picows, so that it counts what is not read of these.
                transport.send_pong(frame.get_payload_as_bytes())
                if self.is_behind:
                    self._check_budget()
        elif kind == WSMsgType.PONG:
            # The answers to our pings are few; others nobody asked for.
            self._count()
            self._session.activity()
        elif kind == WSMsgType.BINARY:
            self._run(self._session.binary_received())
        else:
            self._fragment(frame)

    def on_ws_disconnected(self, transport: WSTransport) -> None:  # noqa: ARG002 (picows's)
        self._leave()
        for timer in (self._cut, self._rest):
            if timer is not None:
                timer.cancel()

    def pause_writing(self) -> None:
        """Much is unread. Broadcasts pass this socket over now; answers go out all the while."""
        self._is_paused = True
        if not self.is_behind:
            self.is_behind = True
            self._behind_since = self._clock()

    def resume_writing(self) -> None:
        """The client has read on."""
        self._is_paused = False
        # Called from within the transport, which is not to be written to from there.
        asyncio.get_running_loop().call_soon(self._catch_up)

    # The details

    def _catch_up(self) -> None:
        # It may be behind again: then it resumes again.
        if not self._is_closing and not self._is_paused:
            self.is_behind = False
            self._behind_since = None
            self._fanout.catch_up(self)

    def _check_budget(self) -> None:
        if self.transport.underlying_transport.get_write_buffer_size() > SOCKET_WRITE_BYTES_MAX:
            # Perhaps in the midst of a broadcast, which should not lose a socket under its hands.
            asyncio.get_running_loop().call_soon(self.close_as_too_slow)

    def _send_soon(self, frame: bytes) -> None:
        """Write a short text message together with all else that this socket is sent in this turn of the loop.

        picows, which would ask the system to send it at once, then puts what follows behind it.
        """
        size = len(frame)
        assert size <= _SHORT_BYTES
        if not (self.transport.is_close_frame_sent or self.transport.is_disconnected):
            header = (
                bytes((_TEXT_HEADER, size)) if size < _EXTENDED else struct.pack("!BBH", _TEXT_HEADER, _EXTENDED, size)
            )
            self.transport.underlying_transport.write(header + frame)
            if self.is_behind:
                self._check_budget()

    def _count(self) -> None:
        """Count a frame that is no message by itself, and is taken however many there are, until this is closed."""
        now = self._clock()
        if self._visit.message(now):
            self._run(self._session.over_rate(now))

    def _fragment(self, frame: WSFrame) -> None:
        """Take a piece of a message in several frames (RFC 6455, section 5.4)."""
        self._count()
        is_first = frame.msg_type == WSMsgType.TEXT
        if is_first != (self._fragments is None):
            self._close(_PROTOCOL_ERROR, "A fragment is out of place.")
            return
        if self._fragments is None:
            self._fragments = bytearray()
        if len(self._fragments) + frame.payload_size > FRAME_BYTES_MAX:
            self._close(_MESSAGE_TOO_BIG, f"A message has at most {FRAME_BYTES_MAX} bytes.")
            return
        self._fragments += frame.get_payload_as_memoryview()
        if frame.fin:
            data = bytes(self._fragments)
            self._fragments = None
            self._run(self._session.text_received(data, self._clock()))

    def _run(self, intents: Iterable[Intent]) -> None:
        for intent in intents:
            match intent:
                case Send():
                    self.send(intent.data)
                case Refuse():
                    self._send_soon(intent.data)
                case Submit():
                    self._submit(intent)
                case Subscribe():
                    on_subscribed = partial(self._subscribed, intent.pending)
                    self._fanout.subscribe(intent.topic, intent.viewer, intent.since, self, on_subscribed)
                case Unsubscribe():
                    self._fanout.unsubscribe(intent.topic, self)
                case FollowUser():
                    self._people.follow(intent.user, self, partial(self._subscribed, intent.pending))
                case UnfollowUser():
                    self._people.drop(self)
                case Ping():
                    self.transport.send_ping()
                case Close():
                    self._close(intent.code, intent.reason)

    def _submit(self, intent: Submit) -> None:
        if self._rest is not None:
            older, self._held = self._held, intent
            if older is not None:
                self._answered(older.pending, BUSY)
        elif retry_after_ms := self._visit.bid(intent.payload.bidder, self._clock()):
            self._answered(intent.pending, rate_limited(retry_after_ms))
        else:
            self._router.submit(intent.payload, partial(self._answered, intent.pending))

    def _answered(self, pending: PendingBid, answer: Answer) -> None:
        if not self._is_closing:
            self._run(self._session.answered(pending, answer))
            if isinstance(answer, Rejection) and answer.code == "busy":
                self._let_rest()

    def _let_rest(self) -> None:
        """Read no further for a moment, and take no bid of what was read: too much is going on behind.

        What comes meanwhile is then read at once, and all bids but the last are refused, at a fraction of the price:
        what the refusals do not cost is there for the bids that are taken; and these have not waited long. Not all wake
        at the same time.
        """
        transport = self.transport.underlying_transport
        if self._rest is None and not transport.is_closing():
            transport.pause_reading()
            rest_ms = uniform(0.5, 1.5) * BUSY_REST_MS  # noqa: S311 (nothing secret)
            self._rest = asyncio.get_running_loop().call_later(rest_ms / SECOND_MS, self._read_on)

    def _read_on(self) -> None:
        transport = self.transport.underlying_transport
        if not transport.is_closing():
            transport.resume_reading()
            self._rest = asyncio.get_running_loop().call_later(BUSY_READ_MS / SECOND_MS, self._wake)

    def _wake(self) -> None:
        self._rest = None
        held, self._held = self._held, None
        if held is not None and not self._is_closing:
            self._submit(held)

    def _subscribed(self, pending: PendingSubscription, answer: Subscribed | list[Standing] | Rejection) -> None:
        if not self._is_closing:
            self._run(self._session.subscribed(pending, answer))

    def _close(self, code: int, reason: str) -> None:
        """Send a close, and cut the connection if the peer does not answer it, or does not read it."""
        if self._is_closing:
            return
        self._leave()
        logger.debug("a socket is closed", connection=self._session.connection, code=code, reason=reason)
        assert len(reason.encode()) <= CLOSE_REASON_BYTES_MAX
        # Cython's enum takes every number, as RFC 6455 wants it; its stub does not say so.
        self.transport.send_close(cast("WSCloseCode", code), reason.encode())
        self._cut = asyncio.get_running_loop().call_later(
            CLOSE_TIMEOUT_MS / SECOND_MS, self.transport.disconnect, False
        )

    def _leave(self) -> None:
        """Take no more part in anything: what is still on its way to this client is dropped."""
        if not self._is_closing:
            self._is_closing = True
            self._sockets.discard(self)
            self._fanout.drop(self)
            self._people.drop(self)


class _LiveProtocol(WSProtocol):  # type: ignore[misc]  # Any, as far as the stub goes.
    """picows's protocol, as uvicorn makes one for each upgrade."""

    listener_factory: Callable[[WSUpgradeRequest], WSUpgradeResponseWithListener]

    def __init__(self, config: Any, server_state: Any, app_state: Any) -> None:  # noqa: ANN401, ARG002 (uvicorn's)
        self._connections: set[object] = server_state.connections
        super().__init__(
            host_port=None,
            ws_path=None,
            is_client_side=False,
            ws_listener_factory=self.listener_factory,
            logger=_LOGGER,
            disconnect_on_exception=True,
            websocket_handshake_timeout=HELLO_TIMEOUT_MS / SECOND_MS,
            enable_auto_ping=False,
            auto_ping_idle_timeout=0,
            auto_ping_reply_timeout=0,
            auto_ping_strategy=WSAutoPingStrategy.PING_PERIODICALLY,
            enable_auto_pong=False,
            max_frame_size=FRAME_BYTES_MAX,
            extra_headers=None,
            read_buffer_init_size=0,
        )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvicorn, when it shuts down, calls `shutdown` of all its connections, and waits until they are gone.
        self._connections.add(self)
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take the upgrade request from uvicorn. What follows on the connection goes past this, into the buffer."""
        rest = memoryview(data)
        while rest:
            buffer = self.get_buffer(len(rest))
            size = min(len(buffer), len(rest))
            buffer[:size] = rest[:size]
            self.buffer_updated(size)
            rest = rest[size:]

    def shutdown(self) -> None:
        """End the connection: uvicorn is shutting down."""
        if self.listener is None:
            self.transport.disconnect()
        else:
            self.listener.drain()


class _QuietLogger(logging.LoggerAdapter[logging.Logger]):
    """A peer that comes, goes or breaks the rules is no news; all that is left is our own faults.

    Being no Logger, it is shared by all connections: of a Logger picows makes a child for each.
    """

    def info(self, msg: object, *args: object, **kwargs: Any) -> None:  # noqa: ANN401 (as in logging)
        """Say nothing: whence a peer comes is nobody's business."""

    def error(self, msg: object, *args: object, **kwargs: Any) -> None:  # noqa: ANN401 (as in logging)
        if str(msg).startswith("WS parser error"):
            self.debug(msg, *args, **kwargs)
        else:
            super().error(msg, *args, **kwargs)


_LOGGER: Final = _QuietLogger(logging.getLogger(__name__))


def make_http_protocol(connections_max: int) -> "type[HttpProtocol]":
    """Make the class that uvicorn takes as `http=`. Connections over `connections_max`, of all kinds, are cut."""

    class BoundedProtocol(HttpProtocol):
        pass

    BoundedProtocol.connections_max = connections_max
    BoundedProtocol.admissions = Slices(CONNECTIONS_PER_SLICE)
    return BoundedProtocol


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's HTTP, with a bound to connections, and an end to the patience for a request's headers.

    Where many connect at once they are let in a few at a time: whoever is in does not wait until all of them are.
    """

    connections_max: int
    admissions: Slices
    _is_admitted = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # As uvicorn has it.
        # All are among them: clients' sockets, and those that are refused or closing, too.
        is_one_too_many = len(self.connections) >= self.connections_max
        super().connection_made(transport)
        self._patience = asyncio.get_running_loop().call_later(HEADERS_TIMEOUT_MS / SECOND_MS, transport.abort)
        if is_one_too_many:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._patience.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_admitted:
            super().data_received(data)
            return
        self.admissions.run([data], self._admit)
        if not self._is_admitted:
            self.transport.pause_reading()

    def _admit(self, data: bytes) -> None:
        if not self.transport.is_closing():
            self._is_admitted = True
            if not self.transport.is_reading():
                self.transport.resume_reading()
            super().data_received(data)

    def on_headers_complete(self) -> None:
        self._patience.cancel()
        super().on_headers_complete()
