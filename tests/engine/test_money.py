"""Exact money: what people write, what is kept, what is shown."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.limits import AMOUNT_MAX
from engine.money import CURRENCIES, format_amount, to_decimal, to_minor

CURRENCY = st.sampled_from(sorted(CURRENCIES))


@pytest.mark.parametrize(
    ("value", "currency", "minor"),
    [
        ("45.00", "USD", 4_500),
        ("45", "USD", 4_500),
        ("45.5", "USD", 4_550),
        (45, "USD", 4_500),
        (Decimal("0.01"), "USD", 1),
        ("1.000", "USD", 100),
        ("0045", "USD", 4_500),
        (Decimal("4.5e1"), "USD", 4_500),
        ("500", "JPY", 500),
        ("500.0", "JPY", 500),
        ("1.234", "KWD", 1_234),
        ("0", "USD", 0),
        ("-3.20", "USD", -320),
        ("99999999.99", "USD", AMOUNT_MAX),
        ("-99999999.99", "USD", -AMOUNT_MAX),
    ],
)
def test_what_is_written_in_the_major_unit_is_kept_in_the_minor(
    value: Decimal | int | str, currency: str, minor: int
) -> None:
    assert to_minor(value, currency) == minor


@pytest.mark.parametrize(
    "value",
    [
        *("", "ten", "1,000", "1_000", " 45", "45 ", "45\n", "+45", "45.", ".5", "0x2d", "4.5e1", "1e1000000", "４５"),  # noqa: RUF001
        *("NaN", "sNaN", "Infinity", "-Infinity", Decimal("NaN"), Decimal("sNaN"), Decimal("Infinity")),
    ],
)
def test_what_is_not_a_number_is_refused(value: Decimal | str) -> None:
    with pytest.raises(ValueError, match="is not a number"):
        to_minor(value, "USD")


@pytest.mark.parametrize(
    ("value", "currency", "decimals"),
    [
        ("0.001", "USD", 2),
        ("1.5", "JPY", 0),
        ("1.2345", "KWD", 3),
        (Decimal("1e-30"), "USD", 2),
        (Decimal("1e-1000000"), "USD", 2),
    ],
)
def test_more_decimals_than_the_currency_has_are_refused(value: Decimal | str, currency: str, decimals: int) -> None:
    with pytest.raises(ValueError, match=f"has more than {decimals} decimals"):
        to_minor(value, currency)


def test_decimals_beyond_the_precision_of_arithmetic_are_refused_too() -> None:
    with pytest.raises(ValueError, match="has more than 2 decimals"):
        to_minor("1.00000000000000000000000000000001", "USD")


@pytest.mark.parametrize(
    "value", ["100000000", "-100000000", "9" * 5_000, Decimal("1e999"), Decimal("-1e1000000"), AMOUNT_MAX, 10**30]
)
def test_an_amount_over_the_bound_is_refused(value: Decimal | str | int) -> None:
    with pytest.raises(ValueError, match=r"is over 99,999,999\.99 USD"):
        to_minor(value, "USD")


@given(st.integers(-AMOUNT_MAX, AMOUNT_MAX), CURRENCY)
def test_minor_units_survive_the_way_out_and_back(amount: int, currency: str) -> None:
    value = to_decimal(amount, currency)
    assert value.as_tuple().exponent == -CURRENCIES[currency]
    assert to_minor(value, currency) == to_minor(str(value), currency) == amount


@pytest.mark.parametrize(
    ("amount", "currency", "shown"),
    [
        (104_500, "USD", "1,045.00 USD"),
        (5, "USD", "0.05 USD"),
        (0, "USD", "0.00 USD"),
        (-320, "USD", "-3.20 USD"),
        (1_234_567, "JPY", "1,234,567 JPY"),
        (1_234, "KWD", "1.234 KWD"),
    ],
)
def test_people_see_all_the_currencys_decimals(amount: int, currency: str, shown: str) -> None:
    assert format_amount(amount, currency) == shown


def test_currencies_are_codes_of_three_letters_with_their_decimals() -> None:
    assert all(len(code) == 3 and code.isascii() and code.isupper() for code in CURRENCIES)
    assert set(CURRENCIES.values()) == {0, 2, 3}
    assert (CURRENCIES["USD"], CURRENCIES["JPY"], CURRENCIES["KWD"]) == (2, 0, 3)
