"""Frames that neither end of a link would send, by the ten thousand, to both ends."""

import asyncio
import logging
import random
from collections.abc import Callable, Iterator
from typing import Any, Final, cast
from uuid import UUID

import msgspec
import picows
import pytest

from actors import link
from actors.link import LinkServer
from actors.messages import (
    VERSION,
    Answered,
    AuctionView,
    Batch,
    BidAccepted,
    Follow,
    Followed,
    GatewayFrame,
    GetAuction,
    Greeting,
    Message,
    Noticed,
    Output,
    Presence,
    Proof,
    Published,
    Recall,
    Request,
    ShardFrame,
    Unfollow,
    Unsubscribe,
    Viewers,
    Watch,
    Watched,
    Welcome,
    You,
    decode_gateway_frame,
    decode_shard_frame,
    encode_into,
    proof,
)
from actors.shard import Shard
from engine.commands import CancelAuction, EndAuction
from engine.rejections import BUSY, Rejection
from tests.engine.support import ANNA, AUCTION, MAKER, NOW, REQUEST
from tests.gateway.test_wire import SNAPSHOT
from tests.support.fuzz import check_that_nothing_stays, mutated
from tests.support.shards import bid, opening

FRAMES: Final = 30_000
"""To each end; in `PARTS`, each a test of its own. More of them find more."""
PARTS: Final = 2

SECRET: Final = b"a secret of the cluster"
NUMBER: Final = 3
EPOCH: Final = 7
MAC: Final = bytes(32)


def encoded(message: GatewayFrame | ShardFrame) -> bytes:
    buffer = bytearray()
    encode_into(message, buffer)
    return bytes(buffer)


FROM_GATEWAYS: Final = [
    Proof("gateway", bytes(32), MAC),
    Batch([]),
    Batch([Request(1, GetAuction(AUCTION, None)), Request(2, Unsubscribe(AUCTION)), Request(3, Viewers(AUCTION, 7))]),
    Batch([Request(3, bid(ANNA, 1_000)), Request(4, bid(ANNA, up_to=2_000)), Request(5, opening(reserve_price=1))]),
    Batch([Request(10, Follow([ANNA, MAKER])), Request(11, Unfollow([ANNA]))]),
    Batch([Request(6, Watch(AUCTION, 3, [ANNA])), Request(7, Recall(AUCTION, b"command", ANNA))]),
    Batch(
        [
            Request(8, EndAuction(auction=AUCTION, caller=MAKER, role="maker", request_id=REQUEST, reason="é")),
            Request(9, CancelAuction(auction=AUCTION, caller=MAKER, role="admin", request_id=REQUEST, salt=b"salt")),
        ]
    ),
]
NOTICED: Final = Noticed(
    user=ANNA,
    auction=AUCTION,
    kind="won",
    seq=9,
    at=NOW,
    price=100,
    minimum=105,
    end_time=NOW,
    status="ended",
    outcome="sold",
    you=You(1, 100, is_leading=True),
)
FROM_SHARDS: Final = [
    Greeting(VERSION, NUMBER, EPOCH, UUID(int=1), bytes(32)),
    Welcome(MAC),
    Output([]),
    Output([Answered(1, BidAccepted(7, bytes(32), NOW, "leading", 100, 3, 900, 105, NOW + 1)), Answered(2, BUSY)]),
    Output([Answered(3, Watched(AUCTION, 5, b"{}", 5, b'{"seq":5}', [None, You(1, 100, is_leading=True)]))]),
    Output([Answered(4, AuctionView(5, SNAPSHOT, None, MAKER, 100, NOW, NOW)), Answered(5, Rejection("ended", "é"))]),
    Output([Answered(6, Followed()), NOTICED]),
    Output([Published(AUCTION, 6, 7, b'{"seq":6},{"seq":7}', b'{"seq":7}', b"{}"), Presence(AUCTION, 7)]),
    Output([Published(AUCTION, 8, 9, None, b"", b"{}")]),
]

_MARK: Final = b"in whose place something else will stand"
_ENCODED_MARK: Final = msgspec.msgpack.encode(_MARK)
_PLAIN: Final[list[Any]] = [
    *(None, True, 0, -1, 2**63, 2**64 - 1, -(2**63), 1.5, float("nan")),
    *("", "é", "x" * 300, "batch", "output", b"", bytes(15), bytes(40)),
    *([], {}, [[]] * 40, {"a": [1]}, {1: {}}, [None] * 20),
    *(msgspec.msgpack.Ext(code, bytes(size)) for code in (-1, 5) for size in (1, 4, 8, 12, 40)),
]
VALUES: Final = [
    *map(msgspec.msgpack.encode, _PLAIN),
    # Texts that are no UTF-8
    b"\xa2\xc3\x28",
    b"\xd9\x03\xed\xa0\x80",
    b"\xda\x00\x01\xff",
    # One in another, to no end, or until there are none
    b"\x91" * 5_000,
    b"\x91" * 5_000 + b"\xc0",
    b"\x81\xc0" * 5_000 + b"\xc0",
    # More than there is
    b"\xd9\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\xff",
    # What msgpack never uses, and a time that is none
    b"\xc1",
    b"\xd7\xff\xff\xff\xff\xff\xff\xff\xff\xff",
]


class Frame:
    """A frame as picows gives it to a listener."""

    def __init__(self, payload: bytes, kind: picows.WSMsgType = picows.WSMsgType.BINARY) -> None:
        self.msg_type = kind
        self.payload_size = len(payload)
        self._payload = payload

    def get_payload_as_memoryview(self) -> memoryview:
        return memoryview(self._payload)


class Transport:
    """What a link's end writes to; to be cut is all that becomes of it."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.is_cut = False

    @property
    def underlying_transport(self) -> "Transport":
        return self

    def set_write_buffer_limits(self, high: int) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def send_reuse_external_bytearray(self, kind: picows.WSMsgType, buffer: bytearray, offset: int) -> None:
        assert kind == picows.WSMsgType.BINARY
        self.written.append(bytes(buffer[offset:]))

    def disconnect(self, graceful: bool = True) -> None:
        self.is_cut = True


class Noise:
    """Makes frames: some as they should be, most of them not."""

    def __init__(self, randomness: random.Random, messages: list[Any]) -> None:
        self._randomness = randomness
        self._encoded = [encoded(message) for message in messages]

    def frame(self) -> Frame:
        randomness = self._randomness
        payload = randomness.choice(self._encoded)
        match randomness.randrange(8):
            case 0 | 1:
                payload = self._with_another_value(payload)
            case 2 | 3:
                payload = mutated(randomness, payload, self._encoded)
            case 4:
                payload = randomness.randbytes(randomness.randrange(30))
            case 5 if randomness.random() < 0.3:
                return Frame(payload, randomness.choice(list(picows.WSMsgType)))
        return Frame(payload)

    def _with_another_value(self, payload: bytes) -> bytes:
        """Put another value in the place of one at any depth of the message, or beside the last."""
        message = values = msgspec.msgpack.decode(payload)
        while True:
            places = [*range(len(values)), len(values)] if isinstance(values, list) else list(values)
            place = self._randomness.choice(places)
            inner = None if place == len(values) else values[place]
            if not isinstance(inner, list | dict) or not inner or self._randomness.random() < 0.2:
                break
            values = inner
        if isinstance(values, list):
            values[place : place + 1] = [_MARK]
        else:
            values[place] = _MARK
        return msgspec.msgpack.encode(message).replace(_ENCODED_MARK, self._randomness.choice(VALUES))


@pytest.fixture
def faults() -> Iterator[list[logging.LogRecord]]:
    """What the ends log beyond a sentence about their peer. Those sentences go nowhere: pytest would keep them all."""
    kept: list[logging.LogRecord] = []

    def keep(record: logging.LogRecord) -> bool:
        if record.exc_info or record.levelno > logging.WARNING:
            kept.append(record)
        return False

    logger = logging.getLogger(link.__name__)
    logger.addFilter(keep)
    yield kept
    logger.removeFilter(keep)


def run(randomness: random.Random, talk: Callable[[int], int]) -> None:
    """Have `talk` send frames in one conversation after another; it takes how many at most and returns how many."""

    async def all_of(frames: int) -> None:
        while frames > 0:
            frames -= talk(min(frames, int(100 ** randomness.random())))
            await asyncio.sleep(0)

    with asyncio.Runner() as runner:
        check_that_nothing_stays(lambda frames: runner.run(all_of(frames)), FRAMES // PARTS)


class _Shard:
    """Takes what it is given, and forgets it."""

    def __init__(self) -> None:
        self.is_expecting = False
        self.taken = 0

    def take(self, requests: list[Request], outlet: object) -> None:
        assert self.is_expecting, "requests came from who has not proved anything"
        assert all(type(request) is Request and type(request.request) is int for request in requests)
        self.taken += 1

    def leave(self, outlet: object) -> None:
        pass


@pytest.mark.parametrize("part", range(PARTS))
def test_a_shard_takes_whatever_comes(randomness: random.Random, faults: list[logging.LogRecord], part: int) -> None:
    shard = _Shard()
    server = LinkServer(cast(Shard, shard), NUMBER, UUID(int=1), lambda: EPOCH, SECRET)
    noise = Noise(randomness, FROM_GATEWAYS)

    def talk(frames: int) -> int:
        transport = Transport()
        end = link._ShardEnd(server)
        end.on_ws_connected(cast(picows.WSTransport, transport))
        [greeting] = [decode_shard_frame(frame) for frame in transport.written]
        assert isinstance(greeting, Greeting)
        shard.is_expecting = randomness.random() < 0.7
        if shard.is_expecting:
            mac = proof(SECRET, "gateway", greeting.nonce, NUMBER, EPOCH)
            receive(end, transport, Frame(encoded(Proof("gateway", bytes(32), mac))))
        sent = 0
        while sent < frames and not transport.is_cut:
            receive(end, transport, noise.frame())
            sent += 1
        answers = [decode_shard_frame(frame) for frame in transport.written[1:]]
        assert [type(answer) for answer in answers] == [Welcome] * shard.is_expecting
        end.on_ws_disconnected(cast(picows.WSTransport, transport))
        assert not server.ends
        return max(sent, 1)

    run(randomness, talk)
    assert shard.taken > 0
    assert faults == []


@pytest.mark.parametrize("part", range(PARTS))
def test_a_gateway_takes_whatever_comes(randomness: random.Random, faults: list[logging.LogRecord], part: int) -> None:
    noise = Noise(randomness, FROM_SHARDS)
    is_open = False
    taken = 0

    def take(messages: list[Message]) -> None:
        nonlocal taken
        assert is_open, "answers came from who has not proved anything"
        assert all(type(message) in {Answered, Noticed, Published, Presence} for message in messages)
        taken += 1

    def talk(frames: int) -> int:
        nonlocal is_open
        transport = Transport()
        end = link._GatewayEnd("gateway", NUMBER, EPOCH, SECRET, take)
        end.on_ws_connected(cast(picows.WSTransport, transport))
        is_open = randomness.random() < 0.7
        if is_open:
            receive(end, transport, Frame(encoded(Greeting(VERSION, NUMBER, EPOCH, UUID(int=1), bytes(32)))))
            [challenge] = [decode_gateway_frame(frame) for frame in transport.written]
            assert isinstance(challenge, Proof)
            mac = proof(SECRET, "shard", challenge.nonce, NUMBER, EPOCH)
            receive(end, transport, Frame(encoded(Welcome(mac))))
        assert end.is_open == is_open
        sent = 0
        while sent < frames and not transport.is_cut:
            receive(end, transport, noise.frame())
            sent += 1
        assert end.is_open == is_open
        assert all(isinstance(decode_gateway_frame(frame), Proof) for frame in transport.written)
        end.on_ws_disconnected(cast(picows.WSTransport, transport))
        return max(sent, 1)

    run(randomness, talk)
    assert taken > 0
    assert faults == []


def receive(end: picows.WSListener, transport: Transport, frame: Frame) -> None:
    end.on_ws_frame(cast(picows.WSTransport, transport), cast(picows.WSFrame, frame))


@pytest.mark.parametrize(
    "payload",
    [b"\x94\xa5proof\xa1\xff\xc4\x00\xc4\x00", b"\x92\xa1\xff\x90", b"\x93\xa5batch\x90" + b"\x91" * 5_000 + b"\xc0"],
    ids=["a name that is no UTF-8", "a tag that is no UTF-8", "one in another"],
)
async def test_what_is_no_message_cuts_the_link(payload: bytes, caplog: pytest.LogCaptureFixture) -> None:
    transport = Transport()
    server = LinkServer(cast(Shard, _Shard()), NUMBER, UUID(int=1), lambda: EPOCH, SECRET)
    end = link._ShardEnd(server)
    end.on_ws_connected(cast(picows.WSTransport, transport))
    receive(end, transport, Frame(payload))
    assert transport.is_cut
    assert "what is not of its protocol" in caplog.text
    end.on_ws_disconnected(cast(picows.WSTransport, transport))
