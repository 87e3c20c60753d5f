"""A shard: many auctions in one process, one turn after another.

A turn takes requests up at one moment of the clock, decides them at once on the live state, and gathers what happened.
One writer appends all that is waiting in one statement, and only then lets the answers and events of those turns out,
in the order in which they were decided. What a client sees is therefore always in the journal.

Without Postgres a shard is away: it takes nothing up and lets nothing out, and no deadline is executed. It goes on
where it was once the journal has said what it holds, and the time has been given back.

Plain asyncio: clock, journal, outlets and the way to die are injected.
"""

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Coroutine, Hashable, Iterable, Sequence
from heapq import nsmallest
from itertools import islice
from typing import NamedTuple, NoReturn, Protocol
from uuid import UUID

import msgspec

from actors.deadlines import Deadlines
from actors.directory import slot_of
from actors.entities import NO_SNAPSHOT, SNAPSHOT_VERSION, Entity, Recorded, bid_accepted
from actors.followers import Followers, noticed
from actors.journal import (
    EntityRow,
    Fenced,
    Journal,
    Life,
    Private,
    Refused,
    Row,
    SnapshotRow,
    Unreadable,
    Unsettled,
)
from actors.logs import get_logger
from actors.messages import (
    Answer,
    Answered,
    Follow,
    Followed,
    GetAuction,
    Message,
    Noticed,
    Payload,
    Presence,
    Published,
    Recall,
    Request,
    Unfollow,
    Unsubscribe,
    Viewers,
    Watch,
    Watched,
)
from actors.presence import Audiences
from engine.auction import decide, due_at
from engine.commands import (
    BID_COMMAND_ID_BYTES,
    CancelAuction,
    EndAuction,
    ExecuteDue,
    OpenAuction,
    PayBack,
    PlaceBid,
    command_id,
)
from engine.events import Event, decode
from engine.limits import (
    ALIVE_MS,
    AWAKE_MAX,
    EVENTS_PER_SNAPSHOT,
    GATHER_MS,
    GATHER_ROWS_MIN,
    IDLE_MS,
    OUTAGE_MS,
    READ_AHEAD_MS,
    READ_AT_ONCE,
    READ_TRIES,
    SECOND_MS,
    SETTLE_RETRY_MS,
    SHARD_LINE_MAX,
    SNAPSHOTS_AT_ONCE,
    VERDICTS_REMEMBERED,
    WAKING_MAX,
)
from engine.public import KEPT, encode_snapshot
from engine.rejections import BUSY, INTERNAL, NOT_FOUND, OUTCOME_UNKNOWN, UNAVAILABLE, Rejection

logger = get_logger(__name__)

_OF_USERS = (Follow, Unfollow)
_NEVER_TAKEN = Rejection("internal", "This was not done: something went wrong on our side.")


class Outlet(Hashable, Protocol):
    """Where a shard's answers and events go: its end of a link."""

    is_gone: bool

    def deliver(self, messages: list[Message]) -> None:
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


class _Recollection(NamedTuple):
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
        self.steps: list[_Reply | _Happened | Noticed | _Recollection] = []
        self.watched: dict[UUID, Entity] = {}
        """The auctions whose events are among the steps."""
        self.views: dict[UUID, tuple[int, bytes]] = {}
        """Their public snapshots as of the turn's last event, with its `seq`: taken when the turn was closed."""
        self.requests = 0
        self.paid_until: int | None = None
        """For a turn that pays an outage back: until when."""


class _Waiting(NamedTuple):
    """A request for an auction that is not ready for it, with the moment at which it was taken up."""

    outlet: Outlet
    request: Request
    taken_at: int


class Shard:
    """The auctions of some slots. `die` ends the process; it must not return."""

    def __init__(
        self, *, slots: Collection[int], clock: Callable[[], int], journal: Journal, die: Callable[[str], NoReturn]
    ) -> None:
        self._slots = frozenset(slots)
        self._clock = clock
        self._journal = journal
        self._die = die
        self._awake: dict[UUID, Entity] = {}
        self._readings: dict[UUID, asyncio.Task[Entity]] = {}
        self._waking: dict[UUID, deque[_Waiting]] = {}
        """Requests for auctions that are being read, or in which something is due, in order."""
        self._overdue: set[UUID] = set()
        """Auctions whose deadline has come, and was not executed yet."""
        self._rejected: OrderedDict[tuple[UUID, bytes], Rejection] = OrderedDict()
        self._deadlines = Deadlines()
        self._watchers: dict[UUID, dict[Outlet, int]] = {}
        """Who gets an auction's events, and after which `seq`: what came before stands in its subscription's answer."""
        self._audiences: Audiences[Outlet] = Audiences(_tell_presence)
        self._followers: Followers[Outlet] = Followers()
        self._turn = _Turn(1)
        self._released = 0
        self._unsaved: dict[UUID, SnapshotRow] = {}
        self._line = 0
        self._work = asyncio.Event()
        self._is_away = True
        self._alive_at = 0
        """The last sign of life, by Postgres's clock."""
        self._signed_at = 0
        """The same by our own, as it was when the write began."""
        self._back_at = 0
        """When the last outage was over. What waited meanwhile was taken up then: it was not to be lost by it."""
        self._is_sign_wanted = False
        self._sign = asyncio.Event()
        """Set, and replaced, at the next sign of life."""
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_stopping = False
        self._last_turn = 0
        """The turn that a stop waits for."""
        self._drained = asyncio.Event()

    # The public way in

    async def start(self, down_at: int | None) -> None:
        """Arm the deadlines, without waking anybody, pay back what is owed since `down_at`, and begin to serve.

        Raises `Unreadable`.
        """
        for entity_id, due in await self._journal.deadlines():
            self._deadlines.set(entity_id, due)
        self._signed_at = self._clock()
        await self._come_back(down_at)
        self._run(self._write())
        self._run(self._keep_alive())
        self._run(self._put_to_sleep())

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
        refused: list[Message] = []
        for request in requests:
            if isinstance(request.payload, _OF_USERS):
                self._take_follow(request.payload, request.request, outlet)
                continue
            entity_id = request.payload.auction
            entity = self._awake.get(entity_id)
            if isinstance(request.payload, Unsubscribe):
                self._take_unsubscribe(entity_id, _Waiting(outlet, request, now))
            elif isinstance(request.payload, Viewers):
                self._count_viewers(request.payload, outlet)
            elif (refusal := self._refuse(entity_id, entity)) is not None:
                refused.append(Answered(request.request, refusal))
            else:
                self._line += 1
                is_ready = entity is not None and entity_id not in self._waking and not _is_due(entity, now)
                if entity is not None and is_ready and now - self._signed_at <= OUTAGE_MS:
                    self._guard(entity, request, outlet, now)
                else:
                    self._wake(entity_id).append(_Waiting(outlet, request, now))
        if refused:
            outlet.deliver(refused)
        self._work.set()

    async def ask(self, payload: Payload) -> Answer:
        """Take up one request that came without a link, and wait for its answer."""
        outlet = _Asking()
        self.take([Request(0, payload)], outlet)
        return await outlet.answer

    def leave(self, outlet: Outlet) -> None:
        """An outlet is gone: no more events for it."""
        for topic in [topic for topic, outlets in self._watchers.items() if outlet in outlets]:
            self._unwatch(topic, outlet)
        self._followers.leave(outlet)

    # One request

    def _refuse(self, entity_id: UUID, entity: Entity | None) -> Rejection | None:
        """Overload is refused before anything is done; so is what another shard serves, or nobody just now."""
        if self._is_stopping or self._is_away:
            return UNAVAILABLE
        if self._line >= SHARD_LINE_MAX:
            return BUSY
        if entity is not None or entity_id in self._waking:
            return None
        if slot_of(entity_id) not in self._slots:
            return UNAVAILABLE
        return BUSY if len(self._waking) >= WAKING_MAX else None

    def _take_follow(self, payload: Follow | Unfollow, request: int, outlet: Outlet) -> None:
        """Never refused, and none of what stands in the line: there are at most as many as sockets."""
        if isinstance(payload, Unfollow):
            self._followers.unfollow(outlet, payload.users)
        else:
            self._followers.follow(outlet, payload.users)
            self._turn.steps.append(_Reply(outlet, request, Followed()))

    def _take_unsubscribe(self, entity_id: UUID, waiting: _Waiting) -> None:
        """Never refused, and nobody is woken for it; but it stays behind a subscription that waits."""
        own = (
            one.request.payload
            for one in reversed(self._waking.get(entity_id, ()))
            if one.outlet is waiting.outlet and isinstance(one.request.payload, Watch | Unsubscribe)
        )
        if isinstance(next(own, None), Watch):
            self._line += 1
            self._waking[entity_id].append(waiting)
        else:
            self._unwatch(entity_id, waiting.outlet)

    def _count_viewers(self, counted: Viewers, outlet: Outlet) -> None:
        """Never refused, and nobody is woken for it; it counts for those who watch."""
        if outlet in self._watchers.get(counted.auction, ()):
            self._audiences.count(counted.auction, outlet, counted.viewers)

    def _guard(self, entity: Entity, request: Request, outlet: Outlet, now: int) -> None:
        """A fault half-way through a request leaves a state that nobody may see: the journal holds the good one."""
        try:
            self._handle(entity, request, outlet, now)
        except Exception as error:  # noqa: BLE001 (whatever it is, this incarnation ends)
            self._fail(error)

    def _fail(self, error: Exception) -> NoReturn:
        logger.error("a fault while deciding", exc_info=error)
        self._die(f"a fault while deciding: {error!r}")

    def _handle(self, entity: Entity, request: Request, outlet: Outlet, taken_at: int) -> None:
        """Do what is asked; what was due by then has been executed."""
        now = max(taken_at, entity.last_at)
        match request.payload:
            case PlaceBid() as bid:
                self._place_bid(entity, bid, request.request, outlet, now)
            case Watch() as watch:
                self._watch(entity, watch, request.request, outlet)
            case Unsubscribe():
                self._unwatch(entity.id, outlet)
                self._turn.requests += 1
            case GetAuction() as get:
                # Looking does not keep it awake: whoever walks through all auctions must not fill the memory.
                self._reply(outlet, request.request, NOT_FOUND if entity.state is None else entity.view(get.viewer))
                return
            case Recall() as recall:
                if not self._answer_again(entity, recall.command_id, recall.caller, request.request, outlet):
                    self._reply(outlet, request.request, _NEVER_TAKEN)
            case (OpenAuction() | EndAuction() | CancelAuction()) as command:
                self._manage(entity, command, request.request, outlet, now)
        entity.used_at = now
        if entity.seq - entity.saved_seq >= EVENTS_PER_SNAPSHOT:
            self._turn.snapshots.append(entity.snapshot_row())

    def _place_bid(self, entity: Entity, bid: PlaceBid, request: int, outlet: Outlet, now: int) -> None:
        known_by = command_id(bid)
        if self._answer_again(entity, known_by, bid.bidder, request, outlet):
            return
        decided = decide(entity.state, bid, now)
        if isinstance(decided, Rejection):
            self._remember(entity.id, known_by, decided)
            self._reply(outlet, request, decided)
            return
        first = self._record(entity, decided, now, known_by)
        self._reply(outlet, request, bid_accepted(first))

    def _manage(
        self, entity: Entity, command: OpenAuction | EndAuction | CancelAuction, request: int, outlet: Outlet, now: int
    ) -> None:
        """Open, end or cancel."""
        caller = command.maker if isinstance(command, OpenAuction) else command.caller
        known_by = command_id(command)
        if self._answer_again(entity, known_by, caller, request, outlet):
            return
        decided = decide(entity.state, command, now)
        if isinstance(decided, Rejection):
            self._reply(outlet, request, decided)
            return
        self._record(entity, decided, now, known_by, _written(command))
        self._reply(outlet, request, entity.view(caller))

    def _answer_again(self, entity: Entity, known_by: bytes, caller: UUID, request: int, outlet: Outlet) -> bool:
        """Answer a command that was answered before: a bid with its first verdict, another with the auction as it is.

        False if it never was.
        """
        seq = entity.accepted.get(known_by)
        if seq is None:
            rejected = self._rejected.get((entity.id, known_by))
            if rejected is None:
                return False
            self._reply(outlet, request, rejected)
        elif len(known_by) != BID_COMMAND_ID_BYTES:
            self._reply(outlet, request, entity.view(caller))
        elif (recorded := entity.recall(seq)) is not None:
            self._reply(outlet, request, bid_accepted(recorded))
        else:
            self._turn.steps.append(_Recollection(outlet, request, entity.id, seq))
        return True

    def _watch(self, entity: Entity, watch: Watch, request: int, outlet: Outlet) -> None:
        if entity.state is None:
            self._reply(outlet, request, NOT_FOUND)
            return
        missed = entity.missed(watch.since)
        answer = Watched(
            auction=entity.id,
            seq=entity.seq,
            snapshot=encode_snapshot(entity.state),
            first=entity.seq + 1 - len(missed),
            events=_join(missed),
            you=[entity.you(viewer) for viewer in watch.viewers],
        )
        self._reply(outlet, request, answer, topic=entity.id)
        if not outlet.is_gone:
            self._watchers.setdefault(entity.id, {}).setdefault(outlet, entity.seq)

    def _unwatch(self, topic: UUID, outlet: Outlet) -> None:
        self._audiences.leave(topic, outlet)
        outlets = self._watchers.get(topic, {})
        outlets.pop(outlet, None)
        if not outlets:
            self._watchers.pop(topic, None)

    def _record(
        self,
        entity: Entity,
        events: Sequence[Event],
        now: int,
        known_by: bytes | None,
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
        if is_watched:
            turn.watched[entity.id] = entity
        first = None
        for event in events:
            concerned = self._followers.concerned(entity, event) if self._followers.by_user else ()
            recorded, row = entity.record(event, now, known_by, private)
            turn.rows.append(row)
            if is_watched:
                turn.steps.append(_Happened(entity.id, recorded))
            for user, kind in concerned:
                turn.steps.append(noticed(entity, recorded, user, kind))
            if first is None:
                first, known_by, private = recorded, None, None
        assert first is not None
        assert entity.state is not None
        if waited_for != (entity.state.status, due_at(entity.state)):
            turn.entities[entity.id] = entity.row()
            self._deadlines.set(entity.id, due_at(entity.state))
            self._arm()
        return first

    def _remember(self, entity_id: UUID, known_by: bytes, rejection: Rejection) -> None:
        self._rejected[entity_id, known_by] = rejection
        if len(self._rejected) > VERDICTS_REMEMBERED:
            self._rejected.popitem(last=False)

    def _reply(self, outlet: Outlet, request: int, answer: Answer, topic: UUID | None = None) -> None:
        self._turn.steps.append(_Reply(outlet, request, answer, topic))
        self._turn.requests += 1

    # Waking, deadlines, sleep

    def _wake(self, entity_id: UUID) -> deque[_Waiting]:
        """Make an auction ready: read it, and execute what is due; meanwhile what is asked of it waits, in order."""
        waiting = self._waking.get(entity_id)
        if waiting is None:
            waiting = self._waking[entity_id] = deque()
            self._run(self._make_ready(entity_id, waiting))
        return waiting

    async def _make_ready(self, entity_id: UUID, waiting: deque[_Waiting]) -> None:
        try:
            entity = await self._reading(entity_id)
        except Unreadable as error:
            logger.warning("the auction cannot be read now", auction=entity_id, error=str(error))
            self._refuse_waiting(entity_id, UNAVAILABLE)
            return
        except Exception:
            # For ever, perhaps: whoever waits is told, and this auction alone is out of service.
            logger.exception("the auction could not be read", auction=entity_id)
            self._refuse_waiting(entity_id, INTERNAL)
            return
        # Each request comes after what was due when it was taken up, and before what was not.
        while True:
            moment = max(waiting[0].taken_at if waiting else self._clock(), entity.last_at, self._back_at)
            due = None if entity.state is None else due_at(entity.state)
            is_due = due is not None and due <= moment
            # After a gap in the signs of life nothing is decided either: time may be owed.
            is_gap = self._clock() - self._signed_at > OUTAGE_MS
            if self._is_away or is_gap or (due is not None and self._alive_at < due <= moment):
                await self._signed(due if is_due else None)
            elif is_due:
                self._execute_due(entity, moment)
            elif waiting:
                one = waiting.popleft()
                self._guard(entity, one.request, one.outlet, moment)
            else:
                break
        self._overdue.discard(entity_id)
        del self._waking[entity_id]
        if entity.state is None:
            # Nothing is known under this id: asking for it again and again must not fill the memory.
            del self._awake[entity_id]
        else:
            self._make_room()
        self._work.set()

    def _execute_due(self, entity: Entity, now: int) -> None:
        """Do what an auction's clock asks for. The shard has lived until then: nobody was kept from bidding."""
        try:
            decided = decide(entity.state, ExecuteDue(entity.id), now)
            assert not isinstance(decided, Rejection)
            self._record(entity, decided, now, None)
        except Exception as error:  # noqa: BLE001 (whatever it is, this incarnation ends)
            self._fail(error)
        self._work.set()

    async def _signed(self, due: int | None) -> None:
        """Wait for a sign of life. One that comes before `due` is by a clock that is behind ours."""
        self._is_sign_wanted = True
        self._work.set()
        await self._sign.wait()
        if due is not None and not self._is_away:
            await asyncio.sleep(min(max(due - self._alive_at, 0), ALIVE_MS) / SECOND_MS)

    def _reading(self, entity_id: UUID) -> asyncio.Task[Entity]:
        """An auction, read from the journal unless it is awake; once for all who wait for it."""
        reading = self._readings.get(entity_id)
        if reading is None:
            reading = self._readings[entity_id] = asyncio.get_running_loop().create_task(self._read(entity_id))
            reading.add_done_callback(lambda _: self._readings.pop(entity_id))
        return reading

    async def _read(self, entity_id: UUID) -> Entity:
        entity = self._awake.get(entity_id)
        if entity is None:
            entity = await self._restore(entity_id)
            entity.used_at = self._clock()
            self._awake[entity_id] = entity
        return entity

    async def _restore(self, entity_id: UUID) -> Entity:
        try:
            return Entity.restore(entity_id, await self._journal.load(entity_id, SNAPSHOT_VERSION))
        except (msgspec.MsgspecError, UnicodeDecodeError):
            # A snapshot only saves time; the journal holds all of it.
            logger.exception("the snapshot cannot be read", auction=entity_id)
            return Entity.restore(entity_id, await self._journal.load(entity_id, NO_SNAPSHOT))

    def _refuse_waiting(self, entity_id: UUID, refusal: Rejection) -> None:
        for waiting in self._waking.pop(entity_id):
            if isinstance(waiting.request.payload, Unsubscribe):
                self._unwatch(entity_id, waiting.outlet)
                self._turn.requests += 1
            else:
                self._reply(waiting.outlet, waiting.request.request, refusal)
        if entity_id in self._overdue:
            self._overdue.discard(entity_id)
            self._deadlines.set(entity_id, self._clock() + SECOND_MS)
            self._arm()
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
        if self._is_away:
            return  # Armed again on return.
        for entity_id in self._deadlines.pop_due(self._clock()):
            self._overdue.add(entity_id)
            self._wake(entity_id)
        self._arm()

    async def _put_to_sleep(self) -> None:
        """Forget what nobody has asked for in a while; the journal remembers."""
        while True:
            await asyncio.sleep(IDLE_MS / 4 / SECOND_MS)
            self.sleep_idle(self._clock() - IDLE_MS)

    def sleep_idle(self, before: int) -> None:
        """Put to sleep what was last used before this time and has nothing waiting for its commit.

        While the shard is away that is nobody: time may be owed to those that are awake.
        """
        if not self._is_away:
            self._sleep([entity for entity in self._awake.values() if entity.used_at <= before])

    def _make_room(self) -> None:
        """Put the longest unused to sleep, some more than must be, so that this is seldom done."""
        too_many = len(self._awake) - AWAKE_MAX
        if too_many > 0:
            self._sleep(nsmallest(too_many + AWAKE_MAX // 10, self._awake.values(), key=lambda one: one.used_at))

    def _sleep(self, entities: Iterable[Entity]) -> None:
        for entity in entities:
            if entity.turn <= self._released and entity.id not in self._waking:
                if entity.seq > entity.saved_seq:
                    self._turn.snapshots.append(entity.snapshot_row())
                del self._awake[entity.id]
        self._work.set()

    # Committing and releasing

    async def _write(self) -> None:
        """The one writer: append what was decided, then let its answers out."""
        loop = asyncio.get_running_loop()
        next_at = loop.time()
        while True:
            await self._work.wait()
            if (rest_s := next_at - loop.time()) > 0:
                await asyncio.sleep(rest_s)
            self._work.clear()
            turn = self._next_turn()
            if len(turn.rows) >= GATHER_ROWS_MIN:
                # A commit costs as much as 10 events: under load those that would follow at once share one.
                next_at = loop.time() + GATHER_MS / SECOND_MS
            if turn.rows or turn.steps or self._is_sign_wanted:
                await self._come_back(await self._commit(turn))
            else:
                self._release(turn)
            await self._save_snapshots()
            self._check_drained()

    def _next_turn(self) -> _Turn:
        """What was decided until now; what comes next is gathered in another turn."""
        turn, self._turn = self._turn, _Turn(self._turn.number + 1)
        # Later the live state would be ahead of what this turn commits.
        for entity in turn.watched.values():
            assert entity.state is not None
            turn.views[entity.id] = entity.seq, encode_snapshot(entity.state)
        return turn

    async def _commit(self, turn: _Turn) -> int | None:
        """Have a turn in the journal and let it out, however long that takes; the start of an unpaid outage."""
        rows, entities = turn.rows, list(turn.entities.values())
        # Whoever asks for a sign from now on may need a later one.
        self._is_sign_wanted = False
        signed_at = self._clock()
        try:
            if rows or turn.paid_until is not None:
                life = await self._journal.append(rows, entities, turn.paid_until)
            else:
                life = await self._journal.check()
        except Unsettled as error:
            life = await self._settle(turn, error)
        except Refused as error:
            self._die(f"the journal did not take a write: {error}")
        self._release(turn)
        self._alive_at = life.alive_at
        self._signed_at = signed_at
        self._sign.set()
        self._sign = asyncio.Event()
        return life.down_at

    async def _settle(self, turn: _Turn, error: Unsettled) -> Life:
        """Find out what became of a turn's write, and do what was not done of it. Meanwhile the shard is away."""
        logger.warning("the shard is away", error=str(error))
        self._is_away = True
        while True:
            try:
                return await self._journal.settle(turn.rows, list(turn.entities.values()), turn.paid_until)
            except Unsettled as unsettled:
                logger.debug("the journal cannot be asked", error=str(unsettled))
            except Fenced:
                self._die("another process has taken this shard over")
            except Refused as refused:
                self._die(f"the journal did not take a write: {refused}")
            await asyncio.sleep(SETTLE_RETRY_MS / SECOND_MS)

    async def _come_back(self, down_at: int | None) -> None:
        """Pay back what is owed since `down_at`, and serve."""
        ahead_ms = 0
        while down_at is not None:
            self._is_away = True
            await self._read_closing(ahead_ms)
            begun = self._now()
            back = begun + ahead_ms
            if back - down_at > OUTAGE_MS:
                logger.warning("no bid could be placed: the time is given back", lost_ms=back - down_at)
                self._back_at = back
                for entity in self._awake.values():
                    self._pay_back(entity, down_at, begun, back)
            turn = self._next_turn()
            turn.paid_until = back
            epoch = self._journal.epoch
            down_at = await self._commit(turn)
            # There was so much to pay that storing it took long: the time that it will take again is paid, too.
            is_slow = self._journal.epoch == epoch
            ahead_ms = min(2 * (self._now() - begun), READ_AHEAD_MS // 2) if is_slow else 0
        if self._is_away:
            self._is_away = False
            self._make_room()
            self._arm()

    def _now(self) -> int:
        """The time, also where Postgres's clock, by which outages begin, has jumped ahead of ours."""
        return max(self._clock(), self._alive_at)

    async def _read_closing(self, ahead_ms: int) -> None:
        """Wake all auctions to which an outage may owe time that is over in a while; go on giving signs of life."""
        until = 0
        tries: Counter[UUID] = Counter()
        # While they are read more of them come near to their ends.
        while until <= self._now() + ahead_ms:
            until = self._now() + ahead_ms + READ_AHEAD_MS
            unreadable: list[UUID] = []
            try:
                closing = await self._journal.closing(until)
                asleep = [one for one in closing if one not in self._awake and tries[one] < READ_TRIES]
                for first in range(0, len(asleep), READ_AT_ONCE):
                    unreadable += await self._read_batch(asleep[first : first + READ_AT_ONCE])
            except Unreadable as error:
                logger.debug("the journal cannot be read", error=str(error))
                until = 0
            tries.update(unreadable)
            if any(tries[one] < READ_TRIES for one in unreadable):
                until = 0
            if until == 0:
                await asyncio.sleep(SETTLE_RETRY_MS / SECOND_MS)

    async def _read_batch(self, batch: Sequence[UUID]) -> list[UUID]:
        """Wake some auctions, and show that the shard lives; which of them could not be read now.

        One that never can be is left out: it is out of service alone.
        """
        readings = [self._reading(entity_id) for entity_id in batch]
        await asyncio.wait(readings)
        unreadable = []
        for entity_id, reading in zip(batch, readings, strict=True):
            failure = reading.exception()
            if isinstance(failure, Unreadable):
                unreadable.append(entity_id)
                logger.warning("the auction cannot be read now", auction=entity_id, error=str(failure))
            elif failure is not None:
                logger.error("the auction could not be read", auction=entity_id, exc_info=failure)
        await self._commit(self._next_turn())
        return unreadable

    def _pay_back(self, entity: Entity, down_at: int, now: int, back: int) -> None:
        """Give an auction back the time until `back`; one that was to open meanwhile opens."""
        is_due = _is_due(entity, now)
        now = max(back, entity.last_at)
        if entity.state is not None and entity.state.status == "scheduled" and is_due:
            self._execute_due(entity, now)
        decided = decide(entity.state, PayBack(entity.id, down_at), now)
        assert not isinstance(decided, Rejection)
        if decided:
            self._record(entity, decided, now, None)

    def _release(self, turn: _Turn) -> None:
        outputs: dict[Outlet, list[Message]] = {}
        happened: dict[UUID, list[Recorded]] = {}
        for step in turn.steps:
            if isinstance(step, _Reply):
                if step.topic in happened:
                    self._publish(step.topic, happened.pop(step.topic), turn.views, outputs)
                outputs.setdefault(step.outlet, []).append(Answered(step.request, step.answer))
            elif isinstance(step, _Happened):
                happened.setdefault(step.topic, []).append(step.recorded)
            elif isinstance(step, Noticed):
                for outlet in self._followers.by_user.get(step.user, ()):
                    outputs.setdefault(outlet, []).append(step)
            else:
                self._run(self._recollect(step))
        for topic, events in happened.items():
            self._publish(topic, events, turn.views, outputs)
        for row in turn.snapshots:
            self._unsaved[row.entity_id] = row
        self._line -= turn.requests
        self._released = turn.number
        for outlet, messages in outputs.items():
            outlet.deliver(messages)

    def _publish(
        self,
        topic: UUID,
        events: list[Recorded],
        views: dict[UUID, tuple[int, bytes]],
        outputs: dict[Outlet, list[Message]],
    ) -> None:
        first, last = events[0].seq, events[-1].seq
        seq, snapshot = views[topic]
        kept = _join(recorded for recorded in events if isinstance(recorded.event, KEPT))
        published = Published(topic, first, last, _join(events), kept, snapshot if seq == last else None)
        for outlet, after in self._watchers.get(topic, {}).items():
            # Whoever subscribed after these were decided, but before they were committed, has them in its answer.
            if after < first:
                outputs.setdefault(outlet, []).append(published)

    async def _recollect(self, step: _Recollection) -> None:
        """Answer a retry with the verdict that the journal holds."""
        # It was accepted, whatever now goes wrong with reading it.
        answer: Answer = OUTCOME_UNKNOWN
        try:
            row = await self._journal.read(step.entity_id, step.seq)
            if row is not None:
                event = decode(row.kind, row.version, row.body)
                answer = bid_accepted(Recorded(row.seq, row.at, event, row.hash))
        except Exception:
            logger.exception("a verdict could not be read", auction=step.entity_id)
        self._line -= 1
        step.outlet.deliver([Answered(step.request, answer)])
        self._check_drained()

    async def _save_snapshots(self) -> None:
        """Save some of the snapshots that wait; the others after the next append."""
        rows = list(islice(self._unsaved.values(), SNAPSHOTS_AT_ONCE))
        if not rows:
            return
        down_at = None
        try:
            await self._journal.save_snapshots(rows)
        except Unsettled as error:
            down_at = (await self._settle(_Turn(0), error)).down_at
        except Refused as error:
            self._die(f"the journal did not take a snapshot: {error}")
        # They only save time: what did not succeed is not tried again. Until now a stop has waited for it.
        for row in rows:
            del self._unsaved[row.entity_id]
        await self._come_back(down_at)
        if self._unsaved:
            self._work.set()

    def _check_drained(self) -> None:
        is_released = self._line == 0 and self._released >= self._last_turn
        if self._is_stopping and is_released and not self._unsaved:
            self._drained.set()

    async def _keep_alive(self) -> None:
        """Without appends the epoch is checked, and a sign of life given, all the same."""
        while True:
            await asyncio.sleep(ALIVE_MS / SECOND_MS)
            self._is_sign_wanted = True
            self._work.set()

    def _run(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("a task of the shard failed", exc_info=task.exception())
            self._die(f"a fault in the shard: {task.exception()!r}")


class _Asking:
    """The outlet of one request that came without a link. Nobody is there for events."""

    is_gone = True

    def __init__(self) -> None:
        self.answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    def deliver(self, messages: list[Message]) -> None:
        for message in messages:
            if isinstance(message, Answered) and not self.answer.done():
                self.answer.set_result(message.answer)


def _is_due(entity: Entity, now: int) -> bool:
    """Whether the auction's own clock asks for something at this time, or has asked."""
    due = None if entity.state is None else due_at(entity.state)
    return due is not None and due <= max(now, entity.last_at)


def _tell_presence(topic: UUID, outlets: list[Outlet], viewers: int) -> None:
    for outlet in outlets:
        outlet.deliver([Presence(topic, viewers)])


def _join(events: Iterable[Recorded]) -> bytes:
    return b",".join([recorded.public for recorded in events])


def _written(command: OpenAuction | EndAuction | CancelAuction) -> Private | None:
    """What a person wrote with a command; it is kept beside the event, where it can be erased."""
    if isinstance(command, OpenAuction) or not command.reason:
        return None
    return Private(command.salt, command.reason.encode())
