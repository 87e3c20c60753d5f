"""The network between simulated processes: WebSockets, as far as our code can tell.

A connection is two `Transport`s, each in a process. What one sends arrives at the other in order, each message after a
delay of its own. A connection may be cut, so that only a part of what was on its way arrives, or held, so that nothing
arrives until it is released, if it ever is. What the listeners are called with is what picows calls them with.

The kernels hold so much of what is not read, `KERNEL_BYTES`. The rest waits in the sender's write buffer, which calls
`pause_writing` and `resume_writing` as uvloop's does, and is lost with its process.
"""

from asyncio import Future, sleep
from collections import deque
from collections.abc import Callable
from contextvars import copy_context
from typing import Any, Final, cast

import msgspec
import picows

from engine.limits import LINK_GREETING_MS, PROBE_TIMEOUT_MS, SECOND_MS
from tests.simulation.world import Handle, Process, World

PING: Final = picows.WSMsgType.PING
PONG: Final = picows.WSMsgType.PONG
CLOSE: Final = picows.WSMsgType.CLOSE
TEXT: Final = picows.WSMsgType.TEXT
BINARY: Final = picows.WSMsgType.BINARY
_INTERNAL_ERROR: Final = 1011
KERNEL_BYTES: Final = 2_000
"""While so much is on its way to a peer, or not read there, nothing more is sent to it."""
_TEXT_HEADER: Final = 0x81
_EXTENDED: Final = 126
"""See RFC 6455, section 5.2."""
_TRACED_CHARACTERS: Final = 300


class Frame:
    """One WebSocket frame, as picows gives it to a listener."""

    __slots__ = ("fin", "msg_type", "payload")

    rsv1 = rsv2 = rsv3 = False

    def __init__(self, msg_type: picows.WSMsgType, payload: bytes, fin: bool = True) -> None:
        self.msg_type = msg_type
        self.payload = payload
        self.fin = fin

    @property
    def payload_size(self) -> int:
        return len(self.payload)

    def get_payload_as_bytes(self) -> bytes:
        return self.payload

    def get_payload_as_memoryview(self) -> memoryview:
        return memoryview(self.payload)

    def get_close_code(self) -> int:
        return int.from_bytes(self.payload[:2], "big")

    def get_close_message(self) -> bytes:
        return self.payload[2:]


_OPEN: Final = Frame(picows.WSMsgType.CONTINUATION, b"")
"""The handshake: the request at the server's end, the response at the client's."""
_END: Final = Frame(picows.WSMsgType.CONTINUATION, b"")
"""The end of the connection."""


class Wires:
    """What the processes of one world share: who listens where, what connects them, and how slow it is."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.delay_us = (50, 2_000)
        """One way, the least and the most."""
        self.spike_chance = 0.005
        self.spike_us_max = 200_000
        self.listening: dict[str, Listening] = {}
        self.connections: dict[Transport, None] = {}
        """The ends at which connections were asked for."""
        self.refusing: set[Process] = set()
        """To these no new connection is let through; those that there are stay."""
        self.parted: set[tuple[Process, Process]] = set()
        """Between these nothing passes, for now."""

    @classmethod
    def of(cls, world: World) -> "Wires":
        """The wires of a world; there is one set."""
        return cast("Wires", world.shared.setdefault(cls, cls(world)))

    def draw_delay_us(self) -> int:
        """How long something travels."""
        chance = self.world.random.random()
        if chance < self.spike_chance:
            return int(self.spike_us_max * self.world.random.random()) + self.delay_us[0]
        least, most = self.delay_us
        return least + int((most - least) * chance)

    def between(self, one: Process, other: Process) -> "list[Transport]":
        """The connections of two processes, each by the end at which it was asked for."""
        pair = (one, other)
        return [
            end for end in self.connections if end.peer is not None and end.process in pair and end.peer.process in pair
        ]

    def of_process(self, process: Process) -> "list[Transport]":
        """The ends of connections in this process."""
        ends = [end for pair in self.connections for end in (pair, pair.peer)]
        return [end for end in ends if end is not None and end.process is process]

    def listening_at(self, address: str) -> "Listening | None":
        """Who takes connections there; None where they are refused."""
        listening = self.listening.get(address)
        return None if listening is None or listening.process in self.refusing else listening

    def refuse(self, process: Process, is_refusing: bool) -> None:
        """Have new connections to a process refused from now on, or let through again."""
        if is_refusing:
            self.refusing.add(process)
        else:
            self.refusing.discard(process)

    def part(self, one: Process, other: Process) -> None:
        """Let nothing pass between two processes, until they are joined again."""
        self.parted |= {(one, other), (other, one)}
        for end in self.between(one, other):
            end.hold()

    def join(self, one: Process, other: Process) -> None:
        """Let pass again, and what was held back first."""
        self.parted -= {(one, other), (other, one)}
        for end in self.between(one, other):
            end.release()


class Listening:
    """An address at which a process takes connections."""

    def __init__(
        self, wires: Wires, process: Process, address: str, make_listener: Callable[[], Any], auto_pong: bool
    ) -> None:
        self.address = address
        self.process = process
        self.make_listener = make_listener
        self.auto_pong = auto_pong
        self.is_closed = False
        self._wires = wires
        wires.listening[address] = self

    def close(self) -> None:
        """Take no more connections."""
        self.is_closed = True
        self._wires.listening.pop(self.address, None)


class SimulatedNetwork:
    """One process's way to the others: see `Network`."""

    def __init__(self, world: World, process: Process) -> None:
        self.wires = Wires.of(world)
        self._process = process
        self._listenings: list[Listening] = []
        process.on_death.append(self._end)

    async def listen(
        self, make_listener: Callable[[], picows.WSListener], host: str, *, auto_pong: bool = True
    ) -> Listening:
        """See `Network`. Without `auto_pong` the listeners see pings and answer them."""
        return self.listen_now(make_listener, host, auto_pong=auto_pong)

    def listen_now(self, make_listener: Callable[[], Any], _host: str = "", *, auto_pong: bool = True) -> Listening:
        """Do the same at once."""
        address = f"{self._process.name}:{len(self._listenings) + 1}"
        listening = Listening(self.wires, self._process, address, make_listener, auto_pong)
        self._listenings.append(listening)
        return listening

    async def connect(self, listener: picows.WSListener, address: str) -> None:
        """See `Network`."""
        await self.open(listener, address)

    async def open(self, listener: Any, address: str) -> "Transport":
        """Connect, and return this end."""
        wires = self.wires
        end = Transport(wires, self._process, listener, auto_pong=True)
        end.connected = self._process.create_future()
        wires.connections[end] = None
        wires.world.after(wires.draw_delay_us(), end.reach, address)
        patience = self._process.call_later(LINK_GREETING_MS / SECOND_MS, end.fail, TimeoutError("no handshake"))
        try:
            await end.connected
        except BaseException:
            end.disconnect(graceful=False)
            raise
        finally:
            patience.cancel()
        return end

    async def refuses(self, address: str) -> bool:
        """See `Network`."""
        wires = self.wires
        await sleep(2 * wires.draw_delay_us() / 1e6)
        listening = wires.listening_at(address)
        if listening is not None and (self._process, listening.process) in wires.parted:
            await sleep(PROBE_TIMEOUT_MS / SECOND_MS)
            return False
        return listening is None

    def _end(self) -> None:
        """Do what the kernel does when the process is gone: its sockets are closed."""
        for listening in self._listenings:
            listening.close()
        for end in self.wires.of_process(self._process):
            end.abandon()


class Transport:
    """One end of a connection: what picows calls a transport, and the transport under it."""

    __slots__ = (
        "_arriving",
        "_auto_pong",
        "_is_armed",
        "_is_closed",
        "_is_held",
        "_is_open",
        "_is_reading_paused",
        "_is_write_paused",
        "_last_due_us",
        "_listening",
        "_pace_us",
        "_read_handle",
        "_takes_more",
        "_unsent",
        "_unsent_bytes",
        "_wires",
        "_world",
        "_write_high",
        "connected",
        "is_close_frame_sent",
        "is_disconnected",
        "listener",
        "peer",
        "process",
        "unread",
    )

    def __init__(self, wires: Wires, process: Process, listener: Any, *, auto_pong: bool) -> None:
        self.process = process
        self.listener = listener
        self.peer: Transport | None = None
        self.connected: Future[None] | None = None
        """At the end at which the connection was asked for: settled when it is open, or will never be."""
        self.is_disconnected = False
        self.is_close_frame_sent = False
        self.unread = 0
        """Bytes on their way to this end, and not read there: what the kernels hold."""
        self._wires = wires
        self._world = process.world
        self._listening: Listening | None = None
        self._arriving: deque[tuple[int, Frame]] = deque()
        self._last_due_us = 0
        self._takes_more = True
        """Whether what is sent from now on can still arrive here."""
        self._is_armed = False
        self._is_held = False
        """By a fault."""
        self._is_reading_paused = False
        """By its own process."""
        self._pace_us = 0
        """If it reads slowly: so long it takes over each frame."""
        self._is_open = False
        self._is_closed = False
        self._auto_pong = auto_pong
        self._unsent: deque[Frame] = deque()
        """The write buffer."""
        self._unsent_bytes = 0
        self._write_high = 1 << 62
        self._is_write_paused = False
        self._read_handle = Handle(self._read, (), copy_context())

    # What listeners use

    @property
    def underlying_transport(self) -> "Transport":
        return self

    def send(self, msg_type: picows.WSMsgType, message: Any, fin: bool = True) -> None:
        payload = message.encode() if isinstance(message, str) else b"" if message is None else bytes(message)
        self._send(Frame(msg_type, payload, fin))

    def send_reuse_external_bytearray(self, msg_type: picows.WSMsgType, buffer: bytearray, msg_offset: int) -> None:
        self._send(Frame(msg_type, bytes(memoryview(buffer)[msg_offset:])))

    def send_ping(self, message: Any = None) -> None:
        self.send(PING, message)

    def send_pong(self, message: Any = None) -> None:
        self.send(PONG, message)

    def send_close(self, close_code: int = 0, close_message: Any = None) -> None:
        text = close_message.encode() if isinstance(close_message, str) else bytes(close_message or b"")
        self._send(Frame(CLOSE, int(close_code).to_bytes(2, "big") + text))
        self.is_close_frame_sent = True

    def disconnect(self, graceful: bool = True) -> None:
        """Close this end. Without `graceful` the other one may see only a part of what was sent."""
        if self._is_closed or self.process.is_dead:
            return
        if self._world.is_tracing:
            self._world.trace(self.process.name, f"disconnects from {self.peer_name}")
        self._is_closed = True
        self._arriving.clear()
        self.process.call_soon(self._lost)
        if self.peer is not None:
            if graceful:
                self._flush(1 << 62)
            self.peer.lose(is_whole=graceful)
        self._drop_unsent()

    def write(self, data: bytes) -> None:
        """Take a text frame as bytes, with its header."""
        size, begin = data[1], 2
        if size == _EXTENDED:
            size, begin = int.from_bytes(data[2:4], "big"), 4
        assert data[0] == _TEXT_HEADER
        assert len(data) == begin + size
        self._send(Frame(TEXT, data[begin:]))

    def get_extra_info(self, name: str) -> tuple[str, int]:
        assert name == "peername"
        return "127.0.0.1", 0

    def get_write_buffer_size(self) -> int:
        return self._unsent_bytes

    def set_write_buffer_limits(self, high: int) -> None:
        self._write_high = high

    def is_closing(self) -> bool:
        return self._is_closed

    def close(self) -> None:
        self.disconnect()

    def abort(self) -> None:
        self.disconnect(graceful=False)

    def pause_reading(self) -> None:
        """Read nothing more from the kernel; what has been read is still handed over."""
        self._ensure_alive()
        self._is_reading_paused = True

    def resume_reading(self) -> None:
        """Read on."""
        self._ensure_alive()
        self._is_reading_paused = False
        self._arm()

    def _ensure_alive(self) -> None:
        if self._is_closed:
            raise RuntimeError("the transport is closed")

    # What faults do to it

    @property
    def is_open(self) -> bool:
        """Whether the handshake is over, and the end not yet there."""
        return self._is_open and not self._is_closed

    @property
    def peer_name(self) -> str:
        """Whose the other end is."""
        return "nobody" if self.peer is None else self.peer.process.name

    def cut(self, late_us: int = 0) -> None:
        """Break the connection: of what is on its way a part arrives. The peer may notice late."""
        if self._world.is_tracing:
            self._world.trace(self.process.name, f"CUT off from {self.peer_name}")
        self.lose(is_whole=False)
        if self.peer is not None:
            self.peer.lose(is_whole=False, late_us=late_us)

    def hold(self) -> None:
        """Let nothing pass, in either direction, without a word."""
        if self._world.is_tracing:
            self._world.trace(self.process.name, f"HELD apart from {self.peer_name}")
        self.stall()
        if self.peer is not None:
            self.peer.stall()

    def release(self) -> None:
        """Let pass what was held back, and all that follows."""
        self.unstall()
        if self.peer is not None:
            self.peer.unstall()

    def stall(self) -> None:
        """Read nothing at this end, whatever comes."""
        self._is_held = True

    def unstall(self) -> None:
        """Read on."""
        self._is_held = False
        self._arm()

    def dawdle(self, pace_us: int) -> None:
        """Take so long over each frame from now on; 0: read as fast as may be."""
        self._pace_us = pace_us

    def abandon(self) -> None:
        """Its process is dead."""
        self._is_closed = True
        self._drop_unsent()
        self._forget()
        if self.peer is not None:
            self.peer.lose(is_whole=False)

    def lose(self, *, is_whole: bool, late_us: int = 0) -> None:
        """Let this end see the end of the connection, after all that is on its way to it, or after a part."""
        if self._is_closed or not self._takes_more:
            return
        self._takes_more = False
        if self.peer is None:
            # The handshake has not got as far as to a peer.
            self.fail(ConnectionResetError("the connection was cut"))
            return
        random = self._world.random
        if not is_whole and random.random() < 0.5:
            now_us = self._world.now_us
            under_way = [item for item in self._arriving if item[0] > now_us]
            for _ in range(random.randint(0, len(under_way))):
                self._arriving.pop()
        self._deliver(_END, late_us)

    # The handshake

    def reach(self, address: str) -> None:
        """The first packet has come to the other machine, if it has."""
        listening = self._wires.listening_at(address)
        connected = self.connected
        assert connected is not None
        if connected.done() or self.process.is_dead:
            return
        if listening is None:
            self._world.after(self._wires.draw_delay_us(), self.fail, ConnectionRefusedError(f"{address} refuses"))
        elif (self.process, listening.process) not in self._wires.parted:
            peer = Transport(self._wires, listening.process, None, auto_pong=listening.auto_pong)
            peer.peer, self.peer = self, peer
            peer._listening = listening
            peer._deliver(_OPEN, 2 * self._wires.draw_delay_us())

    def fail(self, error: Exception) -> None:
        """The connection never comes to be."""
        if self.connected is not None and not self.connected.done() and not self.process.is_dead:
            self.connected.set_exception(error)

    def _open(self) -> None:
        if self._listening is not None:
            if self._listening.is_closed:
                self.disconnect(graceful=False)
                return
            assert self.peer is not None
            self.listener = self._listening.make_listener()
            self.peer._deliver(_OPEN)
        elif self.connected is None or self.connected.done():
            return
        else:
            self.connected.set_result(None)
        self._is_open = True
        if self._world.is_tracing:
            self._world.trace(self.process.name, f"connected with {self.peer_name}")
        self.listener.on_ws_connected(self)

    # What travels

    def _send(self, frame: Frame) -> None:
        peer = self.peer
        if self._is_closed or self.is_close_frame_sent or peer is None or self.process.is_dead:
            return
        if self._world.is_tracing:
            self._world.trace(self.process.name, f"-> {peer.process.name}: {describe(frame)}")
        if peer.unread < KERNEL_BYTES and not self._unsent:
            peer._deliver(frame)
            return
        self._unsent.append(frame)
        self._unsent_bytes += len(frame.payload)
        if self._unsent_bytes > self._write_high and not self._is_write_paused:
            self._is_write_paused = True
            self.listener.pause_writing()

    def _flush(self, room: int) -> None:
        """Send what waits in the write buffer, as long as there is room for it."""
        peer = self.peer
        assert peer is not None
        while self._unsent and peer.unread < room:
            frame = self._unsent.popleft()
            self._unsent_bytes -= len(frame.payload)
            peer._deliver(frame)
        if self._is_write_paused and self._unsent_bytes <= self._write_high // 4 and not self._is_closed:
            self._is_write_paused = False
            self.process.soon(Handle(self.listener.resume_writing, (), None))

    def _drop_unsent(self) -> None:
        self._unsent.clear()
        self._unsent_bytes = 0

    def _deliver(self, frame: Frame, late_us: int = 0) -> None:
        """Put something on the way to this end."""
        if self._is_closed or not (self._takes_more or frame is _END):
            return
        due_us = self._world.now_us + self._wires.draw_delay_us() + late_us
        # Order is kept.
        due_us = self._last_due_us = max(due_us, self._last_due_us)
        self._arriving.append((due_us, frame))
        self.unread += len(frame.payload)
        if not self._is_armed:
            self._arm()

    def _arm(self) -> None:
        """Have this end read when something has come."""
        if self._arriving and not (self._is_armed or self._is_held or self._is_reading_paused):
            self._is_armed = True
            due_us = self._arriving[0][0]
            if due_us <= self._world.now_us:
                due_us = self._world.now_us + self._wires.draw_delay_us()
            self._world.at(due_us + self._pace_us, self.process.receive, self._read_handle)

    def _read(self) -> None:
        """Hand over what has come. What came together is handed over together, as picows does, whatever happens."""
        self._is_armed = False
        if self._is_held or self._is_reading_paused:
            return
        now_us = self._world.now_us
        arriving = self._arriving
        came = 0
        while arriving and arriving[0][0] <= now_us and not (came and self._pace_us):
            frame = arriving.popleft()[1]
            came += len(frame.payload)
            try:
                if frame is _OPEN:
                    self._open()
                elif frame is _END:
                    self._is_closed = True
                    self.process.call_soon(self._lost)
                elif self._auto_pong and frame.msg_type == PING:
                    self.send_pong(frame.payload)
                elif self._is_open:
                    self.listener.on_ws_frame(self, frame)
            except Exception as error:  # noqa: BLE001 (as picows does, but it is a fault)
                self.process.call_exception_handler({"message": "a listener failed", "exception": error})
                self.send_close(_INTERNAL_ERROR)
                self.disconnect()
        self.unread -= came
        if self.peer is not None and self.peer._unsent:
            self.peer._flush(KERNEL_BYTES)
        self._arm()

    def _lost(self) -> None:
        """The connection is over for this end."""
        if self.is_disconnected:
            return
        self.is_disconnected = True
        self._forget()
        if self._is_open:
            if self._world.is_tracing:
                self._world.trace(self.process.name, f"disconnected from {self.peer_name}")
            self.listener.on_ws_disconnected(self)
        self.fail(ConnectionResetError("the connection was cut"))

    def _forget(self) -> None:
        """Both ends are over: faults need not find the connection any more."""
        if self.peer is None or self.peer._is_closed:
            self._wires.connections.pop(self, None)
            if self.peer is not None:
                self._wires.connections.pop(self.peer, None)


def describe(frame: Frame) -> str:
    """A frame for a reader of traces."""
    kind = frame.msg_type
    if kind == TEXT:
        text = frame.payload.decode(errors="replace")
    elif kind == BINARY:
        try:
            text = str(msgspec.msgpack.decode(frame.payload))
        except (msgspec.MsgspecError, UnicodeDecodeError):
            text = repr(frame.payload)
    elif kind == CLOSE:
        text = f"close {frame.get_close_code()} {frame.get_close_message().decode(errors='replace')}"
    else:
        text = "ping" if kind == PING else "pong"
    return text if len(text) <= _TRACED_CHARACTERS else text[:_TRACED_CHARACTERS] + "…"
