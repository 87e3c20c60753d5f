"""What holds in every test: unit tests start nothing, and what is random can be repeated."""

import os
import random
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import NoReturn

import asyncpg
import hypothesis
import pytest
import uvloop

from tests.support.postgres import TABLES, running_postgres

TESTS = Path(__file__).parent
UNIT_SUITES = frozenset({"actors", "engine", "gateway", "gavel", "loadtests"})

# A failing example is printed as a line that repeats it. No deadlines: a slow machine is not a bug.
hypothesis.settings.register_profile("ci", print_blob=True, deadline=None, derandomize=False)
hypothesis.settings.load_profile("ci")


@pytest.fixture(autouse=True)
def _units_start_nothing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forbid Ray, servers and connections in unit tests. The socket pair inside asyncio's loop is not affected."""
    if request.path.relative_to(TESTS).parts[0] not in UNIT_SUITES:
        return

    for method in ("bind", "connect", "connect_ex", "listen"):
        monkeypatch.setattr(socket.socket, method, _refuse(f"socket.{method}"))
    # uvloop does not go through Python's sockets, so its loops are not for unit tests at all.
    for name in ("new_event_loop", "run"):
        monkeypatch.setattr(uvloop, name, _refuse(f"uvloop.{name}"))
    # Importing Ray takes long; what has not imported it cannot start it, except by importing it inside a test.
    if "ray" in sys.modules:
        monkeypatch.setattr("ray.init", _refuse("ray.init"))
    else:
        monkeypatch.setitem(sys.modules, "ray", None)


class StartedInUnitTest(AssertionError):
    """A unit test tried to start Ray, a server or a connection."""


def _refuse(what: str) -> object:
    def refuse(*_arguments: object, **_named: object) -> NoReturn:
        message = f"{what} in a unit test: unit tests start no Ray, no server and no connection (see tests/conftest.py)"
        raise StartedInUnitTest(message)

    return refuse


@pytest.fixture
def seed() -> int:
    """Give a new seed in each run, or the one in GAVEL_TEST_SEED; pytest shows the printed line when the test fails."""
    value = int(os.environ.get("GAVEL_TEST_SEED") or random.SystemRandom().getrandbits(32))
    sys.stdout.write(f"seed {value}: repeat this test with GAVEL_TEST_SEED={value}\n")
    return value


@pytest.fixture
def randomness(seed: int) -> random.Random:
    """Give a random number generator whose seed is printed when the test fails."""
    return random.Random(seed)


@pytest.fixture(scope="session")
def database_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start one embedded Postgres, with the schema, for all tests that ask for it."""
    with running_postgres(tmp_path_factory.mktemp("postgres")) as url:
        yield url


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[asyncpg.Pool]:
    """Give connections to a database whose tables are empty."""
    async with asyncpg.create_pool(database_url, min_size=1, max_size=4) as pool:
        await pool.execute(f"TRUNCATE {TABLES}")
        yield pool
