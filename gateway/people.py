"""Users to sockets: who hears here what concerns whom, and how each of them stands in its auctions.

A user's notices come on the links of all shards, from the moment of its first subscription here on; what it has missed
until then stands in its standings. When a link was broken its users' standings are asked for anew, and what changed
meanwhile is told as the notice that would have told it.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Coroutine
from functools import partial
from typing import Final, Protocol
from uuid import UUID

from actors.logs import get_logger
from actors.messages import Answer, AuctionView, Follow, Followed, GetAuction, Noticed, Payload, Unfollow
from engine.limits import FOLLOWED_AT_ONCE, LOOKUP_RETRY_MS, LOOKUPS_AT_ONCE, SECOND_MS, STANDINGS_MAX, STANDINGS_MS
from engine.notices import NoticeKind
from engine.rejections import INTERNAL, UNAVAILABLE, Rejection
from gateway.catalogue import CatalogueUnavailable
from gateway.fanout import Sink
from gateway.wire import Standing, encode_notice

logger = get_logger(__name__)

_OVER: Final = ("ended", "cancelled")

OnSubscribed = Callable[[list[Standing] | Rejection], None]


class Shards(Protocol):
    """The way to the shards; see `Router`."""

    @property
    def shards(self) -> Collection[int]:
        """All of them."""

    def shard_of(self, entity_id: UUID) -> int:
        """The shard that serves this entity."""

    def unreachable(self) -> Collection[int]:
        """Those that cannot be reached at this moment."""

    def submit_to(self, shard: int, payload: Follow | Unfollow, on_answer: Callable[[Answer], None]) -> None:
        """Send one shard what is about no auction."""

    async def ask_shard(self, shard: int, payload: Follow) -> Answer:
        """The same, and wait for the answer."""

    async def ask(self, payload: Payload) -> Answer:
        """Send a request and wait for its answer."""


class _Refused(Exception):
    """Something that it takes to know a user's standings cannot be had now."""

    def __init__(self, rejection: Rejection) -> None:
        super().__init__(rejection.message)
        self.rejection = rejection


class _Person:
    """What is known of one user at this gateway."""

    __slots__ = ("is_known", "sinks", "standings", "waiting")

    def __init__(self) -> None:
        self.waiting: dict[Sink, OnSubscribed] = {}
        """Subscriptions that are not answered yet."""
        self.sinks: dict[Sink, None] = {}
        """The sockets that are sent its notices."""
        self.standings: dict[UUID, tuple[int, int, Standing]] = {}
        """How it stands in each of its auctions, and since which `seq`, and which moment, at the latest."""
        self.is_known = False
        """Whether all its standings were read."""


class People:
    """The users with a socket here that asked for the topic `me`.

    `list_joined` says in which auctions a user bids, or raises `CatalogueUnavailable`. `clock` gives milliseconds since
    the epoch.
    """

    def __init__(
        self, shards: Shards, list_joined: Callable[[UUID], Awaitable[list[UUID]]], clock: Callable[[], int]
    ) -> None:
        self._shards = shards
        self._list_joined = list_joined
        self._clock = clock
        self._people: dict[UUID, _Person] = {}
        self._user_by_sink: dict[Sink, UUID] = {}
        self._missed: dict[UUID, set[int]] = {}
        """Whose notices may have been missed, of which shards, in the order in which that is looked into."""
        self._openings: Counter[int] = Counter()
        """How often each shard's link has opened."""
        self._newcomers: list[UUID] = []
        self._following = asyncio.Lock()
        self._followed: dict[UUID, Answer] = {}
        """What came of following those who still wait for it."""
        self._lookups = asyncio.Semaphore(LOOKUPS_AT_ONCE)
        self._catching_up = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def follow(self, user: UUID, sink: Sink, on_subscribed: OnSubscribed) -> None:
        """Let a socket hear what concerns its user. `on_subscribed` is called before the first notice is sent to it."""
        person = self._people.get(user)
        self._user_by_sink[sink] = user
        if person is not None and person.is_known:
            person.sinks[sink] = None
            on_subscribed(_standings(person, self._clock()))
            return
        if person is None:
            person = self._people[user] = _Person()
            self._run(self._get_to_know(user, person))
        person.waiting[sink] = on_subscribed

    def drop(self, sink: Sink) -> None:
        """Let a socket hear nothing more; the last one to leave ends its user's notices on the links."""
        user = self._user_by_sink.pop(sink, None)
        if user is None:
            return
        person = self._people[user]
        person.sinks.pop(sink, None)
        on_subscribed = person.waiting.pop(sink, None)
        self._leave(user, person)
        if on_subscribed is not None:
            # A session counts on an answer to every subscription, also to one that it has left.
            on_subscribed(UNAVAILABLE)

    def noticed(self, noticed: Noticed) -> None:
        """A notice came on a link."""
        person = self._people.get(noticed.user)
        if person is None:
            # It was followed again after its last socket had left.
            self._unfollow(noticed.user)
            return
        known = person.standings.get(noticed.auction)
        if known is not None and noticed.seq <= known[0]:
            return
        _keep(person, noticed)
        if noticed.kind != "raised" and person.sinks:
            frame = encode_notice(noticed)
            for sink in list(person.sinks):
                sink.send(frame)

    def follow_again(self, shard: int) -> None:
        """A link has opened again: follow everybody there, and find out what was missed."""
        self._openings[shard] += 1
        self._follow_at(shard, list(self._people))

    async def close(self) -> None:
        """Give up what is being looked up."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # A user's first subscription here

    async def _get_to_know(self, user: UUID, person: _Person) -> None:
        """Follow a user, read its standings, and answer all who wait for them."""
        try:
            await self._follow(user)
            async with self._lookups:
                await self._look_up(user, person, self._shards.shards)
        except Exception as error:
            if not isinstance(error, _Refused):
                logger.exception("the standings could not be read", user=user)
            refusal = error.rejection if isinstance(error, _Refused) else INTERNAL
            self._refuse(user, person, refusal)
        else:
            self._answer(user, person)

    async def _follow(self, user: UUID) -> None:
        """Return when all shards tell of all that is not in the journal yet. Raises `_Refused`.

        All who come while others are being followed are followed together: bids should find room on the links, whoever
        comes back at once.
        """
        self._expect_reachable(self._shards.shards)
        self._newcomers.append(user)
        async with self._following:
            if user not in self._followed:
                newcomers, self._newcomers = self._newcomers, []
                self._followed |= dict.fromkeys(newcomers, await self._follow_together(newcomers))
        _expect(self._followed.pop(user), Followed)

    async def _follow_together(self, users: list[UUID]) -> Answer:
        """Follow users everywhere: the worst of the answers."""
        if self._shards.unreachable():
            return UNAVAILABLE
        answers = await asyncio.gather(
            *(self._shards.ask_shard(shard, follow) for follow in _follows(users) for shard in self._shards.shards)
        )
        return next((answer for answer in answers if not isinstance(answer, Followed)), Followed())

    def _answer(self, user: UUID, person: _Person) -> None:
        person.is_known = True
        waiting, person.waiting = person.waiting, {}
        person.sinks = dict.fromkeys(waiting)
        _tell(waiting, _standings(person, self._clock()))
        self._leave(user, person)

    def _refuse(self, user: UUID, person: _Person, refusal: Rejection) -> None:
        del self._people[user]
        self._unfollow(user)
        for sink in person.waiting:
            del self._user_by_sink[sink]
        _tell(person.waiting, refusal)

    def _leave(self, user: UUID, person: _Person) -> None:
        """Forget a user whom nobody asks for any more, though not while it is being got to know."""
        if person.is_known and not person.sinks and self._people.get(user) is person:
            del self._people[user]
            self._unfollow(user)

    def _unfollow(self, user: UUID) -> None:
        for shard in self._shards.shards:
            self._shards.submit_to(shard, Unfollow([user]), _ignore)

    # Standings

    async def _look_up(self, user: UUID, person: _Person, shards: Collection[int]) -> None:
        """Bring a user's standings at some shards up to date, and tell what changed. Raises `_Refused`."""
        self._expect_reachable(shards)
        try:
            auctions = await self._list_joined(user)
        except CatalogueUnavailable:
            raise _Refused(UNAVAILABLE) from None
        asked = [auction for auction in auctions if self._shards.shard_of(auction) in shards]
        answers = await asyncio.gather(*(self._shards.ask(GetAuction(auction, user)) for auction in asked))
        if self._people.get(user) is not person:
            # It left, and perhaps came back: what is news beside its old standings is none to those who came.
            return
        for answer in answers:
            if isinstance(answer, AuctionView):
                self._update(user, person, answer)
            elif answer != INTERNAL:
                # One that cannot be read is out of service alone.
                _expect(answer, AuctionView)

    def _expect_reachable(self, shards: Collection[int]) -> None:
        """Raise `_Refused` where one would wait for a shard that is away: whoever comes later would wait, too."""
        if any(shard in shards for shard in self._shards.unreachable()):
            raise _Refused(UNAVAILABLE)

    def _update(self, user: UUID, person: _Person, view: AuctionView) -> None:
        """An auction as it is now: to those who know how it was, what changed is news."""
        assert view.you is not None, "it was listed for its bidder"
        known = person.standings.get(view.snapshot.auction)
        kind = _change(None if known is None else known[2], view)
        found = Noticed(
            user=user,
            auction=view.snapshot.auction,
            kind=kind,
            seq=view.seq,
            at=view.at,
            price=view.snapshot.price,
            minimum=view.snapshot.minimum,
            end_time=view.snapshot.end_time,
            status=view.snapshot.status,
            outcome=view.snapshot.outcome,
            you=view.you,
        )
        if person.is_known:
            self.noticed(found)
        elif known is None or view.seq > known[0]:
            _keep(person, found)

    # What was missed

    def _follow_at(self, shard: int, users: list[UUID]) -> None:
        opening = self._openings[shard]

        def followed(users: list[UUID], answer: Answer) -> None:
            self._catch_up_with(users, shard)
            if not isinstance(answer, Followed):
                self._run(self._follow_later(shard, opening, users))

        for follow in _follows(users):
            self._shards.submit_to(shard, follow, partial(followed, follow.users))

    async def _follow_later(self, shard: int, opening: int, users: list[UUID]) -> None:
        """Ask once more for what was refused, unless the link has opened again: then everybody was followed anew."""
        await asyncio.sleep(LOOKUP_RETRY_MS / SECOND_MS)
        if opening == self._openings[shard]:
            self._follow_at(shard, [user for user in users if user in self._people])

    def _catch_up_with(self, users: Collection[UUID], shard: int) -> None:
        for user in users:
            self._missed.setdefault(user, set()).add(shard)
        # Half of what may be looked up at once is left to those who come.
        while self._catching_up < LOOKUPS_AT_ONCE // 2:
            self._catching_up += 1
            self._run(self._catch_up())

    async def _catch_up(self) -> None:
        """Look into what was missed, user after user, until nobody is left."""
        try:
            while self._missed:
                user = next(iter(self._missed))
                shards = self._missed.pop(user)
                person = self._people.get(user)
                if person is not None and not await self._has_caught_up(user, person, shards):
                    self._missed.setdefault(user, set()).update(shards)
                    await asyncio.sleep(LOOKUP_RETRY_MS / SECOND_MS)
        finally:
            self._catching_up -= 1

    async def _has_caught_up(self, user: UUID, person: _Person, shards: Collection[int]) -> bool:
        try:
            async with self._lookups:
                await self._look_up(user, person, shards)
        except _Refused:
            return False
        except Exception:
            # One user's trouble is not another's.
            logger.exception("the standings could not be read", user=user)
        return True

    def _run(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _tell(waiting: dict[Sink, OnSubscribed], answer: list[Standing] | Rejection) -> None:
    for on_subscribed in waiting.values():
        try:
            on_subscribed(answer)
        except Exception:
            # One client's trouble is not another's.
            logger.exception("a subscription could not be answered")


def _follows(users: list[UUID]) -> list[Follow]:
    return [Follow(users[first : first + FOLLOWED_AT_ONCE]) for first in range(0, len(users), FOLLOWED_AT_ONCE)]


def _change(old: Standing | None, view: AuctionView) -> NoticeKind:
    """What became of a standing, as the notice that tells it; `raised` where there is nothing to tell."""
    you, status = view.you, view.snapshot.status
    assert you is not None
    if status == "cancelled":
        return "cancelled"
    if status == "ended":
        return "won" if you.is_leading and view.snapshot.outcome == "sold" else "lost"
    if old is None or you.is_leading != old.is_leading or (not you.is_leading and you.max_amount != old.max_amount):
        return "winning" if you.is_leading else "outbid"
    return "raised"


def _keep(person: _Person, noticed: Noticed) -> None:
    """Note how somebody stands now. Of too many auctions the one that is over is forgotten, or else the oldest."""
    standing = Standing(
        auction=noticed.auction,
        paddle=noticed.you.paddle,
        max_amount=noticed.you.max_amount,
        is_leading=noticed.you.is_leading,
        status=noticed.status,
    )
    person.standings[noticed.auction] = noticed.seq, noticed.at, standing
    if len(person.standings) > STANDINGS_MAX:
        over = (auction for auction, (_, _, one) in person.standings.items() if one.status in _OVER)
        del person.standings[next(over, next(iter(person.standings)))]


def _standings(person: _Person, now: int) -> list[Standing]:
    """How somebody stands, without what has been over for long; that is still known, so that it is not told again."""
    return [
        standing
        for _, at, standing in person.standings.values()
        if standing.status not in _OVER or now - at <= STANDINGS_MS
    ]


def _expect(answer: Answer, kind: type[Answer]) -> None:
    if not isinstance(answer, kind):
        raise _Refused(answer if isinstance(answer, Rejection) else INTERNAL)


def _ignore(_answer: Answer) -> None:
    """The answer to a request that has none."""
