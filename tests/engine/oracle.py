"""A slow and obvious model of an auction, to compare the engine with.

It keeps nothing but the accepted bids and, where there was one, the early end. Everything else is worked out from them
each time it is asked for. It shares no code with the engine.
"""

from dataclasses import dataclass, field
from typing import Literal

AMOUNT_MAX = 9_999_999_999


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
        end, rule = self.rules.end_time, self.rules.soft_close
        if rule is None:
            return end
        for bid in self.competing():
            if end - bid.at <= rule.window:
                wanted = (bid.at if rule.anchor == "reset" else end) + rule.extension
                end = max(end, min(wanted, self.rules.end_time + rule.max_extension))
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
        reached = [increment for from_price, increment in self.rules.increments if from_price <= price]
        return reached[-1] if reached else self.rules.increments[0][1]

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
