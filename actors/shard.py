"""A shard: many auctions in one process, one turn after another.

A turn takes requests up at one moment of the clock, decides them at once on the live state, and gathers what happened.
One writer appends all that is waiting in one statement, and only then lets the answers and events of those turns out,
in the order in which they were decided. What a client sees is therefore always in the journal.

Plain asyncio: clock, journal, outlets and the way to die are injected.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from typing import NamedTuple, NoReturn, Protocol
from uuid import UUID

from actors.deadlines import Deadlines
from actors.directory import slot_of
from actors.entities import SNAPSHOT_VERSION, Entity, Recorded, bid_accepted
from actors.journal import EntityRow, Fenced, Journal, Private, Refused, Row, SnapshotRow, Unreadable
from actors.messages import (
    Answer,
    Answered,
    GetAuction,
    Payload,
    Published,
    Request,
    Subscribe,
    Subscribed,
    Unsubscribe,
)
from engine.auction import decide, due_at, snapshot
from engine.commands import CancelAuction, EndAuction, ExecuteDue, OpenAuction, PlaceBid
from engine.events import Event, decode
from engine.limits import (
    ALIVE_MS,
    BUSY_RETRY_MS,
    EVENTS_PER_SNAPSHOT,
    IDLE_MS,
    SECOND_MS,
    SHARD_LINE_MAX,
    VERDICTS_REMEMBERED,
)
from engine.public import encode_public
from engine.rejections import Rejection

logger = logging.getLogger(__name__)

_BUSY = Rejection("busy", "Too much is going on here just now.", is_transient=True, retry_after_ms=BUSY_RETRY_MS)
_UNAVAILABLE = Rejection("unavailable", "This auction cannot be reached just now.", is_transient=True)
_INTERNAL = Rejection("internal", "Something went wrong on our side.", is_transient=True)
_NOT_FOUND = Rejection("not_found", "There is no such auction.")


class Outlet(Protocol):
    """Where a shard's answers and events go: its end of a link."""

    is_gone: bool

    def deliver(self, messages: list[Answered | Published]) -> None:
        """Pass messages on, in order; never blocks, never raises."""


class _Reply(NamedTuple):
    outlet: Outlet
    request: int
    answer: Answer
    topic: UUID | None = None
    """For the answer to a subscription: the events decided before it go out before it."""


class _Happened(NamedTuple):
    topic: UUID
    recorded: Recorded


class _Recall(NamedTuple):
    """A bid was asked again whose verdict is no longer in memory: read it, once all before it is committed."""

    outlet: Outlet
    request: int
    entity_id: UUID
    seq: int


class _Turn:
    """What was decided and waits for its commit."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.rows: list[Row] = []
        self.entities: dict[UUID, EntityRow] = {}
        self.snapshots: list[SnapshotRow] = []
        self.steps: list[_Reply | _Happened | _Recall] = []
        self.requests = 0


class Shard:
    """The auctions of some slots, in one epoch. `die` ends the process; it must not return."""

    def __init__(
        self, *, slots: Collection[int], clock: Callable[[], int], journal: Journal, die: Callable[[str], NoReturn]
    ) -> None:
        self._slots = frozenset(slots)
        self._clock = clock
        self._journal = journal
        self._die = die
        self._awake: dict[UUID, Entity] = {}
        self._waking: dict[UUID, list[tuple[Outlet, Request] | None]] = {}
        """Requests for entities that are being read; None stands for a deadline."""
        self._rejected: OrderedDict[tuple[UUID, bytes], Rejection] = OrderedDict()
        self._deadlines = Deadlines()
        self._watchers: dict[UUID, dict[Outlet, None]] = {}
        self._turn = _Turn(1)
        self._released = 0
        self._line = 0
        self._work = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_stopping = False
        self._last_turn = 0
        """The turn that a stop waits for."""
        self._drained = asyncio.Event()

    # The public way in

    async def start(self) -> None:
        """Arm the deadlines, without waking anybody, and begin to serve. Raises `Unreadable`."""
        for entity_id, due in await self._journal.deadlines():
            self._deadlines.set(entity_id, due)
        self._run(self._write())
        self._run(self._keep_alive())
        self._run(self._put_to_sleep())
        self._arm()

    async def stop(self) -> None:
        """Take no more, commit and answer what was taken, and keep a snapshot of what is awake."""
        self._is_stopping = True
        if self._timer is not None:
            self._timer.cancel()
        for entity in self._awake.values():
            if entity.seq > entity.saved_seq:
                self._turn.snapshots.append(entity.snapshot_row())
        self._last_turn = self._turn.number
        self._work.set()
        await self._drained.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def take(self, requests: Iterable[Request], outlet: Outlet) -> None:
        """One turn: take up requests that arrived together, in order, at this moment."""
        now = self._clock()
        for request in requests:
            if self._line >= SHARD_LINE_MAX or self._is_stopping:
                refusal = _UNAVAILABLE if self._is_stopping else _BUSY
                outlet.deliver([Answered(request.request, refusal)])
                continue
            self._line += 1
            entity_id = request.payload.auction
            entity = self._awake.get(entity_id)
            if entity is not None:
                self._guard(entity, request, outlet, now)
            elif slot_of(entity_id) not in self._slots:
                self._reply(outlet, request.request, _UNAVAILABLE)
            else:
                self._wake(entity_id, (outlet, request))
        self._work.set()

    async def ask(self, payload: Payload) -> Answer:
        """Take up one request that came without a link, and wait for its answer."""
        outlet = _Waiting()
        self.take([Request(0, payload)], outlet)
        return await outlet.answer

    def leave(self, outlet: Outlet) -> None:
        """An outlet is gone: no more events for it."""
        for topic in [topic for topic, outlets in self._watchers.items() if outlet in outlets]:
            self._unwatch(topic, outlet)

    # One request

    def _guard(self, entity: Entity, request: Request, outlet: Outlet, now: int) -> None:
        """A fault half-way through a request leaves a state that nobody may see: the journal holds the good one."""
        try:
            self._handle(entity, request, outlet, now)
        except Exception as error:
            logger.exception("a fault while deciding")
            self._die(f"a fault while deciding: {error!r}")

    def _handle(self, entity: Entity, request: Request, outlet: Outlet, now: int) -> None:
        now = max(now, entity.last_at)
        entity.used_at = now
        self._execute_due(entity, now)
        match request.payload:
            case PlaceBid() as bid:
                self._place_bid(entity, bid, request.request, outlet, now)
            case Subscribe() as subscribe:
                self._subscribe(entity, subscribe, request.request, outlet)
            case Unsubscribe():
                self._unwatch(entity.id, outlet)
                self._turn.requests += 1
            case GetAuction() as get:
                self._reply(outlet, request.request, _NOT_FOUND if entity.state is None else entity.view(get.viewer))
            case (OpenAuction() | EndAuction() | CancelAuction()) as command:
                self._manage(entity, command, request.request, outlet, now)
        if entity.seq - entity.saved_seq >= EVENTS_PER_SNAPSHOT:
            self._turn.snapshots.append(entity.snapshot_row())

    def _place_bid(self, entity: Entity, bid: PlaceBid, request: int, outlet: Outlet, now: int) -> None:
        command_id = bid.bidder.bytes + bid.bid_id.bytes
        seq = entity.accepted.get(command_id)
        if seq is not None:
            recorded = entity.recall(seq)
            if recorded is None:
                self._turn.steps.append(_Recall(outlet, request, entity.id, seq))
            else:
                self._reply(outlet, request, bid_accepted(recorded))
            return
        rejected = self._rejected.get((entity.id, command_id))
        if rejected is not None:
            self._reply(outlet, request, rejected)
            return
        decided = decide(entity.state, bid, now)
        if isinstance(decided, Rejection):
            self._remember(entity.id, command_id, decided)
            self._reply(outlet, request, decided)
            return
        first = self._record(entity, decided, now, command_id)
        self._reply(outlet, request, bid_accepted(first))

    def _manage(
        self, entity: Entity, command: OpenAuction | EndAuction | CancelAuction, request: int, outlet: Outlet, now: int
    ) -> None:
        """Open, end or cancel; asked again with the same id, the answer is the auction as it is by then."""
        caller = command.maker if isinstance(command, OpenAuction) else command.caller
        command_id = caller.bytes + command.request_id.bytes
        if command_id not in entity.accepted:
            decided = decide(entity.state, command, now)
            if isinstance(decided, Rejection):
                self._reply(outlet, request, decided)
                return
            self._record(entity, decided, now, command_id, _written(command))
        self._reply(outlet, request, entity.view(caller))

    def _subscribe(self, entity: Entity, subscribe: Subscribe, request: int, outlet: Outlet) -> None:
        if entity.state is None:
            self._reply(outlet, request, _NOT_FOUND)
            return
        missed = None if subscribe.since is None else entity.missed(subscribe.since)
        answer = Subscribed(
            seq=entity.seq,
            events=None if missed is None else _encode_events(missed),
            snapshot=snapshot(entity.state) if missed is None else None,
            you=entity.you(subscribe.viewer),
        )
        self._turn.steps.append(_Reply(outlet, request, answer, topic=entity.id))
        self._turn.requests += 1
        if not outlet.is_gone:
            self._watchers.setdefault(entity.id, {})[outlet] = None

    def _unwatch(self, topic: UUID, outlet: Outlet) -> None:
        outlets = self._watchers.get(topic, {})
        outlets.pop(outlet, None)
        if not outlets:
            self._watchers.pop(topic, None)

    def _execute_due(self, entity: Entity, now: int) -> None:
        """What is due comes before any command."""
        while entity.state is not None:
            due = due_at(entity.state)
            if due is None or due > now:
                return
            decided = decide(entity.state, ExecuteDue(entity.id), now)
            assert not isinstance(decided, Rejection)
            self._record(entity, decided, now, None)

    def _record(
        self,
        entity: Entity,
        events: Sequence[Event],
        now: int,
        command_id: bytes | None,
        private: Private | None = None,
    ) -> Recorded:
        """Apply events to the live state and put them in the line for the journal; return the first.

        The command's id and what was written with it belong to the first event.
        """
        before = entity.state
        waited_for = None if before is None else (before.status, due_at(before))
        turn = self._turn
        entity.turn = turn.number
        is_watched = entity.id in self._watchers
        first = None
        for event in events:
            recorded, row = entity.record(event, now, command_id, private)
            turn.rows.append(row)
            if is_watched:
                turn.steps.append(_Happened(entity.id, recorded))
            if first is None:
                first, command_id, private = recorded, None, None
        assert first is not None
        assert entity.state is not None
        if waited_for != (entity.state.status, due_at(entity.state)):
            turn.entities[entity.id] = entity.row()
            self._deadlines.set(entity.id, due_at(entity.state))
            self._arm()
        return first

    def _remember(self, entity_id: UUID, command_id: bytes, rejection: Rejection) -> None:
        self._rejected[entity_id, command_id] = rejection
        if len(self._rejected) > VERDICTS_REMEMBERED:
            self._rejected.popitem(last=False)

    def _reply(self, outlet: Outlet, request: int, answer: Answer) -> None:
        self._turn.steps.append(_Reply(outlet, request, answer))
        self._turn.requests += 1

    # Waking, deadlines, sleep

    def _wake(self, entity_id: UUID, waiting: tuple[Outlet, Request] | None) -> None:
        """Read an entity; meanwhile what is asked of it waits, in order."""
        if entity_id in self._waking:
            self._waking[entity_id].append(waiting)
            return
        self._waking[entity_id] = [waiting]
        self._run(self._load(entity_id))

    async def _load(self, entity_id: UUID) -> None:
        try:
            entity = Entity.restore(entity_id, await self._journal.load(entity_id, SNAPSHOT_VERSION))
        except Exception as error:
            # Unreadable for now or for ever: whoever waits is told, and this auction alone is out of service.
            logger.exception("the auction %s could not be read", entity_id)
            refusal = _UNAVAILABLE if isinstance(error, Unreadable) else _INTERNAL
            for waiting in self._waking.pop(entity_id):
                if waiting is None:
                    self._deadlines.set(entity_id, self._clock() + SECOND_MS)
                    self._arm()
                else:
                    self._reply(waiting[0], waiting[1].request, refusal)
            self._work.set()
            return
        now = self._clock()
        entity.used_at = now
        self._awake[entity_id] = entity
        for waiting in self._waking.pop(entity_id):
            if waiting is None:
                self._execute_due(entity, max(now, entity.last_at))
            else:
                self._guard(entity, waiting[1], waiting[0], now)
        if entity.state is None:
            # Nothing is known under this id: asking for it again and again must not fill the memory.
            del self._awake[entity_id]
        self._work.set()

    def _arm(self) -> None:
        """Have the timer go off at the next deadline."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        next_at = self._deadlines.next_at()
        if next_at is not None and not self._is_stopping:
            delay_s = min(max(next_at - self._clock(), 0), 60 * SECOND_MS) / SECOND_MS
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._fire)

    def _fire(self) -> None:
        now = self._clock()
        for entity_id in self._deadlines.pop_due(now):
            entity = self._awake.get(entity_id)
            if entity is None:
                self._wake(entity_id, None)
            else:
                self._execute_due(entity, max(now, entity.last_at))
        self._work.set()
        self._arm()

    async def _put_to_sleep(self) -> None:
        """Forget what nobody has asked for in a while; the journal remembers."""
        while True:
            await asyncio.sleep(IDLE_MS / 4 / SECOND_MS)
            self.sleep_idle(self._clock() - IDLE_MS)

    def sleep_idle(self, before: int) -> None:
        """Put to sleep what was last used before this time and has nothing waiting for its commit."""
        for entity in [entity for entity in self._awake.values() if entity.used_at <= before]:
            if entity.turn <= self._released:
                if entity.seq > entity.saved_seq:
                    self._turn.snapshots.append(entity.snapshot_row())
                    self._work.set()
                del self._awake[entity.id]

    # Committing and releasing

    async def _write(self) -> None:
        """The one writer: append what was decided, then let its answers out."""
        while True:
            await self._work.wait()
            self._work.clear()
            turn, self._turn = self._turn, _Turn(self._turn.number + 1)
            try:
                if turn.rows:
                    await self._journal.append(turn.rows, list(turn.entities.values()))
                elif turn.steps:
                    await self._journal.check()
                for row in turn.snapshots:
                    await self._journal.save_snapshot(row)
            except Fenced:
                self._die("a newer incarnation of this shard has taken over")
            except Refused as error:
                self._die(f"the journal did not take an append: {error}")
            self._release(turn)

    def _release(self, turn: _Turn) -> None:
        outputs: dict[Outlet, list[Answered | Published]] = {}
        happened: dict[UUID, list[Recorded]] = {}
        for step in turn.steps:
            if isinstance(step, _Reply):
                if step.topic in happened:
                    self._publish(step.topic, happened.pop(step.topic), outputs)
                outputs.setdefault(step.outlet, []).append(Answered(step.request, step.answer))
            elif isinstance(step, _Happened):
                happened.setdefault(step.topic, []).append(step.recorded)
            else:
                self._run(self._recall(step))
        for topic, events in happened.items():
            self._publish(topic, events, outputs)
        self._line -= turn.requests
        self._released = turn.number
        for outlet, messages in outputs.items():
            outlet.deliver(messages)
        self._check_drained()

    def _publish(self, topic: UUID, events: list[Recorded], outputs: dict[Outlet, list[Answered | Published]]) -> None:
        published = Published(topic, events[0].seq, events[-1].seq, _encode_events(events))
        for outlet in self._watchers.get(topic, ()):
            outputs.setdefault(outlet, []).append(published)

    async def _recall(self, step: _Recall) -> None:
        """Answer a retry with the verdict that the journal holds."""
        answer: Answer = _INTERNAL
        try:
            row = await self._journal.read(step.entity_id, step.seq)
            if row is not None:
                event = decode(row.kind, row.version, row.body)
                answer = bid_accepted(Recorded(row.seq, row.at, event, row.hash))
        except Unreadable:
            answer = _UNAVAILABLE
        self._line -= 1
        step.outlet.deliver([Answered(step.request, answer)])
        self._check_drained()

    def _check_drained(self) -> None:
        if self._is_stopping and self._line == 0 and self._released >= self._last_turn:
            self._drained.set()

    async def _keep_alive(self) -> None:
        """Without appends the epoch is checked, and a sign of life given, all the same."""
        while True:
            await asyncio.sleep(ALIVE_MS / SECOND_MS)
            try:
                await self._journal.check()
            except Fenced:
                self._die("a newer incarnation of this shard has taken over")
            except Refused as error:
                self._die(f"the journal did not answer: {error}")

    def _run(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("a task of the shard failed", exc_info=task.exception())
            self._die(f"a fault in the shard: {task.exception()!r}")


class _Waiting:
    """The outlet of one request that came without a link."""

    is_gone = False

    def __init__(self) -> None:
        self.answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    def deliver(self, messages: list[Answered | Published]) -> None:
        for message in messages:
            if isinstance(message, Answered) and not self.answer.done():
                self.answer.set_result(message.answer)


def _encode_events(events: Sequence[Recorded]) -> bytes:
    return b",".join([encode_public(one.seq, one.at, one.event, one.hash, one.reason) for one in events])


def _written(command: OpenAuction | EndAuction | CancelAuction) -> Private | None:
    """What a person wrote with a command; it is kept beside the event, where it can be erased."""
    if isinstance(command, OpenAuction) or not command.reason:
        return None
    return Private(command.salt, command.reason.encode())
