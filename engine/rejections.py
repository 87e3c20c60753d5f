"""Refusals as values: what the rules say no to, in the words and codes of the live protocol."""

from typing import Literal

import msgspec

Code = Literal[
    "not_authenticated",
    "not_found",
    "forbidden",
    "own_auction",
    "already_exists",
    "currency_mismatch",
    "not_started",
    "ended",
    "reason_required",
    "terms_invalid",
    "amount_invalid",
    "amount_too_large",
    "bid_too_low",
    "max_not_raised",
    "busy",
    "rate_limited",
    "unavailable",
    "outcome_unknown",
    "internal",
]


class Rejection(msgspec.Struct, frozen=True, tag="rejection", array_like=True):
    """Why a command was not done. `is_transient`: the same command may succeed later, and is then a new one."""

    code: Code
    message: str
    is_transient: bool = False
    minimum: int | None = None
    """The least that would be accepted, in minor units, where that helps."""
    retry_after_ms: int | None = None
    field: str | None = None
    """The field that is at fault, where there is one."""
