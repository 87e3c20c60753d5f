"""The JSON of the live protocol: clients' messages in, the server's frames out.

The way of a bid is one decode and one encode. Only a message that this refuses is looked at a second time, field by
field, to say what is wrong with it.
"""

import json
from collections.abc import Callable
from typing import Annotated, Any, Final, Literal, NoReturn
from uuid import UUID

import msgspec
from msgspec import Meta, Raw, Struct

from actors.messages import BidAccepted, Noticed, You
from engine.auction import Status
from engine.commands import Role
from engine.events import Outcome
from engine.limits import (
    AMOUNT_MAX,
    FRAME_BYTES_MAX,
    HEARTBEAT_MS,
    IN_FLIGHT_MAX,
    INTEGER_MAX,
    REF_LENGTH_MAX,
    SUBSCRIPTIONS_MAX,
    TOKEN_LENGTH_MAX,
)
from engine.notices import NoticeKind
from engine.rejections import Rejection
from gateway.tokens import Identity

_TOPIC_PATTERN: Final = r"^(me|auction:[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12})\Z"
_ME: Final = "me"

Integer = Annotated[int, Meta(ge=-INTEGER_MAX, le=INTEGER_MAX)]
Ref = Integer | Annotated[str, Meta(max_length=REF_LENGTH_MAX)] | None
"""What a client calls its message, to know the answer by; None where it gave none."""
Topic = Annotated[str, Meta(pattern=_TOPIC_PATTERN)]

ErrorCode = Literal[
    "bad_request",
    "unknown_op",
    "hello_first",
    "too_many",
    "busy",
    "rate_limited",
    "unavailable",
    "internal",
    "outcome_unknown",
]


# Client to server


class Hello(Struct, frozen=True, tag_field="op", tag="hello"):
    """Who is there: the bearer of `token`, or a guest."""

    token: Annotated[str, Meta(max_length=TOKEN_LENGTH_MAX)] | None = None
    ref: Ref = None


class Time(Struct, frozen=True, tag_field="op", tag="time"):
    """Ask for the server's clock; `t0` is the client's."""

    t0: Integer
    ref: Ref = None


class Subscribe(Struct, frozen=True, tag_field="op", tag="subscribe"):
    """Ask for a topic's events, from after `since` on."""

    topic: Topic
    since: Annotated[int, Meta(ge=0, le=INTEGER_MAX)] | None = None
    ref: Ref = None


class Unsubscribe(Struct, frozen=True, tag_field="op", tag="unsubscribe"):
    """Stop a topic's events."""

    topic: Topic
    ref: Ref = None


class Bid(Struct, frozen=True, tag_field="op", tag="bid", gc=False):
    """Bid just `amount`, or up to `max_amount`: exactly one of the two is given, in minor units."""

    auction: UUID
    bid_id: UUID
    amount: Integer | None = None
    max_amount: Integer | None = None
    ref: Ref = None


class Ping(Struct, frozen=True, tag_field="op", tag="ping"):
    """For clients that cannot see WebSocket pongs."""

    ref: Ref = None


Message = Hello | Time | Subscribe | Unsubscribe | Bid | Ping


class NotProtocol(Exception):
    """What came is no JSON object in UTF-8: there is no point in going on (close code 4500)."""


class Malformed(Exception):
    """A message that cannot be taken, and why; `ref` and `op` are the message's own, where they are valid."""

    def __init__(
        self, code: ErrorCode, message: str, *, field: str | None = None, ref: Ref = None, op: str | None = None
    ) -> None:
        super().__init__(message)
        self.code: ErrorCode = code
        self.message = message
        self.field = field
        self.ref: Ref = ref
        self.op = op


def decode(data: bytes) -> Message:
    """Read a client's message.

    Raises:
        Malformed: it is a JSON object, but not one of the messages above.
        NotProtocol: it is no JSON object, or not UTF-8.
    """
    try:
        # msgspec does not look into strings that it skips.
        if not data.isascii():
            data.decode()
        message = _decode(data)
    except UnicodeDecodeError as error:
        raise NotProtocol("A message is text in UTF-8.") from error
    except (msgspec.DecodeError, RecursionError):
        _diagnose(data)
    if type(message) is Bid and (message.amount is None) == (message.max_amount is None):
        sentence = "A bid names exactly one of `amount` and `max_amount`."
        raise Malformed("bad_request", sentence, field="amount", ref=message.ref, op="bid")
    return message


def ref_of(data: bytes) -> Ref:
    """What a client calls a message that is not read otherwise; None where that cannot be told."""
    try:
        return _decode_only_ref(data).ref
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def topic_auction(topic: Topic) -> UUID | None:
    """The auction that a topic is about; None for `me`, which is about the user."""
    return None if topic == _ME else UUID(topic.removeprefix("auction:"))


def topic_name(auction: UUID | None) -> str:
    """The topic of an auction, or of the user (None), as clients call it."""
    return _ME if auction is None else f"auction:{auction}"


class _OnlyRef(Struct, frozen=True):
    ref: Ref = None


_decode_only_ref: Final[Callable[[bytes], _OnlyRef]] = msgspec.json.Decoder(_OnlyRef).decode

# Saying what is wrong

_decode: Final[Callable[[bytes], Message]] = msgspec.json.Decoder(Message).decode
_decode_fields: Final = msgspec.json.Decoder(dict[str, Raw]).decode
_decode_text: Final = msgspec.json.Decoder(str).decode
_decode_ref: Final[Callable[[Raw], Ref]] = msgspec.json.Decoder(Ref).decode

_FIELDS: Final[dict[str, list[tuple[msgspec.structs.FieldInfo, msgspec.json.Decoder[Any]]]]] = {
    str(type_.__struct_config__.tag): [
        (field, msgspec.json.Decoder(field.type)) for field in msgspec.structs.fields(type_)
    ]
    for type_ in (Hello, Time, Subscribe, Unsubscribe, Bid, Ping)
}
"""For each op its fields, each with what reads it alone."""

_AN_INTEGER: Final = f"an integer without fraction or exponent, at most {INTEGER_MAX}"
EXPECTED: Final = {
    "op": "a string",
    "ref": f"an integer or a string of up to {REF_LENGTH_MAX} characters",
    "token": f"a string of up to {TOKEN_LENGTH_MAX} characters",
    "topic": "`me`, or `auction:` and a UUID; other topics are not known here",
    "since": f"{_AN_INTEGER}, and not negative",
    "auction": "a UUID",
    "bid_id": "a UUID",
    "amount": _AN_INTEGER,
    "max_amount": _AN_INTEGER,
    "t0": _AN_INTEGER,
}
"""What each field of a client's message is, in words."""


def _diagnose(data: bytes) -> NoReturn:
    """Say what is wrong with a message that `_decode` refused."""
    try:
        fields = _decode_fields(data)
    except msgspec.DecodeError as error:
        if _is_object(data):
            raise Malformed("bad_request", "A text in it has half of a surrogate pair.") from error
        raise NotProtocol("A message is one JSON object.") from error
    except RecursionError as error:
        raise Malformed("bad_request", "The message is nested too deeply.") from error
    ref = _own_ref(fields)
    op = _own_op(fields, ref)
    if op not in _FIELDS:
        raise Malformed("unknown_op", "This op is not known here.", field="op", ref=ref, op=op)
    for field, decoder in _FIELDS[op]:
        name = field.encode_name
        if name not in fields:
            if field.required:
                raise Malformed("bad_request", f"`{name}` is missing.", field=name, ref=ref, op=op)
            continue
        try:
            decoder.decode(fields[name])
        except (msgspec.DecodeError, RecursionError) as error:
            raise _unexpected(name, ref, op) from error
    # Each field is fine as it was last given: one of them was given twice.
    raise Malformed("bad_request", "A field is given more than once.", ref=ref, op=op)


def _is_object(data: bytes) -> bool:
    """Whether this is a JSON object by JSON's grammar, which lets half a surrogate pair stand alone in a text."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"JSON has no {constant}")

    try:
        # How long an integer is has no bearing on it, and Python refuses to read very long ones.
        return isinstance(json.loads(data.decode(), parse_constant=refuse, parse_int=len), dict)
    except (ValueError, RecursionError):
        return False


def _own_ref(fields: dict[str, Raw]) -> Ref:
    try:
        return _decode_ref(fields.get("ref", Raw(b"null")))
    except (msgspec.DecodeError, RecursionError) as error:
        raise _unexpected("ref", None, None) from error


def _own_op(fields: dict[str, Raw], ref: Ref) -> str:
    if "op" not in fields:
        raise Malformed("bad_request", "`op` is missing.", field="op", ref=ref)
    try:
        return _decode_text(fields["op"])
    except (msgspec.DecodeError, RecursionError) as error:
        raise _unexpected("op", ref, None) from error


def _unexpected(field: str, ref: Ref, op: str | None) -> Malformed:
    return Malformed("bad_request", f"`{field}` is {EXPECTED[field]}.", field=field, ref=ref, op=op)


# Server to client


class Subscribed(Struct, frozen=True, gc=False):
    """The answer to a subscription, for one socket: all events after its `since`, or else the snapshot at `seq`."""

    seq: int
    events: bytes | None
    """JSON objects, joined by commas; None where they could not be recovered."""
    snapshot: bytes | None
    you: You | None


# A field that stands with `= None` is left out where there is nothing to say.


class _Frame(Struct, frozen=True, kw_only=True, tag_field="type", omit_defaults=True):
    """What the server says: `type`, and the type's fields."""


class _Limits(Struct, frozen=True, kw_only=True):
    frame_bytes_max: int
    amount_max: int
    subscriptions_max: int
    in_flight_max: int


class _Welcome(_Frame, frozen=True, kw_only=True, tag="welcome"):
    ref: Ref
    connection: UUID
    server_time: int
    user: UUID | None
    role: Role | None
    expires_at: int | None
    heartbeat_ms: int
    limits: _Limits


class _Time(_Frame, frozen=True, kw_only=True, tag="time"):
    ref: Ref
    t0: int
    t1: int
    t2: int


class _Subscribed(_Frame, frozen=True, kw_only=True, tag="subscribed"):
    ref: Ref
    topic: str
    seq: int
    recovered: bool
    events: Raw | None = None
    snapshot: Raw | None = None
    you: You | None = None


class Standing(Struct, frozen=True, kw_only=True):
    """How a user stands in one of its auctions."""

    auction: UUID
    paddle: int
    max_amount: int
    is_leading: bool
    status: Status


class _Standings(_Frame, frozen=True, kw_only=True, tag="subscribed"):
    ref: Ref
    topic: str
    standings: list[Standing]


class _Notice(_Frame, frozen=True, kw_only=True, tag="notice"):
    topic: str
    kind: NoticeKind
    auction: UUID
    seq: int
    at: int
    price: int
    paddle: int
    max_amount: int
    minimum: int
    end_time: int
    outcome: Outcome | None = None


class _Unsubscribed(_Frame, frozen=True, kw_only=True, tag="unsubscribed"):
    ref: Ref
    topic: str


class _Events(_Frame, frozen=True, kw_only=True, tag="events"):
    topic: str
    events: Raw


class _State(_Frame, frozen=True, kw_only=True, tag="state"):
    topic: str
    seq: int
    snapshot: Raw
    events: Raw


class _Presence(_Frame, frozen=True, kw_only=True, tag="presence"):
    topic: str
    viewers: int


class _Ack(_Frame, frozen=True, kw_only=True, tag="ack", gc=False):
    ref: Ref
    seq: int
    hash: str
    auction: UUID
    bid_id: UUID
    outcome: Literal["leading", "outbid"]
    price: int
    paddle: int
    max_amount: int
    minimum: int
    end_time: int


class _Rejected(_Frame, frozen=True, kw_only=True, tag="rejected"):
    ref: Ref
    bid_id: UUID | None = None
    code: str
    message: str
    is_transient: bool
    minimum: int | None = None
    retry_after_ms: int | None = None


class _Error(_Frame, frozen=True, kw_only=True, tag="error"):
    ref: Ref = None
    code: ErrorCode
    message: str
    field: str | None = None
    retry_after_ms: int | None = None


class _Pong(_Frame, frozen=True, kw_only=True, tag="pong"):
    ref: Ref


_encode: Final = msgspec.json.Encoder().encode

_LIMITS: Final = _Limits(
    frame_bytes_max=FRAME_BYTES_MAX,
    amount_max=AMOUNT_MAX,
    subscriptions_max=SUBSCRIPTIONS_MAX,
    in_flight_max=IN_FLIGHT_MAX,
)


def encode_welcome(ref: Ref, connection: UUID, identity: Identity | None, server_time: int) -> bytes:
    """The answer to a hello; a guest (no identity) has neither user nor role."""
    return _encode(
        _Welcome(
            ref=ref,
            connection=connection,
            server_time=server_time,
            user=None if identity is None else identity.user,
            role=None if identity is None else identity.role,
            expires_at=None if identity is None else identity.expires_at,
            heartbeat_ms=HEARTBEAT_MS,
            limits=_LIMITS,
        )
    )


def encode_time(ref: Ref, t0: int, received_at: int, sent_at: int) -> bytes:
    """The server's clock, as milliseconds since the epoch, beside the client's."""
    return _encode(_Time(ref=ref, t0=t0, t1=received_at, t2=sent_at))


def encode_subscribed(ref: Ref, auction: UUID, answer: Subscribed) -> bytes:
    """From here on the topic's events follow: with what was missed, or with the state as it is."""
    events = None if answer.events is None else _list(answer.events)
    return _encode(
        _Subscribed(
            ref=ref,
            topic=topic_name(auction),
            seq=answer.seq,
            recovered=events is not None,
            events=events,
            snapshot=None if answer.snapshot is None else Raw(answer.snapshot),
            you=answer.you,
        )
    )


def encode_standings(ref: Ref, standings: list[Standing]) -> bytes:
    """From here on the user's notices follow."""
    return _encode(_Standings(ref=ref, topic=_ME, standings=standings))


def encode_notice(noticed: Noticed) -> bytes:
    """What concerns one user alone: the auction, and how the user stands in it, right after the event `seq`."""
    return _encode(
        _Notice(
            topic=_ME,
            kind=noticed.kind,
            auction=noticed.auction,
            seq=noticed.seq,
            at=noticed.at,
            price=noticed.price,
            paddle=noticed.you.paddle,
            max_amount=noticed.you.max_amount,
            minimum=noticed.minimum,
            end_time=noticed.end_time,
            outcome=noticed.outcome,
        )
    )


def encode_unsubscribed(ref: Ref, auction: UUID | None) -> bytes:
    """From here on no events of the topic follow."""
    return _encode(_Unsubscribed(ref=ref, topic=topic_name(auction)))


def encode_events(auction: UUID, encoded: bytes) -> bytes:
    """Events of a topic; `encoded` are JSON objects joined by commas, and go out as they are."""
    return _encode(_Events(topic=topic_name(auction), events=_list(encoded)))


def encode_state(auction: UUID, seq: int, snapshot: bytes, kept: bytes) -> bytes:
    """What a topic's events up to `seq` led to, and those among them that are never dropped."""
    return _encode(_State(topic=topic_name(auction), seq=seq, snapshot=Raw(snapshot), events=_list(kept)))


def encode_presence(auction: UUID, viewers: int) -> bytes:
    """So many watch a topic now, on all gateways."""
    return _encode(_Presence(topic=topic_name(auction), viewers=viewers))


def encode_ack(ref: Ref, auction: UUID, bid_id: UUID, accepted: BidAccepted) -> bytes:
    """The bid is journaled."""
    return _encode(
        _Ack(
            ref=ref,
            seq=accepted.seq,
            hash=accepted.hash.hex(),
            auction=auction,
            bid_id=bid_id,
            outcome=accepted.outcome,
            price=accepted.price,
            paddle=accepted.paddle,
            max_amount=accepted.max_amount,
            minimum=accepted.minimum,
            end_time=accepted.end_time,
        )
    )


def encode_rejected(ref: Ref, rejection: Rejection, bid_id: UUID | None = None) -> bytes:
    """What was asked was not done, and never will be by this request."""
    return _encode(
        _Rejected(
            ref=ref,
            bid_id=bid_id,
            code=rejection.code,
            message=rejection.message,
            is_transient=rejection.is_transient,
            minimum=rejection.minimum,
            retry_after_ms=rejection.retry_after_ms,
        )
    )


def encode_error(
    ref: Ref, code: ErrorCode, message: str, *, field: str | None = None, retry_after_ms: int | None = None
) -> bytes:
    """What was asked was not taken (or, with `outcome_unknown`, may have been)."""
    return _encode(_Error(ref=ref, code=code, message=message, field=field, retry_after_ms=retry_after_ms))


def encode_pong(ref: Ref) -> bytes:
    """The answer to a ping."""
    return _encode(_Pong(ref=ref))


def _list(encoded: bytes) -> Raw:
    return Raw(b"[" + encoded + b"]")
