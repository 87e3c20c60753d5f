"""The HTTP application: the API under `/api/v1`, its description at `/docs`, and the state of health."""

from fastapi import FastAPI
from starlette.responses import RedirectResponse

from gateway.api import auctions, envelope, health
from gateway.api.edge import Edge, Identity, Router, Verifier

__all__ = ["Edge", "Identity", "Router", "Verifier", "create_app"]

_DESCRIPTION = """
Live auctions over HTTP; bids and what happens in an auction also go over the WebSocket `/v1/live`.

Amounts are JSON numbers with the currency's decimals, exact. Times are ISO 8601 in UTC. Every answer stands in an
envelope, and its `meta.request_id` (also the header `X-Request-ID`) names it in the logs; a request may bring its own,
up to 64 letters, digits and `_.:-`.
"""


def create_app(edge: Edge) -> FastAPI:
    """Put the HTTP API together, with the collaborators that it is given."""
    app = FastAPI(
        title="Gavel",
        description=_DESCRIPTION,
        version="1",
        redoc_url=None,
        # A redirect would leave the envelope; an address with a slash too many does not exist.
        redirect_slashes=False,
    )
    app.state.edge = edge
    envelope.install(app)
    app.add_api_route("/", _to_the_description, include_in_schema=False)
    app.include_router(health.root)
    app.include_router(health.router, prefix="/api/v1")
    app.include_router(auctions.router, prefix="/api/v1")
    return app


async def _to_the_description() -> RedirectResponse:
    return RedirectResponse("/docs")
