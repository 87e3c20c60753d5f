"""The values of request bodies: JSON in which no number is rounded, money, currencies, times.

Money crosses HTTP as decimals (`45.00`) and is turned into minor units here, at the edge, exactly or not at all.
"""

import json
import re
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta
from decimal import Decimal, DecimalException
from typing import Annotated, Any, Final, NoReturn

from fastapi import Request
from fastapi.exceptions import HTTPException
from fastapi.routing import APIRoute
from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError
from starlette.responses import Response

from engine.limits import AMOUNT_DIGITS_MAX, INTEGER_MAX
from engine.money import CURRENCIES

# JSON


class ExactRoute(APIRoute):
    """A route that reads JSON bodies exactly: `45.10` is a `Decimal` with two decimals, never the nearest float."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_exactly(request: Request) -> Response:
            return await handle(_ExactRequest(request.scope, request.receive))

        return handle_exactly


class _ExactRequest(Request):
    async def json(self) -> Any:  # noqa: ANN401 - this is the signature of what it overrides.
        body = await self.body()
        try:
            return json.loads(body.decode(), parse_float=Decimal, parse_constant=_refuse_constant)
        # Not JSON, not UTF-8, an integer of thousands of digits; nested too deep; an exponent beyond all bounds.
        except (ValueError, RecursionError, DecimalException):
            raise HTTPException(400, "The body is not valid JSON.") from None


def _refuse_constant(name: str) -> NoReturn:
    """`NaN` and `Infinity` are Python's, not JSON's."""
    raise ValueError(name)


# Money


def _read_amount(value: object) -> Decimal:
    if isinstance(value, str) and _DECIMAL.fullmatch(value):
        value = Decimal(value)
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        raise PydanticCustomError("amount", "An amount is a number, or a number in a string.")
    amount = Decimal(value)
    # Decimals compute with 28 digits; within these bounds nothing is ever rounded.
    exponent = amount.as_tuple().exponent
    assert isinstance(exponent, int), "neither JSON nor the pattern knows infinities"
    if len(amount.as_tuple().digits) > AMOUNT_DIGITS_MAX or abs(exponent) > AMOUNT_DIGITS_MAX:
        raise PydanticCustomError("amount", "An amount is at most 99,999,999.99, with its currency's decimals.")
    return amount


_DECIMAL: Final = re.compile(rf"-?[0-9]{{1,{AMOUNT_DIGITS_MAX}}}(\.[0-9]{{1,{AMOUNT_DIGITS_MAX}}})?")

Amount = Annotated[
    Decimal,
    PlainValidator(_read_amount),
    WithJsonSchema(
        {
            "type": "number",
            "minimum": 0.01,
            "maximum": 99_999_999.99,
            "description": 'With at most the currency\'s decimals. The same as a string (`"45.00"`) is taken, too.',
            "examples": [45.00],
        }
    ),
]
"""Money in a request: a decimal whose currency is not yet known."""

MoneyOut = Annotated[
    Decimal,
    WithJsonSchema({"type": "number", "description": "With exactly the currency's decimals.", "examples": [45.00]}),
]
"""Money in an answer."""


# Currencies, times


def _read_currency(value: str) -> str:
    if value not in CURRENCIES:
        raise PydanticCustomError("currency", "This is not a currency of ISO 4217, such as USD.")
    return value


Currency = Annotated[str, AfterValidator(_read_currency), Field(json_schema_extra={"examples": ["USD"]})]


def _read_moment(value: object) -> int:
    try:
        moment = datetime.fromisoformat(value if isinstance(value, str) else "")
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise PydanticCustomError("moment", "A time is ISO 8601 with an offset, such as 2026-10-09T10:00:00Z.")
    return (moment - _EPOCH) // timedelta(milliseconds=1)


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

Moment = Annotated[
    int,
    BeforeValidator(_read_moment),
    WithJsonSchema({"type": "string", "format": "date-time", "examples": ["2026-10-09T10:00:00Z"]}),
]
"""A time in a request, as milliseconds since the epoch."""

Time = Annotated[
    str, WithJsonSchema({"type": "string", "format": "date-time", "examples": ["2026-10-09T10:00:00.000Z"]})
]
"""A time in an answer, as ISO 8601 in UTC with milliseconds."""

Seconds = Annotated[int, Field(ge=0, le=INTEGER_MAX // 1_000)]
"""A duration; how long it may really be, the engine says."""
