"""A router with the real rules behind it, in memory: what shards answer, without shards. And the HTTP API on top."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast
from uuid import UUID

import asyncpg
import httpx

from actors.entities import Entity, bid_accepted
from actors.journal import EntityRow, Row
from actors.messages import Answer, GetAuction, Payload, Unsubscribe, Viewers, Watch
from engine.auction import decide, due_at
from engine.commands import ExecuteDue, OpenAuction, PlaceBid, Role
from engine.rejections import Rejection
from gateway.app import Edge, Verifier, create_app
from gateway.rates import Rates
from gateway.tokens import TokenInvalid

MAKER = UUID("11111111-1111-4111-8111-111111111111")
ANNA = UUID("22222222-2222-4222-8222-222222222222")
BEN = UUID("33333333-3333-4333-8333-333333333333")
ADMIN = UUID("66666666-6666-4666-8666-666666666666")
NOW = 1_700_000_000_000
"""2023-11-14T22:13:20Z"""

Keep = Callable[[list[Row], EntityRow], Awaitable[None]]


class EngineRouter:
    """Decides on auctions in memory; what happens goes to `keep`, if there is one. `next_answer` comes first."""

    def __init__(self, clock: Callable[[], int], keep: Keep | None = None) -> None:
        self._clock = clock
        self._keep = keep
        self._entities: dict[UUID, Entity] = {}
        self._verdicts: dict[tuple[UUID, UUID], Answer] = {}
        self.next_answer: Answer | Exception | None = None
        self.asked: list[Payload] = []

    async def ask(self, payload: Payload) -> Answer:
        self.asked.append(payload)
        answer, self.next_answer = self.next_answer, None
        if isinstance(answer, Exception):
            raise answer
        return answer if answer is not None else await self._decide(payload)

    async def _decide(self, payload: Payload) -> Answer:
        assert not isinstance(payload, Watch | Unsubscribe | Viewers), "HTTP asks for no events"
        entity = self._entities.setdefault(payload.auction, Entity(payload.auction))
        while entity.state is not None and (due := due_at(entity.state)) is not None and due <= self._clock():
            await self._record(entity, ExecuteDue(payload.auction))
        if isinstance(payload, GetAuction):
            if entity.state is None:
                return Rejection("not_found", "There is no such auction.")
            return entity.view(payload.viewer)
        who, request_id = _command_id(payload)
        if (who, request_id) not in self._verdicts:
            self._verdicts[who, request_id] = await self._record(entity, payload)
        return self._verdicts[who, request_id]

    async def _record(self, entity: Entity, command: Any) -> Answer:
        events = decide(entity.state, command, self._clock())
        if isinstance(events, Rejection):
            return events
        recorded = [entity.record(event, self._clock(), None, None) for event in events]
        if self._keep is not None:
            await self._keep([row for _, row in recorded], entity.row())
        if isinstance(command, PlaceBid):
            return bid_accepted(recorded[0][0])
        return entity.view(None if isinstance(command, ExecuteDue) else _command_id(command)[0])


def _command_id(command: Any) -> tuple[UUID, UUID]:
    if isinstance(command, PlaceBid):
        return command.bidder, command.bid_id
    return command.maker if isinstance(command, OpenAuction) else command.caller, command.request_id


@dataclass(frozen=True)
class Person:
    """Who a test's token speaks for."""

    user: UUID
    role: Role = "viewer"


class Tokens:
    """Tokens are names."""

    people: Mapping[str, Person] = {
        "maker": Person(MAKER, "maker"),
        "anna": Person(ANNA),
        "ben": Person(BEN),
        "admin": Person(ADMIN, "admin"),
    }

    def verify(self, token: str, now_ms: int) -> Person:
        if token not in self.people:
            raise TokenInvalid("The token does not verify.")
        return self.people[token]


@dataclass
class World:
    """The API of one test, its clock, and what stands behind it."""

    now: int = NOW
    rates: Rates = field(default_factory=Rates)
    suspended: set[UUID] = field(default_factory=set)
    health: dict[str, str] = field(default_factory=lambda: {"postgres": "healthy", "shards": "healthy"})

    def start(
        self, pool: asyncpg.Pool | None = None, keep: Keep | None = None, verifier: Verifier | None = None
    ) -> httpx.AsyncClient:
        self.router = EngineRouter(lambda: self.now, keep)

        async def health() -> dict[str, str]:
            return self.health

        edge = Edge(
            router=self.router,
            verifier=verifier or Tokens(),
            pool=cast(asyncpg.Pool, pool),
            clock=lambda: self.now,
            rates=self.rates,
            health=health,
            suspended=self.suspended,
        )
        transport = httpx.ASGITransport(create_app(edge))
        return httpx.AsyncClient(transport=transport, base_url="http://gavel", headers={"accept": "application/json"})


def as_user(name: str, **headers: str) -> dict[str, str]:
    """The headers of a request by `anna`, `ben`, the `maker` or the `admin`."""
    return {"Authorization": f"Bearer {name}", **headers}


def auction_to_open(**changes: Any) -> dict[str, Any]:
    """A body that is fine: an hour from now, from 10.00 on."""
    body = {"title": "A bowl", "currency": "USD", "starting_price": "10.00", "end_time": "2023-11-14T23:13:20Z"}
    return {**body, **changes}
