"""Whether Gavel is well: plain at the root, for load balancers, and in the envelope under `/api/v1`."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response
from typing_extensions import TypedDict

from engine.limits import SECOND_MS
from gateway.api.edge import HEALTHY, CurrentEdge
from gateway.api.envelope import Failure, Success, failure, success


class Health(TypedDict):
    """How Gavel is, and the state of each of its parts."""

    status: str
    parts: dict[str, str]


_UNWELL: dict[int | str, dict[str, Any]] = {503: {"model": Failure, "description": "A part is not well."}}

root = APIRouter(tags=["health"])
router = APIRouter(tags=["health"])


@root.get("/health", response_model=Health, responses={503: {"model": Health, "description": "A part is not well."}})
async def get_health_plainly(edge: CurrentEdge) -> Response:
    """Say whether all is well: 200, or 503 with the state of each part."""
    health = _sum_up(await edge.health())
    return JSONResponse(health, 200 if health["status"] == HEALTHY else 503)


@router.get("/health", response_model=Success[Health], responses=_UNWELL)
async def get_health(request: Request, edge: CurrentEdge) -> Response:
    """Say whether all is well: 200, or 503 with the state of each part under `details`."""
    health = _sum_up(await edge.health())
    if health["status"] == HEALTHY:
        return success(request, health)
    return failure(
        request.scope,
        503,
        "UNAVAILABLE",
        "A part of Gavel is not well.",
        details=[{"field": part, "message": state} for part, state in health["parts"].items()],
        hints={"retry_after_ms": SECOND_MS},
        headers={"Retry-After": "1"},
    )


def _sum_up(parts: dict[str, str]) -> Health:
    is_well = all(state == HEALTHY for state in parts.values())
    return {"status": HEALTHY if is_well else "unhealthy", "parts": parts}
