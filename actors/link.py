"""The ordered connection between a gateway and a shard, both ends: a WebSocket of binary frames.

The gateway's end (`Link`) keeps what was not answered and sends it again, in order, to the shard's next incarnation;
every command carries an id, so that is safe. The shard's end (`LinkServer`) hands what arrives to it as one turn.
"""

import asyncio
import hmac
import os
from collections.abc import Awaitable, Callable
from typing import Final
from uuid import UUID

import asyncpg
import picows

from actors.directory import Owner
from actors.logs import get_logger
from actors.messages import (
    MALFORMED,
    VERSION,
    Answer,
    Answered,
    Batch,
    Follow,
    GatewayFrame,
    GetAuction,
    Greeting,
    Message,
    Noticed,
    Output,
    Payload,
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
    decode_gateway_frame,
    decode_shard_frame,
    encode_into,
    proof,
)
from actors.network import Listening, Network
from actors.shard import Shard
from engine.commands import CancelAuction, EndAuction, OpenAuction, PlaceBid, command_id
from engine.limits import (
    COMMAND_TIMEOUT_MS,
    LINK_BATCH_MAX,
    LINK_DEAD_MS,
    LINK_DEATHS_MAX,
    LINK_FOLD_BYTES,
    LINK_GREETING_MS,
    LINK_IN_FLIGHT_MAX,
    LINK_LINE_MAX,
    LINK_OUTPUT_BYTES,
    LINK_PING_MS,
    LINK_RETRY_MS,
    LINK_WRITE_BYTES_MAX,
    SECOND_MS,
)
from engine.rejections import BUSY, INTERNAL, OUTCOME_UNKNOWN, UNAVAILABLE, Rejection

logger = get_logger(__name__)

_NONCE_BYTES: Final = 32
_HEADER_BYTES: Final = 14
"""The longest header of a frame (RFC 6455, section 5.2)."""
_UNANSWERED: Final = (Unsubscribe, Viewers, Unfollow)
"""What is told and has no answer. A link that breaks takes it along."""
_MESSAGE_BYTES: Final = 256
"""About the size of an answer without events."""
_UNBOUNDED: Final = (Watch, Follow, *_UNANSWERED)


def send(transport: picows.WSTransport, message: GatewayFrame | ShardFrame) -> None:
    """Write a message as one frame.

    picows writes a large frame's header from a buffer that its next frame overwrites, perhaps before the loop has
    written it out; so each frame gets a buffer of its own, with room in front for the header.
    """
    buffer = bytearray(_HEADER_BYTES)
    encode_into(message, buffer, _HEADER_BYTES)
    transport.send_reuse_external_bytearray(picows.WSMsgType.BINARY, buffer, _HEADER_BYTES)


class _Pulse:
    """Pings a peer and notices when it stays silent.

    Silence is counted in pings, not by the clock: a process that was itself held up reads what has arrived meanwhile
    before it judges its peer.
    """

    def __init__(self, transport: picows.WSTransport) -> None:
        self._transport = transport
        self._unanswered = 0
        self._timer = asyncio.get_running_loop().call_later(LINK_PING_MS / SECOND_MS, self._beat)

    def heard(self) -> None:
        self._unanswered = 0

    def stop(self) -> None:
        self._timer.cancel()

    def _beat(self) -> None:
        if self._unanswered * LINK_PING_MS >= LINK_DEAD_MS:
            logger.warning("the other end of a link stays silent")
            self._transport.disconnect(graceful=False)
            return
        self._unanswered += 1
        self._transport.send_ping()
        self._timer = asyncio.get_running_loop().call_later(LINK_PING_MS / SECOND_MS, self._beat)


# The shard's end


class LinkServer:
    """Where the gateways' links to one shard end."""

    def __init__(self, shard: Shard, number: int, owner: UUID, epoch: Callable[[], int], secret: bytes) -> None:
        self.shard = shard
        self.number = number
        self.owner = owner
        self.epoch = epoch
        """The newest epoch: it rises whenever a write was settled."""
        self.secret = secret
        self.ends: dict[_ShardEnd, None] = {}
        """In the order in which they came, which a set would not keep."""
        self._listening: Listening | None = None

    async def listen(self, network: Network, host: str) -> str:
        """Take links at a free port; return the address as `host:port`."""
        self._listening = await network.listen(lambda: _ShardEnd(self), host)
        return self._listening.address

    def close(self) -> None:
        """Take no more links and end those that there are."""
        if self._listening is not None:
            self._listening.close()
        for end in list(self.ends):
            end.close()


class _Fold:
    """Events of one topic that are held back from a gateway that is behind: what they led to, and what is kept."""

    __slots__ = ("first", "kept", "last", "snapshot")

    def __init__(self, first: int) -> None:
        self.first = first
        self.last = first - 1
        self.kept: list[bytes] = []
        self.snapshot: bytes | None = None

    def add(self, published: Published) -> None:
        assert published.first == self.last + 1
        self.last = published.last
        self.snapshot = published.snapshot
        if published.kept:
            self.kept.append(published.kept)


class _ShardEnd(picows.WSListener):
    """One link, at the shard. It is the shard's outlet to this gateway."""

    def __init__(self, server: LinkServer) -> None:
        self._server = server
        self._nonce = os.urandom(_NONCE_BYTES)
        self._epoch = server.epoch()
        self._is_open = False
        self.is_gone = False
        self._is_behind = False
        """Much is unread at the gateway: events are folded."""
        self._folds: dict[UUID, _Fold] = {}
        self._kept_bytes = 0
        """What is kept in the folds."""
        self._transport: picows.WSTransport
        self._pulse: _Pulse
        self._greeting_timer: asyncio.TimerHandle

    def deliver(self, messages: list[Message]) -> None:
        """See `Outlet`: out at once, but for events to a gateway that is behind; they wait, folded by topic.

        A gateway that does not read at all is cut off and comes back.
        """
        if self.is_gone:
            return
        part: list[Message] = []
        part_bytes = 0
        for message in messages:
            if isinstance(message, Published) and (self._is_behind or message.topic in self._folds):
                self._fold(message)
                continue
            if self._folds and isinstance(message, Answered) and isinstance(message.answer, Watched):
                # Before it the topic's events up to its `seq` must have come.
                part += self._unfold(message.answer.auction, message.answer.snapshot)
            part.append(message)
            part_bytes += _message_bytes(message)
            if part_bytes >= LINK_OUTPUT_BYTES:
                self._send(part)
                part, part_bytes = [], 0
        self._send(part)

    def _send(self, messages: list[Message]) -> None:
        if messages and not self.is_gone:
            send(self._transport, Output(messages))
            self._check_budget()

    def _check_budget(self) -> None:
        if self._transport.underlying_transport.get_write_buffer_size() + self._kept_bytes > LINK_WRITE_BYTES_MAX:
            logger.warning("a gateway does not read its link: it is cut off")
            self.close()

    def _fold(self, published: Published) -> None:
        fold = self._folds.get(published.topic)
        if fold is None:
            fold = self._folds[published.topic] = _Fold(published.first)
        fold.add(published)
        self._kept_bytes += len(published.kept)
        self._check_budget()

    def _unfold(self, topic: UUID, snapshot: bytes | None) -> list[Message]:
        """What is held back of a topic, as one message. `snapshot` is of its end, if that is known."""
        fold = self._folds.pop(topic, None)
        if fold is None:
            return []
        kept = b",".join(fold.kept)
        self._kept_bytes -= sum(map(len, fold.kept))
        return [Published(topic, fold.first, fold.last, None, kept, fold.snapshot or snapshot)]

    def close(self) -> None:
        # What is delivered until the transport says so is not written any more.
        self.is_gone = True
        self._transport.disconnect(graceful=False)

    def on_ws_connected(self, transport: picows.WSTransport) -> None:
        self._transport = transport
        transport.underlying_transport.set_write_buffer_limits(high=LINK_FOLD_BYTES)
        self._pulse = _Pulse(transport)
        self._server.ends[self] = None
        self._greeting_timer = asyncio.get_running_loop().call_later(LINK_GREETING_MS / SECOND_MS, self.close)
        greeting = Greeting(VERSION, self._server.number, self._epoch, self._server.owner, self._nonce)
        send(transport, greeting)

    def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        self._pulse.heard()
        if frame.msg_type == picows.WSMsgType.BINARY:
            try:
                message: GatewayFrame = decode_gateway_frame(frame.get_payload_as_memoryview())
            except MALFORMED as error:
                logger.warning("a link sent what is not of its protocol", error=str(error))
                transport.disconnect(graceful=False)
                return
            self._receive(message)
        elif frame.msg_type == picows.WSMsgType.CLOSE:
            transport.disconnect()

    def on_ws_disconnected(self, transport: picows.WSTransport) -> None:  # noqa: ARG002 (picows's signature)
        self.is_gone = True
        self._pulse.stop()
        self._greeting_timer.cancel()
        self._server.ends.pop(self, None)
        self._server.shard.leave(self)

    def pause_writing(self) -> None:
        """The gateway is behind."""
        self._is_behind = True

    def resume_writing(self) -> None:
        """The gateway has read on."""
        self._is_behind = False
        # Called from within the transport, which is not to be written to from there.
        asyncio.get_running_loop().call_soon(self._catch_up)

    def _catch_up(self) -> None:
        """Let out what was held back, unless the gateway is behind again, or the link is gone."""
        if not self._is_behind and not self.is_gone:
            self.deliver([message for topic in list(self._folds) for message in self._unfold(topic, None)])

    def _receive(self, message: GatewayFrame) -> None:
        server = self._server
        if isinstance(message, Batch) and self._is_open:
            server.shard.take(message.requests, self)
        elif isinstance(message, Proof) and not self._is_open:
            expected = proof(server.secret, "gateway", self._nonce, server.number, self._epoch)
            if not hmac.compare_digest(message.mac, expected):
                logger.warning("a link was refused: its other end does not hold the cluster's secret")
                self.close()
                return
            self._is_open = True
            self._greeting_timer.cancel()
            welcome = Welcome(proof(server.secret, "shard", message.nonce, server.number, self._epoch))
            send(self._transport, welcome)
        else:
            logger.warning("a link was refused: a message is out of turn", message_type=type(message).__name__)
            self.close()


# The gateway's end


class _InFlight:
    """A request that waits for its answer."""

    __slots__ = ("deaths", "expires_at", "is_bid", "links", "on_answer", "payload", "request")

    def __init__(
        self,
        request: int,
        payload: Payload | Follow | Unfollow,
        on_answer: Callable[[Answer], None],
        expires_at: float,
    ) -> None:
        self.request = request
        self.payload = payload
        self.on_answer = on_answer
        self.expires_at = expires_at
        self.is_bid = isinstance(payload, PlaceBid)
        """Also when only its outcome is asked for any more."""
        self.links = 0
        """On so many links it was sent."""
        self.deaths = 0
        """So many processes of the shard were replaced while it was in flight."""

    @property
    def is_command(self) -> bool:
        """Whether it may change something, so that it matters if it was done."""
        return not isinstance(self.payload, GetAuction | Watch | Follow)


class Link:
    """A gateway's connection to one shard, through all its incarnations.

    `find_owner` looks the shard up; `on_published`, `on_presence` and `on_noticed` get what it tells; `on_open` is
    called with the shard whenever a link has opened, before anything is sent again. Topics are to be asked for anew
    then: a `Watch` that was not answered is dropped.
    """

    def __init__(
        self,
        *,
        gateway: str,
        shard: int,
        secret: bytes,
        network: Network,
        find_owner: Callable[[int], Awaitable[Owner | None]],
        on_published: Callable[[Published], None],
        on_presence: Callable[[Presence], None],
        on_noticed: Callable[[Noticed], None],
        on_open: Callable[[int], None],
    ) -> None:
        self.shard = shard
        self._gateway = gateway
        self._secret = secret
        self._network = network
        self._find_owner = find_owner
        self._on_published = on_published
        self._on_presence = on_presence
        self._on_noticed = on_noticed
        self._on_open = on_open
        self._epoch = 0
        self._owner: UUID | None = None
        self._next_request = 1
        self._in_flight: dict[int, _InFlight] = {}
        self._bids = 0
        """So many of these are bids."""
        self._suspects: dict[UUID, int] = {}
        """Auctions whose `Watch` was in flight when the link broke, and at how many deaths it had been."""
        self._batch: list[_InFlight] = []
        self._end: _GatewayEnd | None = None
        self._opened: asyncio.Event = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._tasks = [self._loop.create_task(self._keep_open()), self._loop.create_task(self._expire())]

    @property
    def is_open(self) -> bool:
        """Whether the shard can be reached at this moment."""
        return self._end is not None

    async def opened(self) -> None:
        """Wait until the shard can be reached."""
        await self._opened.wait()

    async def close(self) -> None:
        """Give up: what was not answered never will be."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._end is not None:
            self._end.disconnect()

    def submit(self, payload: Payload | Follow | Unfollow, on_answer: Callable[[Answer], None]) -> None:
        """Send a request with all that comes in this turn of the loop; `on_answer` gets its answer, once."""
        if self._is_full_for(payload):
            on_answer(BUSY)
            return
        number = self._next_request
        self._next_request += 1
        waiting = _InFlight(number, payload, on_answer, self._loop.time() + COMMAND_TIMEOUT_MS / SECOND_MS)
        if isinstance(payload, Watch):
            waiting.deaths = self._suspects.pop(payload.auction, 0)
            if waiting.deaths >= LINK_DEATHS_MAX:
                on_answer(INTERNAL)
                return
        if not isinstance(payload, _UNANSWERED):
            self._in_flight[number] = waiting
            self._bids += waiting.is_bid
        if self._end is not None:
            self._queue(waiting)

    def _is_full_for(self, payload: Payload | Follow | Unfollow) -> bool:
        # Who watches is bounded where it is asked for, and must not get lost.
        if isinstance(payload, _UNBOUNDED):
            return False
        # For a shard that is away more is kept: it is done once the shard is back.
        is_placed_now = self._end is not None and isinstance(payload, PlaceBid)
        return len(self._in_flight) >= LINK_IN_FLIGHT_MAX or (is_placed_now and self._bids >= LINK_LINE_MAX)

    def _queue(self, waiting: _InFlight) -> None:
        self._batch.append(waiting)
        if len(self._batch) == 1:
            self._loop.call_soon(self._flush)
        elif len(self._batch) == LINK_BATCH_MAX:
            # A long turn here need not keep the shard waiting.
            self._flush()

    def _flush(self) -> None:
        """Send what has come since; if the link broke meanwhile it is sent when the next one opens."""
        batch, self._batch = self._batch, []
        if self._end is None or not batch:
            return
        for waiting in batch:
            waiting.links += 1
        self._end.send(Batch([Request(waiting.request, waiting.payload) for waiting in batch]))

    async def _keep_open(self) -> None:
        """Look the owner up, link to it, and start over when the link has broken."""
        while True:
            end = await self._connect()
            if end is None:
                await asyncio.sleep(LINK_RETRY_MS / SECOND_MS)
                continue
            try:
                self._open(end)
            except Exception:
                logger.exception("the link could not be taken up", shard=self.shard)
                end.disconnect()
            await end.closed.wait()
            self._end = None
            self._opened.clear()
            logger.info("the link broke", shard=self.shard)

    async def _connect(self) -> "_GatewayEnd | None":
        """Link to the shard's newest incarnation; None if it cannot be reached just now."""
        try:
            owner = await self._find_owner(self.shard)
            if owner is None or owner.address is None or owner.epoch < self._epoch:
                return None
            return await self._greet(owner.address, owner.epoch)
        except (OSError, picows.WSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            logger.debug("the shard cannot be reached", shard=self.shard, error=str(error))
        except Exception:
            # Whatever it is: a link that gave up for good would take its shard out of service.
            logger.exception("linking failed", shard=self.shard)
        return None

    async def _greet(self, address: str, epoch: int) -> "_GatewayEnd | None":
        end = _GatewayEnd(self._gateway, self.shard, epoch, self._secret, self._receive)
        await self._network.connect(end, address)
        try:
            async with asyncio.timeout(LINK_GREETING_MS / SECOND_MS):
                await end.settled.wait()
        finally:
            if not end.is_open:
                end.disconnect()
        return end if end.is_open else None

    def _open(self, end: "_GatewayEnd") -> None:
        """A link is open: send again, in order, what was not answered."""
        is_new_process = end.owner != self._owner
        self._epoch = end.epoch
        self._owner = end.owner
        self._end = end
        for one in self._in_flight.values():
            if one.links > 0 and is_new_process:
                one.deaths += 1
        self._drop_watches()
        waiting = list(self._in_flight.values())
        self._batch = []
        self._on_open(self.shard)
        for one in waiting:
            if one.deaths < LINK_DEATHS_MAX:
                self._queue(one)
            elif one.is_command:
                one.payload = _without_doing_it(one.payload)
                self._queue(one)
            else:
                self._answer(one.request, INTERNAL)
        self._opened.set()

    def _drop_watches(self) -> None:
        """Forget who was to be watched: whatever still is, is asked for anew, from where its events have come to."""
        watches = [one for one in self._in_flight.values() if isinstance(one.payload, Watch)]
        self._suspects = {}
        for one in watches:
            assert isinstance(one.payload, Watch)
            del self._in_flight[one.request]
            if one.deaths > 0:
                self._suspects[one.payload.auction] = one.deaths

    async def _expire(self) -> None:
        """Tell those who have waited too long. A shard that can be reached answers sooner."""
        while True:
            await asyncio.sleep(LINK_PING_MS / SECOND_MS)
            now = self._loop.time()
            while self._in_flight:
                number, waiting = next(iter(self._in_flight.items()))
                if waiting.expires_at > now:
                    break
                self._batch = [one for one in self._batch if one is not waiting]
                self._answer(number, OUTCOME_UNKNOWN if waiting.is_command and waiting.links > 0 else UNAVAILABLE)

    def _receive(self, messages: list[Message]) -> None:
        for message in messages:
            if isinstance(message, Answered):
                self._answer(message.request, message.answer)
            elif isinstance(message, Published):
                self._on_published(message)
            elif isinstance(message, Presence):
                self._on_presence(message)
            else:
                self._on_noticed(message)

    def _answer(self, number: int, answer: Answer) -> None:
        waiting = self._in_flight.pop(number, None)
        if waiting is None:
            return
        self._bids -= waiting.is_bid
        if waiting.links > 1 and isinstance(answer, Rejection) and answer.is_transient and waiting.is_command:
            # This time it was not done; whether it was before, nobody has said.
            answer = OUTCOME_UNKNOWN
        try:
            waiting.on_answer(answer)
        except Exception:
            # One client's trouble is not the link's.
            logger.exception("an answer could not be passed on")


def _message_bytes(message: Message) -> int:
    """About how large a message is."""
    match message:
        case Published(events=events, kept=kept, snapshot=snapshot):
            return _MESSAGE_BYTES + len(events or b"") + len(kept) + len(snapshot or b"")
        case Answered(answer=Watched(events=events, snapshot=snapshot, you=you)):
            return _MESSAGE_BYTES + len(events) + len(snapshot) + 64 * len(you)
        case _:
            return _MESSAGE_BYTES


def _without_doing_it(payload: Payload | Follow | Unfollow) -> Payload | Follow | Unfollow:
    """Ask only what became of a command that may be what kills the shard."""
    match payload:
        case PlaceBid():
            return Recall(payload.auction, command_id(payload), payload.bidder)
        case OpenAuction():
            return Recall(payload.auction, command_id(payload), payload.maker)
        case EndAuction() | CancelAuction():
            return Recall(payload.auction, command_id(payload), payload.caller)
        case _:
            return payload


class _GatewayEnd(picows.WSListener):
    """One link, at the gateway, to one incarnation of a shard."""

    def __init__(
        self,
        gateway: str,
        shard: int,
        epoch_min: int,
        secret: bytes,
        on_messages: Callable[[list[Message]], None],
    ) -> None:
        self.epoch = epoch_min
        self.owner: UUID | None = None
        """The process at the other end."""
        self._gateway = gateway
        self._shard = shard
        self._secret = secret
        self._on_messages = on_messages
        self._nonce = os.urandom(_NONCE_BYTES)
        self.is_open = False
        self.settled = asyncio.Event()
        """Set when the link is open, or will never be."""
        self.closed = asyncio.Event()
        self._transport: picows.WSTransport
        self._pulse: _Pulse

    def send(self, message: GatewayFrame) -> None:
        send(self._transport, message)

    def disconnect(self) -> None:
        self._transport.disconnect(graceful=False)

    def on_ws_connected(self, transport: picows.WSTransport) -> None:
        self._transport = transport
        self._pulse = _Pulse(transport)

    def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        self._pulse.heard()
        if frame.msg_type == picows.WSMsgType.BINARY:
            try:
                message: ShardFrame = decode_shard_frame(frame.get_payload_as_memoryview())
            except MALFORMED as error:
                logger.warning("the shard sent what is not of the link's protocol", shard=self._shard, error=str(error))
                self.disconnect()
                return
            self._handle(message)
        elif frame.msg_type == picows.WSMsgType.CLOSE:
            transport.disconnect()

    def on_ws_disconnected(self, transport: picows.WSTransport) -> None:  # noqa: ARG002 (picows's signature)
        self._pulse.stop()
        self.is_open = False
        self.settled.set()
        self.closed.set()

    def pause_writing(self) -> None:
        """What may be in flight is bounded, and with it what may be unsent."""

    def resume_writing(self) -> None:
        """See `pause_writing`."""

    def _handle(self, message: ShardFrame) -> None:
        if isinstance(message, Output) and self.is_open:
            self._on_messages(message.messages)
        elif isinstance(message, Greeting):
            self._prove(message)
        elif isinstance(message, Welcome) and not self.is_open:
            expected = proof(self._secret, "shard", self._nonce, self._shard, self.epoch)
            if hmac.compare_digest(message.mac, expected):
                self.is_open = True
                self.settled.set()
                return
            logger.warning("the shard does not hold the cluster's secret", shard=self._shard)
            self.disconnect()

    def _prove(self, greeting: Greeting) -> None:
        """Answer the shard's challenge, once, unless it is another shard's, or an owner that has been replaced."""
        is_right = greeting.version == VERSION and greeting.shard == self._shard and greeting.epoch >= self.epoch
        if not is_right or self.owner is not None:
            logger.info("an owner of the shard was refused", shard=self._shard, epoch=greeting.epoch)
            self.disconnect()
            return
        self.epoch = greeting.epoch
        self.owner = greeting.owner
        mac = proof(self._secret, "gateway", greeting.nonce, self._shard, self.epoch)
        self.send(Proof(self._gateway, self._nonce, mac))
