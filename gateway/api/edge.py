"""What the HTTP API is given from outside, and who is calling.

Nothing here knows Ray, links or keys: the wiring hands over an `Edge`, tests hand over another.
"""

from collections.abc import Awaitable, Callable, Container
from dataclasses import dataclass
from typing import Annotated, Protocol
from uuid import UUID

import asyncpg
from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from actors.messages import Answer, Payload
from engine.commands import Role
from engine.rejections import SUSPENDED, Rejection
from gateway.api.envelope import Refused
from gateway.rates import Rates
from gateway.tokens import TokenInvalid

HEALTHY = "healthy"
"""The state of a part that is well; any other word or sentence says what ails it."""


class Router(Protocol):
    """Finds the shard of an auction, and brings its answer."""

    async def ask(self, payload: Payload) -> Answer: ...


class Identity(Protocol):
    """Who a token speaks for."""

    @property
    def user(self) -> UUID: ...

    @property
    def role(self) -> Role: ...


class Verifier(Protocol):
    """Reads access tokens. Raises `TokenInvalid`, with a sentence, for one that is not good at `now_ms`."""

    def verify(self, token: str, now_ms: int) -> Identity: ...


@dataclass(frozen=True)
class Edge:
    """The collaborators of the HTTP API."""

    router: Router
    verifier: Verifier
    pool: asyncpg.Pool
    """For reading only: what changes an auction goes through its shard."""
    clock: Callable[[], int]
    """Milliseconds since the epoch, UTC."""
    rates: Rates
    """Shared with the sockets: a user's bids count wherever they come in."""
    health: Callable[[], Awaitable[dict[str, str]]]
    """The state of each part by its name, `healthy` where it is well."""
    suspended: Container[UUID] = frozenset()
    """The users that are suspended at this moment."""


def edge_of(request: Request) -> Edge:
    """The collaborators of the app that serves this request."""
    edge = request.app.state.edge
    assert isinstance(edge, Edge)
    return edge


CurrentEdge = Annotated[Edge, Depends(edge_of)]

_BEARER = HTTPBearer(auto_error=False, description="An access token.")
_Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]


def optional_caller(request: Request, edge: CurrentEdge, credentials: _Credentials) -> Identity | None:
    """Who calls; None for a guest. Whoever shows a token must show a good one, even where guests may read."""
    if credentials is None:
        if "authorization" in request.headers:
            raise Refused(Rejection("not_authenticated", "Send an access token as `Authorization: Bearer …`."))
        return None
    try:
        identity = edge.verifier.verify(credentials.credentials, edge.clock())
    except TokenInvalid as reason:
        raise Refused(Rejection("not_authenticated", str(reason))) from None
    if identity.user in edge.suspended:
        raise Refused(SUSPENDED)
    return identity


OptionalCaller = Annotated[Identity | None, Depends(optional_caller)]


def caller(identity: OptionalCaller) -> Identity:
    """Who calls; a guest is refused."""
    if identity is None:
        raise Refused(Rejection("not_authenticated", "Log in first: this needs an access token."))
    return identity


Caller = Annotated[Identity, Depends(caller)]
