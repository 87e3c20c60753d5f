"""Whatever goes wrong, no log and no sentence of the engine holds a secret."""

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest
from websockets.asyncio.client import connect

from actors.directory import Directory, Owner
from actors.link import Link
from actors.network import WebSockets
from gateway.tokens import issue, make_key_pair
from tests.e2e.engine import Engine, wait_until
from tests.e2e.live import Live, call, connected, open_auction
from tests.support.postgres import OwnPostgres

SECRET = "hush-this-is-the-clusters-secret"
OTHER_SECRET = "hush-this-is-not-the-clusters-secret"
PASSWORD = "hush-this-is-the-databases-password"

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def postgres() -> Iterator[OwnPostgres]:
    # Not pytest's folder: Postgres, as another user, must be able to reach it.
    with tempfile.TemporaryDirectory(prefix="gt-", dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        postgres = OwnPostgres(Path(folder))
        try:
            yield postgres
        finally:
            postgres.stop()


def test_no_log_holds_a_secret(postgres: OwnPostgres) -> None:
    database_url = postgres.url.replace("postgres@", f"postgres:{PASSWORD}@", 1)
    environment = {"GAVEL_SECRET": SECRET, "GAVEL_DATABASE_URL": database_url, "GAVEL_LOG_LEVEL": "debug"}
    with Engine(environment=environment) as engine:
        engine.start("--shards", "1")
        asyncio.run(provoke(engine, postgres))
        # Ray's logs are gone with Ray.
        logs = engine.logs()
        engine.stop()
        logs |= engine.logs()
        key = engine.keys.private_pem.decode().splitlines()[1]
        hidden = {SECRET, OTHER_SECRET, PASSWORD, key, *(token.rpartition(".")[2] for token in engine.tokens)}
    text = "".join(logs.values())
    # What was provoked was logged.
    assert "does not hold the cluster's secret" in text
    assert "the shard is away" in text
    assert [(path, secret) for path, text in logs.items() for secret in hidden if secret in text] == []


async def provoke(engine: Engine, postgres: OwnPostgres) -> None:
    """Have everything go wrong in which a secret plays a part."""
    user, maker = uuid4(), uuid4()
    auction = await open_auction(engine, maker)
    token, expired = engine.token(user), engine.token(user, ttl_s=1, now_ms=1)
    foreign = issue(make_key_pair()[0], user, "viewer", 3_600, 4_000_000_000_000)
    engine.tokens.append(foreign)
    for bad in (expired, foreign, token + "x", f"{token}\x7f"):
        assert (await call(engine, "GET", f"/auctions/{auction}", token=bad)).status_code in (400, 401)
        async with connect(engine.live_url) as socket:
            live = Live(socket)
            await socket.send(f'{{"op":"hello","token":"{bad}"}}')
            assert await live.close_code() in (4500, 4501)
    for malformed in (f'{{"op":"hello","token":"{token}"', f'{{"op":"hello","token":["{token}"]}}', token):
        async with connect(engine.live_url) as socket:
            await socket.send(malformed)
            await socket.send(b"\xff" + token.encode())
            assert await Live(socket).close_code() == 4500
    async with connect(engine.live_url) as socket:
        socket.transport.write(b"\xff\xff" + token.encode())
        assert await Live(socket).close_code() == 1002
    await link_with_another_secret(engine, postgres.url)
    async with connected(engine, token) as live:
        postgres.crash()
        assert (await live.bid(auction, max_amount=5_000))["code"] in ("unavailable", "outcome_unknown")
        postgres.start()
        while (await live.bid(auction, max_amount=6_000))["type"] != "ack":
            pass


async def link_with_another_secret(engine: Engine, database_url: str) -> None:
    """Be refused by a shard, as a gateway that holds another secret."""

    async def find_owner(shard: int) -> Owner | None:
        return next((owner for owner in await directory.owners() if owner.shard == shard), None)

    async with asyncpg.create_pool(database_url, min_size=1, max_size=1) as pool:
        directory = Directory(pool)
        link = Link(
            gateway="gateway-x",
            shard=0,
            secret=OTHER_SECRET.encode(),
            network=WebSockets(),
            find_owner=find_owner,
            on_published=print,
            on_presence=print,
            on_noticed=print,
            on_open=print,
        )

        def is_refused() -> bool:
            return any("does not hold the cluster's secret" in text for text in engine.logs().values())

        try:
            await asyncio.to_thread(wait_until, is_refused, "nobody refuses the link")
        finally:
            await link.close()
