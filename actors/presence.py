"""How many sockets watch each topic, over all gateways, and when that is told.

A change is told at once, and then not again for a second, or for as many milliseconds as there are viewers if those are
more: a room of 10,000 in which somebody always comes or goes is not sent 10,000 messages a second. The first number
waits for a second: by then all gateways have counted theirs, also those of a shard that was started again.
"""

import asyncio
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar
from uuid import UUID

from engine.limits import PRESENCE_MS, SECOND_MS

Party = TypeVar("Party", bound=Hashable)
"""Who has viewers and is told: a gateway, by its link."""


class _Audience(Generic[Party]):
    """Those who watch one topic."""

    __slots__ = ("is_changed", "timer", "viewers")

    def __init__(self) -> None:
        self.viewers: dict[Party, int] = {}
        self.is_changed = False
        self.timer: asyncio.TimerHandle | None = None
        """Set for as long as nothing is to be told."""


class Audiences(Generic[Party]):
    """The viewers of a shard's topics. `tell` is given a topic, its parties, and how many viewers they have in all."""

    def __init__(self, tell: Callable[[UUID, list[Party], int], None]) -> None:
        self._tell = tell
        self._audiences: dict[UUID, _Audience[Party]] = {}

    def count(self, topic: UUID, party: Party, viewers: int) -> None:
        """A party has so many viewers now."""
        audience = self._audiences.get(topic)
        if audience is None:
            audience = self._audiences[topic] = _Audience()
            self._be_silent(topic, audience, PRESENCE_MS)
        if audience.viewers.get(party) != viewers:
            audience.viewers[party] = viewers
            self._change(topic, audience)

    def leave(self, topic: UUID, party: Party) -> None:
        """A party watches no longer, and takes its viewers with it."""
        audience = self._audiences.get(topic)
        if audience is None or audience.viewers.pop(party, None) is None:
            return
        if audience.viewers:
            self._change(topic, audience)
            return
        if audience.timer is not None:
            audience.timer.cancel()
        del self._audiences[topic]

    def _change(self, topic: UUID, audience: _Audience[Party]) -> None:
        audience.is_changed = True
        if audience.timer is None:
            self._say(topic, audience)

    def _say(self, topic: UUID, audience: _Audience[Party]) -> None:
        """Tell what has changed, if anything has, and then be silent for a while."""
        audience.timer = None
        if not audience.is_changed:
            return
        audience.is_changed = False
        viewers = sum(audience.viewers.values())
        self._be_silent(topic, audience, max(PRESENCE_MS, viewers))
        self._tell(topic, list(audience.viewers), viewers)

    def _be_silent(self, topic: UUID, audience: _Audience[Party], pause_ms: int) -> None:
        audience.timer = asyncio.get_running_loop().call_later(pause_ms / SECOND_MS, self._say, topic, audience)
