"""Real sockets: uvicorn and picows in this process, spoken to by the `websockets` client, an independent one."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, cast
from uuid import UUID

import httpx
import pytest
import uvicorn
import uvloop
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import Frame, Opcode
from websockets.typing import Subprotocol

from actors.messages import Answer, BidAccepted, Payload
from engine.commands import PlaceBid
from engine.limits import (
    FRAME_BYTES_MAX,
    SECOND_MS,
    SOCKET_BEHIND_MS_MAX,
    SOCKET_WRITE_BYTES_MAX,
    SOCKETS_MAX,
    SUBSCRIPTIONS_MAX,
)
from engine.rejections import Rejection
from gateway import socket as socket_module
from gateway.origins import Origins
from gateway.socket import ClientSocket, HttpProtocol, Sink, Sockets, make_http_protocol, make_protocol
from gateway.tokens import Verifier, issue, make_key_pair
from gateway.wire import Standing, Subscribed
from loadtests import clients
from tests.support.certificates import Certificate, make_certificate
from tests.support.waiting import quiet, until

PRIVATE, PUBLIC = make_key_pair()
NOW = 1_700_000_000_000
ANNA = UUID("22222222-2222-4222-8222-222222222222")
AUCTION = UUID("a0000000-0000-4000-8000-00000000000a")
BID = UUID("b0000000-0000-4000-8000-00000000000b")
TOPIC = f"auction:{AUCTION}"
ACCEPTED = BidAccepted(7, bytes(32), NOW, "leading", 100, 3, 900, 105, NOW + 1)
HELLO = '{"op":"hello"}'


class Router:
    """Accepts each bid at once, or keeps what would answer it."""

    def __init__(self) -> None:
        self.payloads: list[Payload] = []
        self.is_silent = False
        self.waiting: list[Callable[[Answer], None]] = []
        self.submitted = asyncio.Event()

    def submit(self, payload: Payload, on_answer: Callable[[Answer], None]) -> None:
        self.payloads.append(payload)
        self.submitted.set()
        if self.is_silent:
            self.waiting.append(on_answer)
        else:
            on_answer(ACCEPTED)


class Fanout:
    """Remembers who watches what."""

    def __init__(self) -> None:
        self.sinks: dict[UUID, list[Sink]] = {}
        self.followers: list[Sink] = []
        self.is_silent = False
        self.waiting: list[Callable[[Subscribed | Rejection], None]] = []
        self.subscribed = asyncio.Event()
        self.dropped = asyncio.Event()
        self.caught_up: list[Sink] = []

    def subscribe(
        self,
        topic: UUID,
        viewer: UUID | None,
        since: int | None,
        sink: Sink,
        on_subscribed: Callable[[Subscribed | Rejection], None],
        /,
    ) -> None:
        self.sinks.setdefault(topic, []).append(sink)
        self.subscribed.set()
        if self.is_silent:
            self.waiting.append(on_subscribed)
        else:
            on_subscribed(Subscribed(5, b'{"seq":5,"kind":"private"}', None, None))

    def follow(self, user: UUID, sink: Sink, on_subscribed: Callable[[list[Standing] | Rejection], None], /) -> None:
        self.followers.append(sink)
        on_subscribed([Standing(auction=AUCTION, paddle=1, max_amount=5, is_leading=True, status="active")])

    def unsubscribe(self, topic: UUID, sink: Sink, /) -> None:
        self.sinks[topic].remove(sink)

    def catch_up(self, sink: Sink, /) -> None:
        self.caught_up.append(sink)

    def drop(self, sink: Sink, /) -> None:
        for sinks in self.sinks.values():
            sinks[:] = [other for other in sinks if other is not sink]
        self.followers = [other for other in self.followers if other is not sink]
        self.dropped.set()


class Connections(set[Any]):
    """uvicorn's set of connections, which tells when one is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.gone = asyncio.Event()

    def discard(self, connection: Any) -> None:
        super().discard(connection)
        self.gone.set()


class Gateway:
    """uvicorn with our protocol on a port of its own, and all that stands behind it."""

    def __init__(self, sockets: Sockets, connections_max: int, certificate: Certificate | None) -> None:
        self.router = Router()
        self.fanout = Fanout()
        self.sockets = sockets
        self.now = NOW
        protocol = make_protocol(
            self.router,
            self.fanout,
            self.fanout,
            Verifier(PUBLIC).verify,
            lambda: self.now,
            sockets,
            Origins("https://gavel.example", is_tls=certificate is not None),
        )
        self.http = make_http_protocol(connections_max)
        config = uvicorn.Config(
            _app,
            ws=protocol,
            lifespan="off",
            log_config=None,
            http=self.http,
            ssl_certfile=None if certificate is None else certificate.path,
            ssl_keyfile=None if certificate is None else certificate.key_path,
        )
        self.server = uvicorn.Server(config)
        self.certificate = certificate
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]

    @asynccontextmanager
    async def client(self, hello: str | None = HELLO, path: str = "/v1/live", **options: Any) -> AsyncIterator[Any]:
        scheme = "ws"
        if self.certificate is not None:
            scheme, options = "wss", {"ssl": self.certificate.trust(), **options}
        async with connect(f"{scheme}://127.0.0.1:{self.port}{path}", **options) as client:
            if hello is not None:
                await client.send(hello)
                assert (await answer(client))["type"] == "welcome"
            yield client

    def token(self) -> str:
        return issue(PRIVATE, ANNA, "viewer", 3600, self.now)


async def _app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"plain"})


@asynccontextmanager
async def running(
    sockets: Sockets | None = None, connections_max: int = SOCKETS_MAX, certificate: Certificate | None = None
) -> AsyncIterator[Gateway]:
    gateway = Gateway(Sockets() if sockets is None else sockets, connections_max, certificate)
    # As inside a Ray actor: not `serve`, which takes the process's signals.
    gateway.server.config.load()
    gateway.server.lifespan = gateway.server.config.lifespan_class(gateway.server.config)
    await gateway.server.startup(sockets=[gateway.listener])
    try:
        yield gateway
    finally:
        await gateway.server.shutdown(sockets=[gateway.listener])
        assert len(gateway.sockets) == 0


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    async with running() as gateway:
        yield gateway


async def answer(client: ClientConnection) -> Any:
    async with asyncio.timeout(10):
        return json.loads(await client.recv())


async def read_on(client: ClientConnection) -> None:
    async with asyncio.timeout(10):
        while True:
            await client.recv()


async def closed(client: ClientConnection) -> int:
    """Read on until the socket is closed, and return the code that the server gave."""
    with pytest.raises(ConnectionClosed) as raised:
        await read_on(client)
    assert raised.value.rcvd is not None, "closed without a close frame"
    return raised.value.rcvd.code


# The conversation


async def test_hello_time_ping(gateway: Gateway) -> None:
    async with gateway.client(hello=None) as client:
        await client.send(json.dumps({"op": "hello", "token": gateway.token(), "ref": 1}))
        welcome = await answer(client)
        assert (welcome["ref"], welcome["user"], welcome["server_time"]) == (1, str(ANNA), NOW)
        assert UUID(welcome["connection"]).version == 4
        await client.send('{"op":"time","t0":3,"ref":2}')
        assert await answer(client) == {"type": "time", "ref": 2, "t0": 3, "t1": NOW, "t2": NOW}
        await client.send('{"op":"ping","ref":3}')
        assert await answer(client) == {"type": "pong", "ref": 3}
        assert len(gateway.sockets) == 1


async def test_a_bid_is_acknowledged(gateway: Gateway) -> None:
    async with gateway.client(hello=json.dumps({"op": "hello", "token": gateway.token()})) as client:
        await client.send(f'{{"op":"bid","auction":"{AUCTION}","bid_id":"{BID}","max_amount":900,"ref":"b"}}')
        ack = await answer(client)

    assert (ack["type"], ack["ref"], ack["seq"], ack["hash"]) == ("ack", "b", 7, "00" * 32)
    assert gateway.router.payloads == [PlaceBid(auction=AUCTION, bidder=ANNA, bid_id=BID, max_amount=900)]


async def test_events_reach_whoever_subscribed(gateway: Gateway) -> None:
    async with gateway.client() as client:
        await client.send(f'{{"op":"subscribe","topic":"{TOPIC}","ref":1}}')
        assert (await answer(client))["events"] == [{"seq": 5, "kind": "private"}]
        for sink in gateway.fanout.sinks[AUCTION]:
            sink.send(b'{"type":"events"}')
        assert await answer(client) == {"type": "events"}
        await client.send(f'{{"op":"unsubscribe","topic":"{TOPIC}","ref":2}}')
        assert (await answer(client))["type"] == "unsubscribed"
        assert gateway.fanout.sinks[AUCTION] == []


async def test_a_thousand_subscriptions(gateway: Gateway) -> None:
    async with gateway.client() as client:
        for number in range(1_000):
            await client.send(json.dumps({"op": "subscribe", "topic": f"auction:{UUID(int=number)}", "ref": number}))
        answers = [await answer(client) for _ in range(1_000)]

    assert [frame["ref"] for frame in answers] == list(range(1_000))
    kinds = [frame.get("code") or frame["type"] for frame in answers]
    assert kinds == ["subscribed"] * SUBSCRIPTIONS_MAX + ["too_many"] * (1_000 - SUBSCRIPTIONS_MAX)


async def test_a_message_in_fragments(gateway: Gateway) -> None:
    async with gateway.client() as client:

        async def pieces() -> AsyncIterator[str]:
            yield '{"op":"pi'
            # Control frames may come between fragments.
            await (await client.ping())
            yield ""
            yield 'ng","ref":"'
            yield 'whole"}'

        await client.send(pieces())
        assert await answer(client) == {"type": "pong", "ref": "whole"}
        await client.send('{"op":"ping","ref":2}')
        assert await answer(client) == {"type": "pong", "ref": 2}


async def test_the_largest_message_is_taken(gateway: Gateway) -> None:
    message = '{"op":"ping","ref":1}'.ljust(FRAME_BYTES_MAX)
    async with gateway.client() as client:
        await client.send(message)
        assert await answer(client) == {"type": "pong", "ref": 1}
        await client.send([message[:9_000], message[9_000:]])
        assert await answer(client) == {"type": "pong", "ref": 1}


# What ends it


@pytest.mark.parametrize("size", [FRAME_BYTES_MAX + 1, 40_000, 1_000_000])
async def test_too_large_a_message_closes(gateway: Gateway, size: int) -> None:
    async with gateway.client() as client:
        await client.send('{"op":"ping"}'.ljust(size))
        assert await closed(client) == 1009


async def test_too_large_a_message_in_fragments_closes(gateway: Gateway) -> None:
    async with gateway.client() as client:
        await client.send([" " * 10_000, " " * 6_384, " "])
        assert await closed(client) == 1009


@pytest.mark.parametrize(
    "message",
    [b'{"op":"ping"}', "hello", "[]", "", "[" * 16_000],
    ids=["binary", "text", "list", "empty", "deep"],
)
async def test_what_is_not_the_protocol_closes(gateway: Gateway, message: str | bytes) -> None:
    async with gateway.client() as client:
        await client.send(message)
        assert await closed(client) == 4500


async def test_invalid_utf8_closes(gateway: Gateway) -> None:
    async with gateway.client() as client:
        await client.send(b'{"op":"ping","x":"\xff"}', text=True)
        assert await closed(client) == 4500


async def test_binary_fragments_close(gateway: Gateway) -> None:
    async with gateway.client() as client:
        await client.send([b"{", b"}"])
        assert await closed(client) == 4500


async def test_nesting_is_told_about(gateway: Gateway) -> None:
    async with gateway.client() as client:
        await client.send('{"op":"ping","x":' + "[" * 8_000 + "]" * 8_000 + "}")
        error = await answer(client)
        assert (error["type"], error["code"]) == ("error", "bad_request")


MASK = b"\0\0\0\0"


@pytest.mark.parametrize(
    "frames",
    [
        b"\x80\x81" + MASK + b"x",
        b"\x01\x81" + MASK + b"{" + b"\x81\x81" + MASK + b"}",
        b"\xc1\x82" + MASK + b"{}",
        b"\x99\x80" + MASK,
        b"\x88\x81" + MASK + b"\0",
        b"\x81\x02{}",
    ],
    ids=["no beginning", "two beginnings", "compressed", "extended ping", "short close", "unmasked"],
)
async def test_frames_against_the_rules_close(gateway: Gateway, frames: bytes) -> None:
    async with gateway.client() as client:
        client.transport.write(frames)
        assert await closed(client) == 1002


async def test_after_a_close_nothing_is_taken(gateway: Gateway) -> None:
    async with gateway.client(hello=json.dumps({"op": "hello", "token": gateway.token()})) as client:
        bid = f'{{"op":"bid","auction":"{AUCTION}","bid_id":"{BID}","amount":100}}'.encode()
        frames = [Frame(Opcode.TEXT, b"[]"), Frame(Opcode.TEXT, bid), Frame(Opcode.PING, b"")]
        client.transport.write(b"".join(frame.serialize(mask=True) for frame in frames))
        assert await closed(client) == 4500

    assert gateway.router.payloads == []


async def test_without_a_hello_in_time_it_closes(gateway: Gateway) -> None:
    async with gateway.client(hello=None) as client:
        await (await client.ping())
        gateway.sockets.tick(NOW + 4_999)
        await (await client.ping())
        gateway.sockets.tick(NOW + 5_000)
        assert await closed(client) == 4501


async def test_pongs_keep_a_socket_open(gateway: Gateway) -> None:
    async with gateway.client() as client:
        for count in range(1, 6):
            gateway.sockets.tick(NOW + count * 15_000)
            # The answer to this comes after our pong has been read.
            await client.send('{"op":"hello"}' if count == 1 else '{"op":"ping"}')
            await answer(client)


async def test_a_peer_that_does_not_pong_is_given_up(gateway: Gateway) -> None:
    reader, writer = await raw_client(gateway)
    writer.write(Frame(Opcode.TEXT, HELLO.encode()).serialize(mask=True))
    await reader.readuntil(b"}}")
    for count in range(1, 4):
        gateway.sockets.tick(NOW + count * 15_000)
    # Two pings, then a close with 4002; nothing answers it, so the connection is cut.
    async with asyncio.timeout(10):
        rest = await reader.read()
    assert rest.startswith(b"\x89\x00\x89\x00\x88")
    assert int.from_bytes(rest[6:8], "big") == 4002
    writer.close()


async def test_draining_closes_all_and_whoever_comes_later(gateway: Gateway) -> None:
    async with gateway.client() as one, gateway.client(hello=None) as two:
        gateway.sockets.drain()
        assert [await closed(one), await closed(two)] == [4000, 4000]
    async with gateway.client(hello=None) as late:
        assert await closed(late) == 4000
    assert len(gateway.sockets) == 0


async def test_uvicorn_shutting_down_drains() -> None:
    async with running() as gateway:
        async with gateway.client() as client:
            # One that has begun a TCP connection only, and one that leaves without a goodbye.
            _, writer = await raw_client(gateway)
            writer.transport.abort()
            shutdown = asyncio.create_task(gateway.server.shutdown())
            assert await closed(client) == 4000
        await shutdown


async def test_the_house_is_full() -> None:
    async with running(Sockets(sockets_max=1)) as gateway, gateway.client() as first:
        async with gateway.client(hello=None) as second:
            assert await closed(second) == 4502
        await first.send('{"op":"ping","ref":1}')
        assert (await answer(first))["type"] == "pong"
        await first.close()
        async with gateway.client():
            assert len(gateway.sockets) == 1


@pytest.mark.parametrize("code", [1000, 1001, 3001, 4999])
async def test_a_client_leaves(gateway: Gateway, code: int) -> None:
    async with gateway.client() as client:
        await client.close(code)
        assert client.close_code in (1000, code)
    assert len(gateway.sockets) == 0


async def test_a_client_that_reads_too_slowly_is_closed(gateway: Gateway) -> None:
    connections = gateway.server.server_state.connections = Connections()
    reader, writer = await raw_client(gateway)
    transport = cast("asyncio.Transport", writer.transport)
    writer.write(Frame(Opcode.TEXT, HELLO.encode()).serialize(mask=True))
    await reader.readuntil(b"}}")
    writer.write(Frame(Opcode.TEXT, f'{{"op":"subscribe","topic":"{TOPIC}"}}'.encode()).serialize(mask=True))
    await reader.readuntil(b"]}")
    transport.pause_reading()
    connections.gone.clear()
    [sink] = gateway.fanout.sinks[AUCTION]
    gateway.fanout.dropped.clear()
    frame = b"x" * 1_000
    sent = 0
    async with asyncio.timeout(10):
        while not gateway.fanout.dropped.is_set():
            for _ in range(100):
                sink.send(frame)
            sent += 100
            await asyncio.sleep(0)
    # What the kernel holds for both ends comes on top.
    assert sent * len(frame) >= SOCKET_WRITE_BYTES_MAX
    assert len(gateway.sockets) == 0

    # It is dropped at once, and cut off after a second; what it reads then ends somewhere.
    await connections.gone.wait()
    transport.resume_reading()
    async with asyncio.timeout(10):
        assert len(await reader.read()) < sent * (len(frame) + 4)
    writer.close()


async def test_a_client_that_reads_on_is_caught_up(gateway: Gateway) -> None:
    async with gateway.client(max_queue=1) as client:
        await client.send(f'{{"op":"subscribe","topic":"{TOPIC}"}}')
        await answer(client)
        [sink] = gateway.fanout.sinks[AUCTION]
        for _ in range(2):
            gateway.fanout.caught_up.clear()
            sent = 0
            while not sink.is_behind:
                sink.send(b"x" * 8_000)
                sent += 1
                await asyncio.sleep(0)
            # What it asks for is answered all the same.
            await client.send('{"op":"ping","ref":7}')
            for _ in range(sent):
                await client.recv()
            assert (await answer(client))["ref"] == 7
            await until(lambda: gateway.fanout.caught_up == [sink])
            assert not sink.is_behind
        assert gateway.fanout.sinks[AUCTION] == [sink]


async def test_who_is_behind_again_at_once_is_not_caught_up_yet(gateway: Gateway) -> None:
    async with gateway.client() as client:
        await client.send(f'{{"op":"subscribe","topic":"{TOPIC}"}}')
        await answer(client)
        [sink] = gateway.fanout.sinks[AUCTION]
        assert isinstance(sink, ClientSocket)
        sink.pause_writing()
        sink.resume_writing()
        sink.pause_writing()
        await quiet()
        # Little is unread by now; but the transport speaks up again only when that is read.
        assert (sink.is_behind, gateway.fanout.caught_up) == (True, [])
        sink.resume_writing()
        await until(lambda: gateway.fanout.caught_up == [sink])
        assert not sink.is_behind


async def test_who_is_behind_for_long_is_closed_whatever_it_says(gateway: Gateway) -> None:
    async with gateway.client() as client:
        await client.send(f'{{"op":"subscribe","topic":"{TOPIC}"}}')
        await answer(client)
        [sink] = gateway.fanout.sinks[AUCTION]
        assert isinstance(sink, ClientSocket)
        sink.pause_writing()
        gateway.sockets.tick(NOW + SOCKET_BEHIND_MS_MAX)
        sink.pause_writing()
        await client.send('{"op":"ping","ref":7}')
        assert (await answer(client))["ref"] == 7
        gateway.sockets.tick(NOW + SOCKET_BEHIND_MS_MAX + SECOND_MS)
        with pytest.raises(ConnectionClosed) as closed:
            await client.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 4001


async def test_a_slow_client_that_catches_up_reads_why(gateway: Gateway) -> None:
    async with gateway.client(max_queue=1) as client:
        await client.send(f'{{"op":"subscribe","topic":"{TOPIC}"}}')
        await answer(client)
        [sink] = gateway.fanout.sinks[AUCTION]
        while gateway.fanout.sinks[AUCTION]:
            for _ in range(1_000):
                sink.send(b"x" * 1_000)
            await asyncio.sleep(0)
        assert await closed(client) == 4001


async def test_unread_pongs_count_as_well(gateway: Gateway) -> None:
    _, writer = await raw_client(gateway)
    cast("asyncio.Transport", writer.transport).pause_reading()
    pings = Frame(Opcode.PING, b"x" * 125).serialize(mask=True) * 500
    gateway.fanout.dropped.clear()
    async with asyncio.timeout(20):
        while not gateway.fanout.dropped.is_set():
            writer.write(pings)
            await asyncio.sleep(0)
    writer.transport.abort()
    assert len(gateway.sockets) == 0


# Answers to nobody


async def test_answers_to_a_dead_peer_are_dropped(gateway: Gateway) -> None:
    gateway.router.is_silent = gateway.fanout.is_silent = True
    async with gateway.client(hello=json.dumps({"op": "hello", "token": gateway.token()})) as client:
        await client.send(f'{{"op":"bid","auction":"{AUCTION}","bid_id":"{BID}","amount":100}}')
        await client.send(f'{{"op":"subscribe","topic":"{TOPIC}"}}')
        await gateway.router.submitted.wait()
        await gateway.fanout.subscribed.wait()
        [sink] = gateway.fanout.sinks[AUCTION]
        gateway.fanout.dropped.clear()
        client.transport.abort()
        await gateway.fanout.dropped.wait()

    [on_answer], [on_subscribed] = gateway.router.waiting, gateway.fanout.waiting
    on_answer(ACCEPTED)
    on_subscribed(Subscribed(5, b"", None, None))
    sink.send(b"x")
    sink.send(b"x" * 10_000)


async def test_answers_after_a_close_are_dropped(gateway: Gateway) -> None:
    gateway.router.is_silent = True
    async with gateway.client(hello=json.dumps({"op": "hello", "token": gateway.token()})) as client:
        await client.send(f'{{"op":"bid","auction":"{AUCTION}","bid_id":"{BID}","amount":100}}')
        await gateway.router.submitted.wait()
        gateway.sockets.drain()
        [on_answer] = gateway.router.waiting
        on_answer(ACCEPTED)
        assert await closed(client) == 4000


async def test_a_fault_behind_closes_this_socket_only(gateway: Gateway, caplog: pytest.LogCaptureFixture) -> None:
    async with gateway.client() as other, gateway.client() as client:

        def fail(*_arguments: Any) -> None:
            message = "a bug"
            raise RuntimeError(message)

        gateway.fanout.subscribe = fail  # type: ignore[method-assign]
        await client.send(f'{{"op":"subscribe","topic":"{TOPIC}"}}')
        assert await closed(client) == 1011
        assert "a bug" in caplog.text
        await other.send('{"op":"ping"}')
        assert (await answer(other))["type"] == "pong"


async def test_a_fault_at_the_door_is_news(gateway: Gateway, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_arguments: Any) -> None:
        message = "a bug"
        raise RuntimeError(message)

    gateway.sockets.add = fail  # type: ignore[assignment, method-assign]
    async with gateway.client(hello=None) as client:
        assert await closed(client) == 1011
    assert "a bug" in caplog.text


# The door


async def test_other_paths_are_not_found(gateway: Gateway) -> None:
    for path in ("/", "/v1", "/v1/live/", "/v1/lives"):
        with pytest.raises(InvalidStatus) as raised:
            async with gateway.client(path=path):
                pass
        assert raised.value.response.status_code == 404
    async with gateway.client(path="/v1/live?from=here"):
        pass


@pytest.mark.parametrize(
    "origin",
    ["http://127.0.0.1:{port}", "HTTP://127.0.0.1:{port}", "https://gavel.example", "https://gavel.example:443"],
)
async def test_pages_of_our_own_origin_and_of_those_listed_may_connect(gateway: Gateway, origin: str) -> None:
    async with gateway.client(additional_headers={"Origin": origin.format(port=gateway.port)}):
        pass


@pytest.mark.parametrize(
    "origin",
    ["https://127.0.0.1:{port}", "http://127.0.0.1", "http://gavel.example", "https://evil.example", "null", "x"],
)
async def test_pages_of_other_origins_may_not(gateway: Gateway, origin: str) -> None:
    with pytest.raises(InvalidStatus) as raised:
        async with gateway.client(additional_headers={"Origin": origin.format(port=gateway.port)}):
            pass
    assert raised.value.response.status_code == 403
    assert b"GAVEL_ORIGINS" in raised.value.response.body
    assert len(gateway.sockets) == 0


async def test_plain_http_on_the_same_port(gateway: Gateway) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{gateway.port}") as http, gateway.client():
        assert (await http.get("/v1/live")).text == "plain"
        assert (await http.get("/")).text == "plain"


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: "])
async def test_who_is_slow_with_headers_is_cut_off(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(socket_module, "HEADERS_TIMEOUT_MS", 1_000)
    # Their patience would end before that of the slow one, were it not that they have sent their headers.
    async with (
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{gateway.port}") as http,
        gateway.client() as client,
    ):
        assert (await http.get("/")).text == "plain"
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(sent)
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
        writer.close()
        await client.send('{"op":"ping"}')
        assert (await answer(client))["type"] == "pong"
        assert (await http.get("/")).text == "plain"


async def test_who_leaves_before_its_headers_is_forgotten(gateway: Gateway) -> None:
    made: list[Any] = []
    server = await asyncio.get_running_loop().create_server(lambda: _watched_protocol(gateway, made), "127.0.0.1", 0)
    _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(b"GET / HTTP/1.1\r\n")
    writer.close()
    await until(lambda: bool(made) and made[0]._patience.cancelled())
    server.close()
    await server.wait_closed()


def _watched_protocol(gateway: Gateway, made: list[Any]) -> HttpProtocol:
    config, state = gateway.server.config, gateway.server.server_state
    made.append(gateway.http(config, state, {}))
    protocol: HttpProtocol = made[-1]
    return protocol


async def test_the_subprotocol_is_echoed_and_compression_is_not(gateway: Gateway) -> None:
    offered = [Subprotocol("other"), Subprotocol("gavel.v1")]
    async with gateway.client(subprotocols=offered) as client:
        assert client.subprotocol == "gavel.v1"
        assert "Sec-WebSocket-Extensions" not in client.response.headers
    async with gateway.client(subprotocols=offered[:1]) as client:
        assert client.subprotocol is None


async def test_an_upgrade_as_browsers_write_it(gateway: Gateway) -> None:
    # Firefox keeps alive, and cookies can be long.
    lines = ("Connection: keep-alive, Upgrade", f"Cookie: {'x' * 12_000}", "Cookie: y")
    _, writer = await raw_client(gateway, *lines)
    writer.close()


async def test_an_upgrade_that_is_too_large_or_has_no_key_is_refused(gateway: Gateway) -> None:
    for lines in ([f"Cookie: {'x' * 60_000}"], ["Sec-WebSocket-Version: 5"]):
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        head = ["GET /v1/live HTTP/1.1", "Host: x", "Upgrade: websocket", "Connection: Upgrade", *lines]
        writer.write("\r\n".join([*head, "", ""]).encode())
        async with asyncio.timeout(10):
            assert b"101" not in await reader.read()
        writer.close()


async def test_peers_that_break_the_rules_are_no_news(gateway: Gateway, caplog: pytest.LogCaptureFixture) -> None:
    async with gateway.client() as client:
        client.transport.write(b"\xff\xff")
        assert await closed(client) == 1002

    assert [record for record in caplog.records if record.levelname not in ("DEBUG", "INFO")] == []


async def test_shutting_down_ends_who_has_not_asked_for_anything_yet(gateway: Gateway) -> None:
    loop = asyncio.get_running_loop()
    made: asyncio.Future[Any] = loop.create_future()

    def make() -> Any:
        protocol: Any = gateway.server.config.ws_protocol_class
        made.set_result(protocol(None, gateway.server.server_state, None))
        return made.result()

    server = await loop.create_server(make, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    (await made).shutdown()
    async with asyncio.timeout(10):
        assert await reader.read() == b""
    writer.close()
    server.close()
    await server.wait_closed()


# uvloop, on which gateways run, buffers and ends connections in its own way.


def on_uvloop(test: Callable[[Gateway], Any], certificate: Certificate | None = None) -> None:
    async def run() -> None:
        async with running(certificate=certificate) as gateway:
            await test(gateway)

    uvloop.run(run())


ON_EACH_TRANSPORT = [
    test_a_bid_is_acknowledged,
    test_a_message_in_fragments,
    test_draining_closes_all_and_whoever_comes_later,
    test_a_client_that_reads_too_slowly_is_closed,
    test_a_client_that_reads_on_is_caught_up,
    test_a_slow_client_that_catches_up_reads_why,
    test_answers_to_a_dead_peer_are_dropped,
]


@pytest.mark.parametrize(
    "test", [*ON_EACH_TRANSPORT, test_unread_pongs_count_as_well, test_an_upgrade_as_browsers_write_it]
)
def test_on_uvloop(test: Callable[[Gateway], Any]) -> None:
    on_uvloop(test)


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.mark.parametrize("test", ON_EACH_TRANSPORT)
def test_over_tls(test: Callable[[Gateway], Any], certificate: Certificate) -> None:
    on_uvloop(test, certificate)


def test_over_tls_too_those_who_come_together_wait_for_their_turns(
    certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def come(gateway: Gateway) -> None:
        async with AsyncExitStack() as stack:
            clients = await asyncio.gather(*(stack.enter_async_context(gateway.client()) for _ in range(30)))
            for client in clients:
                await client.send('{"op":"ping","ref":7}')
                assert (await answer(client))["type"] == "pong"

    monkeypatch.setattr(socket_module, "CONNECTIONS_PER_SLICE", 1)
    on_uvloop(come, certificate)


async def test_over_tls_our_own_origin_is_another(certificate: Certificate) -> None:
    async with running(certificate=certificate) as gateway:
        async with gateway.client(additional_headers={"Origin": f"https://127.0.0.1:{gateway.port}"}):
            pass
        with pytest.raises(InvalidStatus):
            async with gateway.client(additional_headers={"Origin": f"http://127.0.0.1:{gateway.port}"}):
                pass


async def test_clients_of_the_benchmark_speak_tls(certificate: Certificate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.path))
    async with running(certificate=certificate) as gateway:
        client = clients.Client()
        await clients.connect([client], f"https://127.0.0.1:{gateway.port}")
        assert len(gateway.sockets) == 1
        clients.disconnect([client])
        await until(lambda: len(gateway.sockets) == 0)


async def send_large_and_small(gateway: Gateway) -> None:
    async with gateway.client(max_size=None) as client:
        await client.send(f'{{"op":"subscribe","topic":"{TOPIC}"}}')
        await answer(client)
        [sink] = gateway.fanout.sinks[AUCTION]
        assert isinstance(sink, ClientSocket)
        transport = sink.transport.underlying_transport
        frames = []
        # So much that the kernel takes no more, and what follows waits in the transport.
        while transport.get_write_buffer_size() == 0:
            frames.append("z" * 100_000)
            sink.send(frames[-1].encode())
        for letter in "abc":
            for size in (10, 8_192, 8_193, 20_000):
                frames.append(letter * size)
                sink.send(frames[-1].encode())
        async with asyncio.timeout(10):
            assert [await client.recv() for _ in frames] == frames


async def test_large_and_small_messages_keep_apart(gateway: Gateway) -> None:
    await send_large_and_small(gateway)


def test_large_and_small_messages_keep_apart_on_uvloop() -> None:
    on_uvloop(send_large_and_small)


def test_large_and_small_messages_keep_apart_over_tls(certificate: Certificate) -> None:
    on_uvloop(send_large_and_small, certificate)


async def test_those_who_come_together_are_let_in_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket_module, "CONNECTIONS_PER_SLICE", 1)
    async with running() as gateway, AsyncExitStack() as stack:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        coming = [stack.enter_async_context(gateway.client()) for _ in range(50)]
        # One of them leaves before its turn.
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        writer.transport.abort()
        clients = await asyncio.gather(*coming)
        for client in clients:
            await client.send('{"op":"ping","ref":7}')
            assert (await answer(client))["type"] == "pong"
        await until(lambda: len(gateway.server.server_state.connections) == len(gateway.sockets) == 50)
        assert reader.at_eof() or reader.exception() is not None


async def raw_client(gateway: Gateway, *lines: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A WebSocket whose frames are written, or not read, by hand."""
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", gateway.port, ssl=gateway.certificate and gateway.certificate.trust()
    )
    head = ["GET /v1/live HTTP/1.1", "Host: x", "Upgrade: websocket", "Sec-WebSocket-Version: 13"]
    head += ["Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", *(lines or ["Connection: Upgrade"])]
    writer.write("\r\n".join([*head, "", ""]).encode())
    async with asyncio.timeout(10):
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
    return reader, writer
