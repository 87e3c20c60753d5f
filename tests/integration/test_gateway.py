"""A shard and a gateway as they are wired in earnest, on a real Postgres, in one process and without Ray."""

import asyncio
import contextlib
import gc
import json
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn, cast
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest
from websockets.asyncio.client import ClientConnection, connect

from actors import bootstrap, clock, database
from actors.bootstrap import Place, RunningShard, host_of, start_shard
from actors.directory import Directory
from actors.journal import SELECT_ROWS, row_of
from actors.logs import get_logger
from engine.audit import Audit
from engine.commands import Role
from gateway.gateway_actor import Door, RunningGateway, start_gateway
from gateway.tokens import issue, make_key_pair
from gavel.client import Api, LiveClient
from gavel.errors import CommandError
from tests.support.certificates import make_certificate
from tests.support.postgres import wait_for_lock
from tests.support.waiting import until

PRIVATE, PUBLIC = make_key_pair()
MAKER, ANNA, BEN = UUID(int=101), UUID(int=102), UUID(int=103)
FAR_MS = 4_000_000_000_000


def token(user: UUID, role: Role = "viewer") -> str:
    return issue(PRIVATE, user, role, 3_600, FAR_MS)


def die(reason: str) -> NoReturn:
    raise AssertionError(f"a shard died: {reason}")


class Engine:
    """One shard and one gateway; the shard can be killed and started again."""

    def __init__(self, place: Place, pool: asyncpg.Pool) -> None:
        self.place = place
        self.pool = pool
        self.shard: RunningShard | None = None
        self.gateway: RunningGateway
        self.port = free_port()

    async def start(self) -> None:
        await Directory(self.pool).lay_out(1)
        await self.start_shard()
        door = Door(host="127.0.0.1", port=self.port, public_key=PUBLIC)
        self.gateway = await start_gateway(self.place, door, "gateway-0")

    async def start_shard(self) -> None:
        self.shard = await start_shard(host_of(self.place), 0, die)

    async def kill_shard(self) -> None:
        """Leave what a `kill -9` leaves: broken links, broken connections, and an address in the directory."""
        running, self.shard = self.shard, None
        assert running is not None
        running._server.close()
        if running.shard._timer is not None:
            running.shard._timer.cancel()
        tasks = [*running.shard._tasks, running._clock_task]
        for task in tasks:
            task.cancel()
        running._journal._writer.terminate()
        running._pool.terminate()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def stop(self) -> None:
        await self.gateway.stop()
        if self.shard is not None:
            await self.shard.stop()

    async def open_auction(self, seconds: int = 3_600, **changes: Any) -> str:
        body = {
            "title": "A bowl",
            "currency": "USD",
            "starting_price": 10,
            "end_time": await self.pool.fetchval(
                "SELECT to_char((clock_timestamp() + make_interval(secs => $1)) AT TIME ZONE 'UTC', "
                '\'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"\')',
                seconds,
            ),
            **changes,
        }
        # Where the machine stood still for a second, the shard first makes sure that it is the owner.
        while (response := await self.request("POST", "/api/v1/auctions", MAKER, json=body)).status_code == 503:
            pass
        assert response.status_code == 201, response.text
        auction: str = response.json()["data"]["auction_id"]
        return auction

    async def request(self, method: str, path: str, user: UUID | None = None, **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {token(user, 'maker')}"} if user is not None else {}
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}") as client:
            return await client.request(method, path, headers=headers, **options)

    @asynccontextmanager
    async def client(self, user: UUID | None = None) -> AsyncIterator["Client"]:
        async with connect(f"ws://127.0.0.1:{self.port}/v1/live") as connection:
            client = Client(connection)
            hello = {"op": "hello", "ref": "hello"} | ({} if user is None else {"token": token(user)})
            welcome = await client.ask(hello)
            assert welcome["type"] == "welcome"
            assert welcome["user"] == (None if user is None else str(user))
            yield client


class Client:
    """One client: asks, and gathers the events that come; of those that were folded it has only the numbers."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self.events: list[dict[str, Any]] = []
        self.viewers: list[int] = []
        self.answers: dict[Any, list[dict[str, Any]]] = {}
        self._seq = 0
        self._refs = 0

    async def send(self, message: dict[str, Any]) -> Any:
        self._refs += 1
        message = {"ref": self._refs, **message}
        await self.connection.send(json.dumps(message))
        return message["ref"]

    async def receive(self) -> None:
        message = json.loads(await self.connection.recv())
        if message["type"] == "presence":
            self.viewers.append(message["viewers"])
        elif message["type"] == "events":
            self._take(message["events"])
        elif message["type"] == "state":
            kept = {event["seq"]: event for event in message["events"]}
            self._take([kept.get(seq, {"seq": seq}) for seq in range(self._seq + 1, message["seq"] + 1)])
        else:
            if message["type"] == "subscribed" and message["topic"] != "me":
                self._seq = message["seq"]
            self.answers.setdefault(message.get("ref"), []).append(message)

    def _take(self, events: list[dict[str, Any]]) -> None:
        self.events += events
        self._seq = events[-1]["seq"]

    async def answer(self, ref: Any) -> dict[str, Any]:
        while ref not in self.answers:
            await self.receive()
        return self.answers[ref][0]

    async def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        return await self.answer(await self.send(message))

    async def bid(self, auction: str, amount: int, bid_id: UUID | None = None) -> dict[str, Any]:
        return await self.ask({"op": "bid", "auction": auction, "bid_id": str(bid_id or uuid4()), "amount": amount})

    async def subscribe(self, auction: str, since: int | None = None) -> dict[str, Any]:
        message = {"op": "subscribe", "topic": f"auction:{auction}"}
        return await self.ask(message if since is None else {**message, "since": since})

    async def told_viewers(self, viewers: int) -> None:
        """Wait until so many are said to watch."""
        while self.viewers[-1:] != [viewers]:
            await self.receive()

    async def seen(self, seq: int) -> list[int]:
        """Wait for the event `seq`; the numbers of all that came."""
        while not self.events or self.events[-1]["seq"] < seq:
            await self.receive()
        return [event["seq"] for event in self.events]


@pytest.fixture
async def engine(
    database_url: str, pool: asyncpg.Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Engine]:
    monkeypatch.delenv("GAVEL_SECRET", raising=False)
    async with running(database_url, pool, tmp_path) as engine:
        yield engine


@asynccontextmanager
async def running(database_url: str, pool: asyncpg.Pool, tmp_path: Path) -> AsyncIterator[Engine]:
    secret = tmp_path / "secret"
    secret.write_bytes(b"a secret of the cluster")
    place = Place(database_url=database_url, secret_path=str(secret), log_dir=str(tmp_path), log_level="info")
    engine = Engine(place, pool)
    thresholds = gc.get_threshold()
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()
        # Processes of their own settle their memory for good; this one goes on.
        gc.unfreeze()
        gc.set_threshold(*thresholds)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def audited(pool: asyncpg.Pool, auction: str) -> list[str]:
    """The kinds of an auction's events, all of which must be right."""
    rows = await pool.fetch(f"{SELECT_ROWS} WHERE entity_id = $1 ORDER BY seq", UUID(auction))
    audit = Audit()
    for row in rows:
        assert audit.follow(row_of(row)) is None
    assert audit.finish() is None
    return [row["kind"] for row in rows]


async def test_an_auction_from_its_opening_to_its_end(engine: Engine) -> None:
    auction = await engine.open_auction(soft_close=None)
    async with engine.client() as watcher, engine.client(ANNA) as anna, engine.client(BEN) as ben:
        subscribed = await watcher.subscribe(auction)
        assert (subscribed["seq"], subscribed["recovered"], subscribed["snapshot"]["price"]) == (1, False, 1_000)
        first = await anna.bid(auction, 1_500)
        assert (first["type"], first["seq"], first["outcome"], first["paddle"]) == ("ack", 2, "leading", 1)
        low = await ben.bid(auction, 1_600)
        assert (low["type"], low["code"], low["minimum"]) == ("rejected", "bid_too_low", 2_000)
        second = await ben.bid(auction, 2_000)
        assert (second["seq"], second["paddle"]) == (3, 2)
        ended = await engine.request("POST", f"/api/v1/auctions/{auction}/end", MAKER)
        assert ended.status_code == 200, ended.text
        assert await watcher.seen(4) == [2, 3, 4]
        last = watcher.events[-1]
        assert (last["kind"], last["outcome"], last["paddle"], last["price"]) == ("ended", "sold", 2, 2_000)
        late = await anna.bid(auction, 9_000)
        assert late["code"] == "ended"
    assert await audited(engine.pool, auction) == ["opened", "bid_placed", "bid_placed", "ended"]
    assert last["hash"] == (await engine.pool.fetchval("SELECT hash FROM journal WHERE seq = 4")).hex()


async def test_a_client_that_comes_back_gets_what_it_missed(engine: Engine) -> None:
    auction = await engine.open_auction()
    async with engine.client(ANNA) as anna, engine.client(BEN) as ben:
        async with engine.client() as watcher:
            await watcher.subscribe(auction)
            await anna.bid(auction, 1_000)
            assert await watcher.seen(2) == [2]
        await ben.bid(auction, 2_000)
        await anna.bid(auction, 3_000)
        async with engine.client() as watcher:
            subscribed = await watcher.subscribe(auction, since=2)
            assert (subscribed["recovered"], [event["seq"] for event in subscribed["events"]]) == (True, [3, 4])
            await ben.bid(auction, 4_000)
            assert await watcher.seen(5) == [5]
        again = await ben.subscribe(auction, since=99)
        assert (again["recovered"], again["seq"]) == (False, 5)
        assert again["you"] == {"paddle": 2, "max_amount": 4_000, "is_leading": True}


async def test_the_same_bid_sent_again_is_one_bid(engine: Engine) -> None:
    auction = await engine.open_auction()
    bid_id = uuid4()
    async with engine.client(ANNA) as anna:
        first = await anna.bid(auction, 1_000, bid_id)
    async with engine.client(ANNA) as anna:
        again = await anna.bid(auction, 7_777, bid_id)
    assert {**again, "ref": None} == {**first, "ref": None}
    assert await audited(engine.pool, auction) == ["opened", "bid_placed"]


async def test_a_shard_that_dies_costs_nobody_a_bid_and_no_watcher_an_event(engine: Engine) -> None:
    auction = await engine.open_auction()
    async with engine.client() as watcher, engine.client(ANNA) as anna, engine.client(BEN) as ben:
        await watcher.subscribe(auction)
        await anna.bid(auction, 1_000)
        shard = engine.shard
        assert shard is not None
        # A bid is on its way to the journal when the shard dies: its append waits for a lock.
        async with engine.pool.acquire() as other, other.transaction():
            await other.execute("SELECT FROM shards FOR UPDATE")
            late = await ben.send({"op": "bid", "auction": auction, "bid_id": str(uuid4()), "amount": 2_000})
            await wait_for_lock(engine.pool, shard._journal._writer.get_server_pid())
            await engine.kill_shard()
        # And another is made while there is no shard.
        await until(lambda: engine.gateway._router.unreachable() == [0])
        during = await anna.send({"op": "bid", "auction": auction, "bid_id": str(uuid4()), "amount": 3_000})
        await engine.start_shard()
        assert (await ben.answer(late))["seq"] == 3
        assert (await anna.answer(during))["seq"] == 4
        assert (await ben.bid(auction, 4_000))["seq"] == 5
        assert await watcher.seen(5) == [2, 3, 4, 5]
        assert len(ben.answers[late]) == len(anna.answers[during]) == 1
    assert await audited(engine.pool, auction) == ["opened", *["bid_placed"] * 4]


async def test_ended_database_sessions_cost_nobody_a_bid_and_no_watcher_an_event(engine: Engine) -> None:
    auction = await engine.open_auction()
    running = engine.shard
    assert running is not None
    epoch = running._journal.epoch
    async with engine.client() as watcher, engine.client(ANNA) as anna, engine.client(BEN) as ben:
        await watcher.subscribe(auction)
        await anna.bid(auction, 1_000)
        # A bid is on its way to the journal when its session is ended.
        async with engine.pool.acquire() as other, other.transaction():
            await other.execute("SELECT FROM shards FOR UPDATE")
            late = await ben.send({"op": "bid", "auction": auction, "bid_id": str(uuid4()), "amount": 2_000})
            backend_pid = running._journal._writer.get_server_pid()
            await wait_for_lock(engine.pool, backend_pid)
            await other.execute("SELECT pg_terminate_backend($1)", backend_pid)
        # That is acknowledged once it is sure; what comes next is taken up once nothing is owed any more.
        assert (await ben.answer(late))["seq"] == 3
        await until(lambda: not running.shard._is_away)
        assert (await anna.bid(auction, 3_000))["seq"] == 4
        assert await watcher.seen(4) == [2, 3, 4]
        assert len(ben.answers[late]) == 1
    assert running._journal.epoch > epoch
    assert engine.gateway._router.unreachable() == []
    assert await audited(engine.pool, auction) == ["opened", *["bid_placed"] * 3]


async def test_a_shard_that_stops_in_good_order_keeps_snapshots(engine: Engine) -> None:
    auction = await engine.open_auction()
    async with engine.client() as watcher, engine.client(ANNA) as anna:
        await watcher.subscribe(auction)
        await anna.bid(auction, 1_000)
        assert engine.shard is not None
        await engine.shard.stop()
        assert await engine.pool.fetchval("SELECT seq FROM snapshots WHERE entity_id = $1", UUID(auction)) == 2
        await engine.start_shard()
        assert (await anna.bid(auction, 2_000))["seq"] == 3
        assert await watcher.seen(3) == [2, 3]


async def test_a_stored_deadline_that_comes_early_does_no_harm(engine: Engine) -> None:
    auction = await engine.open_auction(soft_close=None)
    async with engine.client() as watcher, engine.client(ANNA) as anna:
        await watcher.subscribe(auction)
        await anna.bid(auction, 1_000)
        await engine.kill_shard()
        await engine.pool.execute("UPDATE entities SET due_at = 1")
        await engine.start_shard()
        # It was woken for its deadline, found that it was not due yet, and goes on.
        assert (await anna.bid(auction, 2_000))["seq"] == 3
        assert await watcher.seen(3) == [2, 3]


async def test_health_tells_of_a_shard_that_is_away(engine: Engine) -> None:
    response = await engine.request("GET", "/health")
    assert (response.status_code, response.json()["parts"]) == (200, {"shards": "healthy", "database": "healthy"})
    await engine.kill_shard()
    await until(lambda: engine.gateway._router.unreachable() == [0])
    response = await engine.request("GET", "/health")
    assert (response.status_code, response.json()["parts"]["shards"]) == (503, "out of reach: 0")
    await engine.start_shard()
    await engine.gateway._router.opened()
    response = await engine.request("GET", "/health")
    assert response.status_code == 200


async def test_health_tells_of_a_database_that_is_away(engine: Engine) -> None:
    pool = engine.gateway._pool
    engine.gateway._pool = asyncpg.create_pool("postgresql://postgres@127.0.0.1:1/none")
    try:
        assert await engine.gateway._database_health() == "out of reach"
    finally:
        engine.gateway._pool = pool


async def test_a_gateway_that_goes_sends_everybody_elsewhere(engine: Engine) -> None:
    async with engine.client() as client:
        stopping = asyncio.create_task(engine.gateway.stop())
        with contextlib.suppress(Exception):
            while True:
                await client.receive()
        assert client.connection.close_code == 4000
        await stopping
    door = Door(host="127.0.0.1", port=engine.port, public_key=PUBLIC)
    engine.gateway = await start_gateway(engine.place, door, "gateway-0")
    async with engine.client():
        pass


async def test_clocks_follow_the_databases_through_its_absences(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "CLOCK_SYNC_MS", 1)
    asked: list[object] = []

    class Clock:
        async def synchronise(self, pool: object) -> None:
            asked.append(pool)
            if len(asked) == 1:
                raise ConnectionRefusedError

    following = asyncio.create_task(bootstrap.keep_synchronised(cast(clock.Clock, Clock()), engine.pool))
    await until(lambda: len(asked) >= 3)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    assert set(asked) == {engine.pool}


async def test_each_process_logs_to_a_file_of_its_own(engine: Engine) -> None:
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    root.handlers = []
    try:
        bootstrap.set_up_logging(engine.place, "shard-7")
        logging.getLogger("uvicorn").info("taken by %s", "someone", extra={"color_message": "TAKEN"})
        get_logger("actors").info("serves", auction=MAKER, slots=7)
        try:
            raise ConnectionError("gone")
        except ConnectionError:
            get_logger("actors").exception("broke")
        (handler,) = root.handlers
        handler.close()
    finally:
        root.handlers = handlers
        root.setLevel(level)
        logging.getLogger("picows").setLevel(logging.NOTSET)
    lines = [json.loads(line) for line in (Path(engine.place.log_dir) / "shard-7.log").read_text().splitlines()]
    for line in lines:
        assert datetime.fromisoformat(line.pop("timestamp")).tzinfo == UTC
    assert lines[:2] == [
        {"process": "shard-7", "level": "info", "logger": "uvicorn", "event": "taken by someone"},
        {
            "process": "shard-7",
            "level": "info",
            "logger": "actors",
            "event": "serves",
            "auction": str(MAKER),
            "slots": 7,
        },
    ]
    assert lines[2]["exception"].endswith("ConnectionError: gone")


async def test_with_a_certificate_all_goes_over_tls(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auction = await engine.open_auction()
    certificate = make_certificate(tmp_path)
    port = free_port()
    door = Door(
        host="127.0.0.1",
        port=port,
        public_key=PUBLIC,
        tls_certificate=str(certificate.path),
        tls_key=str(certificate.key_path),
    )
    gateway = await start_gateway(engine.place, door, "gateway-1")
    url = f"https://127.0.0.1:{port}"
    try:
        # Whoever does not trust the certificate is not served.
        with pytest.raises(CommandError, match="CERTIFICATE_VERIFY_FAILED"):
            async with Api(url, patience_s=0) as api:
                await api.call("GET", f"/auctions/{auction}")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.path))
        async with Api(url) as api, LiveClient(url, token=token(ANNA)) as client:
            assert (await client.bid(UUID(auction), uuid4(), amount=1_000))["outcome"] == "leading"
            assert (await api.call("GET", f"/auctions/{auction}"))["leader_paddle"] == 1
    finally:
        await gateway.stop()


async def test_the_secret_may_come_from_the_environment(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine.place.secret() == b"a secret of the cluster"
    monkeypatch.setenv("GAVEL_SECRET", "another")
    assert engine.place.secret() == b"another"


async def test_a_shard_that_was_overtaken_while_it_started_dies(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    await engine.kill_shard()
    announce = Directory.announce

    async def overtaken(self: Directory, shard: int, owner: UUID, address: str) -> bool:
        await engine.pool.execute("UPDATE shards SET epoch = epoch + 1, owner = $1", uuid4())
        return await announce(self, shard, owner, address)

    reasons: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(Directory, "announce", overtaken)
        # In earnest the process ends here; we let it go on, so that it can be stopped.
        engine.shard = await start_shard(host_of(engine.place), 0, cast("Callable[[str], NoReturn]", reasons.append))
    assert reasons[0] == "another process has taken this shard over"
    await engine.kill_shard()


async def test_a_shard_waits_for_a_database_that_is_just_starting(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_pool = asyncpg.create_pool
    tries = 0

    async def fail_twice(*arguments: Any, **options: Any) -> asyncpg.Pool:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise asyncpg.CannotConnectNowError("the database system is starting up")
        pool = await create_pool(*arguments, **options)
        assert pool is not None
        return pool

    monkeypatch.setattr(database, "DATABASE_RETRY_MS", 1)
    monkeypatch.setattr(asyncpg, "create_pool", fail_twice)
    pool = await database.Postgres(database_url).pool()
    await pool.close()
    assert tries == 3
