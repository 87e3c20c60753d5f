"""Simulated clients: bidders and watchers on sockets, by the live protocol alone, and a maker who opens auctions.

All of them share one process. What they do is drawn from a source of their own, so that a change of what the engine
draws does not change it.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Final
from uuid import UUID

import msgspec
import picows

from tests.simulation.history import (
    Connected,
    Events,
    Message,
    Notice,
    Presence,
    Record,
    Sent,
    Standings,
    Subscribing,
    state,
    subscribed,
    verdict,
)
from tests.simulation.network import SimulatedNetwork, Transport
from tests.simulation.observer import Observer
from tests.simulation.world import Process

_TEXT: Final = picows.WSMsgType.TEXT
_CLOSE: Final = picows.WSMsgType.CLOSE
_OVER: Final = ("ended", "cancelled", "won", "lost")
_PING: Final = picows.WSMsgType.PING
_decode: Final[Callable[[bytes], Message]] = msgspec.json.Decoder(dict[str, Any]).decode
_encode: Final = msgspec.json.Encoder().encode


@dataclass(frozen=True)
class Lot:
    """What the clients know of an auction before it opens."""

    auction: UUID
    starting_price: int
    increment: int
    end_time: int


@dataclass(frozen=True)
class Habits:
    """How a client behaves, drawn once for each."""

    pipelined: int
    """So many bids may leave at once."""
    exact_chance: float
    raise_chance: float
    """Of bidding while it leads."""
    low_chance: float
    repeat_chance: float
    """Of sending a bid once more at once, perhaps with another amount."""
    give_up_chance: float
    """Of leaving it at an error."""
    leave_chance: float
    """Of hanging up after a bid."""
    snipe_chance: float
    """Of waiting for the last milliseconds."""
    shared_id_chance: float
    """Of using a `bid_id` that others use, too."""
    me_after_s: float | None
    """So long after its welcome, about, it asks for what concerns it, if it does."""


def draw_habits(random: Random) -> Habits:
    """Habits of one client."""
    return Habits(
        pipelined=random.choice((1, 1, 2, 5)),
        exact_chance=random.choice((0.0, 0.3, 1.0)),
        raise_chance=random.choice((0.05, 0.3)),
        low_chance=random.choice((0.05, 0.3)),
        repeat_chance=random.choice((0.0, 0.1)),
        give_up_chance=random.choice((0.0, 0.3, 1.0)),
        leave_chance=random.choice((0.0, 0.01, 0.05)),
        snipe_chance=random.choice((0.0, 0.3, 1.0)),
        shared_id_chance=random.choice((0.0, 0.2)),
        me_after_s=random.choice((None, 0.0, 0.0, 2.0)),
    )


class _Bid:
    """A bid until it has its verdict."""

    def __init__(self, lot: Lot, bid_id: UUID, field: str, amount: int) -> None:
        self.lot = lot
        self.bid_id = bid_id
        self.field = field
        self.amount = amount


class Client:
    """One user on one socket at a time; it reconnects, subscribes again with what it saw last, and sends again.

    A guest (`user` is None) only watches.
    """

    def __init__(
        self,
        *,
        name: str,
        user: UUID | None,
        process: Process,
        random: Random,
        gap_s: float,
        addresses: Callable[[], list[str]],
        lots: list[Lot],
        shared_ids: list[UUID],
        joined: set[tuple[UUID, UUID]],
        history: list[Record],
        bids_until_us: int,
    ) -> None:
        self.name = name
        self.is_over = False
        self._user = user
        self._process = process
        self._network = SimulatedNetwork(process.world, process)
        self._random = random
        self._gap_s = gap_s
        """Between two bids, about."""
        self._addresses = addresses
        self._lots = lots
        self._shared_ids = shared_ids
        self._joined = joined
        """Each user with each auction in which a bid of it was acknowledged."""
        self._history = history
        self._bids_until_us = bids_until_us
        self._habits = draw_habits(random)
        self._connection = 0
        self._transport: Transport | None = None
        self._gone = asyncio.Event()
        self._next_ref = 0
        self._bids: dict[int, _Bid] = {}
        """What waits for its answer on this connection, by `ref`."""
        self._unanswered: dict[UUID, _Bid] = {}
        self._asked: dict[int, tuple[Lot, int | None]] = {}
        self._me: int | None = None
        """The `ref` under which it has asked for what concerns it."""
        self._told: dict[UUID, str] = {}
        """What it was told last of each of its auctions, on this connection."""
        self._seen: dict[UUID, int] = {}
        """The last `seq` of each topic."""
        self._viewers: dict[UUID, int] = {}
        """How many watch each topic, as it was told on this connection."""
        self._over: set[UUID] = set()
        self._prices: dict[UUID, tuple[int, int]] = {}
        """Minimum and end of each auction, as the events say."""
        self._leads: set[UUID] = set()
        self._maximums: dict[UUID, int] = {}
        self.sent = 0

    @property
    def is_settled(self) -> bool:
        """Whether all of its bids have their verdicts, and it has seen the end of all auctions."""
        joined = [auction for user, auction in self._joined if user == self._user]
        is_told = self._habits.me_after_s is None or all(self._told.get(auction) in _OVER for auction in joined)
        return is_told and not self._unanswered and all(lot.auction in self._over for lot in self._lots)

    @property
    def viewers(self) -> dict[tuple[str, int, UUID], int]:
        """How many watch each topic that it watches, as it was told last; by itself, its connection and the topic."""
        if self._transport is None:
            return {}
        return {(self.name, self._connection, auction): count for auction, count in self._viewers.items()}

    def describe(self) -> str:
        """What it still waits for."""
        return (
            f"{self.name}: {len(self._unanswered)} bids without a verdict, events seen {self._seen}, told {self._told}"
        )

    # Its life

    async def live(self) -> None:
        """Connect, again and again."""
        backoff_s = 0.05
        while not self.is_over:
            self._gone = asyncio.Event()
            addresses = self._addresses()
            if addresses:
                try:
                    self._transport = await self._network.open(self, self._random.choice(addresses))
                    backoff_s = 0.05
                    await self._gone.wait()
                except OSError:
                    pass
            self._transport = None
            await asyncio.sleep(backoff_s * (0.5 + self._random.random()))
            backoff_s = min(2 * backoff_s, 1.0)

    async def bid(self) -> None:
        """Bid, as its habits are."""
        random, habits = self._random, self._habits
        await asyncio.sleep(random.random() * 0.5)
        while self._lots and self._process.world.now_us < self._bids_until_us:
            lot = random.choice(self._lots)
            end_time = self._prices.get(lot.auction, (0, lot.end_time))[1]
            left_s = end_time / 1_000 - self._process.world.now_us / 1e6
            if random.random() < habits.snipe_chance and 0 < left_s < 3:
                await asyncio.sleep(max(0.0, left_s + random.uniform(-0.006, -0.002)))
                for _ in range(4):
                    self._place(lot)
                    await asyncio.sleep(0.001)
            for _ in range(random.randint(1, habits.pipelined)):
                self._place(lot)
            if random.random() < habits.leave_chance and self._transport is not None:
                self._transport.disconnect(graceful=random.random() < 0.5)
            await asyncio.sleep(self._gap_s * random.expovariate(1))

    def _place(self, lot: Lot) -> None:
        random, habits = self._random, self._habits
        if self._user is None or len(self._unanswered) > 20:
            return
        minimum = self._prices.get(lot.auction, (lot.starting_price, 0))[0]
        amount = minimum + lot.increment * random.choice((0, 0, 1, 2, 5))
        if lot.auction in self._leads:
            if random.random() > habits.raise_chance:
                return
            amount = max(amount, self._maximums.get(lot.auction, 0) + random.randint(0, 3))
        elif random.random() < habits.low_chance:
            amount = max(1, minimum - random.randint(1, 3 * lot.increment))
        bid_id = UUID(int=random.getrandbits(128), version=4)
        if random.random() < habits.shared_id_chance:
            bid_id = random.choice(self._shared_ids)
            if bid_id in self._unanswered:
                return
        bid = _Bid(lot, bid_id, "amount" if random.random() < habits.exact_chance else "max_amount", amount)
        self._unanswered[bid_id] = bid
        self._send_bid(bid)
        if random.random() < habits.repeat_chance:
            again = _Bid(lot, bid_id, bid.field, amount + random.choice((0, lot.increment)))
            self._send_bid(again)

    def _send_bid(self, bid: _Bid) -> None:
        if self._transport is None or self._user is None or not self._connection:
            return
        self._next_ref += 1
        self._bids[self._next_ref] = bid
        self.sent += 1
        self._history.append(
            Sent(
                client=self.name,
                connection=self._connection,
                auction=bid.lot.auction,
                bid_id=bid.bid_id,
                bidder=self._user,
                at=self._now_ms(),
                **{bid.field: bid.amount},
            )
        )
        self._send(
            {
                "op": "bid",
                "ref": self._next_ref,
                "auction": str(bid.lot.auction),
                "bid_id": str(bid.bid_id),
                bid.field: bid.amount,
            }
        )

    def _subscribe(self, lot: Lot) -> None:
        if self._transport is None:
            return
        since = self._seen.get(lot.auction)
        if self._random.random() < 0.1:
            since = None
        self._next_ref += 1
        self._asked[self._next_ref] = lot, since
        self._history.append(
            Subscribing(
                client=self.name, connection=self._connection, auction=lot.auction, since=since, at=self._now_ms()
            )
        )
        message: Message = {"op": "subscribe", "ref": self._next_ref, "topic": f"auction:{lot.auction}"}
        self._send(message if since is None else message | {"since": since})

    def _ask_for_me(self, connection: int) -> None:
        if connection == self._connection:
            self._next_ref += 1
            self._me = self._next_ref
            self._send({"op": "subscribe", "ref": self._me, "topic": "me"})

    def _send(self, message: Message) -> None:
        if self._transport is not None:
            self._transport.send(_TEXT, _encode(message))

    def _now_ms(self) -> int:
        return self._process.world.now_us // 1_000

    def _later(self, delay_s: float, action: Callable[..., None], *arguments: object) -> None:
        self._process.call_later(delay_s * (0.5 + self._random.random()), action, *arguments)

    # What the socket says

    def on_ws_connected(self, transport: Transport) -> None:
        self._transport = transport
        self._connection += 1
        self._bids.clear()
        self._asked.clear()
        self._told.clear()
        self._viewers.clear()
        self._send({"op": "hello"} if self._user is None else {"op": "hello", "token": str(self._user)})
        for lot in self._lots:
            self._subscribe(lot)
        if self._user is not None and self._habits.me_after_s is not None:
            self._later(self._habits.me_after_s, self._ask_for_me, self._connection)
        for bid in list(self._unanswered.values()):
            self._send_bid(bid)

    def on_ws_frame(self, transport: Transport, frame: Any) -> None:
        if frame.msg_type == _TEXT:
            self._receive(_decode(frame.get_payload_as_bytes()))
        elif frame.msg_type == _CLOSE:
            transport.disconnect()

    def on_ws_disconnected(self, transport: Transport) -> None:
        if transport is self._transport:
            self._transport = None
            self._gone.set()

    def pause_writing(self) -> None: ...

    def resume_writing(self) -> None: ...

    def _receive(self, message: Message) -> None:
        match message["type"]:
            case "events":
                auction = UUID(message["topic"][8:])
                self._history.append(
                    Events(
                        client=self.name,
                        connection=self._connection,
                        auction=auction,
                        events=message["events"],
                        at=self._now_ms(),
                    )
                )
                self._follow(auction, message["events"])
            case "state":
                self._take_up(message)
            case "presence":
                auction = UUID(message["topic"][8:])
                self._viewers[auction] = message["viewers"]
                self._history.append(
                    Presence(
                        client=self.name,
                        connection=self._connection,
                        auction=auction,
                        viewers=message["viewers"],
                        at=self._now_ms(),
                    )
                )
            case "ack" | "rejected" | "error" if message.get("ref") in self._bids:
                self._judged(message)
            case "subscribed" if message["ref"] == self._me:
                self._history.append(
                    Standings(
                        client=self.name,
                        connection=self._connection,
                        standings=message["standings"],
                        at=self._now_ms(),
                    )
                )
                self._told = {UUID(one["auction"]): one["status"] for one in message["standings"]}
            case "notice":
                auction = UUID(message["auction"])
                self._history.append(
                    Notice(
                        client=self.name,
                        connection=self._connection,
                        auction=auction,
                        notice=message,
                        at=self._now_ms(),
                    )
                )
                self._told[auction] = message["kind"]
            case "error" if message.get("ref") == self._me:
                self._later(0.3, self._ask_for_me, self._connection)
            case "subscribed":
                self._subscribed(message)
            case "error" | "rejected" if message.get("ref") in self._asked:
                lot, _ = self._asked.pop(message["ref"])
                self._later(0.3, self._subscribe_again, lot, self._connection)
            case "welcome":
                self._history.append(
                    Connected(client=self.name, connection=self._connection, user=self._user, at=self._now_ms())
                )
            case other:
                raise AssertionError(f"{other} was not asked for: {message}")

    def _take_up(self, message: Message) -> None:
        """Go on from a state, which stands for all that was folded into it."""
        Observer.here().strained["client told a state"] += 1
        record = state(self.name, self._connection, message, at=self._now_ms())
        self._history.append(record)
        self._know(record.auction, message)
        self._leads.discard(record.auction)
        self._follow(record.auction, message["events"])
        self._seen[record.auction] = record.seq

    def _subscribe_again(self, lot: Lot, connection: int) -> None:
        if connection == self._connection:
            self._subscribe(lot)

    def _subscribed(self, message: Message) -> None:
        lot, since = self._asked.pop(message["ref"])
        self._history.append(subscribed(self.name, self._connection, lot.auction, since, message, at=self._now_ms()))
        self._seen[lot.auction] = message["seq"]
        self._viewers.setdefault(lot.auction, 0)
        if "snapshot" in message:
            self._know(lot.auction, message)
        you = message.get("you")
        if you is not None:
            self._leads.discard(lot.auction)
            if you["is_leading"]:
                self._leads.add(lot.auction)
            self._maximums[lot.auction] = you["max_amount"]
        self._follow(lot.auction, message.get("events") or [])

    def _know(self, auction: UUID, message: Message) -> None:
        """Take over what a snapshot says."""
        snapshot = message["snapshot"]
        self._prices[auction] = snapshot["minimum"], snapshot["end_time"]
        if snapshot["status"] in ("ended", "cancelled"):
            self._over.add(auction)

    def _follow(self, auction: UUID, events: list[Message]) -> None:
        lot = next(lot for lot in self._lots if lot.auction == auction)
        for event in events:
            self._seen[auction] = event["seq"]
            minimum, end_time = self._prices.get(auction, (lot.starting_price, lot.end_time))
            self._prices[auction] = event.get("minimum", minimum), event.get("end_time", end_time)
            if event["kind"] == "bid_placed":
                self._leads.discard(auction)
            if event["kind"] in ("ended", "cancelled"):
                self._over.add(auction)

    def _judged(self, message: Message) -> None:
        bid = self._bids.pop(message["ref"])
        self._history.append(
            verdict(self.name, self._connection, bid.lot.auction, bid.bid_id, message, at=self._now_ms())
        )
        if message["type"] != "error":
            self._unanswered.pop(bid.bid_id, None)
            if message["type"] == "ack" and self._user is not None:
                self._joined.add((self._user, bid.lot.auction))
            if message.get("outcome") == "leading":
                self._leads.add(bid.lot.auction)
                self._maximums[bid.lot.auction] = message["max_amount"]
            self._prices[bid.lot.auction] = (
                message.get("minimum") or self._prices.get(bid.lot.auction, (bid.lot.starting_price, 0))[0],
                self._prices.get(bid.lot.auction, (0, bid.lot.end_time))[1],
            )
        elif bid.bid_id not in self._unanswered or self._random.random() < self._habits.give_up_chance:
            self._unanswered.pop(bid.bid_id, None)
        else:
            self._later(0.3, self._send_again, bid, self._connection)

    def _send_again(self, bid: _Bid, connection: int) -> None:
        if connection == self._connection and bid.bid_id in self._unanswered:
            self._send_bid(bid)
