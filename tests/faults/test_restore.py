"""Everything dies under load, and is restored to a moment: all that was acknowledged by then, nothing later."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from uuid import UUID, uuid4

import pytest

from actors.journal import Row
from engine.events import BidPlaced, Event, Extended, Opened, decode
from tests.e2e.engine import Engine, wait_until
from tests.e2e.live import connected, iso, now_ms, open_auction
from tests.faults.test_kill_shard import Lane
from tests.simulation.checker import check
from tests.simulation.history import Sent, Verdict

LANES = 2
BIDS = 20
"""In each lane before the backup, while it is made, up to the moment, and after it."""
ENDS_IN = timedelta(minutes=10)
"""Within the usual window of the soft close, so that time lost is given back whenever it was lost."""

pytestmark = pytest.mark.timeout(240)


class Past(NamedTuple):
    """What an engine leaves that was killed some time after a moment."""

    lanes: list[Lane]
    ending: UUID
    """An auction that was near its end at the moment."""
    moment_ms: int
    rows: list[Row]
    """The journal some time before the engine was killed, and after the moment."""


async def test_a_restore_to_a_moment() -> None:
    with Engine() as engine, Engine() as restored:
        backup, archive = engine.folder / "backup", engine.folder / "archive"
        engine.start("--archive-dir", str(archive))
        past = await _killed_after_a_moment(engine, str(backup))
        moment = datetime.fromtimestamp(past.moment_ms / 1_000, UTC).isoformat()
        options = ["--archive", str(archive), "--to", moment, "--data-dir", str(restored.data_dir)]
        made = engine.gavel("restore", str(backup), *options)
        assert made.returncode == 0, made.stderr
        assert made.stdout.startswith(f"{restored.data_dir} is restored; the last change in it was committed at ")
        restored.verify()
        assert restored.keys == engine.keys

        restored.start("--archive-dir", str(restored.folder / "archive"))
        rows = restored.journal_rows()
        _judge(past.lanes, rows, past.moment_ms)
        # But for the time that was given back, it is what the other one began with.
        assert {row for row in rows if row.kind != "extended"} < set(past.rows)
        _judge_the_time(past, rows)
        await _bid_again(restored, past)
        restored.verify()
        assert not restored.leaks()
        secret = "keys/cluster_secret"
        assert (restored.data_dir / secret).read_text() != (engine.data_dir / secret).read_text()


async def _killed_after_a_moment(engine: Engine, backup: str) -> Past:
    """Have a backup made under load, and bids after it, then kill everything once the log was copied past a moment."""
    ending = await open_auction(engine, end_time=iso(ENDS_IN))
    async with _bidding(engine) as lanes:
        making = asyncio.create_task(
            asyncio.to_thread(engine.gavel, "backup", backup, "--data-dir", str(engine.data_dir))
        )
        await _advanced(lanes)
        made = await making
        assert made.returncode == 0, made.stderr
        await _advanced(lanes)
        moment_ms = now_ms()
        await _advanced(lanes)
        rows = engine.journal_rows()
        end_of_log = engine.fetch("SELECT pg_current_wal_lsn()")[0][0]
        copied = "SELECT FROM pg_stat_replication WHERE application_name = 'gavel-archive' AND write_lsn >= $1"
        await asyncio.to_thread(wait_until, lambda: bool(engine.fetch(copied, end_of_log)), "the log is not copied")
        engine.kill_everything()
    return Past(lanes, ending, moment_ms, rows)


@asynccontextmanager
async def _bidding(engine: Engine) -> AsyncIterator[list[Lane]]:
    lanes = [Lane(engine, await open_auction(engine)) for _ in range(LANES)]
    try:
        await _advanced(lanes)
        yield lanes
    finally:
        for lane in lanes:
            await lane.close()


async def _advanced(lanes: list[Lane]) -> None:
    await asyncio.gather(*(lane.advanced(BIDS) for lane in lanes))


def _judge(lanes: list[Lane], rows: list[Row], moment_ms: int) -> None:
    """What anybody was told before the moment is so, and no bid is there that was sent after it."""
    records = [record for lane in lanes for record in lane.history]
    before = [record for record in records if record.at < moment_ms]
    assert sum(isinstance(record, Verdict) for record in before) >= 2 * BIDS * LANES
    assert check(before, rows, true_time=True) == []
    later = {record.bid_id for record in records if isinstance(record, Sent) and record.at > moment_ms}
    assert len(later) >= (BIDS - 1) * LANES, "the first of a lane may have been sent before"
    assert not later & {event.bid_id for event in map(_event, rows) if isinstance(event, BidPlaced)}


def _judge_the_time(past: Past, rows: list[Row]) -> None:
    """What was near its end at the moment has as much time left as it had then."""
    (opened, extended) = [row for row in rows if row.entity_id == past.ending]
    before, now = _event(opened), _event(extended)
    assert isinstance(before, Opened)
    assert isinstance(now, Extended)
    assert now.reason == "outage"
    assert now.end_time - extended.at >= before.terms.end_time - past.moment_ms


def _event(row: Row) -> Event:
    return decode(row.kind, row.version, row.body)


async def _bid_again(restored: Engine, past: Past) -> None:
    """What was lost can be sent again, and counts now; other bids are taken, too."""
    lane = past.lanes[0]
    lost = next(record for record in lane.history if isinstance(record, Sent) and record.at > past.moment_ms)
    async with connected(restored, restored.token(lost.bidder)) as live:
        state = await live.subscribe(lane.auction)
        answer = await live.bid(lane.auction, lost.bid_id, amount=state["snapshot"]["minimum"])
        assert (answer["type"], answer["outcome"]) == ("ack", "leading")
    async with connected(restored, restored.token(uuid4())) as live:
        for auction in (lane.auction, past.ending):
            answer = await live.bid(auction, amount=100_000)
            assert (answer["type"], answer["outcome"]) == ("ack", "leading")
