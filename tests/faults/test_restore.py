"""Everything dies under load, and what was is restored to a moment: all that was acknowledged by then, nothing later."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from uuid import UUID, uuid4

import msgspec
import pytest

from actors.journal import Row
from engine.events import Extended
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
        for lane in past.lanes:
            _judge(lane, rows, past.moment_ms)
        assert _is_cut_from(rows, past.rows)
        _judge_the_time(past, rows)
        await _bid_again(restored, past)
        restored.verify()
        assert not restored.leaks()
        secret = "keys/cluster_secret"  # noqa: S105 - its name only
        assert (restored.data_dir / secret).read_text() != (engine.data_dir / secret).read_text()


async def _killed_after_a_moment(engine: Engine, backup: str) -> Past:
    """Have a backup made under load, and bids after it, then kill everything once the log was copied past a moment."""
    ending = await open_auction(engine, end_time=iso(ENDS_IN))
    async with _bidding(engine) as lanes:
        making = asyncio.create_task(asyncio.to_thread(engine.gavel, "backup", backup, "--data-dir", str(engine.data_dir)))
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


def _judge(lane: Lane, rows: list[Row], moment_ms: int) -> None:
    """Every bid that was acknowledged before the moment is there once, none that was sent after it."""
    placed = [row for row in rows if row.entity_id == lane.auction and row.kind == "bid_placed"]
    ids = [row.command_id for row in placed]
    acknowledged = [record for record in lane.history if isinstance(record, Verdict) and record.at < moment_ms]
    assert len(acknowledged) >= 2 * BIDS
    assert {row.seq: row.hash.hex() for row in placed}.items() >= {(ack.seq, ack.hash) for ack in acknowledged}
    assert [ids.count(_id(ack)) for ack in acknowledged] == [1] * len(acknowledged)
    later = [record for record in lane.history if isinstance(record, Sent) and record.at > moment_ms]
    assert len(later) >= BIDS
    assert not {_id(sent) for sent in later} & set(ids)


def _id(record: Verdict | Sent) -> bytes:
    return record.bid_id.bytes


def _is_cut_from(rows: list[Row], before: list[Row]) -> bool:
    """Whether a journal is what another one began with, but for the time that was given back."""
    kept = [row for row in rows if row.kind != "extended"]
    return set(kept) < set(before)


def _judge_the_time(past: Past, rows: list[Row]) -> None:
    """What was near its end at the moment has as much time left as it had then."""
    (opened, extended) = [row for row in rows if row.entity_id == past.ending]
    given = msgspec.msgpack.decode(extended.body, type=Extended)
    assert (extended.kind, given.reason) == ("extended", "outage")
    end = opened.at + ENDS_IN // timedelta(milliseconds=1)
    print(given.end_time - extended.at, end - past.moment_ms)


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
