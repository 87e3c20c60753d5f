"""Exact money: integers in a currency's minor unit, decimals only where people read or write them."""

import re
from decimal import Decimal
from typing import Final

from engine.limits import AMOUNT_DIGITS_MAX, AMOUNT_MAX

# ISO 4217, the currencies in circulation, by the number of their decimals.
_DECIMALS_0 = "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF"
_DECIMALS_2 = (
    "AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BMD BND BOB BRL BSD BTN BWP BYN BZD CAD CDF CHF CNY COP CRC CUP "
    "CVE CZK DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GTQ GYD HKD HNL HTG HUF IDR ILS INR IRR JMD KES "
    "KGS KHR KPW KYD KZT LAK LBP LKR LRD LSL MAD MDL MGA MKD MMK MNT MOP MRU MUR MVR MWK MXN MYR MZN NAD NGN NIO NOK "
    "NPR NZD PAB PEN PGK PHP PKR PLN QAR RON RSD RUB SAR SBD SCR SDG SEK SGD SHP SLE SOS SRD SSP STN SVC SYP SZL THB "
    "TJS TMT TOP TRY TTD TWD TZS UAH USD UYU UZS VED VES WST XCD YER ZAR ZMW ZWG"
)
_WRITTEN = re.compile(r"-?[0-9]+(\.[0-9]+)?")
_DECIMALS_3 = "BHD IQD JOD KWD LYD OMR TND"

CURRENCIES: Final[dict[str, int]] = {
    code: decimals
    for decimals, codes in ((0, _DECIMALS_0), (2, _DECIMALS_2), (3, _DECIMALS_3))
    for code in codes.split()
}
"""The decimals of each ISO 4217 currency, by its code."""


def to_minor(value: Decimal | int | str, currency: str) -> int:
    """Turn what a person wrote (`45.00`) into minor units (4500), or raise `ValueError` with a sentence.

    The value may be negative or zero; it may not have more decimals than the currency or pass `AMOUNT_MAX`.
    """
    if isinstance(value, str) and not _WRITTEN.fullmatch(value):
        raise ValueError("is not a number")
    amount = Decimal(value)
    _, digits, exponent = amount.as_tuple()
    if not isinstance(exponent, int):
        raise ValueError("is not a number")  # noqa: TRY004 (infinity and NaN are Decimals, too)
    decimals = CURRENCIES[currency]
    if len(digits) + exponent > AMOUNT_DIGITS_MAX:
        raise ValueError(f"is over {format_amount(AMOUNT_MAX, currency)}")
    # Within these bounds Decimal's arithmetic is exact.
    is_exact = len(digits) <= AMOUNT_DIGITS_MAX and exponent >= -AMOUNT_DIGITS_MAX
    minor = amount.scaleb(decimals) if is_exact else None
    if minor is None or minor != minor.to_integral_value():
        raise ValueError(f"has more than {decimals} decimals")
    if abs(minor) > AMOUNT_MAX:
        raise ValueError(f"is over {format_amount(AMOUNT_MAX, currency)}")
    return int(minor)


def to_decimal(amount: int, currency: str) -> Decimal:
    """Turn minor units (4500) into a decimal with exactly the currency's decimals (`45.00`)."""
    return Decimal(amount).scaleb(-CURRENCIES[currency])


def format_amount(amount: int, currency: str) -> str:
    """Show minor units to a person: `1,045.00 USD`."""
    return f"{to_decimal(amount, currency):,} {currency}"
