"""One client's conversation, sans-I/O: what it sends goes in, what is to be done about it comes out.

No socket, no clock, no asyncio: `socket.py` carries the intents out and brings the answers back. `now` is always
milliseconds since the epoch, UTC.
"""

from collections.abc import Callable, Container
from typing import Final
from uuid import UUID

import msgspec

from actors.messages import Answer, BidAccepted
from engine.commands import PlaceBid
from engine.limits import (
    BUSY_RETRY_MS,
    ERRORS_MAX,
    ERRORS_WINDOW_MS,
    HEARTBEAT_MS,
    HEARTBEATS_MISSED_MAX,
    HELLO_TIMEOUT_MS,
    IN_FLIGHT_MAX,
    RATE_REFUSALS_MAX,
    SUBSCRIPTIONS_MAX,
    TOKEN_GRACE_MS,
)
from engine.rejections import SUSPENDED, Rejection
from gateway import wire
from gateway.rates import rate_limited
from gateway.tokens import Identity, TokenInvalid

# Why a socket is closed, as the protocol's close codes
DRAINING: Final = 4000
TOO_SLOW: Final = 4001
NO_HEARTBEAT: Final = 4002
NOT_PROTOCOL: Final = 4500
NOT_WELCOME: Final = 4501
TOO_MANY: Final = 4502

Verify = Callable[[str, int], Identity]
"""`Verifier.verify`: the identity behind a token at a time, or `TokenInvalid`."""


class PendingBid(msgspec.Struct, frozen=True, gc=False):
    """A bid on its way, and what its answer must name."""

    ref: wire.Ref
    auction: UUID
    bid_id: UUID


class PendingSubscription(msgspec.Struct, eq=False):
    """A subscription on its way. Once it is cancelled, its answer is for nobody."""

    ref: wire.Ref
    auction: UUID | None
    """None for the topic `me`."""
    is_cancelled: bool = False


# What is to be done


class Send(msgspec.Struct, frozen=True, gc=False):
    """Send a text message to the client."""

    data: bytes


class Refuse(msgspec.Struct, frozen=True, gc=False):
    """Send a refusal that should cost as little as possible: there are many of them when there is much to do."""

    data: bytes


class Ping(msgspec.Struct, frozen=True):
    """Send a WebSocket ping."""


class Close(msgspec.Struct, frozen=True):
    """Close the socket. Nothing comes after this."""

    code: int
    reason: str


class Submit(msgspec.Struct, frozen=True, gc=False):
    """Hand a bid to its shard, and the answer to `answered`."""

    payload: PlaceBid
    pending: PendingBid


class Subscribe(msgspec.Struct, frozen=True):
    """Subscribe the client to an auction's events, and hand the answer to `subscribed`."""

    topic: UUID
    viewer: UUID | None
    since: int | None
    pending: PendingSubscription


class Unsubscribe(msgspec.Struct, frozen=True):
    """Stop an auction's events. Has no answer."""

    topic: UUID


class FollowUser(msgspec.Struct, frozen=True):
    """Send the client what concerns its user, and hand the user's standings to `subscribed`."""

    user: UUID
    pending: PendingSubscription


class UnfollowUser(msgspec.Struct, frozen=True):
    """Stop what concerns the client's user. Has no answer."""


Intent = Send | Refuse | Ping | Close | Submit | Subscribe | Unsubscribe | FollowUser | UnfollowUser


class _Subscription(msgspec.Struct, eq=False):
    """A topic that the client has asked for: whether it gets its events, and what was not answered yet."""

    is_live: bool = False
    pending: PendingSubscription | None = None


class Session:
    """One connection, from before its hello to its close."""

    __slots__ = (
        "_errors",
        "_errors_since",
        "_identity",
        "_in_flight",
        "_is_welcomed",
        "_opened_at",
        "_ping_at",
        "_pings_unanswered",
        "_refusals",
        "_refusals_since",
        "_subscriptions",
        "_suspended",
        "_unanswered",
        "_verify",
        "connection",
        "is_closed",
    )

    def __init__(self, connection: UUID, verify: Verify, now: int, suspended: Container[UUID] = frozenset()) -> None:
        self.is_closed = False
        self.connection = connection
        self._verify = verify
        self._suspended = suspended
        """The users that are, at this moment: this changes under us."""
        self._opened_at = now
        self._is_welcomed = False
        self._identity: Identity | None = None
        self._in_flight = 0
        self._subscriptions: dict[UUID | None, _Subscription] = {}
        """By auction; None for the topic `me`."""
        self._unanswered = 0
        """Subscriptions that were handed on and not answered yet, cancelled ones included."""
        self._errors = 0
        self._errors_since = now
        self._refusals = 0
        """For its rate, since `_refusals_since`."""
        self._refusals_since = now
        self._ping_at = now + HEARTBEAT_MS
        self._pings_unanswered = 0

    # What comes from the client

    def text_received(self, data: bytes, now: int) -> list[Intent]:
        """Take a whole text message."""
        if self.is_closed:
            return []
        self.activity()
        try:
            message = wire.decode(data)
        except wire.Malformed as error:
            return self._malformed(error, now)
        except wire.NotProtocol as error:
            return self._close(NOT_PROTOCOL, str(error))
        if isinstance(message, wire.Hello):
            return self._hello(message, now)
        if not self._is_welcomed:
            return self._hello_first(message.ref, now)
        match message:
            case wire.Bid():
                return self._bid(message)
            case wire.Subscribe():
                return self._subscribe(message)
            case wire.Unsubscribe():
                return self._unsubscribe(message)
            case wire.Time():
                # Received and sent at the same moment: nothing is awaited in between.
                return [Send(wire.encode_time(message.ref, message.t0, now, now))]
            case wire.Ping():
                return [Send(wire.encode_pong(message.ref))]

    def rate_limited(self, data: bytes, retry_after_ms: int, now: int) -> list[Intent]:
        """Refuse a whole text message, for there were too many; who goes on all the same is closed."""
        if self.is_closed:
            return []
        return self.over_rate(now) or [_refusal(wire.ref_of(data), rate_limited(retry_after_ms), None)]

    def over_rate(self, now: int) -> list[Intent]:
        """Note something that came too often; after too many of these this is closed."""
        self.activity()
        if now - self._refusals_since >= ERRORS_WINDOW_MS:
            self._refusals = 0
            self._refusals_since = now
        self._refusals += 1
        if self._refusals < RATE_REFUSALS_MAX:
            return []
        return self._close(TOO_MANY, "There were too many requests; try again in a minute.")

    def binary_received(self) -> list[Intent]:
        """Take a binary message: the protocol has none."""
        return self._close(NOT_PROTOCOL, "A message is text, not binary.")

    def activity(self) -> None:
        """Note a sign of life: a message or a pong."""
        self._pings_unanswered = 0

    # What comes back from the shards

    def answered(self, pending: PendingBid, answer: Answer) -> list[Intent]:
        """Pass on the answer to a bid."""
        if self.is_closed:
            return []
        assert self._in_flight > 0, "each bid is answered once"
        self._in_flight -= 1
        match answer:
            case BidAccepted():
                return [Send(wire.encode_ack(pending.ref, pending.auction, pending.bid_id, answer))]
            case Rejection():
                return [_refusal(pending.ref, answer, pending.bid_id)]
            case _:
                # The shard did something, though not what was asked; a retry finds out.
                return [_error(pending.ref, "outcome_unknown", "The answer to this bid was not understood.")]

    def subscribed(
        self, pending: PendingSubscription, answer: wire.Subscribed | list[wire.Standing] | Rejection
    ) -> list[Intent]:
        """Pass on the answer to a subscription."""
        self._unanswered -= 1
        if self.is_closed or pending.is_cancelled:
            return []
        subscription = self._subscriptions[pending.auction]
        subscription.pending = None
        if isinstance(answer, wire.Subscribed):
            assert pending.auction is not None
            subscription.is_live = True
            return [Send(wire.encode_subscribed(pending.ref, pending.auction, answer))]
        if isinstance(answer, list):
            subscription.is_live = True
            return [Send(wire.encode_standings(pending.ref, answer))]
        # Refused again, a topic keeps what it had.
        if not subscription.is_live:
            del self._subscriptions[pending.auction]
        return [_refusal(pending.ref, answer, None)]

    # What comes with time

    @property
    def due_at(self) -> int:
        """When `tick` has something to do, in milliseconds; what the client sends may put it off."""
        if not self._is_welcomed:
            return min(self._ping_at, self._opened_at + HELLO_TIMEOUT_MS)
        if self._identity is None:
            return self._ping_at
        return min(self._ping_at, self._identity.expires_at + TOKEN_GRACE_MS + 1)

    def tick(self, now: int) -> list[Intent]:
        """Do what is due at this time."""
        if self.is_closed:
            return []
        if not self._is_welcomed and now - self._opened_at >= HELLO_TIMEOUT_MS:
            return self._close(NOT_WELCOME, "There was no hello in time.")
        if self._identity is not None and now > self._identity.expires_at + TOKEN_GRACE_MS:
            return self._close(NOT_WELCOME, "The token has expired.")
        if now < self._ping_at:
            return []
        if self._pings_unanswered >= HEARTBEATS_MISSED_MAX:
            return self._close(NO_HEARTBEAT, "There was no sign of life.")
        self._pings_unanswered += 1
        self._ping_at = now + HEARTBEAT_MS
        return [Ping()]

    def suspensions_changed(self) -> list[Intent]:
        """Close, if the user is among the suspended by now."""
        return self._close(NOT_WELCOME, SUSPENDED.message) if self._is_suspended(self._identity) else []

    def drained(self) -> list[Intent]:
        """Say goodbye: this gateway is going away."""
        return self._close(DRAINING, "This gateway is going away; reconnect elsewhere.")

    def too_slow(self) -> list[Intent]:
        """Give up on a client that does not read what it is sent."""
        return self._close(TOO_SLOW, "Too much was left unread; reconnect.")

    def too_many(self) -> list[Intent]:
        """Turn a client away: the house is full."""
        return self._close(TOO_MANY, "There are too many connections; try again in a minute.")

    # The details

    def _hello(self, message: wire.Hello, now: int) -> list[Intent]:
        identity = None
        if message.token is not None:
            try:
                identity = self._verify(message.token, now)
            except TokenInvalid as error:
                return self._close(NOT_WELCOME, str(error))
        if self._is_suspended(identity):
            return self._close(NOT_WELCOME, SUSPENDED.message)
        if self._is_welcomed and _user(identity) != _user(self._identity):
            return self._close(NOT_WELCOME, "A connection stays with the user that it began with.")
        self._identity = identity
        self._is_welcomed = True
        return [Send(wire.encode_welcome(message.ref, self.connection, identity, now))]

    def _bid(self, message: wire.Bid) -> list[Intent]:
        if self._identity is None:
            rejection = Rejection("not_authenticated", "Log in to bid.")
            return [_refusal(message.ref, rejection, message.bid_id)]
        if self._is_suspended(self._identity):
            # Not rejected: this bid may be the retry of one that was placed.
            return self._close(NOT_WELCOME, SUSPENDED.message)
        if self._in_flight >= IN_FLIGHT_MAX:
            text = f"At most {IN_FLIGHT_MAX} bids may wait for their answers."
            return [_error(message.ref, "too_many", text, retry_after_ms=BUSY_RETRY_MS)]
        self._in_flight += 1
        bid = PlaceBid(
            auction=message.auction,
            bidder=self._identity.user,
            bid_id=message.bid_id,
            amount=message.amount,
            max_amount=message.max_amount,
        )
        return [Submit(bid, PendingBid(message.ref, message.auction, message.bid_id))]

    def _subscribe(self, message: wire.Subscribe) -> list[Intent]:
        auction, user = wire.topic_auction(message.topic), _user(self._identity)
        if auction is None and user is None:
            return [_refusal(message.ref, Rejection("not_authenticated", "Log in to hear what concerns you."), None)]
        subscription = self._subscriptions.get(auction)
        is_over = subscription is None and len(self._subscriptions) >= SUBSCRIPTIONS_MAX
        # Asked for and left again and again without waiting, that is bounded, too.
        if is_over or self._unanswered >= SUBSCRIPTIONS_MAX:
            text = f"A connection has at most {SUBSCRIPTIONS_MAX} subscriptions."
            return [_error(message.ref, "too_many", text)]
        if subscription is None:
            subscription = self._subscriptions[auction] = _Subscription()
        elif subscription.pending is not None:
            return [_error(message.ref, "too_many", "The last subscription to this topic is not answered yet.")]
        pending = subscription.pending = PendingSubscription(message.ref, auction)
        self._unanswered += 1
        if auction is None:
            assert user is not None
            return [FollowUser(user, pending)]
        return [Subscribe(auction, user, message.since, pending)]

    def _unsubscribe(self, message: wire.Unsubscribe) -> list[Intent]:
        auction = wire.topic_auction(message.topic)
        intents: list[Intent] = []
        subscription = self._subscriptions.pop(auction, None)
        if subscription is not None:
            intents.append(UnfollowUser() if auction is None else Unsubscribe(auction))
            pending = subscription.pending
            if pending is not None:
                pending.is_cancelled = True
                intents.append(_error(pending.ref, "bad_request", "Unsubscribed before this was answered."))
        intents.append(Send(wire.encode_unsubscribed(message.ref, auction)))
        return intents

    def _malformed(self, error: wire.Malformed, now: int) -> list[Intent]:
        if not self._is_welcomed and error.op != "hello":
            return self._hello_first(error.ref, now)
        return self._mistake(Send(wire.encode_error(error.ref, error.code, error.message, field=error.field)), now)

    def _hello_first(self, ref: wire.Ref, now: int) -> list[Intent]:
        return self._mistake(_error(ref, "hello_first", "Say hello first."), now)

    def _mistake(self, answer: Send, now: int) -> list[Intent]:
        """Answer what a client should not have sent; after too many of these it is closed."""
        if now - self._errors_since >= ERRORS_WINDOW_MS:
            self._errors = 0
            self._errors_since = now
        self._errors += 1
        if self._errors >= ERRORS_MAX:
            return self._close(NOT_PROTOCOL, "There were too many errors.")
        return [answer]

    def _is_suspended(self, identity: Identity | None) -> bool:
        return identity is not None and identity.user in self._suspended

    def _close(self, code: int, reason: str) -> list[Intent]:
        if self.is_closed:
            return []
        self.is_closed = True
        return [Close(code, reason)]


def _user(identity: Identity | None) -> UUID | None:
    return None if identity is None else identity.user


def _refusal(ref: wire.Ref, rejection: Rejection, bid_id: UUID | None) -> Send | Refuse:
    """A refusal by the rules is a verdict; one by the engine says that it came to none."""
    match rejection.code:
        case "busy" | "rate_limited" as code:
            data = wire.encode_error(ref, code, rejection.message, retry_after_ms=rejection.retry_after_ms)
            return Refuse(data)
        case "unavailable" | "internal" | "outcome_unknown" as code:
            return _error(ref, code, rejection.message, retry_after_ms=rejection.retry_after_ms)
        case _:
            return Send(wire.encode_rejected(ref, rejection, bid_id))


def _error(ref: wire.Ref, code: wire.ErrorCode, message: str, *, retry_after_ms: int | None = None) -> Send:
    return Send(wire.encode_error(ref, code, message, retry_after_ms=retry_after_ms))
