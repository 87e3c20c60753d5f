"""The Locust swarm against a running engine: nothing fails, and it sees what it is there to see."""

from pathlib import Path

from tests.e2e.engine import Engine
from tests.e2e.live import call
from tests.support.swarm import run_swarm

MEASURED = {"connect", "resume", "bid ack", "bid to screen", "subscribe", "POST /auctions", "GET /auctions"}


async def test_thirty_users_in_two_processes_see_nothing_wrong(engine: Engine, tmp_path: Path) -> None:
    table = run_swarm(
        tmp_path,
        *("-H", engine.url, "--data-dir", str(engine.data_dir), "--processes", "2"),
        *("-u", "30", "-r", "30", "-t", "8s", "--auctions", "2", "--bid-every-s", "0.5", "--drop-every-s", "2"),
    )
    assert (table.code, table.failures) == (0, {}), table.log
    assert table.requests.keys() >= MEASURED, table.log
    assert "the generator " in table.log
    # Both processes were in the same two auctions.
    listed = (await call(engine, "GET", "/auctions?status=active&limit=100")).json()["data"]["auctions"]
    swarm = [auction["title"] for auction in listed if auction["title"].startswith("Load test")]
    assert sorted(swarm) == ["Load test, room 0", "Load test, room 1"]
