"""The door of a whole engine: TLS, suspension, and no secret in a log, whatever goes wrong."""

import asyncio
from collections.abc import Iterator
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
from tests.support.certificates import make_certificate
from tests.support.postgres import OwnPostgres, own_postgres

SECRET = "hush-this-is-the-clusters-secret"
OTHER_SECRET = "hush-this-is-not-the-clusters-secret"
PASSWORD = "hush-this-is-the-databases-password"

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def postgres() -> Iterator[OwnPostgres]:
    with own_postgres() as postgres:
        yield postgres


@pytest.fixture(scope="module")
def engine(postgres: OwnPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine that speaks TLS, with a secret and a password of its own, and tells all that it has to tell."""
    certificate = make_certificate(tmp_path_factory.mktemp("tls"))
    environment = {
        "GAVEL_DATABASE_URL": postgres.url.replace("postgres@", f"postgres:{PASSWORD}@", 1),
        "GAVEL_LOG_LEVEL": "debug",
        "GAVEL_SECRET": SECRET,
        "GAVEL_TLS_CERTIFICATE": str(certificate.path),
        "GAVEL_TLS_KEY": str(certificate.key_path),
        # What it starts trusts its certificate, and so do the tests.
        "SSL_CERT_FILE": str(certificate.path),
    }
    with Engine("--shards", "1", environment=environment) as engine, pytest.MonkeyPatch.context() as patched:
        patched.setenv("SSL_CERT_FILE", str(certificate.path))
        engine.url = engine.url.replace("http:", "https:")
        engine.live_url = engine.live_url.replace("ws:", "wss:")
        yield engine.start()


async def test_the_command_line_trusts_a_certificate_that_it_is_given(engine: Engine) -> None:
    maker = uuid4()
    auction = await open_auction(engine, maker)
    watching = asyncio.create_task(asyncio.to_thread(engine.gavel, "watch", str(auction), "--url", engine.url))
    async with connected(engine, engine.token(uuid4())) as live:
        assert (await live.bid(auction, max_amount=5_000))["type"] == "ack"
    end = await call(
        engine, "POST", f"/auctions/{auction}/end", token=engine.token(uuid4(), "admin"), body={"reason": "It broke."}
    )
    assert end.status_code == 200, end.text
    watched = await watching
    assert (watched.returncode, watched.stderr) == (0, "")
    # However late it came.
    assert "paddle 1" in watched.stdout


async def test_a_suspended_user_is_sent_away(engine: Engine) -> None:
    user = uuid4()
    token = engine.token(user)
    async with connected(engine, token) as live:
        suspended = await asyncio.to_thread(engine.gavel, "suspend", str(user))
        assert (suspended.returncode, suspended.stdout) == (0, f"{user} is suspended.\n")
        assert await live.close_code() == 4501
    lifted = await asyncio.to_thread(engine.gavel, "suspend", str(user), "--lift")
    assert (lifted.returncode, lifted.stdout) == (0, f"{user} is not suspended.\n")


def test_no_log_holds_a_secret(engine: Engine, postgres: OwnPostgres) -> None:
    """The last one: it takes Postgres down, and ends the engine."""
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
    # Nor does anybody note whence clients came.
    gateway = engine.data_dir / "logs" / "gateway-0.log"
    assert "a socket is closed" in logs[gateway]
    assert "accepted" not in logs[gateway]
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
