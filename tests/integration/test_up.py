"""What `gavel up` does to the database before it starts anything."""

import asyncpg
import pytest

from gavel import up
from gavel.errors import CommandError


async def test_a_database_is_held_by_one_engine(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(up, "_RETRY_S", 0.001)
    first, second = await asyncpg.connect(database_url), await asyncpg.connect(database_url)
    try:
        await up._hold(first)
        with pytest.raises(CommandError, match="Another engine runs on this database"):
            await up._hold(second)
        # An engine that has died holds nothing, once Postgres has noticed.
        monkeypatch.setattr(up, "_HOLD_TRIES", 10_000)
        first.terminate()
        await up._hold(second)
    finally:
        await second.close()
