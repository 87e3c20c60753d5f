"""The access tokens of a swarm's users."""

import random
import time
from pathlib import Path
from typing import Final
from uuid import UUID, uuid4, uuid5

from engine.commands import Role
from gateway.tokens import issue
from gavel.errors import CommandError
from gavel.keys import read_keys
from gavel.settings import load_settings

TOKEN_TTL_S: Final = 24 * 60 * 60


class Tokens:
    """Access tokens: issued with the engine's key, or the given ones, of which the first is a maker's."""

    def __init__(self, private_pem: bytes | None, given: list[str]) -> None:
        self._private_pem = private_pem
        self._given = given

    @property
    def is_issuer(self) -> bool:
        """Whether there are always new ones."""
        return self._private_pem is not None

    def maker(self, run: UUID) -> str:
        """The token of the run's maker, the same user in all processes."""
        return self._given[0] if self._private_pem is None else self._issue(uuid5(run, "maker"), "maker")

    def bidder(self) -> str:
        """The token of a bidder, a new user if we may choose."""
        return random.choice(self._given[1:]) if self._private_pem is None else self._issue(uuid4(), "viewer")

    def _issue(self, user: UUID, role: Role) -> str:
        assert self._private_pem is not None
        return issue(self._private_pem, user, role, TOKEN_TTL_S, time.time_ns() // 1_000_000)


def read_tokens(data_dir: str | None, file: str | None) -> Tokens:
    """The tokens that the options name. Raises `CommandError`."""
    if file is None:
        return Tokens(read_keys(load_settings(data_dir=data_dir).data_dir).private_pem, [])
    try:
        given = Path(file).read_text(encoding="utf-8").split()
    except OSError as error:
        raise CommandError(f"The tokens in {file} cannot be read ({error.strerror}).") from None
    if len(given) < 2:  # noqa: PLR2004 - a maker's and a bidder's
        raise CommandError(f"{file} must hold a maker's token and at least one bidder's, one a line.")
    return Tokens(None, given)
