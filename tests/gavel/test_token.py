"""`gavel token`."""

import time
from pathlib import Path
from uuid import UUID

import pytest
from click.testing import CliRunner

from gateway.tokens import Verifier
from gavel.keys import ensure_keys
from gavel.token import command

USER = "5f0c3f5e-8a53-4c0a-9d53-1f6f1a2b3c4d"


def test_prints_a_token_and_nothing_else(tmp_path: Path) -> None:
    pair = ensure_keys(tmp_path)
    before = time.time_ns() // 1_000_000
    result = CliRunner().invoke(
        command, [USER, "--role", "maker", "--ttl", "15m", "--data-dir", str(tmp_path)], catch_exceptions=False
    )
    assert (result.exit_code, result.stderr) == (0, "")
    identity = Verifier(pair.public_pem).verify(result.stdout.strip(), before)
    assert (identity.user, identity.role) == (UUID(USER), "maker")
    lives_ms = identity.expires_at - before
    # Tokens count in whole seconds.
    assert 899_000 <= lives_ms <= 960_000


@pytest.mark.parametrize(
    ("ttl", "seconds"), [("90", 90), ("1s", 1), ("15m", 900), ("1h", 3_600), ("366d", 366 * 86_400)]
)
def test_durations(ttl: str, seconds: int) -> None:
    parameter = next(one for one in command.params if one.name == "ttl")
    assert parameter.type.convert(ttl, None, None) == seconds


@pytest.mark.parametrize(
    "arguments",
    [["somebody"], [USER, "--ttl", "0"], [USER, "--ttl", "367d"], [USER, "--ttl", "1w"], [USER, "--role", "x"]],
)
def test_impossible_arguments_are_refused(arguments: list[str]) -> None:
    assert CliRunner().invoke(command, arguments).exit_code == 2
