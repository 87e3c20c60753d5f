"""A shard without Ray, links or Postgres: what it stands on can be held, broken and looked into."""

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal, NoReturn
from uuid import UUID

from actors.journal import EntityRow, Life, Loaded, Row, SnapshotRow, Unreadable, Unsettled
from actors.memory import MemoryJournal, MemoryStore
from actors.messages import (
    Answer,
    Answered,
    AuctionView,
    BidAccepted,
    Follow,
    Message,
    Noticed,
    Payload,
    Published,
    Recall,
    Request,
    Unfollow,
    Watched,
)
from actors.shard import Shard
from engine.commands import CancelAuction, EndAuction, OpenAuction, PlaceBid, command_id
from engine.limits import SLOTS
from engine.rejections import Rejection
from tests.engine.support import AUCTION, MAKER, NOW, REQUEST, make_terms
from tests.support.waiting import turns


class Died(Exception):
    """The process would have ended."""


class ControlledJournal(MemoryJournal):
    """A journal whose writes and reads a test may hold, fail and count."""

    def __init__(self, store: MemoryStore, shard: int, owner: UUID) -> None:
        super().__init__(store, shard, owner)
        self.appends: list[list[Row]] = []
        self.checks = 0
        self.closings = 0
        self.loads: list[UUID] = []
        self.before_append = asyncio.Event()
        self.before_append.set()
        self.after_append = asyncio.Event()
        self.after_append.set()
        self.before_load = asyncio.Event()
        self.before_load.set()
        self.is_away = False
        """Whether nothing can be written or read just now."""
        self.loses: Literal["write", "reply"] | None = None
        """What becomes of the next append: it does not arrive, or is done but not answered."""
        self.append_error: Exception | None = None
        self.check_error: Exception | None = None
        self.settle_error: Exception | None = None
        self.settled: list[list[Row]] = []
        self.snapshot_error: Exception | None = None
        self.read_error: Exception | None = None
        self.load_errors: dict[UUID, Exception] = {}
        self.before_save = asyncio.Event()
        self.before_save.set()
        self.log: list[str] = []
        """What was written, as it began: `append` or `save`, each with a number of rows."""

    def hold(self) -> None:
        """Let no append begin from now on."""
        self.before_append.clear()

    def let_go(self) -> None:
        self.before_append.set()
        self.after_append.set()

    async def append(self, rows: Sequence[Row], entities: Sequence[EntityRow], paid_until: int | None = None) -> Life:
        self.appends.append(list(rows))
        self.log.append(f"append {len(rows)}")
        await self.before_append.wait()
        if self.append_error is not None:
            raise self.append_error
        loses, self.loses = self.loses, None
        self._check_reach(is_lost=loses == "write")
        life = await super().append(rows, entities, paid_until)
        await self.after_append.wait()
        self._check_reach(is_lost=loses == "reply")
        return life

    async def check(self) -> Life:
        self.checks += 1
        if self.check_error is not None:
            raise self.check_error
        self._check_reach()
        return await super().check()

    async def settle(self, rows: Sequence[Row], entities: Sequence[EntityRow], paid_until: int | None) -> Life:
        self.settled.append(list(rows))
        if self.settle_error is not None:
            raise self.settle_error
        self._check_reach()
        return await super().settle(rows, entities, paid_until)

    async def save_snapshots(self, snapshots: Sequence[SnapshotRow]) -> None:
        self.log.append(f"save {len(snapshots)}")
        await self.before_save.wait()
        if self.snapshot_error is not None:
            raise self.snapshot_error
        await super().save_snapshots(snapshots)

    async def load(self, entity_id: UUID, snapshot_version: int) -> Loaded:
        self.loads.append(entity_id)
        await self.before_load.wait()
        if entity_id in self.load_errors:
            raise self.load_errors[entity_id]
        if self.is_away:
            raise Unreadable("away")
        return await super().load(entity_id, snapshot_version)

    async def read(self, entity_id: UUID, seq: int) -> Row | None:
        if self.read_error is not None:
            raise self.read_error
        return await super().read(entity_id, seq)

    async def closing(self, before: int) -> list[UUID]:
        self.closings += 1
        if self.is_away:
            raise Unreadable("away")
        return await super().closing(before)

    def _check_reach(self, *, is_lost: bool = False) -> None:
        if self.is_away or is_lost:
            raise Unsettled("away")


class Recorder:
    """An outlet that keeps what it is given."""

    def __init__(self) -> None:
        self.is_gone = False
        self.messages: list[Message] = []
        self.deliveries = 0
        self._came = asyncio.Event()

    def deliver(self, messages: list[Message]) -> None:
        self.messages += messages
        self.deliveries += 1
        self._came.set()

    @property
    def answers(self) -> dict[int, Answer]:
        return {message.request: message.answer for message in self.messages if isinstance(message, Answered)}

    @property
    def published(self) -> list[Published]:
        return [message for message in self.messages if isinstance(message, Published)]

    @property
    def noticed(self) -> list[tuple[UUID, str, int]]:
        """Who was told what, of which event."""
        return [(told.user, told.kind, told.seq) for told in self.messages if isinstance(told, Noticed)]

    async def answer(self, request: int) -> Answer:
        while request not in self.answers:
            self._came.clear()
            await self._came.wait()
        return self.answers[request]

    async def events(self, last: int) -> None:
        """Wait until events up to `last` have been published."""
        while not self.published or self.published[-1].last < last:
            self._came.clear()
            await self._came.wait()


class House:
    """One incarnation of a shard over a store, with a clock that a test moves."""

    def __init__(self, store: MemoryStore | None = None, slots: Sequence[int] = range(SLOTS), now: int = NOW) -> None:
        self.store = store or MemoryStore()
        self._now = now
        self.store.clock = lambda: self._now
        self.owner = self.store.take_over(0)
        self.journal = ControlledJournal(self.store, 0, self.owner)
        self.deaths: list[str] = []
        self.died = asyncio.Event()
        self.shard = Shard(slots=slots, clock=lambda: self.now, journal=self.journal, die=self.die)
        self._requests = 0

    @property
    def now(self) -> int:
        return self._now

    @now.setter
    def now(self, now: int) -> None:
        """Time passes, and the shard is in service all the while."""
        self._now = now
        self.store.shards[0].alive_at = now
        self.shard._signed_at = now

    def be_out(self, until: int) -> None:
        """Time passes, and the shard gives no sign of life meanwhile."""
        self._now = until

    def die(self, reason: str) -> NoReturn:
        self.deaths.append(reason)
        self.died.set()
        raise Died(reason)

    def take(self, outlet: Recorder, *payloads: Payload | Follow | Unfollow) -> list[int]:
        """One turn; returns the numbers of its requests."""
        requests = [Request(self._requests + index, payload) for index, payload in enumerate(payloads, 1)]
        self._requests += len(payloads)
        self.shard.take(requests, outlet)
        return [request.request for request in requests]

    async def answers(self, *payloads: Payload) -> list[Answer]:
        """One turn through an outlet of its own, and the answers to it."""
        outlet = Recorder()
        return [await outlet.answer(number) for number in self.take(outlet, *payloads)]

    async def start(self) -> None:
        await self.shard.start(self.store.shards[0].down_at)

    async def ask(self, payload: Payload) -> Answer:
        return await self.shard.ask(payload)

    async def at_rest(self) -> None:
        """Wait until all that was decided has been released."""
        await turns(lambda: self.shard._line == 0)

    def is_awake(self, auction: UUID = AUCTION) -> bool:
        return auction in self.shard._awake

    async def put_to_sleep(self) -> None:
        """Put to sleep all that is awake and committed, and let snapshots be saved."""
        self.shard.sleep_idle(self.now)
        snapshots = list(self.shard._turn.snapshots)
        await turns(lambda: all(self.is_saved(row) for row in snapshots))
        assert not self.is_awake()

    def is_saved(self, snapshot: SnapshotRow) -> bool:
        saved = self.store.snapshots.get(snapshot.entity_id)
        return saved is not None and saved.seq >= snapshot.seq

    async def kill(self) -> None:
        """What a `kill -9` leaves: nothing that was not in the store."""
        if self.shard._timer is not None:
            self.shard._timer.cancel()
        tasks = list(self.shard._tasks)
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)


Start = Callable[..., Awaitable[House]]
"""Starts a shard over a store, or over a new one."""


def opening(auction: UUID = AUCTION, request_id: UUID = REQUEST, **terms: object) -> OpenAuction:
    """The command that opens an auction by the usual maker."""
    return OpenAuction(auction=auction, maker=MAKER, request_id=request_id, terms=make_terms(**terms))


def bid(
    bidder: UUID, amount: int | None = None, *, up_to: int | None = None, bid_id: int = 1, auction: UUID = AUCTION
) -> PlaceBid:
    """A bid; `bid_id` is written as a small number."""
    return PlaceBid(auction=auction, bidder=bidder, bid_id=UUID(int=bid_id), amount=amount, max_amount=up_to)


def recall(command: OpenAuction | PlaceBid | EndAuction | CancelAuction) -> Recall:
    """The question what became of a command."""
    match command:
        case PlaceBid():
            caller = command.bidder
        case OpenAuction():
            caller = command.maker
        case _:
            caller = command.caller
    return Recall(command.auction, command_id(command), caller)


# Answers, which must be of a kind


def code(answer: Answer) -> str:
    assert isinstance(answer, Rejection), answer
    return answer.code


def accepted(answer: Answer) -> BidAccepted:
    assert isinstance(answer, BidAccepted), answer
    return answer


def viewed(answer: Answer) -> AuctionView:
    assert isinstance(answer, AuctionView), answer
    return answer


def watched(answer: Answer) -> Watched:
    assert isinstance(answer, Watched), answer
    return answer


def listed(events: bytes | None) -> list[dict[str, Any]]:
    assert events is not None
    found: list[dict[str, Any]] = json.loads(b"[" + events + b"]")
    return found


def seqs(published: list[Published]) -> list[int]:
    """The numbers of all events that were published, which must be what their frames say."""
    found = []
    for frame in published:
        numbers = [event["seq"] for event in listed(frame.events)]
        assert (numbers[0], numbers[-1]) == (frame.first, frame.last)
        found += numbers
    return found


def kinds(store: MemoryStore, auction: UUID = AUCTION) -> list[str]:
    return [row.kind for _, row in sorted(store.journal[auction].items())]
