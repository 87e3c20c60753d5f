"""A demonstration: a few auctions that never end for long, and bidders of differing temperaments who bid in them.

Everything goes the way that anybody's client would go: auctions over HTTP, bids over live sockets.
"""

import asyncio
import math
import random
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID, uuid4

from engine.commands import Role
from engine.money import format_amount, to_decimal
from gateway.tokens import issue
from gavel.client import OVER, Api, LiveClient, Message, follow
from gavel.errors import CommandError

CURRENCY: Final = "USD"
ROOMS: Final = 4
BIDDERS: Final = (8, 12)
DURATION_S: Final = (120, 360)
SOFT_CLOSE: Final = {"window_s": 20, "extension_s": 20, "max_extension_s": 300, "anchor": "reset"}
PAUSE_S: Final = 5.0
TOKEN_TTL_S: Final = 366 * 24 * 60 * 60
"""A demonstration may run for long, and its users exist nowhere else."""

TITLES: Final = (
    "Stoneware moon jar, ash glaze",
    "Hand-knotted wool rug, madder and indigo",
    "Walnut rocking chair, steam-bent",
    "Forged chef's knife, bog oak handle",
    "Linocut of a harbour at dawn, 3 of 20",
    "Blown glass carafe with two tumblers",
    "Quilt of old work shirts, double bed",
    "Saddle-stitched satchel, bridle leather",
    "Silver ring with a beach pebble",
    "Ladder-back stool, woven seagrass",
    "Porcelain tea bowls, a set of five",
    "Willow basket for firewood",
    "Marbled notebooks, a set of three",
    "Carved spoon of flamed birch",
    "Brass desk lamp, spun by hand",
    "Tapestry of a winter field",
)


@dataclass(frozen=True)
class Temperament:
    """How somebody bids: the pause between two looks, the steps over the minimum, and when to begin and to stop."""

    look_s: tuple[float, float]
    steps: tuple[int, int]
    is_by_maximum: bool
    begins_before_end_s: float
    generosity: float


TEMPERAMENTS: Final = (
    # Nibbles from the beginning, the least that will do.
    Temperament((4, 15), (0, 1), is_by_maximum=False, begins_before_end_s=math.inf, generosity=0.8),
    # Says once what the piece is worth, and leaves the rest to the engine.
    Temperament((10, 60), (6, 14), is_by_maximum=True, begins_before_end_s=math.inf, generosity=1.0),
    # Jumps, to frighten the others off.
    Temperament((8, 30), (2, 6), is_by_maximum=False, begins_before_end_s=180, generosity=0.9),
    # Waits for the last half minute.
    Temperament((2, 6), (1, 3), is_by_maximum=True, begins_before_end_s=30, generosity=1.1),
    # Cannot let go.
    Temperament((3, 10), (0, 2), is_by_maximum=False, begins_before_end_s=90, generosity=1.4),
)


@dataclass
class Room:
    """One auction as its spectators see it."""

    auction: UUID
    title: str
    worth: int
    snapshot: Message = field(default_factory=dict)
    over: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True)
class Bidder:
    """A simulated person with a socket."""

    client: LiveClient
    temperament: Temperament


async def run_demo(
    url: str, private_pem: bytes, stop: asyncio.Event, say: Callable[[str], None] = lambda _line: None
) -> None:
    """Keep a few auctions and their bidders going against the engine at `url` until `stop` is set.

    `say` gets a line for each auction that opens or ends. The only thing that ends it early is an engine that refuses
    us for good, with a `CommandError`; one that is away is waited for.
    """
    demo = asyncio.create_task(_Demo(url, private_pem, say).run())
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((demo, stopping), return_when=asyncio.FIRST_COMPLETED)
        if demo.done():
            demo.result()
    finally:
        for task in (demo, stopping):
            task.cancel()
        await asyncio.gather(demo, stopping, return_exceptions=True)


class _Demo:
    """The makers' side, and one spectator whose view all bidders share."""

    def __init__(self, url: str, private_pem: bytes, say: Callable[[str], None]) -> None:
        self._url = url
        self._private_pem = private_pem
        self._say = say
        self._rooms: dict[str, Room] = {}
        self._titles = random.sample(TITLES, len(TITLES))

    async def run(self) -> None:
        async with AsyncExitStack() as stack:
            api = await stack.enter_async_context(Api(self._url, patience_s=math.inf))
            spectator = LiveClient(self._url, on_message=self._on_message, patience_s=math.inf)
            await stack.enter_async_context(spectator)
            bidders = []
            for number in range(random.randint(*BIDDERS)):  # noqa: S311 - nothing to guess here
                client = LiveClient(self._url, token=self._token("viewer"), patience_s=math.inf)
                await stack.enter_async_context(client)
                bidders.append(Bidder(client, TEMPERAMENTS[number % len(TEMPERAMENTS)]))
            try:
                async with asyncio.TaskGroup() as group:
                    for number in range(ROOMS):
                        group.create_task(self._keep_room(number, api, spectator, bidders))
            except* CommandError as errors:
                error: BaseException = errors
                while isinstance(error, BaseExceptionGroup):
                    error = error.exceptions[0]
                raise error from None

    async def _keep_room(self, number: int, api: Api, spectator: LiveClient, bidders: list[Bidder]) -> None:
        """One auction after another."""
        maker = self._token("maker")
        while True:
            room = await self._open(number, api, maker)
            self._rooms[f"auction:{room.auction}"] = room
            await spectator.subscribe(f"auction:{room.auction}")
            self._say(f"opened: {room.title} ({room.auction})")
            async with asyncio.TaskGroup() as group:
                bidding = [group.create_task(_bid_along(room, bidder)) for bidder in bidders]
                await room.over.wait()
                for task in bidding:
                    task.cancel()
            await spectator.unsubscribe(f"auction:{room.auction}")
            del self._rooms[f"auction:{room.auction}"]
            self._say(f"{_ending(room.snapshot)}: {room.title} ({room.auction})")
            await asyncio.sleep(PAUSE_S)

    async def _open(self, number: int, api: Api, maker: str) -> Room:
        # Each room walks through its own part of the titles, so that no two show the same piece at once.
        self._titles[number::ROOMS] = [*self._titles[number::ROOMS][1:], self._titles[number]]
        title = self._titles[number]
        starting_price = random.randrange(1_000, 8_000, 500)  # noqa: S311
        end = datetime.now(UTC) + timedelta(seconds=random.randint(*DURATION_S))  # noqa: S311
        body: dict[str, Any] = {
            "title": title,
            "currency": CURRENCY,
            "starting_price": str(to_decimal(starting_price, CURRENCY)),
            "increments": "ebay_us",
            "end_time": end.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "soft_close": SOFT_CLOSE,
        }
        data = await api.call("POST", "/auctions", token=maker, key=uuid4(), body=body)
        return Room(UUID(data["auction_id"]), title, worth=starting_price * random.randint(3, 6))  # noqa: S311

    def _on_message(self, message: Message) -> None:
        room = self._rooms.get(message.get("topic", ""))
        if room is None:
            return
        room.snapshot = follow(room.snapshot, message)
        if room.snapshot.get("status") in OVER:
            room.over.set()

    def _token(self, role: Role) -> str:
        return issue(self._private_pem, uuid4(), role, TOKEN_TTL_S, time.time_ns() // 1_000_000)


def _ending(snapshot: Message) -> str:
    if snapshot["outcome"] == "sold":
        return f"sold to paddle {snapshot['leader']} for {format_amount(snapshot['price'], CURRENCY)}"
    return "ended without a sale" if snapshot["status"] == "ended" else "cancelled"


async def _bid_along(room: Room, bidder: Bidder) -> None:
    """Look, think, bid, until it gets too dear; the room ends it otherwise."""
    temperament = bidder.temperament
    # What a piece is worth differs from person to person; not everybody wants everything.
    limit = int(room.worth * temperament.generosity * random.uniform(0.3, 1.2))  # noqa: S311
    paddle: int | None = None
    while True:
        await asyncio.sleep(random.uniform(*temperament.look_s))  # noqa: S311
        shown = room.snapshot
        if shown["minimum"] > limit:
            return
        left_s = (shown["end_time"] - bidder.client.now_ms()) / 1_000
        is_leading = paddle is not None and shown["leader"] == paddle
        if is_leading or left_s > temperament.begins_before_end_s:
            continue
        step = max(100, room.worth // 50)
        offer = min(limit, shown["minimum"] + step * random.randint(*temperament.steps))  # noqa: S311
        amount, max_amount = (None, offer) if temperament.is_by_maximum else (offer, None)
        verdict = await bidder.client.bid(room.auction, uuid4(), amount=amount, max_amount=max_amount)
        if verdict["type"] == "ack":
            paddle = verdict["paddle"]
