"""Events are for ever: what was stored must be read, byte for byte, by every later program."""

from typing import get_args

import msgspec
import pytest

from engine.commands import SoftClose
from engine.events import (
    KINDS,
    VERSION,
    BidPlaced,
    Cancelled,
    Ended,
    Event,
    Extended,
    MaximumRaised,
    Opened,
    ReserveReached,
    Scheduled,
    decode,
    encode,
)
from engine.increments import Step, flat
from tests.engine.support import ANNA, AUCTION, MAKER, NOW, REQUEST, make_terms

FULL_TERMS = make_terms(
    title='A bowl, "Ümlaut" \N{AMPHORA} and \0',
    start_time=NOW,
    reserve_price=8_000,
    increments=(Step(1, 5), Step(100, 25)),
    soft_close=SoftClose(window_ms=60_000, extension_ms=90_000, max_extension_ms=150_000, anchor="append"),
)
BARE_TERMS = make_terms(start_time=NOW, increments=flat(500), story=None)

# Stored bytes of version 1. A line here is never changed: a new shape is a new version with a reader of its own.
GOLDEN: list[tuple[str, Event, bytes]] = [
    (
        "scheduled",
        Scheduled(AUCTION, MAKER, FULL_TERMS),
        b'{"auction":"a0000000-0000-4000-8000-000000000000",'
        b'"maker":"11111111-1111-4111-8111-111111111111","terms":{"title":"A bowl,'
        b' \\"\xc3\x9cmlaut\\" \xf0\x9f\x8f\xba and \\u0000","currency":"USD","starting_price":1000,'
        b'"increments":[{"from_price":1,"increment":5},{"from_price":100,"increment":25}],'
        b'"start_time":1700000000000,"end_time":1700003600000,"reserve_price":8000,'
        b'"soft_close":{"window_ms":60000,"extension_ms":90000,"max_extension_ms":150000,'
        b'"anchor":"append"},"story":"50000000-0000-4000-8000-000000000000"}}',
    ),
    (
        "opened",
        Opened(AUCTION, MAKER, BARE_TERMS),
        b'{"auction":"a0000000-0000-4000-8000-000000000000",'
        b'"maker":"11111111-1111-4111-8111-111111111111","terms":{"title":"A bowl","currency":"USD",'
        b'"starting_price":1000,"increments":[{"from_price":1,"increment":500}],'
        b'"start_time":1700000000000,"end_time":1700003600000,"reserve_price":null,"soft_close":null,'
        b'"story":null}}',
    ),
    (
        "bid_placed",
        BidPlaced(ANNA, REQUEST, 2, None, 5_000, 2_500, 1, 7, 3_000, NOW, False),
        b'{"bidder":"22222222-2222-4222-8222-222222222222",'
        b'"bid_id":"99999999-9999-4999-8999-999999999999","paddle":2,"amount":null,"max_amount":5000,'
        b'"price":2500,"leader":1,"bids":7,"minimum":3000,"end_time":1700000000000,"reserve_met":false}',
    ),
    (
        "bid_placed",
        BidPlaced(ANNA, REQUEST, 2, 5_000, None, 5_000, 2, 7, 5_500, NOW, None),
        b'{"bidder":"22222222-2222-4222-8222-222222222222",'
        b'"bid_id":"99999999-9999-4999-8999-999999999999","paddle":2,"amount":5000,"max_amount":null,'
        b'"price":5000,"leader":2,"bids":7,"minimum":5500,"end_time":1700000000000,"reserve_met":null}',
    ),
    (
        "maximum_raised",
        MaximumRaised(ANNA, REQUEST, 2, None, 9_000, 2_500, 3_000, NOW),
        b'{"bidder":"22222222-2222-4222-8222-222222222222",'
        b'"bid_id":"99999999-9999-4999-8999-999999999999","paddle":2,"amount":null,"max_amount":9000,'
        b'"price":2500,"minimum":3000,"end_time":1700000000000}',
    ),
    ("reserve_reached", ReserveReached(8_000, 8_500), b'{"price":8000,"minimum":8500}'),
    (
        "extended",
        Extended(NOW + 90_000, NOW + 150_000, "soft_close"),
        b'{"end_time":1700000090000,"end_time_max":1700000150000,"reason":"soft_close"}',
    ),
    (
        "extended",
        Extended(NOW + 90_000, None, "outage"),
        b'{"end_time":1700000090000,"end_time_max":null,"reason":"outage"}',
    ),
    (
        "ended",
        Ended("sold", ANNA, 2, 5_500, "deadline", NOW),
        b'{"outcome":"sold","winner":"22222222-2222-4222-8222-222222222222","paddle":2,"price":5500,'
        b'"by":"deadline","ended_at":1700000000000,"reason_hash":null}',
    ),
    (
        "ended",
        Ended("reserve_not_met", None, None, None, "admin", NOW, "5f"),
        b'{"outcome":"reserve_not_met","winner":null,"paddle":null,"price":null,"by":"admin",'
        b'"ended_at":1700000000000,"reason_hash":"5f"}',
    ),
    ("cancelled", Cancelled("maker", NOW), b'{"by":"maker","ended_at":1700000000000,"reason_hash":null}'),
]


@pytest.mark.parametrize(("kind", "event", "body"), GOLDEN)
def test_stored_bytes_of_version_1_stay_what_they_are(kind: str, event: Event, body: bytes) -> None:
    assert (KINDS[type(event)], VERSION) == (kind, 1)
    assert encode(event) == body
    assert decode(kind, 1, body) == event


def test_every_kind_has_a_name_and_a_golden_example() -> None:
    assert set(KINDS) == set(get_args(Event))
    assert len(set(KINDS.values())) == len(KINDS)
    assert {kind for kind, _, _ in GOLDEN} == set(KINDS.values())


@pytest.mark.parametrize("kind", sorted(KINDS.values()))
def test_every_kind_is_read_back_as_itself(kind: str) -> None:
    [event] = [event for name, event, _ in GOLDEN if name == kind][:1]
    read = decode(kind, VERSION, encode(event))
    assert type(read) is type(event)
    assert read == event


@pytest.mark.parametrize(("kind", "version"), [("bid_withdrawn", 1), ("bid_placed", 0), ("bid_placed", VERSION + 1)])
def test_an_unknown_kind_or_version_cannot_be_read(kind: str, version: int) -> None:
    with pytest.raises(ValueError, match=f"no reader for events of kind '{kind}', version {version}"):
        decode(kind, version, b"{}")


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b'{"price":"8000","minimum":8500}', b"\xff"])
def test_a_body_that_is_not_the_kinds_cannot_be_read(body: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - msgspec words it.
        decode("reserve_reached", 1, body)


def test_events_cannot_be_changed() -> None:
    event = ReserveReached(8_000, 8_500)
    with pytest.raises(AttributeError):
        event.price = 1  # type: ignore[misc]
    assert msgspec.structs.replace(event, price=1) != event
