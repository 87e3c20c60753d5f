"""Auctions over HTTP: opening, listing, looking, bidding, ending. Each route reads, asks the shard, and shows.

Amounts are decimals in these bodies and minor units behind this file; what an auction allows, its shard decides.
"""

import asyncio
from decimal import Decimal
from secrets import token_bytes
from typing import Annotated, Final, Literal, NotRequired
from uuid import UUID, uuid4, uuid5

import msgspec
from fastapi import APIRouter, Body, Header, Query, Request
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag
from starlette.responses import Response
from typing_extensions import TypedDict

from actors.logs import get_logger
from actors.messages import Answer, AuctionView, BidAccepted, GetAuction, Payload
from engine.auction import Status
from engine.commands import CancelAuction, EndAuction, OpenAuction, PlaceBid, SoftClose, Terms
from engine.events import Outcome
from engine.increments import BUILT_IN, Increments, Step, default_increments, flat
from engine.limits import (
    AMOUNT_MAX,
    INCREMENT_STEPS_MAX,
    INTEGER_MAX,
    PAGE_LIMIT_DEFAULT,
    PAGE_LIMIT_MAX,
    REASON_LENGTH_MAX,
    SALT_BYTES,
    SECOND_MS,
    TITLE_LENGTH_MAX,
)
from engine.money import to_decimal, to_minor
from engine.rejections import Rejection
from gateway.api.edge import Caller, CurrentEdge, Edge, Identity, OptionalCaller
from gateway.api.envelope import (
    Invalid,
    Pagination,
    Refused,
    Success,
    command_id,
    failures,
    iso,
    success,
)
from gateway.api.values import Amount, Currency, ExactRoute, Moment, MoneyOut, Seconds, Time
from gateway.catalogue.auctions import ListedAuction, list_auctions, list_bids
from gateway.rates import rate_limited

logger = get_logger(__name__)

router = APIRouter(prefix="/auctions", tags=["auctions"], route_class=ExactRoute)


# What clients send. Unknown fields are ignored, as in the live protocol; nothing is converted silently.


class _Sent(BaseModel):
    model_config = ConfigDict(strict=True)


# Text in JSON: a strict model would take none for a UUID.
_Uuid = Annotated[UUID, Field(strict=False)]


class SoftCloseToSet(_Sent):
    """A bid in the last `window_s` seconds moves the end: `reset` counts from the bid, `append` from the end."""

    window_s: Seconds = 900
    extension_s: Seconds = 900
    max_extension_s: Seconds = 86_400
    anchor: Literal["reset", "append"] = "reset"


class StepToSet(_Sent):
    """From this price on, a bid must pass the price by this increment."""

    from_price: Amount = Field(alias="from")
    increment: Amount


def _kind_of_increments(value: object) -> str | None:
    if isinstance(value, list):
        return "table"
    return "name" if isinstance(value, str) else None


_IncrementsToSet = Annotated[
    Annotated[list[StepToSet], Field(max_length=INCREMENT_STEPS_MAX), Tag("table")]
    | Annotated[Literal["ebay_us"], Tag("name")],
    Discriminator(
        _kind_of_increments,
        custom_error_type="increments",
        custom_error_message="Increments are a list of steps, or the name of a built-in table.",
    ),
]


class AuctionToOpen(_Sent):
    """An auction to open. Its maker is whoever opens it."""

    title: Annotated[str, Field(max_length=TITLE_LENGTH_MAX, examples=["A walnut bowl"])]
    currency: Currency
    starting_price: Amount
    end_time: Moment
    story_id: _Uuid | None = None
    reserve_price: Amount | None = None
    minimum_bid_increment: Annotated[Amount | None, Field(description="One for all prices; the default is 5.00.")] = (
        None
    )
    increments: _IncrementsToSet | None = None
    start_time: Annotated[Moment | None, Field(description="The default is now.")] = None
    soft_close: Annotated[
        SoftCloseToSet | None, Field(description="Absent: the default. Null: the end stays as it is.")
    ] = Field(default_factory=SoftCloseToSet)


class BidToPlace(_Sent):
    """A bid: exactly `bid_amount`, or as much as it takes up to `max_bid_amount`."""

    bid_amount: Amount | None = None
    max_bid_amount: Amount | None = None
    currency: Annotated[Currency | None, Field(description="Refused where the auction is in another.")] = None


class ReasonToGive(_Sent):
    """Why; an admin must say."""

    reason: Annotated[str | None, Field(max_length=REASON_LENGTH_MAX)] = None


_Reason = Annotated[ReasonToGive | None, Body()]
_IdempotencyKey = Annotated[
    UUID | None,
    Header(alias="Idempotency-Key", description="A UUID; the same request sent again with it is done only once."),
]
# Far beyond every list, and its offset still within Postgres's integers.
_Page = Annotated[int, Query(ge=1, le=2**31 - 1)]
_Limit = Annotated[int, Query(ge=1, le=PAGE_LIMIT_MAX)]
_Cursor = Annotated[
    str | None,
    Query(
        max_length=64, description="A list's `next_cursor`: goes on there, whatever has come since; replaces `page`."
    ),
]


# What clients get


class YouData(TypedDict):
    """How the caller stands in an auction in which it bids."""

    paddle: int
    max_amount: MoneyOut
    is_leading: bool


class AuctionData(TypedDict):
    """An auction, as the caller may see it."""

    auction_id: UUID
    story_id: UUID | None
    title: str
    currency: str
    status: Status
    starting_price: MoneyOut
    price: MoneyOut
    minimum_bid: MoneyOut
    bid_count: int
    leader_paddle: int | None
    reserve_met: bool | None
    start_time: Time
    end_time: Time
    actual_end_time: Time | None
    outcome: Outcome | None
    seq: int
    you: NotRequired[YouData]
    reserve_price: NotRequired[MoneyOut | None]


class BidData(TypedDict):
    """A bid that was placed, as its bidder may see it."""

    bid_id: UUID
    auction_id: UUID
    bid_amount: MoneyOut
    currency: str
    status: Literal["active", "outbid"]
    is_current_high_bid: bool
    created_at: Time


class PlacedBidData(TypedDict):
    """A bid as everybody may see it."""

    seq: int
    at: Time
    paddle: int
    price: MoneyOut
    leader: int


class AuctionList(TypedDict):
    """A page of auctions."""

    auctions: list[AuctionData]
    pagination: Pagination


class BidList(TypedDict):
    """A page of an auction's bids."""

    bids: list[PlacedBidData]
    pagination: Pagination


# The routes


@router.post("", status_code=201, response_model=Success[AuctionData], responses=failures(401, 403, 409, body=True))
async def open_auction(
    request: Request, edge: CurrentEdge, caller: Caller, body: AuctionToOpen, idempotency_key: _IdempotencyKey = None
) -> Response:
    """Open an auction, or schedule it where its `start_time` lies ahead."""
    # Made of the key, a retry's id is the same; made of the user too, nobody can take another's.
    auction = uuid4() if idempotency_key is None else uuid5(caller.user, str(idempotency_key))
    command = OpenAuction(
        auction=auction, maker=caller.user, request_id=idempotency_key or command_id(request), terms=_read_terms(body)
    )
    _log(command, command.request_id)
    answer = await edge.router.ask(command)
    if isinstance(answer, Rejection) and answer.field == "increments" and body.minimum_bid_increment is not None:
        answer = msgspec.structs.replace(answer, field="minimum_bid_increment")
    return success(request, _show_auction(_view(answer), caller), status=201)


@router.get("", response_model=Success[AuctionList], responses=failures(401, 403))
async def get_auctions(
    request: Request,
    edge: CurrentEdge,
    caller: OptionalCaller,
    status: Status | None = None,
    maker_id: UUID | None = None,
    page: _Page = 1,
    limit: _Limit = PAGE_LIMIT_DEFAULT,
    cursor: _Cursor = None,
) -> Response:
    """List auctions, newest first."""
    after = None if cursor is None else _read_auctions_cursor(cursor)
    found, total = await list_auctions(
        edge.pool, status=status, maker=maker_id, after=after, offset=_offset(page, limit, cursor), limit=limit + 1
    )
    listed, has_more = found[:limit], len(found) > limit
    viewer = None if caller is None else caller.user
    answers = await asyncio.gather(*(edge.router.ask(GetAuction(one.auction, viewer)) for one in listed))
    data: AuctionList = {
        "auctions": [_show_auction(_view(answer), caller) for answer in answers if not _is_unreadable(answer)],
        "pagination": {
            "page": page,
            "limit": limit,
            "total": total,
            "has_more": has_more,
            "next_cursor": f"{listed[-1].created_at}.{listed[-1].auction}" if has_more else None,
        },
    }
    return success(request, data)


@router.get("/{auction_id}", response_model=Success[AuctionData], responses=failures(401, 403, 404))
async def get_auction(request: Request, edge: CurrentEdge, caller: OptionalCaller, auction_id: UUID) -> Response:
    """Show an auction; to one who bids in it also how it stands (`you`), to its maker also the reserve."""
    view = await _ask(edge, GetAuction(auction_id, None if caller is None else caller.user))
    return success(request, _show_auction(view, caller))


@router.post(
    "/{auction_id}/bids",
    status_code=201,
    response_model=Success[BidData],
    responses=failures(401, 403, 404, 409, body=True),
)
async def place_bid(
    request: Request,
    edge: CurrentEdge,
    caller: Caller,
    auction_id: UUID,
    body: BidToPlace,
    idempotency_key: _IdempotencyKey = None,
) -> Response:
    """Place a bid. It counts once this has answered with 201, and no earlier."""
    if (body.bid_amount is None) == (body.max_bid_amount is None):
        raise Invalid("bid_amount", "A bid names either `bid_amount` or `max_bid_amount`.")
    address = "" if request.client is None else request.client.host
    if retry_after_ms := edge.rates.bid(address, caller.user, edge.clock()):
        raise Refused(rate_limited(retry_after_ms))
    currency = body.currency
    if currency is None:
        currency = (await _ask(edge, GetAuction(auction_id, None))).snapshot.currency
    command = PlaceBid(
        auction=auction_id,
        bidder=caller.user,
        bid_id=idempotency_key or command_id(request),
        amount=_read_bid("bid_amount", body.bid_amount, currency),
        max_amount=_read_bid("max_bid_amount", body.max_bid_amount, currency),
        currency=body.currency,
    )
    _log(command, command.bid_id)
    answer = await edge.router.ask(command)
    if isinstance(answer, Rejection):
        raise Refused(answer, currency)
    assert isinstance(answer, BidAccepted), f"a bid is accepted or rejected, not answered by {type(answer)}"
    return success(request, _show_bid(command, answer, currency), status=201)


@router.get("/{auction_id}/bids", response_model=Success[BidList], responses=failures(401, 403, 404))
async def get_bids(
    request: Request,
    edge: CurrentEdge,
    _caller: OptionalCaller,
    auction_id: UUID,
    page: _Page = 1,
    limit: _Limit = PAGE_LIMIT_DEFAULT,
    cursor: _Cursor = None,
) -> Response:
    """List an auction's bids, newest first: prices and paddles, no maximum and no name."""
    view = await _ask(edge, GetAuction(auction_id, None))
    currency = view.snapshot.currency
    up_to = view.seq if cursor is None else _read_bids_cursor(cursor)
    found = await list_bids(edge.pool, auction_id, up_to=up_to, offset=_offset(page, limit, cursor), limit=limit + 1)
    bids, has_more = found[:limit], len(found) > limit
    data: BidList = {
        "bids": [
            {
                "seq": bid.seq,
                "at": iso(bid.at),
                "paddle": bid.paddle,
                "price": to_decimal(bid.price, currency),
                "leader": bid.leader,
            }
            for bid in bids
        ],
        "pagination": {
            "page": page,
            "limit": limit,
            "total": view.snapshot.bids,
            "has_more": has_more,
            "next_cursor": str(bids[-1].seq - 1) if has_more else None,
        },
    }
    return success(request, data)


@router.post(
    "/{auction_id}/end", response_model=Success[AuctionData], responses=failures(401, 403, 404, 409, body=True)
)
async def end_auction(
    request: Request, edge: CurrentEdge, caller: Caller, auction_id: UUID, body: _Reason = None
) -> Response:
    """End an auction before its time, with the result that it has now."""
    command = EndAuction(
        auction=auction_id,
        caller=caller.user,
        role=caller.role,
        request_id=command_id(request),
        reason=None if body is None else body.reason,
        salt=token_bytes(SALT_BYTES),
    )
    _log(command, command.request_id)
    return success(request, _show_auction(await _ask(edge, command), caller))


@router.post(
    "/{auction_id}/cancel", response_model=Success[AuctionData], responses=failures(401, 403, 404, 409, body=True)
)
async def cancel_auction(
    request: Request, edge: CurrentEdge, caller: Caller, auction_id: UUID, body: _Reason = None
) -> Response:
    """Call an auction off: nobody wins."""
    command = CancelAuction(
        auction=auction_id,
        caller=caller.user,
        role=caller.role,
        request_id=command_id(request),
        reason=None if body is None else body.reason,
        salt=token_bytes(SALT_BYTES),
    )
    _log(command, command.request_id)
    return success(request, _show_auction(await _ask(edge, command), caller))


# Asking


def _log(command: OpenAuction | PlaceBid | EndAuction | CancelAuction, id_: UUID) -> None:
    """Say which request brings a command: the line has the request's id, and the journal the command's."""
    # Bids are too many to be told of each.
    log = logger.debug if isinstance(command, PlaceBid) else logger.info
    log("a request brings a command", command=type(command).__name__, auction=command.auction, command_id=id_)


async def _ask(edge: Edge, payload: Payload) -> AuctionView:
    return _view(await edge.router.ask(payload))


def _is_unreadable(answer: Answer) -> bool:
    """Whether the shard does not know, or cannot read, what Postgres lists: then the page is the poorer by it only."""
    return isinstance(answer, Rejection) and answer.code in ("not_found", "internal")


def _view(answer: Answer) -> AuctionView:
    if isinstance(answer, Rejection):
        raise Refused(answer)
    assert isinstance(answer, AuctionView), f"this is answered by a view, not by {type(answer)}"
    return answer


# Reading


def _read_terms(body: AuctionToOpen) -> Terms:
    rule = body.soft_close
    return Terms(
        title=body.title,
        currency=body.currency,
        starting_price=_read_amount("starting_price", body.starting_price, body.currency),
        increments=_read_increments(body),
        start_time=body.start_time,
        end_time=body.end_time,
        reserve_price=_read_optional_amount("reserve_price", body.reserve_price, body.currency),
        soft_close=None
        if rule is None
        else SoftClose(
            window_ms=rule.window_s * SECOND_MS,
            extension_ms=rule.extension_s * SECOND_MS,
            max_extension_ms=rule.max_extension_s * SECOND_MS,
            anchor=rule.anchor,
        ),
        story=body.story_id,
    )


def _read_increments(body: AuctionToOpen) -> Increments:
    if body.increments is None and body.minimum_bid_increment is None:
        return default_increments(body.currency)
    if body.increments is None:
        assert body.minimum_bid_increment is not None
        return flat(_read_amount("minimum_bid_increment", body.minimum_bid_increment, body.currency))
    if body.minimum_bid_increment is not None:
        raise Invalid("increments", "An auction has either `increments` or a `minimum_bid_increment`.")
    if isinstance(body.increments, str):
        return BUILT_IN[body.increments]
    return tuple(
        Step(
            _read_amount(f"increments.{index}.from", step.from_price, body.currency),
            _read_amount(f"increments.{index}.increment", step.increment, body.currency),
        )
        for index, step in enumerate(body.increments)
    )


def _read_optional_amount(field: str, amount: Decimal | None, currency: str) -> int | None:
    return None if amount is None else _read_amount(field, amount, currency)


def _read_bid(field: str, amount: Decimal | None, currency: str) -> int | None:
    """A bid out of all bounds is for the rules to refuse, in their order; how far out does not matter."""
    if amount is not None and abs(amount) > to_decimal(AMOUNT_MAX, currency):
        return AMOUNT_MAX + 1 if amount > 0 else -1
    return _read_optional_amount(field, amount, currency)


def _read_amount(field: str, amount: Decimal, currency: str) -> int:
    try:
        return to_minor(amount, currency)
    except ValueError as problem:
        raise Invalid(field, f"The amount {problem}.") from None


def _offset(page: int, limit: int, cursor: str | None) -> int:
    """A cursor says where to go on by itself; pages count from the newest there is now."""
    return 0 if cursor is not None else (page - 1) * limit


def _read_bids_cursor(cursor: str) -> int:
    if not cursor.isascii() or not cursor.isdigit() or int(cursor) > INTEGER_MAX:
        raise Invalid("cursor", _NO_CURSOR)
    return int(cursor)


def _read_auctions_cursor(cursor: str) -> ListedAuction:
    created_at, _, auction = cursor.partition(".")
    try:
        return ListedAuction(UUID(auction), _read_bids_cursor(created_at))
    except ValueError:
        raise Invalid("cursor", _NO_CURSOR) from None


_NO_CURSOR: Final = "This is no cursor that a list has given; leave it out to begin at the newest."


# Showing


def _show_auction(view: AuctionView, caller: Identity | None) -> AuctionData:
    auction = view.snapshot
    currency = auction.currency
    data: AuctionData = {
        "auction_id": auction.auction,
        "story_id": auction.story,
        "title": auction.title,
        "currency": currency,
        "status": auction.status,
        "starting_price": to_decimal(auction.starting_price, currency),
        "price": to_decimal(auction.price, currency),
        "minimum_bid": to_decimal(auction.minimum, currency),
        "bid_count": auction.bids,
        "leader_paddle": auction.leader,
        "reserve_met": auction.reserve_met,
        "start_time": iso(auction.start_time),
        "end_time": iso(auction.end_time),
        "actual_end_time": None if view.ended_at is None else iso(view.ended_at),
        "outcome": auction.outcome,
        "seq": view.seq,
    }
    if view.you is not None:
        data["you"] = {
            "paddle": view.you.paddle,
            "max_amount": to_decimal(view.you.max_amount, currency),
            "is_leading": view.you.is_leading,
        }
    if caller is not None and (caller.user == view.maker or caller.role == "admin"):
        reserve = view.reserve_price
        data["reserve_price"] = None if reserve is None else to_decimal(reserve, currency)
    return data


def _show_bid(command: PlaceBid, accepted: BidAccepted, currency: str) -> BidData:
    is_leading = accepted.outcome == "leading"
    return {
        "bid_id": command.bid_id,
        "auction_id": command.auction,
        # All that was offered, an automatic bid's maximum too: only its bidder sees this.
        "bid_amount": to_decimal(accepted.max_amount, currency),
        "currency": currency,
        "status": "active" if is_leading else "outbid",
        "is_current_high_bid": is_leading,
        "created_at": iso(accepted.at),
    }
