"""Random histories of one auction, and how they are played to the engine and to the oracle at once.

Amounts and times are drawn close to where the rules turn: around the minimum, the leader's maximum and the reserve,
around the start, the end and the soft close's window.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar
from uuid import UUID

from hypothesis import strategies as st

from engine.auction import Snapshot, snapshot
from engine.commands import CancelAuction, Command, EndAuction, OpenAuction, PayBack, PlaceBid, Role, SoftClose, Terms
from engine.events import Event
from engine.increments import Increments, Step, flat
from engine.limits import AMOUNT_MAX
from engine.rejections import Rejection
from tests.engine.oracle import Oracle, Rules, SoftCloseRule
from tests.engine.support import (
    ADMIN,
    ANNA,
    AUCTION,
    BEN,
    CLEO,
    DORA,
    MAKER,
    NOW,
    REQUEST,
    STRANGER,
    Driver,
    make_terms,
)

WINDOW_MS = 5_000

INCREMENTS: list[Increments] = [
    flat(1),
    flat(5),
    (Step(0, 1), Step(20, 5)),
    # Not rising, and beginning above the least price.
    (Step(10, 3), Step(15, 1), Step(30, 7)),
]


@dataclass(frozen=True)
class Moment:
    """A time, relative to the last command or to the auction's start or end; never before the last command."""

    base: Literal["last", "start", "end"]
    offset: int


@dataclass(frozen=True)
class Amount:
    base: Literal["nothing", "minimum", "maximum", "reserve"]
    offset: int


@dataclass(frozen=True)
class Bid:
    moment: Moment
    bidder: UUID
    amount: Amount
    is_exact: bool
    currency: str | None


@dataclass(frozen=True)
class Stop:
    """An attempt to end or to cancel."""

    moment: Moment
    wanted: Literal["end", "cancel"]
    caller: UUID
    role: Role
    reason: str | None


@dataclass(frozen=True)
class Outage:
    """From this moment on nobody is there for so long."""

    moment: Moment
    lost_ms: int


@dataclass(frozen=True)
class History:
    terms: Terms
    steps: list[Bid | Stop | Outage]


@dataclass(frozen=True)
class Turn:
    """One command, with the engine's answer to it and the oracle's."""

    now: int
    command: Command
    before: Snapshot
    result: list[Event] | Rejection
    expected_code: str | None
    driver: Driver
    oracle: Oracle


# Drawing


def terms() -> st.SearchStrategy[Terms]:
    soft_close = st.builds(
        SoftClose,
        window_ms=st.sampled_from([1_000, WINDOW_MS]),
        extension_ms=st.sampled_from([1_000, WINDOW_MS, 8_000]),
        max_extension_ms=st.sampled_from([0, 3_000, 10_000, 1_000_000]),
        anchor=st.sampled_from(["reset", "append"]),
    )
    return st.builds(
        make_terms,
        starting_price=st.integers(1, 20),
        reserve_price=st.none() | st.integers(1, 120),
        increments=st.sampled_from(INCREMENTS),
        start_time=st.sampled_from([None, NOW - 5_000, NOW, NOW + 1, NOW + 2_000]),
        end_time=st.sampled_from([NOW + 4_000, NOW + 20_000]),
        soft_close=st.none() | soft_close,
    )


T = TypeVar("T")


def _weighted(*choices: tuple[int, st.SearchStrategy[T]]) -> st.SearchStrategy[T]:
    """Draw from each strategy as often as its weight says. (`one_of` takes a strategy that is repeated once.)"""
    strategies = [strategy for weight, strategy in choices for _ in range(weight)]
    return st.integers(0, len(strategies) - 1).flatmap(strategies.__getitem__)


def _moments() -> st.SearchStrategy[Moment]:
    around_windows = [-WINDOW_MS - 1, -WINDOW_MS, 1 - WINDOW_MS, -1_001, -1_000, -999, -1]
    return _weighted(
        (16, st.builds(Moment, base=st.just("last"), offset=st.just(0))),
        (4, st.builds(Moment, base=st.just("last"), offset=st.sampled_from([1, 500, 1_000]))),
        (3, st.builds(Moment, base=st.just("start"), offset=st.sampled_from([-1, 0, 1]))),
        (6, st.builds(Moment, base=st.just("end"), offset=st.sampled_from(around_windows))),
        (1, st.builds(Moment, base=st.just("end"), offset=st.sampled_from([0, 1]))),
    )


def _amounts() -> st.SearchStrategy[Amount]:
    return _weighted(
        (6, st.builds(Amount, base=st.just("minimum"), offset=st.integers(-1, 12))),
        (6, st.builds(Amount, base=st.just("maximum"), offset=st.integers(-1, 8))),
        (2, st.builds(Amount, base=st.just("reserve"), offset=st.integers(-1, 1))),
        (2, st.builds(Amount, base=st.just("nothing"), offset=st.integers(1, 60))),
        (1, st.builds(Amount, base=st.just("nothing"), offset=st.sampled_from([-1, 0, AMOUNT_MAX, AMOUNT_MAX + 1]))),
    )


_BIDS = st.builds(
    Bid,
    moment=_moments(),
    bidder=_weighted((20, st.sampled_from([ANNA, BEN, CLEO, DORA])), (1, st.just(MAKER))),
    amount=_amounts(),
    is_exact=st.booleans(),
    currency=_weighted((20, st.sampled_from([None, "USD"])), (1, st.just("EUR"))),
)
_STOPS = st.builds(
    Stop,
    moment=_moments(),
    wanted=st.sampled_from(["end", "cancel"]),
    caller=st.sampled_from([MAKER, ADMIN, STRANGER]),
    role=_weighted((2, st.sampled_from(["viewer", "maker", "moderator"])), (1, st.just("admin"))),
    reason=st.sampled_from([None, "", "A reason"]),
)


_OUTAGES = st.builds(
    Outage, moment=_moments(), lost_ms=st.sampled_from([1_001, 2_000, WINDOW_MS, WINDOW_MS + 1, 59_999, 60_001])
)


def histories() -> st.SearchStrategy[History]:
    # Few attempts to end and few outages, so that most auctions come to something.
    steps = st.integers(1, 20).flatmap(
        lambda least: st.lists(_weighted((24, _BIDS), (1, _STOPS), (1, _OUTAGES)), min_size=least, max_size=30)
    )
    return st.builds(History, terms=terms(), steps=steps)


# Playing


def play(history: History) -> Iterator[Turn]:
    """Open the auction and give each step to both; what was due before it has been executed by then."""
    rules = _rules(history.terms)
    driver, oracle, now = Driver(), Oracle(rules), NOW
    opening = OpenAuction(auction=AUCTION, maker=MAKER, request_id=REQUEST, terms=history.terms)
    assert not isinstance(driver.submit(opening, now), Rejection)
    for step in history.steps:
        now = max(now, _time(step.moment, now, oracle))
        driver.execute_due(now)
        before = snapshot(driver.auction)
        if isinstance(step, Outage):
            down, now = now, now + step.lost_ms
            if oracle.early_end is None:
                oracle.pay_back(down, now)
            yield Turn(now, PayBack(AUCTION, down), before, driver.pay_back(down, now), None, driver, oracle)
            continue
        if isinstance(step, Bid):
            amount = _amount(step.amount, oracle)
            bid_id = UUID(int=len(driver.events))
            command: Command = PlaceBid(
                auction=AUCTION,
                bidder=step.bidder,
                bid_id=bid_id,
                amount=amount if step.is_exact else None,
                max_amount=None if step.is_exact else amount,
                currency=step.currency,
            )
            code = oracle.bid(now, str(step.bidder), amount, is_exact=step.is_exact, currency=step.currency)
        else:
            caller, is_admin = str(step.caller), step.role == "admin"
            kind = EndAuction if step.wanted == "end" else CancelAuction
            command = kind(auction=AUCTION, caller=step.caller, role=step.role, request_id=REQUEST, reason=step.reason)
            attempt = oracle.end if step.wanted == "end" else oracle.cancel
            code = attempt(now, caller, is_admin=is_admin, reason=step.reason)
        result = driver.submit(command, now)
        yield Turn(now, command, before, result, code, driver, oracle)


def _rules(terms: Terms) -> Rules:
    soft_close = None
    if terms.soft_close is not None:
        rule = terms.soft_close
        soft_close = SoftCloseRule(rule.window_ms, rule.extension_ms, rule.max_extension_ms, rule.anchor)
    return Rules(
        maker=str(MAKER),
        currency=terms.currency,
        starting_price=terms.starting_price,
        reserve_price=terms.reserve_price,
        increments=[(step.from_price, step.increment) for step in terms.increments],
        start_time=NOW if terms.start_time is None else max(NOW, terms.start_time),
        end_time=terms.end_time,
        soft_close=soft_close,
    )


def _time(moment: Moment, last: int, oracle: Oracle) -> int:
    base = {"last": last, "start": oracle.rules.start_time, "end": oracle.end_time()}[moment.base]
    return base + moment.offset


def _amount(amount: Amount, oracle: Oracle) -> int:
    base = {
        "nothing": 0,
        "minimum": oracle.minimum(),
        "maximum": oracle.highest(oracle.accepted),
        "reserve": oracle.rules.reserve_price or 0,
    }[amount.base]
    return base + amount.offset
