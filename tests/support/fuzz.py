"""Bytes that nobody should send, made of bytes that somebody should; and a look at what they leave behind."""

import gc
import json
import random
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Final, TypeVar
from uuid import UUID

from engine.limits import FRAME_BYTES_MAX, INTEGER_MAX, REF_LENGTH_MAX

T = TypeVar("T")

BLOCKS_KEPT_MAX: Final = 1_000
BYTES_KEPT_MAX: Final = 64 * 1024
"""What thousands of frames may leave behind: caches that fill up, tables that grow by a step."""


def mutated(randomness: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Damage `data` in one to three places; `others` are what it may be spliced with."""
    damaged = bytearray(data)
    for _ in range(1 + int(randomness.random() ** 2 * 3)):
        start = int(randomness.random() * (len(damaged) + 1))
        end = start + 1 + int(randomness.random() ** 4 * (len(damaged) - start))
        match int(randomness.random() * 6):
            case 0 if start < len(damaged):
                damaged[start] ^= 1 << int(randomness.random() * 8)
            case 1:
                del damaged[start:end]
            case 2:
                del damaged[start:]
            case 3:
                other = randomness.choice(others)
                damaged[start:] = other[int(randomness.random() * len(other)) :]
            case 4:
                damaged[start:start] = damaged[start:end] * (1 + int(randomness.random() * 3))
            case _:
                damaged[start:start] = randomness.randbytes(1 + int(randomness.random() * 4))
    return bytes(damaged)


def check_that_nothing_stays(deal_with: Callable[[int], None], frames: int) -> None:
    """Have so many frames dealt with (by a call that forgets them all), and see that memory is as it was before."""
    # What is made once and kept, is made now.
    deal_with(frames // 10)
    gc.collect()
    blocks_before = sys.getallocatedblocks()
    deal_with(frames)
    gc.collect()
    blocks_kept = sys.getallocatedblocks() - blocks_before
    assert blocks_kept <= BLOCKS_KEPT_MAX, f"{blocks_kept} blocks of memory were not given back"
    # Those were blocks of up to 512 bytes. To follow larger ones, too, takes several times as long.
    tracemalloc.start()
    try:
        deal_with(frames // 20)
        gc.collect()
        bytes_kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert bytes_kept <= BYTES_KEPT_MAX, f"{bytes_kept} bytes of memory were not given back"


# What clients of the live protocol say


AUCTIONS: Final = [UUID(int=0xA0000000_0000_4000_8000_000000000000 + number) for number in range(130)]
BAD_TOKENS: Final = [
    "",
    "a.b.c",
    "eyJhbGciOiJub25lIn0.e30.",
    "eyJhbGciOlsiUlMyNTYiXX0.e30.AAAA",
    "eyJhbGciOiJSUzI1NiIsImtpZCI6W119.e30.AAAA",
    "W10.e30.AAAA",
    ".".join(["é" * 20] * 3),
    "x" * 4_096,
]
INTEGERS: Final = [b"0", b"1", b"500", b"-1", b"-0", b"%d" % INTEGER_MAX, b"%d" % -INTEGER_MAX]
NOT_INTEGERS: Final = [
    b"%d" % (INTEGER_MAX + 1),
    b"%d" % (-INTEGER_MAX - 1),
    b"%d" % 2**63,
    b"%d" % -(2**64),
    b"1.0",
    b"1.5",
    b"-0.0",
    b"1e3",
    b"1E-400",
    b"1e400",
    b"9" * 400,
    b"9" * 5_000,
]
NOT_JSON: Final = [
    b"NaN",
    b"-Infinity",
    b"01",
    b"+1",
    b"1.",
    b".5",
    b"0x10",
    b"1_000",
    b"-",
    b"undefined",
    b"'x'",
    b'"x',
    b"",
    b"[1,]",
    b"{,}",
    b'{"a"}',
    b'"\x00"',
    b'"\n"',
    b'"\xff"',
    b'"\xc0\x80"',
    b'"\xed\xa0\x80"',
    b'"\\x"',
    b'"\\u12"',
    b"/**/1",
]
OTHERS: Final = [
    b"null",
    b"true",
    b"[]",
    b"{}",
    b'[1,{"a":[null]}]',
    b'{"op":"ping","ref":1}',
    b'""',
    b'"x"',
    b'"\\u0000"',
    b'"\\ud83d\\ude00"',
    b'"\\ud800"',
    b'"\\udfff\\ud800"',
    '"é😀\u2028\ufeff"'.encode(),
    b'"' + b"r" * REF_LENGTH_MAX + b'"',
    b'"' + b"r" * (REF_LENGTH_MAX + 1) + b'"',
    b'"' + "é".encode() * REF_LENGTH_MAX + b'"',
    b'"A0000000-0000-4000-8000-00000000000A"',
    b'"a000000000004000800000000000000a"',
    b'"a0000000-0000-4000-8000-00000000000a\\n"',
]
LARGE: Final = [
    b'"' + b"x" * FRAME_BYTES_MAX + b'"',
    b'"' + b"x" * (FRAME_BYTES_MAX - 300) + b'"',
    b'"' + b"\\u00e9" * 2_000 + b'"',
    b"[" * 5_000 + b"]" * 5_000,
    b'{"a":' * 2_000 + b"1" + b"}" * 2_000,
    b"[" * FRAME_BYTES_MAX,
    b"[" + b"1," * 5_000 + b"1]",
]


class Grammar:
    """Makes messages of every op: most as they should be, many with something in them that should not."""

    def __init__(self, randomness: random.Random, tokens: Sequence[str]) -> None:
        self.randomness = randomness
        self.tokens = tokens
        self._some = [self._message(wildness=0) for _ in range(50)]

    def text(self, wildness: float) -> bytes:
        """A message, or what was one."""
        message = self._message(wildness)
        if self.randomness.random() < wildness:
            message = mutated(self.randomness, message, self._some)
        return message[:FRAME_BYTES_MAX]

    def hello(self) -> bytes:
        """A beginning."""
        return b'{"op":"hello","token":%s}' % json.dumps(self.choice(self.tokens)).encode()

    def _message(self, wildness: float) -> bytes:
        draw = self.randomness.random
        op = self.choice(OPS)
        fields = [(b"op", b'"' + op + b'"')]
        if draw() < 0.8:
            fields.append((b"ref", b"%d" % int(draw() * 1_000) if draw() < 0.7 else b'"r"'))
        fields += [(name, make(self)) for name, make in FIELDS_BY_OP[op]]
        if op == b"bid":
            fields.append((self.choice([b"amount", b"max_amount"]), self.choice(INTEGERS)))
        while fields and draw() < wildness / 2:
            self._spoil(fields)
        return b"{" + b",".join([b'"' + name + b'":' + value for name, value in fields]) + b"}"

    def _anything(self) -> bytes:
        draw = self.randomness.random()
        if draw < 0.02:
            return self.choice(LARGE)
        if draw < 0.12:
            return self.choice(NOT_JSON)
        return self.choice(self.choice([INTEGERS, NOT_INTEGERS, OTHERS]))

    def _spoil(self, fields: list[tuple[bytes, bytes]]) -> None:
        index = int(self.randomness.random() * len(fields))
        name, value = fields[index]
        match int(self.randomness.random() * 8):
            case 0:
                del fields[index]
            case 1:
                fields.append((name, self._anything()))
            case 2:
                fields.append((name, value))
            case 3:
                fields.append((self.choice(NAMES), self._anything()))
            case 4:
                fields[index] = (b"\\u%04x" % ord(name[:1] or b"x") + name[1:], value)
            case 5:
                self.randomness.shuffle(fields)
            case _:
                fields[index] = (name, self._anything())

    def choice(self, values: Sequence[T]) -> T:
        # Several times as fast as `random.choice`.
        return values[int(self.randomness.random() * len(values))]


TOPICS: Final = [b'"me"', *(b'"auction:%s"' % str(auction).encode() for auction in AUCTIONS)]


def _auction(grammar: Grammar) -> bytes:
    return b'"%s"' % str(grammar.choice(AUCTIONS)).encode()


def _topic(grammar: Grammar) -> bytes:
    return grammar.choice(TOPICS)


def _token(grammar: Grammar) -> bytes:
    draw = grammar.randomness.random()
    if draw < 0.1:
        return b"null"
    return json.dumps(grammar.choice(grammar.tokens if draw < 0.95 else BAD_TOKENS)).encode()


FIELDS_BY_OP: Final[dict[bytes, list[tuple[bytes, Callable[[Grammar], bytes]]]]] = {
    b"hello": [(b"token", _token)],
    b"time": [(b"t0", lambda grammar: grammar.choice(INTEGERS))],
    b"subscribe": [(b"topic", _topic), (b"since", lambda grammar: grammar.choice([b"null", b"0", b"7"]))],
    b"unsubscribe": [(b"topic", _topic)],
    b"bid": [(b"auction", _auction), (b"bid_id", _auction)],
    b"ping": [],
    b"react": [(b"story", _auction), (b"kind", lambda _: b'"fire"')],
    b"dance": [(b"\xc3\xa9", lambda _: b'[1,{"op":null}]')],
}
# Bids and subscriptions are what has most to it.
OPS: Final = [*FIELDS_BY_OP, b"time", b"ping", b"unsubscribe", *[b"bid", b"subscribe", b"subscribe"] * 20]
NAMES: Final = [b"more", b"", b"type", b"topic", b"amount", b"max_amount", b"ref", b"op", b"\xf0\x9f\x92\xa5", b"\xff"]


# WebSocket frames (RFC 6455, section 5)

CONTINUATION: Final = 0x0
TEXT: Final = 0x1
BINARY: Final = 0x2
CLOSE: Final = 0x8
PING: Final = 0x9
PONG: Final = 0xA
_FIN: Final = 0x80
_MASKED: Final = 0x80


def client_frame(
    randomness: random.Random,
    opcode: int,
    payload: bytes,
    bits: int = _FIN,
    masked: int = _MASKED,
    length_bytes: int | None = None,
    length: int | None = None,
) -> bytes:
    """A frame as clients send it; what is not given is as it should be."""
    length = len(payload) if length is None else length
    if length_bytes is None:
        length_bytes = 0 if length < 126 else 2 if length < 65_536 else 8
    flag = {0: length % 126, 2: 126, 8: 127}[length_bytes]
    head = bytes([bits | opcode, masked | flag]) + length.to_bytes(8, "big")[8 - length_bytes :]
    if not masked:
        return head + payload
    mask = randomness.choice([bytes(4), randomness.randbytes(4)])
    key = (mask * (len(payload) // 4 + 1))[: len(payload)]
    covered = int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")
    return head + mask + covered.to_bytes(len(payload), "big")


class Frames:
    """Makes what a client may write to its socket, and more and more of what it may not."""

    def __init__(self, grammar: Grammar, wildness: float) -> None:
        self._randomness = grammar.randomness
        self._grammar = grammar
        self._wildness = wildness

    def hello(self) -> bytes:
        """A beginning."""
        return client_frame(self._randomness, TEXT, self._grammar.hello())

    def some(self) -> list[bytes]:
        """One frame, or a message in several."""
        draw = self._randomness.random()
        if draw < self._wildness / 2:
            return self._spoilt()
        if draw < 0.9:
            return self._message()
        return [self._control()]

    def _message(self) -> list[bytes]:
        text = self._grammar.text(self._wildness / 2)
        if self._randomness.random() < 0.8:
            return [client_frame(self._randomness, TEXT, text)]
        frames = []
        opcode = TEXT
        while self._randomness.random() < 0.7:
            size = self._randomness.randrange(len(text) + 1)
            frames.append(client_frame(self._randomness, opcode, text[:size], bits=0))
            text = text[size:]
            opcode = CONTINUATION
            if self._randomness.random() < 0.2:
                frames.append(self._control())
        return [*frames, client_frame(self._randomness, opcode, text)]

    def _control(self) -> bytes:
        size = self._randomness.choice([0, 1, 4, 125])
        return client_frame(self._randomness, self._randomness.choice([PING, PONG]), self._randomness.randbytes(size))

    def _spoilt(self) -> list[bytes]:
        randomness = self._randomness
        payload = self._grammar.text(0)
        kind = randomness.choice([TEXT, TEXT, PING, PONG, CLOSE, CONTINUATION, BINARY])
        match randomness.randrange(12):
            case 0:
                return [client_frame(randomness, randomness.randrange(16), payload[:125])]
            case 1:
                return [client_frame(randomness, kind, payload[:125], bits=randomness.randrange(16) << 4)]
            case 2:
                return [client_frame(randomness, kind, payload[:125], masked=0)]
            case 3:
                length_bytes = randomness.choice([2, 8])
                return [client_frame(randomness, kind, payload[:125], length_bytes=length_bytes)]
            case 4:
                length = randomness.choice([0, 125, 126, FRAME_BYTES_MAX, FRAME_BYTES_MAX + 1, 2**32, 2**63 - 1, 2**63])
                return [client_frame(randomness, kind, payload, length=length)]
            case 5:
                return [client_frame(randomness, TEXT, b"x" * (FRAME_BYTES_MAX + randomness.randrange(2)))]
            case 6:
                part = b" " * (FRAME_BYTES_MAX // 4 + randomness.randrange(2))
                opcodes = [TEXT, *[CONTINUATION] * 4]
                return [client_frame(randomness, opcode, part, bits=0) for opcode in opcodes]
            case 7:
                return [client_frame(randomness, kind, payload[:125], bits=0)]
            case 8:
                code = randomness.choice([1000, 1001, 1005, 1006, 1012, 2999, 3000, 4999, 65_535, 0])
                reason = randomness.choice([b"", b"bye", b"\xff", b"x" * 123])
                return [client_frame(randomness, CLOSE, code.to_bytes(2, "big") + reason)]
            case 9:
                return [client_frame(randomness, CLOSE, randomness.randbytes(randomness.randrange(4)))]
            case 10:
                return [randomness.randbytes(randomness.randrange(1, 40))]
            case _:
                frames = self._message()
                index = randomness.randrange(len(frames))
                frames[index] = mutated(randomness, frames[index], frames)
                return frames
