"""Bounds that other pages promise. The relations between bounds are asserted where they stand."""

from decimal import Decimal

from engine import limits
from engine.money import to_decimal


def test_the_largest_amount_fits_a_decimal_of_ten_digits_with_two_decimals() -> None:
    assert to_decimal(limits.AMOUNT_MAX, "USD") == Decimal("99999999.99")


def test_the_largest_minimum_stays_an_integer_that_json_readers_keep() -> None:
    # The highest price and the highest increment.
    assert 2 * limits.AMOUNT_MAX <= limits.INTEGER_MAX == 2**53 - 1


def test_a_client_is_told_the_protocols_numbers() -> None:
    assert limits.FRAME_BYTES_MAX == 16_384
    assert limits.REF_LENGTH_MAX == 64
    assert limits.HELLO_TIMEOUT_MS == 5_000
    assert limits.TOKEN_GRACE_MS == 60_000
    assert limits.HEARTBEATS_MISSED_MAX == 2
    assert limits.VERDICTS_REMEMBERED == 10_000
