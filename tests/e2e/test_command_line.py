"""`gavel up` and its sisters as a person meets them: what they say, how they end, and what is there the next time."""

import asyncio
import re
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from uuid import UUID, uuid4

import pytest

from tests.e2e.engine import ROOT, Engine
from tests.e2e.live import ANSWER_S, Live, Message, call, connected, iso, open_auction

DRAINING = 4000

pytestmark = pytest.mark.timeout(120)


# What cannot be


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"GAVEL_PROT": "1"}, ["GAVEL_PROT", "did you mean GAVEL_PORT?"]),
        ({"GAVEL_SHARDS": "0"}, ["GAVEL_SHARDS", "1 to 64"]),
        ({"GAVEL_DATABASE_URL": "postgresql://anna:sesame@127.0.0.1:1/gavel"}, ["database", "GAVEL_DATABASE_URL"]),
        ({"GAVEL_DATABASE_URL": "mysql://anna:sesame@127.0.0.1/gavel"}, ["GAVEL_DATABASE_URL"]),
        ({"GAVEL_SECRET": "sesame"}, ["GAVEL_SECRET", "16"]),
        (
            {"GAVEL_DATABASE_URL": "postgresql://anna:sesame@127.0.0.1:1/gavel", "GAVEL_ARCHIVE_DIR": "never"},
            ["GAVEL_ARCHIVE_DIR", "the server"],
        ),
    ],
)
def test_an_impossible_setting_is_one_sentence(engine: Engine, environment: dict[str, str], words: list[str]) -> None:
    folder = engine.folder / "never"
    refused = engine.gavel("up", "--port", "0", "--data-dir", str(folder), **environment)
    _check_refusal(refused.returncode, refused.stdout, refused.stderr, words)
    assert "sesame" not in refused.stderr


def test_a_port_in_use_is_one_sentence(engine: Engine) -> None:
    refused = engine.gavel("up", "--port", str(engine.port), "--data-dir", str(engine.folder / "other"))
    _check_refusal(refused.returncode, refused.stdout, refused.stderr, [str(engine.port), "--port"])


def test_a_data_folder_in_use_is_one_sentence(engine: Engine) -> None:
    refused = engine.gavel("up", "--port", "0", "--data-dir", str(engine.data_dir))
    _check_refusal(refused.returncode, refused.stdout, refused.stderr, [str(engine.data_dir), "--data-dir"])


def test_a_file_as_data_folder_is_one_sentence(engine: Engine) -> None:
    file = engine.folder / "file"
    file.touch()
    refused = engine.gavel("up", "--port", "0", "--data-dir", str(file))
    _check_refusal(refused.returncode, refused.stdout, refused.stderr, ["--data-dir"])


def _check_refusal(code: int, output: str, errors: str, words: list[str]) -> None:
    assert code == 1
    assert output == ""
    assert errors.count("\n") == 1, errors
    assert errors.startswith("gavel: ")
    assert all(word in errors for word in words), errors


# One life after another: these tests share an engine, which the first starts with its demonstration.


@pytest.fixture(scope="module")
def demo() -> Iterator[Engine]:
    # A single shard: what these tests are about is the same with more.
    with Engine("--shards", "1") as engine:
        yield engine.start("--demo")


@pytest.fixture(scope="module")
def kept(demo: Engine) -> UUID:
    """An auction with a bid in it, opened in the first life."""

    async def open_and_bid() -> UUID:
        auction = await open_auction(demo)
        async with connected(demo, demo.token(uuid4())) as live:
            assert (await live.bid(auction, max_amount=700))["type"] == "ack"
        return auction

    return asyncio.run(open_and_bid())


async def test_the_demonstration_bids_over_sockets(demo: Engine) -> None:
    async with connected(demo) as live:
        auctions = await _demo_auctions(demo)
        for auction in auctions:
            assert (await live.subscribe(auction))["type"] == "subscribed"
        events = [event for message in live.others for event in message.get("events", ())]
        while not any(event["kind"] == "bid_placed" for event in events):
            events += (await live.wait_for(lambda message: message["type"] == "events"))["events"]


async def test_watch_prints_what_happens(demo: Engine) -> None:
    auction = (await _demo_auctions(demo))[0]
    async with _running(demo, "watch", str(auction), "--url", demo.url) as watch:
        assert watch.stdout is not None
        first = await _line(watch.stdout)
        assert re.fullmatch(r"seq \d+: active, .*, (no bids yet|paddle \d+ leads), \d+ bids", first)
        async with connected(demo, demo.token(uuid4())) as live:
            minimum = (await live.subscribe(auction))["snapshot"]["minimum"]
            answer = await live.bid(auction, amount=minimum + 100_000)
        assert answer["type"] == "ack"
        while not (line := await _line(watch.stdout)).startswith(f"seq {answer['seq']}: "):
            pass
        assert re.fullmatch(rf"seq \d+: paddle {answer['paddle']} bids: [\d,.]+ USD", line)


async def test_a_printed_token_is_good_for_a_bid(demo: Engine) -> None:
    user, auction = uuid4(), await open_auction(demo)
    printed = demo.gavel("token", str(user), "--ttl", "10m", "--data-dir", str(demo.data_dir))
    assert printed.returncode == 0, printed.stderr
    async with connected(demo, printed.stdout.strip()) as live:
        assert (await live.bid(auction, amount=500))["type"] == "ack"
    body = {"max_bid_amount": "9.00"}
    response = await call(demo, "POST", f"/auctions/{auction}/bids", token=printed.stdout.strip(), body=body)
    assert (response.status_code, response.json()["data"]["status"]) == (201, "active")


async def test_a_scheduled_auction_opens_and_ends_by_its_own_clock(demo: Engine) -> None:
    # Seconds that suffice anywhere but on a machine that stands still; it gets more of them.
    for seconds in (2, 8, 30):
        if await _is_played(demo, timedelta(seconds=seconds)):
            return
    raise AssertionError("there was no time to bid before the start, or before the end")


async def _is_played(demo: Engine, step: timedelta) -> bool:
    """Schedule an auction a step ahead, for a step; False if we came too late for one of its turns."""
    auction = await open_auction(demo, start_time=iso(step), end_time=iso(2 * step), soft_close=None)
    async with connected(demo, demo.token(uuid4())) as live:
        snapshot = (await live.subscribe(auction))["snapshot"]
        if (await live.bid(auction, amount=500)).get("code") != "not_started":
            return False
        assert snapshot["status"] == "scheduled"
        opened = await _event(live, "opened")
        assert opened["at"] >= snapshot["start_time"]
        ack = await live.bid(auction, amount=500)
        if ack.get("code") == "ended":
            return False
        assert ack["type"] == "ack"
        ended = await _event(live, "ended")
        assert ended["at"] >= snapshot["end_time"]
        assert (ended["outcome"], ended["paddle"], ended["price"], ended["by"]) == ("sold", 1, 500, "deadline")
        assert (await live.bid(auction, amount=600))["code"] == "ended"
    data = (await call(demo, "GET", f"/auctions/{auction}")).json()["data"]
    assert (data["status"], data["outcome"], data["price"]) == ("ended", "sold", 5.0)
    return True


async def test_ctrl_c_stops_everything_and_sends_clients_elsewhere(demo: Engine, kept: UUID) -> None:
    async with connected(demo) as live:
        closing = asyncio.create_task(live.close_code())
        await asyncio.to_thread(demo.stop, signal.SIGINT, is_to_the_group=True)
        assert await closing == DRAINING
    assert not demo.leaks()
    assert "stopping" in demo.errors_path.read_text()


def test_verify_needs_no_engine(demo: Engine, kept: UUID) -> None:
    demo.verify()
    assert not demo.processes()


async def test_the_next_engine_goes_on_and_stops_on_sigterm(demo: Engine, kept: UUID) -> None:
    await asyncio.to_thread(demo.start)
    async with connected(demo, demo.token(uuid4())) as live:
        answer = await live.subscribe(kept, since=0)
        assert answer["recovered"]
        assert [event["kind"] for event in answer["events"]] == ["opened", "bid_placed"]
        # The maximum of the bidder before is known still.
        ack = await live.bid(kept, amount=699)
        assert (ack["type"], ack["outcome"], ack["price"], ack["paddle"]) == ("ack", "outbid", 700, 2)
        closing = asyncio.create_task(live.close_code())
        await asyncio.to_thread(demo.stop, signal.SIGTERM)
        assert await closing == DRAINING
    assert not demo.leaks()
    # No stack is printed, by Ray either: somebody stopped it, that is all.
    assert "SIGTERM" not in demo.errors_path.read_text()
    demo.verify()


async def _demo_auctions(demo: Engine) -> list[UUID]:
    """The demonstration's auctions, once there are any."""
    async with asyncio.timeout(ANSWER_S):
        while True:
            data = (await call(demo, "GET", "/auctions?status=active&limit=100")).json()["data"]
            found = [UUID(auction["auction_id"]) for auction in data["auctions"] if auction["title"] != "Walnut bowl"]
            if found:
                return found
            await asyncio.sleep(0.1)


async def _event(live: Live, kind: str) -> Message:
    """The next event of a kind, on a socket with a single subscription."""
    while True:
        for message in live.others:
            for event in message.get("events", ()):
                if event["kind"] == kind:
                    return dict(event)
        live.others.append(await live.receive())


@asynccontextmanager
async def _running(engine: Engine, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "gavel",
        *arguments,
        cwd=ROOT,
        env=engine.environment(PYTHONUNBUFFERED="1"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        # Not by SIGINT, which a process started in the background of a script ignores.
        process.terminate()
        await process.communicate()


async def _line(reader: asyncio.StreamReader) -> str:
    async with asyncio.timeout(ANSWER_S):
        line = await reader.readline()
    assert line, "it ended"
    return line.decode().rstrip("\n")
