"""Bounds that other pages promise. The relations between bounds are asserted where they stand."""

import ast
from decimal import Decimal
from pathlib import Path

import pytest

from engine import limits
from engine.money import to_decimal

ROOT = Path(__file__).parents[2]
ENDINGS = ("_MAX", "_MIN", "_MS", "_S", "_RATE")
"""How bounds and times are called."""


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


@pytest.mark.parametrize("folder", ["actors", "engine", "gateway"])
def test_all_bounds_stand_in_one_file(folder: str) -> None:
    """A module may give a bound in other units, but not a number of its own."""
    own = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.name != "limits.py"
        for name, value in constants(path)
        if name.endswith(ENDINGS) and is_number(value)
    ]
    assert own == []


def constants(path: Path) -> list[tuple[str, ast.expr]]:
    """The names that a module sets at its top, and to what."""
    found = []
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        match statement:
            case ast.Assign(targets=[ast.Name(name)], value=value):
                found.append((name, value))
            case ast.AnnAssign(target=ast.Name(name), value=ast.expr() as value):
                found.append((name, value))
    return found


def is_number(value: ast.expr) -> bool:
    """Whether this is put together from numbers alone."""
    parts = list(ast.walk(value))
    is_plain = not any(isinstance(part, ast.Name | ast.Attribute) for part in parts)
    return is_plain and any(isinstance(part, ast.Constant) and isinstance(part.value, int | float) for part in parts)
