"""Who follows which users at a shard, and what these are told of their auctions."""

from collections.abc import Iterable
from typing import Generic, Protocol, TypeVar
from uuid import UUID

from actors.entities import Entity, Recorded
from actors.logs import get_logger
from actors.messages import Noticed
from engine.auction import minimum
from engine.events import Event
from engine.limits import FOLLOWED_MAX
from engine.notices import NoticeKind, notices

logger = get_logger(__name__)


class Follower(Protocol):
    """A link's end, as far as it matters here."""

    is_gone: bool


F = TypeVar("F", bound=Follower)


class Followers(Generic[F]):
    """The users that gateways follow. One gateway follows at most as many as it may have sockets."""

    def __init__(self) -> None:
        self.by_user: dict[UUID, dict[F, None]] = {}
        """Each user that is followed, with those who follow it."""
        self._users: dict[F, set[UUID]] = {}

    def follow(self, follower: F, users: Iterable[UUID]) -> None:
        """From now on what concerns these users is for this follower, too."""
        if follower.is_gone:
            return
        followed = self._users.setdefault(follower, set())
        for user in users:
            if len(followed) >= FOLLOWED_MAX and user not in followed:
                logger.error("a gateway follows more users than it may have sockets")
                return
            followed.add(user)
            self.by_user.setdefault(user, {})[follower] = None

    def unfollow(self, follower: F, users: Iterable[UUID]) -> None:
        """No longer."""
        followed = self._users.get(follower, set())
        for user in users:
            if user in followed:
                followed.discard(user)
                self.by_user[user].pop(follower)
                if not self.by_user[user]:
                    del self.by_user[user]

    def leave(self, follower: F) -> None:
        """A follower is gone."""
        self.unfollow(follower, list(self._users.get(follower, ())))
        self._users.pop(follower, None)

    def concerned(self, entity: Entity, event: Event) -> list[tuple[UUID, NoticeKind]]:
        """The followed users whom an event concerns that is about to be recorded."""
        return [(user, kind) for user, kind in notices(entity.state, event) if user in self.by_user]


def noticed(entity: Entity, recorded: Recorded, user: UUID, kind: NoticeKind) -> Noticed:
    """What a user is told of an event right after it was recorded."""
    state, you = entity.state, entity.you(user)
    assert state is not None
    assert you is not None, "only bidders are concerned"
    return Noticed(
        user=user,
        auction=entity.id,
        kind=kind,
        seq=recorded.seq,
        at=recorded.at,
        price=state.price,
        minimum=minimum(state),
        end_time=state.end_time,
        status=state.status,
        outcome=state.outcome,
        you=you,
    )
