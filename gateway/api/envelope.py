"""The envelope that every answer of the HTTP API comes in, and what becomes of everything that goes wrong.

Success: `{"success": true, "data": …, "meta": …}`. Failure: `{"success": false, "error": {"code", "message",
"details"}, "meta": …}` with the HTTP status that fits. `meta` says when, which request and which version.
"""

import asyncio
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from http import HTTPStatus
from typing import Any, Final, Generic, Literal, NotRequired, TypeVar
from uuid import UUID, uuid4

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars
from typing_extensions import TypedDict

from actors.logs import get_logger
from engine.limits import BODY_BYTES_MAX, LINGER_BYTES_MAX, LINGER_MS, REQUEST_ID_LENGTH_MAX, SECOND_MS
from engine.money import to_decimal
from engine.rejections import Code, Rejection
from gateway.api.values import MoneyOut
from gateway.catalogue import CatalogueUnavailable

logger = get_logger(__name__)

# The shapes, as the API's description shows them


class Meta(TypedDict):
    """When, which request, which version."""

    timestamp: str
    request_id: str
    version: Literal["v1"]


class Detail(TypedDict):
    """What is wrong with one field."""

    field: str
    message: str


class Error(TypedDict):
    """What went wrong, for programs (`code`) and for people (`message`)."""

    code: str
    message: str
    details: list[Detail]
    minimum: NotRequired[MoneyOut]
    retry_after_ms: NotRequired[int]


DataT = TypeVar("DataT")


class Success(BaseModel, Generic[DataT]):
    """An answer."""

    success: Literal[True]
    data: DataT
    meta: Meta


class Failure(BaseModel):
    """A refusal or a fault."""

    success: Literal[False]
    error: Error
    meta: Meta


class Pagination(TypedDict):
    """Where in a list a page stands."""

    page: int
    limit: int
    total: int
    has_more: bool
    next_cursor: str | None


# Answering


def success(request: Request, data: object, *, status: int = 200) -> Response:
    """Answer with `data`: what msgspec encodes, money as `Decimal` with exactly the currency's decimals."""
    return _json({"success": True, "data": data, "meta": _meta(request.scope)}, status)


def failure(
    scope: Scope,
    status: int,
    code: str,
    message: str,
    *,
    details: Sequence[Detail] = (),
    hints: Mapping[str, Decimal | int] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Answer that it did not work; `hints` stand beside the code."""
    error = {"code": code, "message": message, "details": details, **(hints or {})}
    return _json({"success": False, "error": error, "meta": _meta(scope)}, status, headers)


def command_id(request: Request) -> UUID:
    """The id of the command that a request brings, where the client chose none: so it is known in the journal.

    Where the client gave the request no id either, it is the number in `request_id`.
    """
    given: UUID = request.scope[_COMMAND_ID]
    return given


def iso(at: int) -> str:
    """Milliseconds since the epoch as ISO 8601 in UTC: `2026-10-09T10:00:00.000Z`."""
    moment = _EPOCH + timedelta(milliseconds=at)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _meta(scope: Scope) -> Meta:
    timestamp = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return {"timestamp": timestamp, "request_id": scope[_REQUEST_ID], "version": "v1"}


def _json(content: object, status: int, headers: Mapping[str, str] | None = None) -> Response:
    return Response(_ENCODER.encode(content), status, headers, media_type="application/json")


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_ENCODER: Final = msgspec.json.Encoder(decimal_format="number")
_REQUEST_ID: Final = "gavel.request_id"
_COMMAND_ID: Final = "gavel.command_id"


# What can go wrong


class Refused(Exception):
    """The engine, or the door in front of it, said no. `currency` is that of the rejection's `minimum`."""

    def __init__(self, rejection: Rejection, currency: str | None = None) -> None:
        super().__init__(rejection.message)
        self.rejection = rejection
        self.currency = currency


class Invalid(Exception):
    """A field of the request cannot be right, which its type alone could not tell."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.detail: Detail = {"field": field, "message": message}


STATUSES: Final[dict[Code, int]] = {
    "not_authenticated": 401,
    "not_found": 404,
    "forbidden": 403,
    "own_auction": 403,
    "already_exists": 409,
    "not_started": 409,
    "ended": 409,
    "currency_mismatch": 422,
    "reason_required": 422,
    "terms_invalid": 422,
    "amount_invalid": 422,
    "amount_too_large": 422,
    "bid_too_low": 422,
    "max_not_raised": 422,
    "rate_limited": 429,
    "busy": 503,
    "unavailable": 503,
    "outcome_unknown": 503,
    "internal": 500,
}
"""The HTTP status of each refusal of the engine."""

_BY_STATUS: Final[dict[int, tuple[str, str]]] = {
    400: ("BAD_REQUEST", "The body is not valid JSON."),
    401: ("NOT_AUTHENTICATED", "Log in first: this needs an access token."),
    403: ("FORBIDDEN", "Only the auction's maker or an admin may do this."),
    404: ("NOT_FOUND", "There is no such auction."),
    409: ("ENDED", "This auction has ended."),
    413: ("TOO_LARGE", f"A request has at most {BODY_BYTES_MAX} bytes."),
    415: ("UNSUPPORTED_MEDIA_TYPE", "Send JSON, with `Content-Type: application/json`."),
    422: ("VALIDATION_ERROR", "The request is not valid."),
    429: ("RATE_LIMITED", "Too many requests."),
    500: ("INTERNAL_ERROR", "Something went wrong here, and it has been noted."),
    503: ("BUSY", "Too much at once; try again shortly."),
}
"""What HTTP itself may say no with, and the example of each status in the description."""
_OTHER_CODES: Final = {405: ("METHOD_NOT_ALLOWED", "This address does not take that method.")}
_ALWAYS: Final = (422, 429, 500, 503)
_WITH_A_BODY: Final = (400, 413, 415)


def failures(*statuses: int, body: bool = False) -> dict[int | str, dict[str, Any]]:
    """Describe how a route may fail: in these ways, and in those in which every route may."""
    ways = {*statuses, *_ALWAYS, *(_WITH_A_BODY if body else ())}
    return {status: _describe(status) for status in sorted(ways)}


def _describe(status: int) -> dict[str, Any]:
    code, message = _BY_STATUS[status]
    wrong = {"field": "starting_price", "message": "The amount has more than 2 decimals."}
    details = [wrong] if status == HTTPStatus.UNPROCESSABLE_ENTITY else []
    example = {
        "success": False,
        "error": {"code": code, "message": message, "details": details},
        "meta": {"timestamp": "2026-10-09T10:00:00.000Z", "request_id": "req_8d3c1f", "version": "v1"},
    }
    return {"model": Failure, "description": message, "content": {"application/json": {"example": example}}}


# From what went wrong to an answer


def install(app: FastAPI) -> None:
    """Give an app the envelope: around every answer, every refusal and every fault."""
    app.add_exception_handler(Refused, _on_refused)
    app.add_exception_handler(Invalid, _on_invalid)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(CatalogueUnavailable, _on_catalogue_unavailable)
    app.add_middleware(_Envelope)


async def _on_refused(request: Request, refused: Exception) -> Response:
    assert isinstance(refused, Refused)
    rejection = refused.rejection
    hints: dict[str, Decimal | int] = {}
    if rejection.minimum is not None and refused.currency is not None:
        hints["minimum"] = to_decimal(rejection.minimum, refused.currency)
    if rejection.retry_after_ms is not None:
        hints["retry_after_ms"] = rejection.retry_after_ms
    status = STATUSES[rejection.code]
    headers = {}
    if status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        headers["Retry-After"] = str(max(1, -(-(rejection.retry_after_ms or 0) // SECOND_MS)))
    details: list[Detail] = []
    if rejection.field is not None:
        details = [{"field": rejection.field, "message": rejection.message}]
    code = "INTERNAL_ERROR" if rejection.code == "internal" else rejection.code.upper()
    return failure(request.scope, status, code, rejection.message, details=details, hints=hints, headers=headers)


async def _on_catalogue_unavailable(request: Request, unavailable: Exception) -> Response:
    logger.warning("the catalogue is unavailable", exc_info=unavailable)
    message = "Lists cannot be read just now; try again shortly."
    return await _on_refused(request, Refused(Rejection("unavailable", message, True, retry_after_ms=SECOND_MS)))


async def _on_invalid(request: Request, invalid: Exception) -> Response:
    assert isinstance(invalid, Invalid)
    code, message = _BY_STATUS[422]
    return failure(request.scope, 422, code, message, details=[invalid.detail])


async def _on_validation_error(request: Request, invalid: Exception) -> Response:
    assert isinstance(invalid, RequestValidationError)
    if isinstance(invalid.body, bytes):  # So it stays where the content type does not say that it is JSON.
        code, message = _BY_STATUS[415]
        return failure(request.scope, 415, code, message)
    code, message = _BY_STATUS[422]
    details: list[Detail] = [
        {"field": _field(error["loc"], invalid.body), "message": _printable(error["msg"])} for error in invalid.errors()
    ]
    return failure(request.scope, 422, code, message, details=details)


def _field(location: Sequence[str | int], body: object) -> str:
    """The field at fault as the client sent it, dotted: `increments.0.from`.

    Pydantic names the branch of a union on its way, too. Such a name stands for nothing in the body: it is no key of
    an object, or what it is sought in is no object.
    """
    if location[0] != "body":
        return _printable(".".join(str(part) for part in location[1:]))
    parts: list[str] = []
    for part in location[1:]:
        if isinstance(body, dict):
            parts.append(str(part))
            body = body.get(part)
        elif isinstance(body, list) and isinstance(part, int):
            parts.append(str(part))
            body = body[part]
    return _printable(".".join(parts)) or "body"


def _printable(text: str) -> str:
    """The text, with what UTF-8 cannot hold (half a surrogate pair) replaced."""
    return text.encode("utf-8", "replace").decode("utf-8")


async def _on_http_exception(request: Request, exception: Exception) -> Response:
    assert isinstance(exception, HTTPException)
    status = exception.status_code
    code, message = {**_BY_STATUS, **_OTHER_CODES}.get(status, ("BAD_REQUEST", "The request cannot be served."))
    if status == HTTPStatus.NOT_FOUND:
        message = "There is nothing at this address."
    elif status == HTTPStatus.BAD_REQUEST:
        message = exception.detail
    return failure(request.scope, status, code, message, headers=exception.headers)


class _Envelope:
    """Gives each request its id, bounds its body, and answers for what nobody foresaw."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        command_id = scope[_COMMAND_ID] = uuid4()
        request_id = scope[_REQUEST_ID] = _given_id(scope) or f"req_{command_id.hex}"
        has_started = False
        taken = 0

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            elif taken > BODY_BYTES_MAX:
                await send({**message, "more_body": True})
                await _discard(receive)
                message = {"type": "http.response.body"}
            await send(message)

        async def receive_bounded() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > BODY_BYTES_MAX:
                raise HTTPException(413, headers=_CLOSE)
            return message

        with bound_contextvars(request_id=request_id):
            try:
                if (length := _content_length(scope)) > BODY_BYTES_MAX:
                    taken = length
                    code, sentence = _BY_STATUS[413]
                    too_large = failure(scope, 413, code, sentence, headers=_CLOSE)
                    await too_large(scope, receive, send_with_id)
                else:
                    await self._app(scope, receive_bounded, send_with_id)
            except Exception:
                logger.exception("a request failed", method=scope["method"], path=scope["path"])
                if has_started:  # Half an answer is out; only breaking it off tells the client.
                    raise
                code, sentence = _BY_STATUS[500]
                await failure(scope, 500, code, sentence)(scope, receive, send_with_id)


_CLOSE: Final = {"Connection": "close"}
"""Nobody reads the rest of too large a body, so the connection cannot be used again."""


async def _discard(receive: Receive) -> None:
    """Throw away the rest of too large a body, within bounds.

    A connection that is closed on unread bytes is reset, and with it goes the answer that says why.
    """
    discarded = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_MS / SECOND_MS):
            while discarded < LINGER_BYTES_MAX and (message := await receive()).get("more_body"):
                discarded += len(message.get("body", b""))


def _given_id(scope: Scope) -> str | None:
    """The id that the client has given its request, where it is one that may stand in logs and headers."""
    value = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
    return value if _GIVEN_ID.fullmatch(value) else None


_GIVEN_ID: Final = re.compile(rf"[A-Za-z0-9_.:-]{{1,{REQUEST_ID_LENGTH_MAX}}}")


def _content_length(scope: Scope) -> int:
    """The body's length as its header says; 0 where it does not (the bytes are counted as well)."""
    value = dict(scope["headers"]).get(b"content-length", b"")
    # Cut, because Python refuses to read thousands of digits; what is left of so many is too large as well.
    return int(value[:_LENGTH_DIGITS]) if value.isdigit() else 0


_LENGTH_DIGITS: Final = 20
