"""Refusals as values: what the rules say no to, in the words and codes of the live protocol."""

from typing import Literal

import msgspec

from engine.limits import BUSY_RETRY_MS

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


BUSY = Rejection("busy", "Too much is going on here just now.", is_transient=True, retry_after_ms=BUSY_RETRY_MS)
UNAVAILABLE = Rejection("unavailable", "This auction cannot be reached just now.", is_transient=True)
INTERNAL = Rejection("internal", "Something went wrong on our side.", is_transient=True)
OUTCOME_UNKNOWN = Rejection(
    "outcome_unknown", "This may or may not have been done: send it again with the same id.", is_transient=True
)
SUSPENDED = Rejection("forbidden", "This user is suspended.")
NOT_FOUND = Rejection("not_found", "There is no such auction.")
