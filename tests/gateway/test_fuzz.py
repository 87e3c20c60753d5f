"""Frames that nobody should send, by the ten thousand: to a session, and as raw bytes to picows under uvicorn."""

import asyncio
import contextlib
import gc
import json
import random
from collections.abc import Callable, Iterator
from typing import Any, Final, NoReturn, cast
from uuid import UUID

import msgspec
import pytest
import uvicorn
from uvicorn.server import ServerState

from actors.messages import Answer, AuctionView, BidAccepted, Payload, You
from engine.limits import (
    CLOSE_TIMEOUT_MS,
    ERRORS_MAX,
    FRAME_BYTES_MAX,
    HEADERS_TIMEOUT_MS,
    HEARTBEAT_MS,
    HELLO_TIMEOUT_MS,
    IN_FLIGHT_MAX,
    INTEGER_MAX,
    REF_LENGTH_MAX,
    SECOND_MS,
    SOCKETS_MAX,
    SUBSCRIPTIONS_MAX,
)
from engine.rejections import BUSY, INTERNAL, NOT_FOUND, OUTCOME_UNKNOWN, UNAVAILABLE, Rejection
from gateway.origins import Origins
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
)
from gateway.socket import Sink, Sockets, make_http_protocol, make_protocol
from gateway.tokens import Verifier, issue, make_key_pair
from gateway.wire import Standing, Subscribed
from tests.gateway.test_wire import SNAPSHOT
from tests.support.fuzz import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    Frames,
    Grammar,
    check_that_nothing_stays,
    mutated,
)

FRAMES: Final = 100_000
"""To the session, and as many to the parser; in `PARTS`, each a test of its own. More of them find more."""
PARTS: Final = 5

NOW: Final = 1_700_000_000_000
ANNA: Final = UUID("22222222-2222-4222-8222-222222222222")
BEN: Final = UUID("33333333-3333-4333-8333-333333333333")
PRIVATE, PUBLIC = make_key_pair()
VERIFY: Final = Verifier(PUBLIC).verify
TOKENS: Final = [
    *[issue(PRIVATE, ANNA, "viewer", 3_600, NOW)] * 4,
    issue(PRIVATE, ANNA, "viewer", 90, NOW),
    issue(PRIVATE, BEN, "admin", 3_600, NOW),
]


# What the server may say to it, after the live protocol's tables

FIELDS_BY_TYPE: Final[dict[str, tuple[set[str], set[str]]]] = {
    "welcome": (
        {"ref", "connection", "server_time", "user", "role", "expires_at", "heartbeat_ms", "limits"},
        set(),
    ),
    "time": ({"ref", "t0", "t1", "t2"}, set()),
    "subscribed": ({"ref", "topic"}, {"seq", "recovered", "events", "snapshot", "you", "standings"}),
    "unsubscribed": ({"ref", "topic"}, set()),
    "ack": (
        {"ref", "seq", "hash", "auction", "bid_id", "outcome", "price", "paddle", "max_amount", "minimum", "end_time"},
        set(),
    ),
    "rejected": ({"ref", "code", "message", "is_transient"}, {"bid_id", "minimum", "retry_after_ms"}),
    "error": ({"code", "message"}, {"ref", "field", "retry_after_ms"}),
    "pong": ({"ref"}, set()),
}
"""Of each type that a session sends: the fields that it has, and those that it may have."""
ERROR_CODES: Final = {
    "bad_request",
    "unknown_op",
    "hello_first",
    "too_many",
    "busy",
    "rate_limited",
    "unavailable",
    "internal",
    "outcome_unknown",
}
REJECTION_CODES: Final = {"not_authenticated", "not_found", "ended", "bid_too_low"}
"""Of the protocol's: the session's own, and those that this file's shards give."""
CLOSE_CODES: Final = {4000, 4001, 4002, 4500, 4501, 4502}
ANSWERS_BY_OP: Final = {
    "hello": {"welcome", "error"},
    "time": {"time", "error"},
    "subscribe": {"rejected", "error"},
    "unsubscribe": {"unsubscribed", "error"},
    "bid": {"rejected", "error"},
    "ping": {"pong", "error"},
}
NOT_PROTOCOL: Final = object()
UNKNOWN: Final = object()


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def _integer(digits: str) -> int:
    # Python refuses to read very long ones; all of these are out of bounds alike.
    return int(digits[:400])


_reader: Final = json.JSONDecoder(parse_constant=_refuse, parse_int=_integer)


def read_independently(data: bytes) -> Any:
    """A JSON object as Python reads it; `NOT_PROTOCOL` if it is none, `UNKNOWN` where it is nested too deeply."""
    try:
        message = _reader.decode(data.decode())
    except ValueError:
        return NOT_PROTOCOL
    except RecursionError:
        return UNKNOWN
    return message if isinstance(message, dict) else NOT_PROTOCOL


def read_frame(data: bytes) -> dict[str, Any]:
    """What the server sent, after a look whether it is of the protocol."""
    frame: dict[str, Any] = _reader.decode(data.decode())
    needed, possible = FIELDS_BY_TYPE[frame["type"]]
    fields = frame.keys() - {"type"}
    assert needed <= fields <= needed | possible, frame
    assert is_ref(frame.get("ref"))
    match frame["type"]:
        case "error":
            assert frame["code"] in ERROR_CODES
            assert frame["message"]
        case "rejected":
            assert frame["code"] in REJECTION_CODES
            assert frame["message"]
        case "subscribed":
            is_me = frame["topic"] == "me"
            is_told = "standings" in frame, "events" in frame, "snapshot" in frame
            assert is_told == (is_me, frame.get("recovered") is True, frame.get("recovered") is False)
    return frame


def is_ref(ref: Any) -> bool:
    return ref is None or is_integer(ref) or (isinstance(ref, str) and len(ref) <= REF_LENGTH_MAX)


def is_integer(value: Any) -> bool:
    return type(value) is int and abs(value) <= INTEGER_MAX


# A session


ACCEPTED: Final = BidAccepted(7, bytes(32), NOW, "leading", 100, 3, 900, 105, NOW + 1)
VERDICTS: Final[list[Answer]] = [
    ACCEPTED,
    Rejection("bid_too_low", "Bid 1.05 or more.", minimum=105),
    Rejection("ended", "It is over."),
    NOT_FOUND,
    BUSY,
    INTERNAL,
    OUTCOME_UNKNOWN,
    AuctionView(1, SNAPSHOT, None, ANNA, None, None, NOW),
]
SUBSCRIPTION_ANSWERS: Final[list[Subscribed | Rejection]] = [
    Subscribed(5, b"", None, None),
    Subscribed(5, b'{"seq":5,"kind":"private"}', None, You(1, 100, is_leading=True)),
    Subscribed(5, None, msgspec.json.encode(SNAPSHOT), None),
    NOT_FOUND,
    UNAVAILABLE,
]

FOLLOWING_ANSWERS: Final[list[list[Standing] | Rejection]] = [
    [],
    [Standing(auction=SNAPSHOT.auction, paddle=1, max_amount=100, is_leading=True, status="active")],
    UNAVAILABLE,
]


class Conversation:
    """A session under fire, and what must be true of it after each frame."""

    def __init__(self, randomness: random.Random, grammar: Grammar) -> None:
        self.session = Session(UUID(int=randomness.getrandbits(128)), VERIFY, NOW)
        self.is_over = False
        self._randomness = randomness
        self._grammar = grammar
        self._now = NOW
        self._bids: list[PendingBid] = []
        self._subscriptions: list[PendingSubscription] = []
        # Most are polite at first, some are never; some wait long for their answers, some for ever.
        self._wildness = randomness.choice([0, 0.05, 0.3, 1])
        self._patience = randomness.choice([0, 0.1, 0.6])
        self._step_ms = randomness.choice([1, 200, 5_000])
        self._frames_left = int(1_000 ** randomness.random())
        if randomness.random() < 0.9:
            self._text(grammar.hello())

    def go_on(self) -> None:
        """One frame from the client, and perhaps something else."""
        draw = self._randomness.random
        self._now += int(draw() * self._step_ms)
        if draw() < 0.01:
            self._something_else()
        if draw() < self._patience:
            self._answer_one()
        self._text(self._grammar.text(self._wildness))
        session = self.session
        assert session._in_flight <= IN_FLIGHT_MAX
        assert len(session._subscriptions) <= SUBSCRIPTIONS_MAX
        assert session._unanswered == len(self._subscriptions) <= SUBSCRIPTIONS_MAX
        assert session.is_closed or (session._in_flight == len(self._bids) and session._errors < ERRORS_MAX)
        self._frames_left -= 1
        if session.is_closed or self._frames_left == 0:
            self._end()

    def _text(self, data: bytes) -> None:
        asked = read_independently(data)
        was_closed = self.session.is_closed
        intents = self.session.text_received(data, self._now)
        frames = self._check(intents)
        if was_closed:
            assert intents == []
        elif asked is NOT_PROTOCOL:
            assert [type(intent) for intent in intents] == [Close], data
            assert intents == [Close(4500, getattr(intents[0], "reason", ""))], data
        elif asked is UNKNOWN:
            assert [type(intent) for intent in intents] in ([Send], [Close]), data
        else:
            ref = self._check_answer(asked, intents, frames)
            has_half_a_pair = b"\\ud" in data.lower()
            assert ref == (asked.get("ref") if is_ref(asked.get("ref")) else None) or has_half_a_pair, data

    def _check_answer(self, asked: dict[str, Any], intents: list[Intent], frames: list[dict[str, Any]]) -> Any:
        """See that this is an answer to what was asked; return the `ref` in it."""
        op = asked.get("op")
        match intents:
            case [Close(code=4500, reason=reason)]:
                assert reason == "There were too many errors.", asked
                return asked.get("ref")
            case [Close(code=code)]:
                assert (op, code) == ("hello", 4501), asked
                return asked.get("ref")
            case [Submit(payload=bid, pending=pending)]:
                assert op == "bid", asked
                assert (bid.amount is None) != (bid.max_amount is None), asked
                assert (bid.amount, bid.max_amount) == (asked.get("amount"), asked.get("max_amount")), asked
                assert is_integer(bid.amount if bid.max_amount is None else bid.max_amount), asked
                assert (bid.auction, bid.bid_id) == (UUID(asked["auction"]), UUID(asked["bid_id"])), asked
                assert bid.bidder in {ANNA, BEN}
                return pending.ref
            case [Subscribe(topic=topic, since=since, pending=pending)]:
                assert op == "subscribe", asked
                assert asked["topic"].lower() == f"auction:{topic}", asked
                assert since == asked.get("since"), asked
                assert since is None or (is_integer(since) and since >= 0), asked
                return pending.ref
            case [FollowUser(user=user, pending=pending)]:
                assert (op, asked["topic"]) == ("subscribe", "me"), asked
                assert user in {ANNA, BEN}
                return pending.ref
            case _:
                expected = ANSWERS_BY_OP.get(op, {"error"}) if isinstance(op, str) else {"error"}
                assert frames[-1]["type"] in expected, asked
                assert self._wildness > 0 or frames[-1].get("code") != "bad_request", asked
                return frames[-1].get("ref")

    def _something_else(self) -> None:
        match int(self._randomness.random() * 8):
            case 0:
                self._check(self.session.binary_received())
            case 1:
                self._check(self.session.drained())
            case 2:
                self._check(self.session.too_slow())
            case 3:
                self.session.activity()
            case _:
                self._check(self.session.tick(self._now))

    def _answer_one(self) -> None:
        """What has waited longest is answered, or what comes by chance."""
        index = 0 if self._randomness.random() < 0.5 else -1
        if self._bids:
            answer = self._randomness.choice(VERDICTS)
            pending = self._bids.pop(index)
            was_closed = self.session.is_closed
            frames = self._check(self.session.answered(pending, answer))
            assert was_closed or [frame.get("ref") for frame in frames] == [pending.ref]
        if self._subscriptions:
            subscription = self._subscriptions.pop(index)
            answers = FOLLOWING_ANSWERS if subscription.auction is None else SUBSCRIPTION_ANSWERS
            frames = self._check(self.session.subscribed(subscription, self._randomness.choice(answers)))
            is_for_nobody = self.session.is_closed or subscription.is_cancelled
            assert [frame.get("ref") for frame in frames] == ([] if is_for_nobody else [subscription.ref])

    def _check(self, intents: list[Intent]) -> list[dict[str, Any]]:
        """See that what is to be done can be done; return what is said to the client."""
        frames = []
        for index, intent in enumerate(intents):
            match intent:
                case Send() | Refuse():
                    frames.append(read_frame(intent.data))
                case Close():
                    assert intent.code in CLOSE_CODES
                    assert index == len(intents) - 1
                    assert self.session.is_closed
                case Submit():
                    self._bids.append(intent.pending)
                case Subscribe() | FollowUser():
                    self._subscriptions.append(intent.pending)
                case Ping() | Unsubscribe() | UnfollowUser():
                    pass
        return frames

    def _end(self) -> None:
        """What is answered afterwards is for nobody, and some of it never is."""
        self.is_over = True
        if self.session.is_closed and self._randomness.random() < 0.5:
            while self._bids or self._subscriptions:
                self._answer_one()


@pytest.mark.parametrize("part", range(PARTS))
def test_a_session_takes_whatever_it_is_told(randomness: random.Random, part: int) -> None:
    grammar = Grammar(randomness, TOKENS)

    def deal_with(frames: int) -> None:
        conversation = Conversation(randomness, grammar)
        for _ in range(frames):
            if conversation.is_over:
                conversation = Conversation(randomness, grammar)
            conversation.go_on()

    check_that_nothing_stays(deal_with, FRAMES // PARTS)


# Bytes on a socket


class Loop(asyncio.SelectorEventLoop):
    """A loop whose time a test moves."""

    now = 0.0

    def time(self) -> float:
        return self.now


class Wire(asyncio.Transport):
    """The server's end of a connection, in memory."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self.written = bytearray()
        self.is_close_written = False
        """Whether a close was the last thing written."""
        self.is_ended = False
        self._loop = loop
        self._is_closing = False
        self._is_reading = True
        self._protocol: asyncio.BaseProtocol

    def receive(self, data: bytes) -> None:
        """Hand in what the client sent, as asyncio's transports do."""
        rest = memoryview(data)
        while rest and not self._is_closing:
            if not isinstance(self._protocol, asyncio.BufferedProtocol):
                cast(asyncio.Protocol, self._protocol).data_received(bytes(rest))
                return
            buffer = cast(memoryview, self._protocol.get_buffer(-1))
            size = min(len(buffer), len(rest))
            assert size > 0
            buffer[:size] = rest[:size]
            self._protocol.buffer_updated(size)
            rest = rest[size:]

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        # Asked for a TLS object picows writes through its transport, not past it into the socket.
        # From here as much is taken as comes.
        return {"socket": Socket(), "ssl_object": self, "peername": ("127.0.0.1", 1)}.get(name, default)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.is_ended
        self.written += data
        self.is_close_written = data[0] == 0x80 | CLOSE

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        self._is_reading = False

    def resume_reading(self) -> None:
        self._is_reading = True

    def is_reading(self) -> bool:
        return self._is_reading

    def is_closing(self) -> bool:
        return self._is_closing

    def close(self) -> None:
        if not self._is_closing:
            self._is_closing = True
            self._loop.call_soon(self._end)

    abort = close

    def _end(self) -> None:
        self.is_ended = True
        self._protocol.connection_lost(None)


class Socket:
    """What uvicorn and picows ask of a socket."""

    def fileno(self) -> int:
        return -1

    def setsockopt(self, *_option: object) -> None:
        pass

    def getsockopt(self, *_option: object) -> int:
        return 0

    def getsockname(self) -> tuple[str, int]:
        return "server", 1

    getpeername = getsockname


class Behind:
    """Router, fan-out and notices in one: answers at once, later or never."""

    wire: Wire
    """From which whatever is asked comes."""

    def __init__(self, randomness: random.Random) -> None:
        self._later: list[Callable[[], None]] = []
        self._randomness = randomness

    def submit(self, payload: Payload, on_answer: Callable[[Answer], None]) -> None:
        self._answer(lambda: on_answer(self._randomness.choice(VERDICTS)))

    def subscribe(
        self,
        topic: UUID,
        viewer: UUID | None,
        since: int | None,
        sink: Sink,
        on_subscribed: Callable[[Subscribed | Rejection], None],
        /,
    ) -> None:
        self._answer(lambda: on_subscribed(self._randomness.choice(SUBSCRIPTION_ANSWERS)))

    def unsubscribe(self, topic: UUID, sink: Sink, /) -> None:
        pass

    def catch_up(self, sink: Sink, /) -> None:
        pass

    def follow(self, user: UUID, sink: Sink, on_subscribed: Callable[[list[Standing] | Rejection], None], /) -> None:
        self._answer(lambda: on_subscribed(self._randomness.choice(FOLLOWING_ANSWERS)))

    def drop(self, sink: Sink, /) -> None:
        pass

    def answer_later(self) -> None:
        later, self._later = self._later, []
        for answer in later:
            answer()

    def _answer(self, answer: Callable[[], None]) -> None:
        assert not self.wire.is_close_written, "something was taken after the close"
        match self._randomness.randrange(3):
            case 0:
                answer()
            case 1:
                self._later.append(answer)


async def _app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"plain"})


class Gateway:
    """uvicorn with our protocol, without a port."""

    def __init__(self, loop: Loop, randomness: random.Random) -> None:
        self.loop = loop
        self.sockets = Sockets()
        self.behind = Behind(randomness)
        self._state = ServerState()
        self.connections = self._state.connections
        protocol = make_protocol(self.behind, self.behind, self.behind, VERIFY, lambda: NOW, self.sockets, Origins())
        self._http = make_http_protocol(SOCKETS_MAX)
        self._config = uvicorn.Config(_app, ws=protocol, lifespan="off", log_config=None, http=self._http)
        self._config.load()

    def connect(self) -> Wire:
        wire = self.behind.wire = Wire(self.loop)
        protocol = self._http(self._config, self._state, {}, self.loop)
        wire.set_protocol(protocol)
        protocol.connection_made(wire)
        return wire

    async def answer_to(self, *parts: bytes) -> bytes:
        """Take a request, and wait longer than anybody has patience; returns what was written."""
        wire = self.connect()
        for part in parts:
            wire.receive(part)
        for _ in range(3):
            await self.pass_time(HEADERS_TIMEOUT_MS / SECOND_MS)
            self.sockets.tick(NOW + HELLO_TIMEOUT_MS)
        assert wire.is_ended
        assert len(self.sockets) == 0
        assert self.connections == set()
        assert not wire.written or wire.written.startswith(b"HTTP/1.1 ")
        return bytes(wire.written)

    async def pass_time(self, seconds: float) -> None:
        """Let be done what is due until then."""
        self.loop.now += seconds
        for _ in range(3):
            await asyncio.sleep(0)


HEAD: Final = (
    b"GET /v1/live HTTP/1.1\r\nHost: gavel\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    b"Sec-WebSocket-Protocol: gavel.v1\r\n\r\n"
)


class Client:
    """Somebody who writes to a socket what it likes, and the judge of what comes back."""

    def __init__(self, gateway: Gateway, randomness: random.Random, grammar: Grammar) -> None:
        self._gateway = gateway
        self._randomness = randomness
        self._sent = bytearray()
        self._wire = gateway.connect()
        wildness = randomness.choice([0, 0.05, 0.3, 1])
        self._frames = Frames(grammar, wildness)
        self._turns_left = int(300 ** randomness.random())
        self._wire.receive(HEAD)
        assert self._wire.written.startswith(b"HTTP/1.1 101 ")
        del self._wire.written[: self._wire.written.index(b"\r\n\r\n") + 4]

    async def talk(self) -> int:
        """Send frames, and leave; returns how many there were."""
        rest = self._frames.hello() if self._randomness.random() < 0.9 else b""
        reads_after_close = 0
        while reads_after_close < 5:
            # Often a few bytes, at times many frames.
            size = int(4_000 ** self._randomness.random())
            while len(rest) < size and self._turns_left > 0:
                rest += b"".join(self._frames.some())
                self._turns_left -= 1
            if not rest:
                break
            self._sent += rest[:size]
            self._wire.receive(rest[:size])
            rest = rest[size:]
            reads_after_close += self._wire.is_close_written
        self._gateway.behind.answer_later()
        await self._leave()
        return self._judge()

    async def _leave(self) -> None:
        if not self._wire.is_close_written:
            assert len(self._gateway.sockets) == 1
            if self._randomness.random() < 0.5:
                self._wire.close()
            else:
                # Two pings, and then the patience is over.
                for count in range(1, 4):
                    self._gateway.sockets.tick(NOW + count * HEARTBEAT_MS)
        # Who is sent a close has so long to answer it.
        await self._gateway.pass_time(CLOSE_TIMEOUT_MS / SECOND_MS)
        assert self._wire.is_ended
        assert len(self._gateway.sockets) == 0
        assert self._gateway.connections == set()

    def _judge(self) -> int:
        frames = server_frames(bytes(self._wire.written))
        reading = Reading(bytes(self._sent))
        assert [opcode for opcode, _ in frames[:-1]].count(CLOSE) == 0, "something came after the close"
        code = int.from_bytes(frames[-1][1][:2], "big") if frames and frames[-1][0] == CLOSE else None
        for opcode, payload in frames:
            if opcode == TEXT:
                read_frame(payload)
        pongs = [payload for opcode, payload in frames if opcode == PONG]
        assert pongs == reading.pings[: len(pongs)]
        assert code is not None or pongs == reading.pings
        if reading.offences:
            assert code in reading.offences | {4500, 4501}
        else:
            assert code in {None, 4002, 4500, 4501}
        return reading.frames


def server_frames(data: bytes) -> list[tuple[int, bytes]]:
    """What a server wrote: each frame's opcode and payload."""
    frames = []
    while data:
        assert data[0] & 0xF0 == 0x80, "a server's frames are whole"
        flag = data[1]
        assert flag < 0x80, "a server's frames are not masked"
        header_bytes = {126: 4, 127: 10}.get(flag, 2)
        length = int.from_bytes(data[2:header_bytes], "big") if flag > 125 else flag
        assert len(data) >= header_bytes + length
        frames.append((data[0] & 0xF, data[header_bytes : header_bytes + length]))
        data = data[header_bytes + length :]
    return frames


class Reading:
    """A client's bytes by the rules of RFC 6455: frames, pings, and the codes of all that it may be closed for."""

    def __init__(self, data: bytes) -> None:
        self.frames = 0
        self.pings: list[bytes] = []
        self.offences: set[int] = set()
        self._data = data
        self._message_bytes: int | None = None
        start: int | None = 0
        while start is not None:
            start = self._frame(start)

    def _frame(self, start: int) -> int | None:
        """Read one frame and return where it ends; None if it is not whole, or if there is no way to go on."""
        data = self._data
        if len(data) < start + 2:
            return None
        self.frames += 1
        opcode, is_final, is_extended = data[start] & 0xF, data[start] >= 0x80, data[start] & 0x70 != 0
        is_masked, flag = data[start + 1] >= 0x80, data[start + 1] & 0x7F
        is_control = opcode >= CLOSE
        if opcode not in _OPCODES or not is_masked or (is_control and (flag > 125 or not is_final)):
            self.offences.add(1002)
            return None
        length_end = start + {126: 4, 127: 10}.get(flag, 2)
        if len(data) < length_end:
            return None
        length = int.from_bytes(data[start + 2 : length_end], "big") if flag > 125 else flag
        if (flag == 126 and length < 126) or (flag == 127 and not 65_536 <= length < 2**63):
            self.offences.add(1002)
            return None
        if length > FRAME_BYTES_MAX:
            self.offences.add(1009)
            return None
        end = length_end + 4 + length
        if len(data) < end:
            return None
        payload = unmasked(data[length_end : length_end + 4], data[length_end + 4 : end])
        if is_extended:
            self.offences.add(1002)
        return end if self._payload(opcode, payload, is_final=is_final) else None

    def _payload(self, opcode: int, payload: bytes, *, is_final: bool) -> bool:
        """Take what is in a frame; False if there is no way to go on."""
        if opcode == CLOSE:
            return self._close(payload)
        if opcode == PING:
            self.pings.append(payload)
        elif opcode == BINARY:
            self.offences.add(4500)
        elif opcode != PONG:
            if (opcode == TEXT) != (self._message_bytes is None):
                self.offences.add(1002)
            self._message_bytes = (self._message_bytes or 0) + len(payload)
            if self._message_bytes > FRAME_BYTES_MAX:
                self.offences.add(1009)
            if is_final:
                self._message_bytes = None
        return True

    def _close(self, payload: bytes) -> bool:
        code = int.from_bytes(payload[:2], "big")
        if len(payload) == 1 or (payload and code < 3_000 and code not in _CLOSE_CODES):
            self.offences.add(1002)
            return False
        try:
            payload[2:].decode()
        except UnicodeDecodeError:
            self.offences.add(1007)
            return False
        # A second one is an offence, too.
        self.offences.add(1002 if 1000 in self.offences else 1000)
        return True


_OPCODES: Final = {CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG}
_CLOSE_CODES: Final = {0, *range(1_000, 1_004), *range(1_006, 1_015)}
"""Those below 3000 that picows lets a client close with: a few more than it should."""


def unmasked(mask: bytes, payload: bytes) -> bytes:
    key = (mask * (len(payload) // 4 + 1))[: len(payload)]
    return (int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")).to_bytes(len(payload), "big")


@pytest.fixture
def loop() -> Iterator[Loop]:
    """A loop in which nothing may go wrong behind our back."""
    faults: list[dict[str, Any]] = []
    with contextlib.closing(Loop()) as loop:
        loop.set_exception_handler(lambda _, context: faults.append(context))
        yield loop
        gc.collect()
    assert faults == []


@pytest.mark.parametrize("part", range(PARTS))
def test_a_socket_takes_whatever_is_written(
    loop: Loop, randomness: random.Random, part: int, caplog: pytest.LogCaptureFixture
) -> None:
    grammar = Grammar(randomness, TOKENS)
    gateway = Gateway(loop, randomness)

    async def talk(frames: int) -> None:
        while frames > 0:
            frames -= await Client(gateway, randomness, grammar).talk()
        del gateway.behind.wire

    check_that_nothing_stays(lambda frames: loop.run_until_complete(talk(frames)), FRAMES // PARTS)
    assert caplog.records == []


def test_a_socket_takes_whatever_asks_for_it(
    loop: Loop, randomness: random.Random, caplog: pytest.LogCaptureFixture
) -> None:
    """Upgrade requests that were damaged: some are plain HTTP, some are nothing at all."""
    gateway = Gateway(loop, randomness)

    async def ask() -> None:
        head = randomness.choice(HEADS)
        if randomness.random() < 0.8:
            head = mutated(randomness, head, HEADS)
        cut = randomness.randrange(len(head) + 1)
        await gateway.answer_to(head[:cut], head[cut:])

    for _ in range(FRAMES // 50):
        loop.run_until_complete(ask())
    assert [record for record in caplog.records if record.levelname not in {"INFO", "WARNING"} or record.exc_info] == []


HEADS: Final = [
    HEAD,
    HEAD.replace(b"/v1/live", b"/"),
    HEAD.replace(b"Host: gavel", b"Host: gavel\r\nX-More: " + b"\xe9\xff" * 20),
    HEAD.replace(b"Host: gavel", b"Host: gavel\r\nContent-Length: 5"),
    HEAD.replace(b"Host: gavel", b"Host: gavel\r\nTransfer-Encoding: chunked"),
    HEAD.replace(b"Host: gavel", b"Host: gavel\r\nX-Long: " + b"x" * 20_000),
    HEAD.replace(b"AAAA==", b"\xc3\xa9=="),
    HEAD.replace(b"gavel.v1", b"\xff, ,gavel.v1"),
]


def test_a_version_that_is_no_text_is_refused(loop: Loop, randomness: random.Random) -> None:
    gateway = Gateway(loop, randomness)
    answer = loop.run_until_complete(gateway.answer_to(HEAD.replace(b"Version: 13", b"Version: \xb1")))
    assert answer.startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("value", ["9" * 5_000, "-" + "9" * 5_000], ids=["many digits", "many digits below zero"])
def test_half_a_surrogate_pair_beside_a_long_integer_is_a_mistake(value: str) -> None:
    """Each of them alone is one; Python does not read integers of more than 4,300 digits."""
    session = Session(UUID(int=1), VERIFY, NOW)
    session.text_received(b'{"op":"hello"}', NOW)
    [error] = session.text_received(b'{"op":"ping","x":"\\ud800","y":%s}' % value.encode(), NOW)
    assert isinstance(error, Send)
    assert read_frame(error.data)["code"] == "bad_request"
