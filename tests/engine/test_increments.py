"""Increments as data."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.increments import BUILT_IN, EBAY_US, Step, default_increments, flat, increment_at

# The table as the design states it, in cents.
EBAY_TABLE = [
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
]


def test_ebays_table_is_built_in() -> None:
    assert BUILT_IN["ebay_us"] is EBAY_US
    assert [(step.from_price, step.increment) for step in EBAY_US] == EBAY_TABLE


@pytest.mark.parametrize(("from_price", "increment"), EBAY_TABLE)
def test_a_step_begins_at_its_price(from_price: int, increment: int) -> None:
    assert increment_at(EBAY_US, from_price) == increment


@pytest.mark.parametrize(
    ("price", "increment"), list(zip([f - 1 for f, _ in EBAY_TABLE[1:]], [i for _, i in EBAY_TABLE], strict=False))
)
def test_under_it_the_step_before_holds(price: int, increment: int) -> None:
    assert increment_at(EBAY_US, price) == increment


def test_a_price_under_the_first_step_takes_the_first() -> None:
    assert increment_at((Step(100, 7), Step(200, 9)), 1) == 7
    assert increment_at((Step(100, 7),), 1) == 7


def test_a_flat_table_has_one_increment_for_every_price() -> None:
    assert [increment_at(flat(500), price) for price in (0, 1, 10**9)] == [500, 500, 500]


@pytest.mark.parametrize(("currency", "increment"), [("USD", 500), ("JPY", 5), ("KWD", 5_000)])
def test_the_default_is_flat_5_units_of_the_currency(currency: str, increment: int) -> None:
    assert default_increments(currency) == flat(increment)


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=8, unique=True).map(sorted),
    st.lists(st.integers(1, 9), min_size=8, max_size=8),
    st.integers(0, 60),
)
def test_the_last_step_that_the_price_reaches_counts(prices: list[int], increments: list[int], price: int) -> None:
    table = tuple(Step(from_price, increment) for from_price, increment in zip(prices, increments, strict=False))
    reached = [step.increment for step in table if step.from_price <= price]
    assert increment_at(table, price) == (reached[-1] if reached else table[0].increment)
