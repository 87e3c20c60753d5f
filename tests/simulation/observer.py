"""What the simulator knows of an engine beside its clients: when its shards were out, when bids were taken up, and how
often it had more to do than it could.

In a simulated world shards, journals, links, topics and sockets are of these classes: the real ones, looked at.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast
from uuid import UUID

from actors import bootstrap, link
from actors.journal import EntityRow, Life, PostgresJournal, Row
from actors.messages import Published, Request
from actors.shard import Outlet, Shard
from engine.commands import PlaceBid, command_id
from engine.limits import RESUME_EVENTS_MAX
from gateway import fanout
from gateway.socket import ClientSocket
from gateway.topic import Memory
from tests.simulation.postgres import SimulatedPostgres, Table, Values
from tests.simulation.world import Process, World


class Out(NamedTuple):
    """A shard could take no bids; milliseconds by Postgres's clock and by the shard's."""

    shard: int
    down: int
    back: int


@dataclass
class _Shard:
    """A shard as Postgres's rows show it."""

    claim: tuple[int, int]
    """Epoch and session."""
    alive_at: int | None
    """Its last sign of life while it served."""
    down: int | None = None
    """Since when it has not served."""


class Observer:
    """Looks on at one world."""

    def __init__(self, world: World, postgres: SimulatedPostgres) -> None:
        self.outages: list[Out] = []
        self.taken: dict[tuple[UUID, bytes], int] = {}
        """When each bid was last taken up, by its shard's clock."""
        self.paying: dict[UUID, int] = {}
        """Until when an owner pays an outage back just now."""
        self.at_write: dict[Process, Callable[[], None]] = {}
        """What is to happen when a process next appends events, once."""
        self.strained: Counter[str] = Counter()
        """How often there was more than a bound allows, by what came of it."""
        self._shards: dict[int, _Shard] = {}
        self._columns = postgres.tables["shards"].columns
        postgres.on_commit = self._committed
        world.shared[Observer] = self

    @staticmethod
    def here() -> "Observer":
        """The observer of the world in which the running process is."""
        return cast("Observer", cast("Process", asyncio.get_running_loop()).world.shared[Observer])

    def _committed(self, table: Table, values: Values) -> None:
        if table.name != "shards":
            return
        row: dict[str, Any] = dict(zip(self._columns, values, strict=True))
        number, claim = row["shard_id"], (row["epoch"], row["backend_pid"])
        alive_at = int(row["alive_at"] + 500) // 1_000 if row["alive_at"] > 0 else None
        shard = self._shards.setdefault(number, _Shard(claim, None))
        if claim != shard.claim:
            shard.claim = claim
            shard.down = shard.alive_at if shard.down is None else shard.down
        elif row["owner"] in self.paying:
            back = self.paying.pop(row["owner"])
            if shard.down is not None and back - shard.down > _OUTAGE_MS:
                self.outages.append(Out(number, shard.down, back))
            shard.down = None if row["down_at"] is None else back
            shard.alive_at = alive_at
        elif shard.down is None:
            shard.alive_at = alive_at


_OUTAGE_MS = 1_000


def _nothing() -> None:
    """Nothing is to happen."""


class ObservedJournal(PostgresJournal):
    """A journal that says when an outage is paid back."""

    async def append(self, rows: Sequence[Row], entities: Sequence[EntityRow], paid_until: int | None = None) -> Life:
        observer = Observer.here()
        if paid_until is not None:
            observer.paying[self._owner] = paid_until
        if rows:
            observer.at_write.pop(cast("Process", asyncio.get_running_loop()), _nothing)()
        return await super().append(rows, entities, paid_until)


class ObservedShard(Shard):
    """A shard that says when it takes bids up."""

    def take(self, requests: Iterable[Request], outlet: Outlet) -> None:
        requests = list(requests)
        taken, now = Observer.here().taken, self._clock()
        for request in requests:
            if isinstance(request.payload, PlaceBid):
                taken[request.payload.auction, command_id(request.payload)] = now
        super().take(requests, outlet)


class ObservedEnd(link._ShardEnd):
    """A shard's end of a link that says when it cannot get rid of what it has to tell."""

    def pause_writing(self) -> None:
        Observer.here().strained["gateway behind"] += 1
        super().pause_writing()

    def _check_budget(self) -> None:
        was_gone = self._transport.underlying_transport.is_closing()
        super()._check_budget()
        if self._transport.underlying_transport.is_closing() and not was_gone:
            Observer.here().strained["gateway cut off"] += 1


class ObservedMemory(Memory):
    """A gateway's memory of a topic that says when it is asked for more than it holds."""

    __slots__ = ()

    def add(self, published: Published) -> None:
        if published.events is None:
            Observer.here().strained["events folded on a link"] += 1
        super().add(published)

    def events_after(self, since: int) -> bytes | None:
        found = super().events_after(since)
        if found is None and 0 < self.seq - since <= RESUME_EVENTS_MAX:
            Observer.here().strained["events no longer at the gateway"] += 1
        return found


class ObservedSocket(ClientSocket):
    """A socket that says when its client does not read, and when it reads nothing itself."""

    __slots__ = ()

    def pause_writing(self) -> None:
        Observer.here().strained["client behind"] += 1
        super().pause_writing()

    def close_as_too_slow(self) -> None:
        if not self._is_closing:
            Observer.here().strained["client closed as too slow"] += 1
        super().close_as_too_slow()

    def _let_rest(self) -> None:
        if self._rest is None:
            Observer.here().strained["client told busy"] += 1
        super()._let_rest()


bootstrap.PostgresJournal = ObservedJournal  # type: ignore[attr-defined]
bootstrap.Shard = ObservedShard  # type: ignore[attr-defined]
link._ShardEnd = ObservedEnd  # type: ignore[misc]
fanout.Memory = ObservedMemory  # type: ignore[attr-defined]
