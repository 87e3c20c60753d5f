"""The rules of an English auction with soft close.

`decide` says what a command brings about and changes nothing; `evolve` applies what happened and decides nothing.
Recovery is `evolve` over the stored events: the same code that runs live. Every function takes the time as an argument.

The rules: the first bid must reach the starting price, later ones the price plus the increment. The leader pays no more
than it takes to beat the runner-up by one increment, and never more than its maximum; an exact bid leads at its own
amount. A hidden reserve lifts the price once the leader's maximum reaches it.
"""

from itertools import pairwise
from typing import Literal, assert_never
from uuid import UUID

import msgspec

from engine.chain import seal
from engine.commands import CancelAuction, Command, EndAuction, ExecuteDue, OpenAuction, PayBack, PlaceBid, Terms
from engine.events import (
    BidPlaced,
    Cancelled,
    Ended,
    EndedBy,
    Event,
    Extended,
    MaximumRaised,
    Opened,
    Outcome,
    ReserveReached,
    Scheduled,
)
from engine.increments import increment_at
from engine.limits import (
    AMOUNT_MAX,
    AUCTION_DURATION_MS_MAX,
    AUCTION_NOTICE_MS_MAX,
    INCREMENT_STEPS_MAX,
    OUTAGE_LEAST_MS,
    OUTAGE_WINDOW_MS,
    REASON_LENGTH_MAX,
    SECOND_MS,
    SOFT_CLOSE_EXTENSION_MS_MAX,
    SOFT_CLOSE_TOTAL_MS_MAX,
    SOFT_CLOSE_WINDOW_MS_MAX,
    TITLE_LENGTH_MAX,
)
from engine.money import CURRENCIES, format_amount
from engine.rejections import NOT_FOUND, Rejection

Status = Literal["scheduled", "active", "ended", "cancelled"]


class Bidder(msgspec.Struct):
    """One bidder of one auction: its public number, and the most that it will pay."""

    paddle: int
    max_amount: int


class Auction(msgspec.Struct, kw_only=True):
    """The state of one auction; what `evolve` makes of its events. Not public: see `snapshot`."""

    auction: UUID
    maker: UUID
    terms: Terms
    status: Status
    price: int
    end_time: int
    end_time_max: int | None
    leader: UUID | None = None
    bids: int = 0
    bidders: dict[UUID, Bidder] = msgspec.field(default_factory=dict)
    outcome: Outcome | None = None
    ended_at: int | None = None


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """What everybody may see of an auction."""

    auction: UUID
    story: UUID | None
    title: str
    currency: str
    status: Status
    starting_price: int
    price: int
    minimum: int
    bids: int
    leader: int | None
    reserve_met: bool | None
    start_time: int
    end_time: int
    outcome: Outcome | None


# Reading a state


def snapshot(state: Auction) -> Snapshot:
    """The public view of an auction: paddles instead of people, no maximum, no reserve."""
    terms = state.terms
    assert terms.start_time is not None
    return Snapshot(
        auction=state.auction,
        story=terms.story,
        title=terms.title,
        currency=terms.currency,
        status=state.status,
        starting_price=terms.starting_price,
        price=state.price,
        minimum=minimum(state),
        bids=state.bids,
        leader=None if state.leader is None else state.bidders[state.leader].paddle,
        reserve_met=reserve_met(state),
        start_time=terms.start_time,
        end_time=state.end_time,
        outcome=state.outcome,
    )


def minimum(state: Auction) -> int:
    """The least that a newcomer's bid must reach."""
    return _minimum_at(state.terms, state.price, has_bids=state.leader is not None)


def reserve_met(state: Auction) -> bool | None:
    """Whether the leader's maximum reaches the reserve; None without a reserve."""
    if state.terms.reserve_price is None:
        return None
    return state.leader is not None and state.bidders[state.leader].max_amount >= state.terms.reserve_price


def due_at(state: Auction) -> int | None:
    """When the auction's own clock next asks for something; None once it is over."""
    if state.status == "active":
        return state.end_time
    return state.terms.start_time if state.status == "scheduled" else None


def outage_window_ms(state: Auction) -> int:
    """How near to its end an auction must be for an outage to move it."""
    soft_close = state.terms.soft_close
    return OUTAGE_WINDOW_MS if soft_close is None else soft_close.window_ms


# Deciding


def decide(state: Auction | None, command: Command, now: int) -> list[Event] | Rejection:
    """Say what `command` brings about at `now` (milliseconds), or why it does not.

    What was due before `now` must have been executed before (`ExecuteDue`, until `due_at` lies after `now`).
    """
    match command:
        case PlaceBid():
            return _place_bid(state, command, now)
        case ExecuteDue():
            return _execute_due(state, now)
        case OpenAuction():
            return _open(state, command, now)
        case EndAuction():
            return _end(state, command, now)
        case CancelAuction():
            return _cancel(state, command, now)
        case PayBack():
            return _pay_back(state, command, now)
        case _:
            assert_never(command)


def _place_bid(state: Auction | None, bid: PlaceBid, now: int) -> list[Event] | Rejection:
    assert (bid.amount is None) != (bid.max_amount is None), "a bid names an amount or a maximum"
    if state is None:
        return NOT_FOUND
    offered = bid.amount if bid.amount is not None else bid.max_amount
    assert offered is not None
    refusal = _refuse_bid(state, bid, offered)
    if refusal is not None:
        return refusal
    if state.leader == bid.bidder:
        return _raise_maximum(state, bid, offered)
    return _outbid(state, bid, offered, now)


def _refuse_bid(state: Auction, bid: PlaceBid, offered: int) -> Rejection | None:
    currency = state.terms.currency
    if bid.bidder == state.maker:
        return Rejection("own_auction", "You cannot bid on your own auction.")
    if bid.currency is not None and bid.currency != currency:
        return Rejection("currency_mismatch", f"This auction is in {currency}, not in {bid.currency}.")
    if state.status != "active":
        return _not_active(state)
    if offered < 1:
        return Rejection("amount_invalid", "A bid is an amount above zero.")
    if offered > AMOUNT_MAX:
        return Rejection("amount_too_large", f"No bid may be over {format_amount(AMOUNT_MAX, currency)}.")
    least = minimum(state)
    if state.leader == bid.bidder:
        if offered <= state.bidders[bid.bidder].max_amount:
            return Rejection("max_not_raised", "You lead already, with a maximum that is not under this one.")
    elif offered < least:
        message = f"The least that can be bid now is {format_amount(least, currency)}."
        return Rejection("bid_too_low", message, minimum=least)
    return None


def _raise_maximum(state: Auction, bid: PlaceBid, offered: int) -> list[Event]:
    """The leader replaces its own maximum: nothing else changes, but the price rises to a reserve first reached."""
    reserve = state.terms.reserve_price
    price = state.price if reserve is None or offered < reserve else max(state.price, reserve)
    least = _minimum_at(state.terms, price, has_bids=True)
    raised = MaximumRaised(
        bidder=bid.bidder,
        bid_id=bid.bid_id,
        paddle=state.bidders[bid.bidder].paddle,
        amount=bid.amount,
        max_amount=bid.max_amount,
        price=price,
        minimum=least,
        end_time=state.end_time,
    )
    return [raised] if price == state.price else [raised, ReserveReached(price, least)]


def _outbid(state: Auction, bid: PlaceBid, offered: int, now: int) -> list[Event]:
    """A bid by someone who does not lead: it takes the lead, or the leader's maximum answers at once."""
    terms = state.terms
    known = state.bidders.get(bid.bidder)
    paddle = len(state.bidders) + 1 if known is None else known.paddle
    leader = None if state.leader is None else state.bidders[state.leader]
    if leader is None or offered > leader.max_amount:
        leading_paddle, leading_max = paddle, offered
        if bid.amount is not None:
            price = offered
        elif leader is None:
            price = terms.starting_price
        else:
            price = min(offered, leader.max_amount + increment_at(terms.increments, leader.max_amount))
    else:
        leading_paddle, leading_max = leader.paddle, leader.max_amount
        price = min(leading_max, offered + increment_at(terms.increments, offered))
    reserve = terms.reserve_price
    is_reserve_met = None if reserve is None else leading_max >= reserve
    if reserve is not None and is_reserve_met:
        price = max(price, reserve)
    end_time = _soft_close(state, now)
    placed = BidPlaced(
        bidder=bid.bidder,
        bid_id=bid.bid_id,
        paddle=paddle,
        amount=bid.amount,
        max_amount=bid.max_amount,
        price=price,
        leader=leading_paddle,
        bids=state.bids + 1,
        minimum=_minimum_at(terms, price, has_bids=True),
        end_time=end_time,
        reserve_met=is_reserve_met,
    )
    if end_time == state.end_time:
        return [placed]
    return [placed, Extended(end_time, state.end_time_max, "soft_close")]


def _soft_close(state: Auction, now: int) -> int:
    """The end after a bid at `now` that changed price or leader."""
    rule = state.terms.soft_close
    if rule is None or state.end_time - now > rule.window_ms:
        return state.end_time
    start = now if rule.anchor == "reset" else state.end_time
    assert state.end_time_max is not None
    return max(state.end_time, min(start + rule.extension_ms, state.end_time_max))


def _minimum_at(terms: Terms, price: int, *, has_bids: bool) -> int:
    return price + increment_at(terms.increments, price) if has_bids else terms.starting_price


def _execute_due(state: Auction | None, now: int) -> list[Event]:
    if state is None:
        return []
    due = due_at(state)
    if due is None or now < due:
        return []
    if state.status == "scheduled":
        return [Opened(state.auction, state.maker, state.terms)]
    return [_ended(state, "deadline", now, None)]


def _pay_back(state: Auction | None, outage: PayBack, now: int) -> list[Event]:
    """Move an end that an outage came too near to: as much time is left as there was, or at least as much as it took.

    An auction whose start fell into the outage lost the time since then.
    """
    if state is None or state.status != "active":
        return []
    assert state.terms.start_time is not None
    down = max(outage.down, state.terms.start_time)
    if not down < min(state.end_time, now) or state.end_time >= now + outage_window_ms(state):
        return []
    end_time = now + max(state.end_time - down, min(now - down, OUTAGE_LEAST_MS))
    cap = None if state.end_time_max is None else state.end_time_max + end_time - state.end_time
    return [Extended(end_time, cap, "outage")]


def _open(state: Auction | None, command: OpenAuction, now: int) -> list[Event] | Rejection:
    if state is not None:
        return Rejection("already_exists", "An auction with this id exists already.")
    terms = command.terms
    problem = terms_problem(terms, now)
    if problem is not None:
        field, message = problem
        return Rejection("terms_invalid", message, field=field)
    if terms.start_time is None or terms.start_time <= now:
        terms = msgspec.structs.replace(terms, start_time=now)
        return [Opened(command.auction, command.maker, terms)]
    return [Scheduled(command.auction, command.maker, terms)]


def _end(state: Auction | None, command: EndAuction, now: int) -> list[Event] | Rejection:
    if state is None:
        return NOT_FOUND
    by = _authority(state, command, is_makers_turn=state.leader is None or state.terms.soft_close is None)
    if isinstance(by, Rejection):
        return by
    if state.status != "active":
        return _not_active(state)
    return _refuse_reason(by, command.reason) or [_ended(state, by, now, _seal_reason(command))]


def _cancel(state: Auction | None, command: CancelAuction, now: int) -> list[Event] | Rejection:
    if state is None:
        return NOT_FOUND
    by = _authority(state, command, is_makers_turn=state.leader is None)
    if isinstance(by, Rejection):
        return by
    if state.status not in ("scheduled", "active"):
        return _not_active(state)
    return _refuse_reason(by, command.reason) or [Cancelled(by, now, _seal_reason(command))]


def _authority(state: Auction, command: EndAuction | CancelAuction, *, is_makers_turn: bool) -> EndedBy | Rejection:
    """In whose name the caller may end or cancel. After the first bid its maker could end it for a friend."""
    if command.caller == state.maker and is_makers_turn:
        return "maker"
    if command.role == "admin":
        return "admin"
    if command.caller == state.maker:
        return Rejection("forbidden", "Once there is a bid, only an admin may do this.")
    return Rejection("forbidden", "Only the auction's maker or an admin may do this.")


def _refuse_reason(by: EndedBy, reason: str | None) -> Rejection | None:
    if by == "admin" and (reason is None or not reason.strip()):
        return Rejection("reason_required", "An admin who ends or cancels an auction gives a reason.", field="reason")
    if reason is not None and len(reason) > REASON_LENGTH_MAX:
        return Rejection("terms_invalid", f"A reason has at most {REASON_LENGTH_MAX} characters.", field="reason")
    return None


def _seal_reason(command: EndAuction | CancelAuction) -> str | None:
    return seal(command.salt, command.reason) if command.reason else None


def _ended(state: Auction, by: EndedBy, now: int, reason_hash: str | None) -> Ended:
    outcome: Outcome
    if state.leader is None:
        outcome = "unsold"
    elif reserve_met(state) is False:
        outcome = "reserve_not_met"
    else:
        outcome = "sold"
    is_sold = outcome == "sold"
    return Ended(
        outcome=outcome,
        winner=state.leader if is_sold else None,
        paddle=state.bidders[state.leader].paddle if is_sold and state.leader is not None else None,
        price=state.price if is_sold else None,
        by=by,
        ended_at=now,
        reason_hash=reason_hash,
    )


def _not_active(state: Auction) -> Rejection:
    if state.status == "scheduled":
        return Rejection("not_started", "This auction has not started yet.")
    if state.status == "cancelled":
        return Rejection("ended", "This auction was cancelled.")
    return Rejection("ended", "This auction has ended.")


# Applying


def evolve(state: Auction | None, event: Event) -> Auction:
    """Apply an event, in place, and return the state (a new one for an auction's first event)."""
    match event:
        case Scheduled() | Opened():
            return _begun(event)
        case BidPlaced():
            assert state is not None
            _apply_bid(state, event)
        case MaximumRaised():
            assert state is not None
            state.bidders[event.bidder].max_amount = _offered(event)
        case ReserveReached():
            assert state is not None
            state.price = event.price
        case Extended():
            assert state is not None
            state.end_time = event.end_time
            state.end_time_max = event.end_time_max
        case Ended():
            assert state is not None
            state.status = "ended"
            state.outcome = event.outcome
            state.ended_at = event.ended_at
        case Cancelled():
            assert state is not None
            state.status = "cancelled"
            state.ended_at = event.ended_at
        case _:
            assert_never(event)
    return state


def _begun(event: Scheduled | Opened) -> Auction:
    terms = event.terms
    soft_close = terms.soft_close
    return Auction(
        auction=event.auction,
        maker=event.maker,
        terms=terms,
        status="active" if isinstance(event, Opened) else "scheduled",
        price=terms.starting_price,
        end_time=terms.end_time,
        end_time_max=None if soft_close is None else terms.end_time + soft_close.max_extension_ms,
    )


def _apply_bid(state: Auction, event: BidPlaced) -> None:
    bidder = state.bidders.get(event.bidder)
    if bidder is None:
        state.bidders[event.bidder] = Bidder(event.paddle, _offered(event))
    else:
        bidder.max_amount = _offered(event)
    if event.leader == event.paddle:
        state.leader = event.bidder
    state.price = event.price
    state.bids = event.bids
    state.end_time = event.end_time


def _offered(event: BidPlaced | MaximumRaised) -> int:
    """The most that the bidder of this event will pay."""
    offered = event.amount if event.amount is not None else event.max_amount
    assert offered is not None
    return offered


# Terms


def terms_problem(terms: Terms, now: int) -> tuple[str, str] | None:
    """The field that is at fault and a sentence about it, or None where an auction may open under these terms."""
    start = now if terms.start_time is None else max(terms.start_time, now)
    if not 1 <= len(terms.title.strip()) <= len(terms.title) <= TITLE_LENGTH_MAX:
        return "title", f"A title has 1 to {TITLE_LENGTH_MAX} characters."
    if terms.currency not in CURRENCIES:
        return "currency", "This is not a currency of ISO 4217."
    if not 1 <= terms.starting_price <= AMOUNT_MAX:
        return "starting_price", _amount_sentence("A starting price", terms.currency)
    if terms.reserve_price is not None and not 1 <= terms.reserve_price <= AMOUNT_MAX:
        return "reserve_price", _amount_sentence("A reserve price", terms.currency)
    if start - now > AUCTION_NOTICE_MS_MAX:
        return "start_time", "An auction starts within a year."
    if terms.end_time <= start:
        return "end_time", "An auction ends after it starts, and not in the past."
    if terms.end_time - start > AUCTION_DURATION_MS_MAX:
        return "end_time", "An auction lasts at most a year."
    return _increments_problem(terms) or _soft_close_problem(terms)


def _increments_problem(terms: Terms) -> tuple[str, str] | None:
    steps = terms.increments
    if not 1 <= len(steps) <= INCREMENT_STEPS_MAX:
        return "increments", f"A table of increments has 1 to {INCREMENT_STEPS_MAX} steps."
    if any(not 1 <= step.increment <= AMOUNT_MAX for step in steps):
        return "increments", _amount_sentence("An increment", terms.currency)
    prices = [step.from_price for step in steps]
    if prices[0] < 0 or any(lower >= higher for lower, higher in pairwise(prices)):
        return "increments", "The steps of a table of increments begin at rising prices, none of them negative."
    return None


def _soft_close_problem(terms: Terms) -> tuple[str, str] | None:
    rule = terms.soft_close
    if rule is None:
        return None
    if not SECOND_MS <= rule.window_ms <= SOFT_CLOSE_WINDOW_MS_MAX:
        return "soft_close.window_s", f"The window is 1 to {SOFT_CLOSE_WINDOW_MS_MAX // SECOND_MS} seconds."
    if not SECOND_MS <= rule.extension_ms <= SOFT_CLOSE_EXTENSION_MS_MAX:
        return "soft_close.extension_s", f"The extension is 1 to {SOFT_CLOSE_EXTENSION_MS_MAX // SECOND_MS} seconds."
    if not 0 <= rule.max_extension_ms <= SOFT_CLOSE_TOTAL_MS_MAX:
        return "soft_close.max_extension_s", f"The cap is 0 to {SOFT_CLOSE_TOTAL_MS_MAX // SECOND_MS} seconds."
    return None


def _amount_sentence(what: str, currency: str) -> str:
    return f"{what} is above zero and at most {format_amount(AMOUNT_MAX, currency)}."
