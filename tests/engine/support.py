"""What the engine's tests share: people, terms, and a driver that treats one auction as a shard does."""

from typing import Any
from uuid import UUID

import msgspec

from engine.auction import Auction, decide, due_at, evolve
from engine.commands import (
    CancelAuction,
    Command,
    EndAuction,
    ExecuteDue,
    OpenAuction,
    PayBack,
    PlaceBid,
    Role,
    SoftClose,
    Terms,
)
from engine.events import KINDS, VERSION, Event, decode, encode
from engine.increments import flat
from engine.rejections import Rejection

AUCTION = UUID("a0000000-0000-4000-8000-000000000000")
STORY = UUID("50000000-0000-4000-8000-000000000000")
MAKER = UUID("11111111-1111-4111-8111-111111111111")
ANNA = UUID("22222222-2222-4222-8222-222222222222")
BEN = UUID("33333333-3333-4333-8333-333333333333")
CLEO = UUID("44444444-4444-4444-8444-444444444444")
DORA = UUID("55555555-5555-4555-8555-555555555555")
ADMIN = UUID("66666666-6666-4666-8666-666666666666")
STRANGER = UUID("77777777-7777-4777-8777-777777777777")
REQUEST = UUID("99999999-9999-4999-8999-999999999999")

NOW = 1_700_000_000_000
END = NOW + 3_600_000
SOFT_CLOSE = SoftClose(window_ms=60_000, extension_ms=90_000, max_extension_ms=150_000)


def make_terms(**changes: Any) -> Terms:
    """Terms that are fine: an hour from now, from 10.00 on, by 5.00, without reserve or soft close."""
    terms = Terms(
        title="A bowl",
        currency="USD",
        starting_price=1_000,
        increments=flat(500),
        start_time=None,
        end_time=END,
        story=STORY,
    )
    return msgspec.structs.replace(terms, **changes)


def replay(events: list[Event]) -> Auction | None:
    """What recovery makes of the events, by way of their stored bytes."""
    state: Auction | None = None
    for event in events:
        state = evolve(state, decode(KINDS[type(event)], VERSION, encode(event)))
    return state


class Driver:
    """One auction in memory. Executes what is due before each command, and applies what is decided."""

    def __init__(self) -> None:
        self.state: Auction | None = None
        self.events: list[Event] = []

    @classmethod
    def opened(cls, now: int = NOW, **terms: Any) -> "Driver":
        driver = cls()
        command = OpenAuction(auction=AUCTION, maker=MAKER, request_id=REQUEST, terms=make_terms(**terms))
        assert not isinstance(driver.submit(command, now), Rejection)
        return driver

    @property
    def auction(self) -> Auction:
        assert self.state is not None
        return self.state

    def submit(self, command: Command, now: int) -> list[Event] | Rejection:
        self.execute_due(now)
        return self._take_up(command, now)

    def execute_due(self, now: int) -> None:
        while self.state is not None and (due := due_at(self.state)) is not None and due <= now:
            assert self._take_up(ExecuteDue(self.state.auction), now), "what is due brings something about"

    def pay_back(self, down: int, now: int) -> list[Event]:
        """An outage from `down` until now, in which no deadline was executed; what was to open opens first."""
        self.execute_due(down)
        if self.auction.status == "scheduled" and due_at(self.auction) <= now:  # type: ignore[operator]  # It has one.
            self._take_up(ExecuteDue(self.auction.auction), now)
        return accepted(self._take_up(PayBack(self.auction.auction, down), now))

    def _take_up(self, command: Command, now: int) -> list[Event] | Rejection:
        before = msgspec.json.encode(self.state)
        result = decide(self.state, command, now)
        assert msgspec.json.encode(self.state) == before, "decide changes nothing"
        if not isinstance(result, Rejection):
            for event in result:
                self.state = evolve(self.state, event)
            self.events += result
        return result

    # Shorthands: what came of it

    def try_bid(
        self,
        bidder: UUID,
        *,
        exactly: int | None = None,
        up_to: int | None = None,
        now: int = NOW,
        currency: str | None = None,
    ) -> list[Event] | Rejection:
        bid_id = UUID(int=len(self.events))
        command = PlaceBid(
            auction=AUCTION, bidder=bidder, bid_id=bid_id, amount=exactly, max_amount=up_to, currency=currency
        )
        return self.submit(command, now)

    def bid(self, bidder: UUID, *, exactly: int | None = None, up_to: int | None = None, now: int = NOW) -> list[Event]:
        return accepted(self.try_bid(bidder, exactly=exactly, up_to=up_to, now=now))

    def end(
        self, caller: UUID, *, role: Role = "viewer", reason: str | None = None, now: int = NOW
    ) -> list[Event] | Rejection:
        command = EndAuction(auction=AUCTION, caller=caller, role=role, request_id=REQUEST, reason=reason)
        return self.submit(command, now)

    def cancel(
        self, caller: UUID, *, role: Role = "viewer", reason: str | None = None, now: int = NOW
    ) -> list[Event] | Rejection:
        command = CancelAuction(auction=AUCTION, caller=caller, role=role, request_id=REQUEST, reason=reason)
        return self.submit(command, now)


def accepted(result: list[Event] | Rejection) -> list[Event]:
    assert not isinstance(result, Rejection), result
    return result


def refused(result: list[Event] | Rejection) -> Rejection:
    assert isinstance(result, Rejection), result
    assert not result.is_transient
    assert result.message.endswith(".")
    return result
