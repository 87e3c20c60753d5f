"""A slow and obvious model of an auction, to compare the engine with.

`Oracle` keeps nothing but the accepted bids, the outages that were paid back and, where there was one, the early end.
Everything else is worked out from them each time it is asked for. `Course` is the same auction played forward, for
histories that are too long for that; a test holds the two together. They share no code with the engine.
"""

from dataclasses import dataclass, field
from typing import Literal

AMOUNT_MAX = 9_999_999_999
OUTAGE = 1_000
"""A shorter one is none."""
OUTAGE_LEFT = 60_000
WINDOW_WITHOUT_SOFT_CLOSE = 60_000


@dataclass(frozen=True)
class SoftCloseRule:
    window: int
    extension: int
    max_extension: int
    anchor: Literal["reset", "append"]


@dataclass(frozen=True)
class Rules:
    maker: str
    currency: str
    starting_price: int
    reserve_price: int | None
    increments: list[tuple[int, int]]
    """(from_price, increment), by rising price."""
    start_time: int
    end_time: int
    soft_close: SoftCloseRule | None


@dataclass(frozen=True)
class AcceptedBid:
    at: int
    bidder: str
    amount: int
    is_exact: bool


@dataclass(frozen=True)
class PaidBack:
    """An outage moved the end, and the cap with it, when so many bids had been accepted."""

    bids: int
    moved_by: int


@dataclass(frozen=True)
class EarlyEnd:
    status: Literal["ended", "cancelled"]
    by: Literal["maker", "admin"]


@dataclass(frozen=True)
class View:
    """All that can be said of the auction at one moment."""

    status: str
    price: int
    minimum: int
    leader: str | None
    bids: int
    reserve_met: bool | None
    end_time: int
    outcome: str | None
    ended_by: str | None
    paddles: dict[str, int]
    maximums: dict[str, int]


@dataclass
class Oracle:
    rules: Rules
    accepted: list[AcceptedBid] = field(default_factory=list)
    paid_back: list[PaidBack] = field(default_factory=list)
    early_end: EarlyEnd | None = None

    # Commands: the code of the refusal, or None where it is accepted

    def bid(self, now: int, bidder: str, amount: int, *, is_exact: bool, currency: str | None = None) -> str | None:
        code = self._bid_refusal(now, bidder, amount, currency)
        if code is None:
            self.accepted.append(AcceptedBid(now, bidder, amount, is_exact))
        return code

    def _bid_refusal(self, now: int, bidder: str, amount: int, currency: str | None) -> str | None:
        reasons = [
            ("own_auction", bidder == self.rules.maker),
            ("currency_mismatch", currency not in (None, self.rules.currency)),
            ("not_started", self.status(now) == "scheduled"),
            ("ended", self.status(now) in ("ended", "cancelled")),
            ("amount_invalid", amount < 1),
            ("amount_too_large", amount > AMOUNT_MAX),
            ("bid_too_low", bidder != self.leader() and amount < self.minimum()),
            ("max_not_raised", bidder == self.leader() and amount <= self.highest(self.accepted)),
        ]
        return next((code for code, applies in reasons if applies), None)

    def end(self, now: int, caller: str, *, is_admin: bool, reason: str | None) -> str | None:
        may_maker = not self.accepted or self.rules.soft_close is None
        return self._stop(now, caller, "ended", is_admin=is_admin, reason=reason, may_maker=may_maker)

    def cancel(self, now: int, caller: str, *, is_admin: bool, reason: str | None) -> str | None:
        may_maker = not self.accepted
        return self._stop(now, caller, "cancelled", is_admin=is_admin, reason=reason, may_maker=may_maker)

    def _stop(
        self,
        now: int,
        caller: str,
        wanted: Literal["ended", "cancelled"],
        *,
        is_admin: bool,
        reason: str | None,
        may_maker: bool,
    ) -> str | None:
        as_maker = caller == self.rules.maker and may_maker
        reasons = [
            ("forbidden", not as_maker and not is_admin),
            ("not_started", wanted == "ended" and self.status(now) == "scheduled"),
            ("ended", self.status(now) in ("ended", "cancelled")),
            ("reason_required", not as_maker and not reason),
        ]
        code = next((code for code, applies in reasons if applies), None)
        if code is None:
            self.early_end = EarlyEnd(wanted, "maker" if as_maker else "admin")
        return code

    def pay_back(self, down: int, back: int) -> None:
        """The auction could not be reached from `down` to `back`."""
        end = end_after_outage(self.rules, self.end_time(), down, back)
        if end is not None:
            self.paid_back.append(PaidBack(len(self.accepted), end - self.end_time()))

    # What follows from the accepted bids

    def view(self, now: int) -> View:
        return View(
            status=self.status(now),
            price=self.price(),
            minimum=self.minimum(),
            leader=self.leader(),
            bids=len(self.competing()),
            reserve_met=self.reserve_met(),
            end_time=self.end_time(),
            outcome=self.outcome(now),
            ended_by=self.ended_by(now),
            paddles=self.paddles(),
            maximums={bidder: self.highest(self._bids_of(bidder)) for bidder in self.paddles()},
        )

    def status(self, now: int) -> str:
        if self.early_end is not None:
            return self.early_end.status
        if now < self.rules.start_time:
            return "scheduled"
        return "active" if now < self.end_time() else "ended"

    def leader(self) -> str | None:
        return self._leader_of(self.accepted)

    def price(self) -> int:
        """What the last bid that was not the leader's own made of it, and at least a reserve that is reached."""
        price = self.rules.starting_price
        if self.accepted:
            price = self._price_after(self.competing()[-1])
        if self.reserve_met() and self.rules.reserve_price is not None:
            price = max(price, self.rules.reserve_price)
        return price

    def _price_after(self, bid: AcceptedBid) -> int:
        earlier = self.accepted[: self.accepted.index(bid)]
        if bid.amount > self.highest(earlier):
            if bid.is_exact:
                return bid.amount
            if not earlier:
                return self.rules.starting_price
            return min(bid.amount, self._raised(self.highest(earlier)))
        return min(self.highest(earlier), self._raised(bid.amount))

    def minimum(self) -> int:
        return self._raised(self.price()) if self.accepted else self.rules.starting_price

    def reserve_met(self) -> bool | None:
        if self.rules.reserve_price is None:
            return None
        return self.highest(self.accepted) >= self.rules.reserve_price

    def competing(self) -> list[AcceptedBid]:
        """The bids that count: those of a bidder who did not lead already."""
        return [bid for place, bid in enumerate(self.accepted) if self._leader_of(self.accepted[:place]) != bid.bidder]

    def end_time(self) -> int:
        end, rule, competing = self.rules.end_time, self.rules.soft_close, self.competing()
        for place in range(len(self.accepted) + 1):
            moved_until_now = [paid.moved_by for paid in self.paid_back if paid.bids <= place]
            end += sum(paid.moved_by for paid in self.paid_back if paid.bids == place)
            bid = self.accepted[place] if place < len(self.accepted) else None
            if rule is not None and bid is not None and bid in competing and end - bid.at <= rule.window:
                wanted = (bid.at if rule.anchor == "reset" else end) + rule.extension
                end = max(end, min(wanted, self.rules.end_time + rule.max_extension + sum(moved_until_now)))
        return end

    def outcome(self, now: int) -> str | None:
        if self.status(now) != "ended":
            return None
        if not self.accepted:
            return "unsold"
        return "reserve_not_met" if self.reserve_met() is False else "sold"

    def ended_by(self, now: int) -> str | None:
        if self.early_end is not None:
            return self.early_end.by
        return "deadline" if self.status(now) == "ended" else None

    def paddles(self) -> dict[str, int]:
        in_order = list(dict.fromkeys(bid.bidder for bid in self.accepted))
        return {bidder: number for number, bidder in enumerate(in_order, start=1)}

    def increment(self, price: int) -> int:
        return increment_at(self.rules, price)

    def _raised(self, price: int) -> int:
        return price + self.increment(price)

    def _bids_of(self, bidder: str) -> list[AcceptedBid]:
        return [bid for bid in self.accepted if bid.bidder == bidder]

    @staticmethod
    def highest(bids: list[AcceptedBid]) -> int:
        return max((bid.amount for bid in bids), default=0)

    @staticmethod
    def _leader_of(bids: list[AcceptedBid]) -> str | None:
        """The one who bid the most; of equals the first."""
        return max(bids, key=lambda bid: bid.amount).bidder if bids else None


@dataclass
class Course:
    """An auction played forward, one accepted bid after another. What it says of each moment is what `Oracle` says."""

    rules: Rules
    leader: str | None = None
    price: int = 0
    bids: int = 0
    end_time: int = 0
    cap: int = 0
    """How far bids may move the end."""
    paddles: dict[str, int] = field(default_factory=dict)
    maximums: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.price = self.rules.starting_price
        self.end_time = self.cap = self.rules.end_time
        if self.rules.soft_close is not None:
            self.cap += self.rules.soft_close.max_extension

    def refusal(self, bidder: str, amount: int) -> str | None:
        """Why an active auction refuses a bid, or None."""
        if bidder == self.rules.maker:
            return "own_auction"
        if amount < 1:
            return "amount_invalid"
        if amount > AMOUNT_MAX:
            return "amount_too_large"
        if bidder == self.leader:
            return "max_not_raised" if amount <= self.maximums[bidder] else None
        return "bid_too_low" if amount < self.minimum() else None

    def bid(self, now: int, bidder: str, amount: int, *, is_exact: bool) -> None:
        """A bid that is not refused."""
        if bidder == self.leader:
            self.maximums[bidder] = amount
            self._reach_reserve()
            return
        highest = 0 if self.leader is None else self.maximums[self.leader]
        if amount <= highest:
            self.price = min(highest, amount + increment_at(self.rules, amount))
        elif is_exact:
            self.price = amount
        elif self.leader is not None:
            self.price = min(amount, highest + increment_at(self.rules, highest))
        if amount > highest:
            self.leader = bidder
        self.bids += 1
        self.paddles.setdefault(bidder, len(self.paddles) + 1)
        self.maximums[bidder] = amount
        self._reach_reserve()
        rule = self.rules.soft_close
        if rule is not None and self.end_time - now <= rule.window:
            wanted = (now if rule.anchor == "reset" else self.end_time) + rule.extension
            self.end_time = max(self.end_time, min(wanted, self.cap))

    def move_end(self, end_time: int) -> None:
        """An outage was paid back."""
        self.cap += end_time - self.end_time
        self.end_time = end_time

    def minimum(self) -> int:
        return self.price if self.leader is None else self.price + increment_at(self.rules, self.price)

    def reserve_met(self) -> bool | None:
        reserve = self.rules.reserve_price
        if reserve is None:
            return None
        return self.leader is not None and self.maximums[self.leader] >= reserve

    def outcome(self) -> str:
        """What becomes of it when it ends now."""
        if self.leader is None:
            return "unsold"
        return "reserve_not_met" if self.reserve_met() is False else "sold"

    def _reach_reserve(self) -> None:
        if self.reserve_met():
            self.price = max(self.price, self.rules.reserve_price or 0)


def increment_at(rules: Rules, price: int) -> int:
    """By how much a bid must pass a price."""
    reached = [increment for from_price, increment in rules.increments if from_price <= price]
    return reached[-1] if reached else rules.increments[0][1]


def end_after_outage(rules: Rules, end_time: int, down: int, back: int) -> int | None:
    """Where the end moves that an outage came too near to; None where it stays."""
    if back - down <= OUTAGE:
        return None
    down = max(down, rules.start_time)
    window = WINDOW_WITHOUT_SOFT_CLOSE if rules.soft_close is None else rules.soft_close.window
    if down >= back or not down < end_time < back + window:
        return None
    return back + max(end_time - down, min(back - down, OUTAGE_LEFT))
