"""Bid increments as data: by how much a bid must pass the price, by price."""

from bisect import bisect_right
from typing import Final

import msgspec

from engine.money import to_minor


class Step(msgspec.Struct, frozen=True):
    """From this price on (inclusive), a bid must pass the price by this increment; both in minor units."""

    from_price: int
    increment: int


Increments = tuple[Step, ...]
"""Steps by rising `from_price`; a price under the first step takes the first."""

EBAY_US: Final[Increments] = tuple(
    Step(from_price, increment)
    for from_price, increment in (
        (1, 5),
        (100, 25),
        (500, 50),
        (2_500, 100),
        (10_000, 250),
        (25_000, 500),
        (50_000, 1_000),
        (100_000, 2_500),
        (250_000, 5_000),
        (500_000, 10_000),
    )
)
"""eBay's table for the United States, in cents."""

BUILT_IN: Final[dict[str, Increments]] = {"ebay_us": EBAY_US}
"""The tables that an auction may name instead of giving its own."""


def flat(increment: int) -> Increments:
    """The table with one increment for every price."""
    return (Step(1, increment),)


def default_increments(currency: str) -> Increments:
    """The product's default: a flat 5.00 (5 units of the currency)."""
    return flat(to_minor(5, currency))


def increment_at(increments: Increments, price: int) -> int:
    """By how much a bid must pass `price`."""
    if len(increments) == 1:
        return increments[0].increment
    index = bisect_right(increments, price, key=_from_price) - 1
    return increments[max(index, 0)].increment


def _from_price(step: Step) -> int:
    return step.from_price
