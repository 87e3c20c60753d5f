"""Real links on the loopback: a shard on a journal in memory at one end, a gateway's `Link` at the other."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Self
from uuid import UUID

import msgspec
import picows
import pytest

from actors import link as link_module
from actors import network as network_module
from actors import shard as shard_module
from actors.directory import Owner
from actors.journal import Unreadable
from actors.link import Link, LinkServer, send
from actors.memory import MemoryStore
from actors.messages import (
    VERSION,
    Answer,
    AuctionView,
    Batch,
    BidAccepted,
    GatewayFrame,
    GetAuction,
    Greeting,
    Noticed,
    Output,
    Payload,
    Presence,
    Proof,
    Published,
    Request,
    Unsubscribe,
    Viewers,
    Watch,
    Watched,
    Welcome,
    decode_gateway_frame,
    decode_shard_frame,
    proof,
)
from actors.network import WebSockets
from engine import auction
from engine.commands import CancelAuction, EndAuction, PlaceBid
from engine.limits import LINK_BATCH_MAX
from engine.rejections import Rejection
from gateway.fanout import Fanout
from gateway.wire import Subscribed
from tests.engine.support import ANNA, AUCTION, BEN, MAKER, REQUEST
from tests.support.shards import House, Recorder, bid, opening, recall
from tests.support.waiting import until

SECRET = b"a secret of the cluster"
GET = GetAuction(AUCTION, None)
NUMBER = 0
OWNER = UUID(int=1)


class Site:
    """Where a gateway finds its shard, and the shard's incarnations, one after another, over one store."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.owner: Owner | None = None
        self.lookups = 0
        self.houses: list[House] = []
        self.servers: list[LinkServer] = []
        self.links: list[Link] = []
        self.fakes: list[Fake] = []
        self.published: list[Published] = []
        self.presence: list[Presence] = []
        self.noticed: list[Noticed] = []
        self.opened: list[int] = []

    async def find_owner(self, shard: int) -> Owner | None:
        assert shard == NUMBER
        self.lookups += 1
        return self.owner

    async def start_shard(
        self, *, secret: bytes = SECRET, number: int = NUMBER, prepare: Callable[[House], None] = lambda _: None
    ) -> House:
        house = House(self.store)
        await house.start()
        prepare(house)
        server = LinkServer(house.shard, number, house.owner, lambda: house.journal.epoch, secret)
        self.owner = Owner(NUMBER, house.journal.epoch, await server.listen(WebSockets(), "127.0.0.1"))
        self.houses.append(house)
        self.servers.append(server)
        return house

    async def kill_shard(self) -> None:
        """The process is gone; its address stands in the directory until the next one takes over."""
        self.servers[-1].close()
        await self.houses[-1].kill()

    async def kill_shard_and_notice(self) -> None:
        """The process is gone, and every link to it has broken."""
        await self.kill_shard()
        await until(lambda: not any(link.is_open for link in self.links))

    def link(self, secret: bytes = SECRET) -> Link:
        link = Link(
            gateway="gateway",
            shard=NUMBER,
            secret=secret,
            network=WebSockets(),
            find_owner=self.find_owner,
            on_published=self.published.append,
            on_presence=self.presence.append,
            on_noticed=self.noticed.append,
            on_open=self.opened.append,
        )
        self.links.append(link)
        return link

    async def tried(self, times: int = 3) -> None:
        """Wait until links have looked for their owner so many times more."""
        wanted = self.lookups + times
        await until(lambda: self.lookups >= wanted)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for link in self.links:
            await link.close()
        for server in self.servers:
            server.close()
        for fake in self.fakes:
            fake.close()
        await until(lambda: not any(fake.is_connected() for fake in self.fakes))
        for house in self.houses:
            await house.kill()


@pytest.fixture
async def site(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Site]:
    monkeypatch.setattr(link_module, "LINK_RETRY_MS", 2)
    async with Site() as site:
        yield site


class Asker:
    """Submits requests and keeps their answers, in the order in which they came."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.answers: list[tuple[int, Answer]] = []
        self.submitted = 0

    def submit(self, *payloads: Payload) -> None:
        for payload in payloads:
            self.link.submit(payload, self._keeper(self.submitted))
            self.submitted += 1

    def _keeper(self, number: int) -> Callable[[Answer], None]:
        return lambda answer: self.answers.append((number, answer))

    async def all(self) -> list[Answer]:
        """Every answer, each of which must have come once and in order."""
        await until(lambda: len(self.answers) >= self.submitted)
        assert [number for number, _ in self.answers] == list(range(self.submitted))
        return [answer for _, answer in self.answers]


@pytest.fixture
async def asker(site: Site) -> Asker:
    """Somebody who asks over an open link to a shard in which an auction is open."""
    house = await site.start_shard()
    await house.ask(opening())
    link = site.link()
    await link.opened()
    return Asker(link)


def greeting(version: int = VERSION, shard: int = NUMBER, epoch: int = 1, owner: UUID = OWNER) -> Greeting:
    return Greeting(version, shard, epoch, owner, bytes(32))


def code(answer: Answer) -> str:
    assert isinstance(answer, Rejection), answer
    return answer.code


def accepted(answer: Answer) -> BidAccepted:
    assert isinstance(answer, BidAccepted), answer
    return answer


def bids(store: MemoryStore) -> list[int]:
    return [row.seq for row in store.journal[AUCTION].values() if row.kind == "bid_placed"]


# In peace


async def test_answers_and_events_come_in_order(site: Site, asker: Asker) -> None:
    asker.submit(Watch(AUCTION, None, []))
    asker.submit(*(bid(BEN if n % 2 else ANNA, 1_000 + 500 * n, bid_id=n) for n in range(50)))
    answers = await asker.all()
    assert isinstance(answers[0], Watched)
    assert [accepted(answer).seq for answer in answers[1:]] == list(range(2, 52))
    await until(lambda: site.published[-1].last == 51)
    assert site.published[0].first == 2
    for one, next_one in zip(site.published, site.published[1:], strict=False):
        assert next_one.first == one.last + 1
    asker.submit(Unsubscribe(AUCTION))
    asker.submitted -= 1  # It has no answer.
    before = len(site.published)
    asker.submit(bid(ANNA, 90_000, bid_id=99), GET)
    assert isinstance((await asker.all())[-1], AuctionView)
    assert len(site.published) == before


async def test_what_comes_in_one_turn_goes_as_one_batch(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    house = await site.start_shard()
    taken: list[int] = []
    take = house.shard.take

    def count(requests: Any, outlet: Any) -> None:
        taken.append(len(requests))
        take(requests, outlet)

    monkeypatch.setattr(house.shard, "take", count)
    link = site.link()
    await link.opened()
    asker = Asker(link)
    asker.submit(*[GET] * 10)
    assert [code(answer) for answer in await asker.all()] == ["not_found"] * 10
    assert taken == [10]
    # A long turn does not keep the shard waiting, and no batch is over the bound.
    taken.clear()
    asker.submit(*[GET] * (2 * LINK_BATCH_MAX + 3))
    assert [code(answer) for answer in await asker.all()] == ["not_found"] * (2 * LINK_BATCH_MAX + 13)
    assert taken == [LINK_BATCH_MAX, LINK_BATCH_MAX, 3]


async def test_large_frames_back_to_back_arrive_whole(site: Site, asker: Asker) -> None:
    """picows copies what is up to 8 KiB; what is larger must not be overwritten by the frame behind it."""
    await site.houses[-1].ask(opening(UUID(int=5), title="ü" * 200))
    for _ in range(20):
        asker.submit(*[GetAuction(UUID(int=5), None)] * 300)
        await asyncio.sleep(0)
        asker.submit(GET)
        await asyncio.sleep(0)
    for index, answer in enumerate(await asker.all()):
        assert isinstance(answer, AuctionView)
        assert answer.snapshot.title == ("A bowl" if index % 301 == 300 else "ü" * 200)


async def test_two_gateways_share_a_shard(site: Site, asker: Asker) -> None:
    other = Asker(site.link())
    await other.link.opened()
    other.submit(bid(ANNA, 1_000))
    await other.all()
    asker.submit(bid(BEN, 1_000))
    assert code((await asker.all())[0]) == "bid_too_low"
    await other.link.close()
    await until(lambda: len(site.servers[-1].ends) == 1)
    asker.submit(GET)
    await asker.all()


async def test_a_gateway_that_does_not_read_is_cut_off_and_comes_back(
    site: Site, asker: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "LINK_WRITE_BYTES_MAX", -1)
    asker.submit(bid(ANNA, 1_000))
    await until(lambda: len(site.opened) >= 2)
    monkeypatch.setattr(link_module, "LINK_WRITE_BYTES_MAX", 1 << 20)
    assert accepted((await asker.all())[0]).seq == 2
    assert bids(site.store) == [2]


async def test_a_gateway_that_is_behind_gets_events_folded(
    site: Site, asker: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "LINK_FOLD_BYTES", 1_000)
    monkeypatch.setattr(link_module, "LINK_DEAD_MS", 1 << 40)
    house = site.houses[-1]
    link = site.link()
    await link.opened()
    watcher = Asker(link)
    watcher.submit(Watch(AUCTION, None, []))
    await watcher.all()
    site.published.clear()
    # It does not read, and the kernel holds little for it.
    far, near = list(site.servers[-1].ends)[-1], link._end
    assert near is not None
    _raw_socket(far._transport).setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_096)
    _raw_socket(near._transport).setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    near._transport.underlying_transport.pause_reading()
    number = 0
    while not far._folds or house.shard._awake[AUCTION].seq < 20:
        number += 1
        house.take(Recorder(), bid(BEN if number % 2 else ANNA, 1_000 + 500 * number, bid_id=number))
        await house.at_rest()
    folded_from = far._folds[AUCTION].first
    house.take(Recorder(), EndAuction(auction=AUCTION, caller=MAKER, role="admin", request_id=REQUEST, reason="Why."))
    await house.at_rest()
    # What is asked now comes after what was held back.
    watcher.submit(Watch(AUCTION, None, []))
    seen: list[int] = []
    link.submit(GET, lambda _answer: seen.append(len(site.published)))
    await until(lambda: house.shard._line == 0)
    assert far._is_behind
    near._transport.underlying_transport.resume_reading()
    answer = (await watcher.all())[-1]
    assert isinstance(answer, Watched)
    assert far._folds == {}
    assert [one.first for one in site.published[1:]] == [one.last + 1 for one in site.published[:-1]]
    last = site.published[-1]
    assert (last.first, last.last, last.events, last.snapshot) == (folded_from, answer.seq, None, answer.snapshot)
    assert [event["kind"] for event in msgspec.json.decode(b"[" + last.kept + b"]")] == ["ended"]
    assert all(one.events is not None for one in site.published[:-1])
    await until(lambda: seen == [len(site.published)])


async def test_a_gateway_that_has_read_on_is_told_what_was_held_back(
    site: Site, asker: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    asker.submit(Watch(AUCTION, None, []))
    await asker.all()
    house, (end,) = site.houses[-1], site.servers[-1].ends
    end.pause_writing()
    for number, bidder in enumerate((ANNA, BEN, ANNA), 1):
        asker.submit(bid(bidder, 1_000 * number, bid_id=number))
        # Answers are not held back.
        assert accepted((await asker.all())[-1]).seq == number + 1
    assert site.published == []
    end.resume_writing()
    await until(lambda: bool(site.published))
    asker.submit(bid(BEN, 9_000, bid_id=9))
    await until(lambda: len(site.published) == 2)
    assert [(one.first, one.last, one.events is None) for one in site.published] == [(2, 4, True), (5, 5, False)]
    assert house.deaths == []


async def test_who_is_behind_and_gone_or_behind_again_is_told_nothing(site: Site, asker: Asker) -> None:
    asker.submit(Watch(AUCTION, None, []))
    await asker.all()
    (end,) = site.servers[-1].ends
    end.pause_writing()
    asker.submit(bid(ANNA, 1_000))
    await asker.all()
    end.resume_writing()
    end.pause_writing()
    asker.submit(bid(BEN, 2_000, bid_id=2))
    await asker.all()
    assert site.published == []
    end.close()
    await until(lambda: end.is_gone)
    end.resume_writing()
    await until(lambda: len(site.opened) == 2)
    assert site.published == []


async def test_what_is_kept_for_a_gateway_that_is_behind_counts_as_unread(
    site: Site, asker: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    asker.submit(Watch(AUCTION, None, []))
    await asker.all()
    monkeypatch.setattr(link_module, "LINK_WRITE_BYTES_MAX", 1)
    (end,) = site.servers[-1].ends
    end.pause_writing()
    site.houses[-1].take(
        Recorder(), CancelAuction(auction=AUCTION, caller=MAKER, role="admin", request_id=REQUEST, reason="Why.")
    )
    await until(lambda: len(site.opened) == 2)


async def test_viewers_are_told_on_links(site: Site, asker: Asker) -> None:
    asker.submit(Watch(AUCTION, None, []))
    await asker.all()
    asker.link.submit(Viewers(AUCTION, 3), lambda _answer: None)
    await until(lambda: bool(site.presence))
    assert site.presence == [Presence(AUCTION, 3)]


def _raw_socket(transport: Any) -> socket.socket:
    found: socket.socket = transport.underlying_transport.get_extra_info("socket")
    return found


async def test_many_large_answers_do_not_make_too_large_a_frame(
    site: Site, asker: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = site.houses[-1]
    house.take(Recorder(), *(bid(BEN if n % 2 else ANNA, 1_000 + 500 * n, bid_id=n) for n in range(999)))
    await house.at_rest()
    # New links take frames of 2 MiB; the answers to come have several times as much.
    monkeypatch.setattr(network_module, "LINK_FRAME_BYTES_MAX", 2 * 1024 * 1024)
    link = site.link()
    await link.opened()
    many = Asker(link)
    many.submit(*[Watch(AUCTION, 0, [])] * 40, GET)
    answers = await many.all()
    assert isinstance(answers[-1], AuctionView)
    sizes = [len(answer.events) for answer in answers[:-1] if isinstance(answer, Watched)]
    assert len(sizes) == 40
    assert sum(sizes) > 2 * 2 * 1024 * 1024
    assert site.opened == [NUMBER, NUMBER]
    assert link.is_open


# Who may


async def test_a_gateway_without_the_secret_is_refused(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    await site.start_shard()
    link = site.link(secret=b"another secret")
    await site.tried()
    assert not link.is_open
    assert "does not hold the cluster's secret" in caplog.text
    assert SECRET.decode() not in caplog.text
    await until(lambda: len(site.servers[-1].ends) <= 1)


async def test_a_shard_without_the_secret_is_refused(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    fake = await Fake.start(site, greeting(), secret=b"another secret")
    link = site.link()
    await site.tried()
    assert not link.is_open
    assert "the shard does not hold the cluster's secret" in caplog.text
    # The gateway did prove itself, without ever sending the secret.
    assert all(SECRET not in frame for frame in fake.frames)


@pytest.mark.parametrize(
    ("owner_epoch", "greeting"),
    [
        (2, greeting(epoch=1)),
        (1, greeting(shard=NUMBER + 1)),
        (1, greeting(version=VERSION + 1)),
    ],
)
async def test_another_incarnation_shard_or_version_is_refused(
    site: Site, owner_epoch: int, greeting: Greeting
) -> None:
    fake = await Fake.start(site, greeting, epoch=owner_epoch)
    link = site.link()
    await site.tried()
    assert not link.is_open
    assert fake.frames == []


async def test_the_server_of_another_shard_is_refused(site: Site) -> None:
    await site.start_shard(number=7)
    link = site.link()
    await site.tried()
    assert not link.is_open


async def test_an_older_incarnation_than_the_last_is_not_even_tried(site: Site, asker: Asker) -> None:
    await site.start_shard()
    site.servers[0].close()
    await until(lambda: len(site.opened) == 2)
    # The directory speaks of the one before, which lives.
    older = await Fake.start(site, greeting(epoch=1), epoch=1)
    site.servers[1].close()
    await until(lambda: not asker.link.is_open)
    await site.tried()
    assert older.ends == []


async def test_a_newer_incarnation_than_the_directory_says_is_taken(site: Site) -> None:
    house = await site.start_shard()
    assert site.owner is not None
    site.owner = site.owner._replace(epoch=house.journal.epoch - 1)
    link = site.link()
    await link.opened()
    assert link._epoch == house.journal.epoch


# What is not of the protocol


class Fake:
    """A server that greets, takes any proof, answers with its own, and keeps what it gets."""

    def __init__(self, greeting: Greeting, secret: bytes) -> None:
        self.greeting = greeting
        self.secret = secret
        self.before_greeting: Output | None = None
        self.is_silent = False
        self.frames: list[bytes] = []
        self.ends: list[_FakeEnd] = []
        self.server: asyncio.Server

    @classmethod
    async def start(
        cls, site: Site, greeting: Greeting, *, secret: bytes = SECRET, epoch: int = 1, auto_pong: bool = True
    ) -> "Fake":
        fake = cls(greeting, secret)
        fake.server = await picows.ws_create_server(
            lambda _: _FakeEnd(fake), "127.0.0.1", 0, enable_auto_pong=auto_pong
        )
        site.fakes.append(fake)
        site.owner = Owner(NUMBER, epoch, f"127.0.0.1:{fake.server.sockets[0].getsockname()[1]}")
        return fake

    def close(self) -> None:
        self.server.close()
        for end in self.ends:
            if not end.is_gone:
                end.transport.disconnect(graceful=False)

    def is_connected(self) -> bool:
        return not all(end.is_gone for end in self.ends)


class _FakeEnd(picows.WSListener):
    def __init__(self, fake: Fake) -> None:
        self.fake = fake
        self.is_gone = False
        self.transport: picows.WSTransport

    def on_ws_connected(self, transport: picows.WSTransport) -> None:
        self.transport = transport
        self.fake.ends.append(self)
        if self.fake.before_greeting is not None:
            send(transport, self.fake.before_greeting)
        if not self.fake.is_silent:
            send(transport, self.fake.greeting)

    def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        if frame.msg_type != picows.WSMsgType.BINARY:
            return
        self.fake.frames.append(frame.get_payload_as_bytes())
        message: GatewayFrame = decode_gateway_frame(self.fake.frames[-1])
        if isinstance(message, Proof):
            greeting = self.fake.greeting
            send(transport, Welcome(proof(self.fake.secret, "shard", message.nonce, greeting.shard, greeting.epoch)))

    def on_ws_disconnected(self, transport: picows.WSTransport) -> None:
        self.is_gone = True


class Client(picows.WSListener):
    """A client of a shard that says what a test wants."""

    def __init__(self) -> None:
        self.frames: list[Any] = []
        self.closed = asyncio.Event()
        self.transport: picows.WSTransport

    @classmethod
    async def connect(cls, site: Site, **options: Any) -> "Client":
        assert site.owner is not None
        client = cls()
        await picows.ws_connect(lambda _request, _response: client, f"ws://{site.owner.address}/", **options)
        await until(lambda: bool(client.frames))
        return client

    def on_ws_connected(self, transport: picows.WSTransport) -> None:
        self.transport = transport

    def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        if frame.msg_type == picows.WSMsgType.BINARY:
            self.frames.append(decode_shard_frame(frame.get_payload_as_bytes()))

    def on_ws_disconnected(self, transport: picows.WSTransport) -> None:
        self.closed.set()

    async def prove(self, secret: bytes = SECRET) -> None:
        greeting = self.frames[0]
        mac = proof(secret, "gateway", greeting.nonce, greeting.shard, greeting.epoch)
        send(self.transport, Proof("client", bytes(32), mac))
        await until(lambda: len(self.frames) == 2)
        assert self.frames[1] == Welcome(proof(secret, "shard", bytes(32), greeting.shard, greeting.epoch))


BATCH = Batch([Request(1, bid(ANNA, 1_000))])


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1 no msgpack",
        msgspec.msgpack.encode(["batch", [[1, ["bid", "no uuid"]]]]),
        msgspec.msgpack.encode(["welcome", b""]),
        msgspec.msgpack.encode(["proof", "gateway", bytes(32), bytes(32)]),
        msgspec.msgpack.encode(["proof", "gateway", bytes(32), bytes(32)]).replace(b"gate", b"\xff\xff\xff\xff"),
        msgspec.msgpack.encode(BATCH, enc_hook=str),
    ],
)
@pytest.mark.parametrize("is_proved", [False, True])
async def test_garbage_ends_a_link_and_does_nothing_else(
    site: Site, asker: Asker, frame: bytes, is_proved: bool
) -> None:
    client = await Client.connect(site)
    if is_proved:
        await client.prove()
        if frame == msgspec.msgpack.encode(BATCH, enc_hook=str):
            return  # That is not garbage any more.
    client.transport.send(picows.WSMsgType.BINARY, frame)
    await client.closed.wait()
    asker.submit(GET)
    view = (await asker.all())[0]
    assert isinstance(view, AuctionView)
    assert view.seq == 1


async def test_nothing_is_taken_before_the_proof(site: Site, asker: Asker) -> None:
    client = await Client.connect(site)
    send(client.transport, BATCH)
    await client.closed.wait()
    assert bids(site.store) == []


async def test_a_second_proof_is_out_of_turn(site: Site, asker: Asker) -> None:
    client = await Client.connect(site)
    await client.prove()
    send(client.transport, Proof("client", bytes(32), bytes(32)))
    await client.closed.wait()


async def test_a_close_frame_closes(site: Site, asker: Asker) -> None:
    client = await Client.connect(site)
    await client.prove()
    client.transport.send(picows.WSMsgType.TEXT, b"what is no binary frame is passed over")
    client.transport.send_close(picows.WSCloseCode.OK)
    await client.closed.wait()


async def test_garbage_from_a_shard_ends_the_link_which_opens_again(site: Site) -> None:
    fake = await Fake.start(site, greeting())
    link = site.link()
    await link.opened()
    fake.ends[-1].transport.send(picows.WSMsgType.BINARY, b"\xc1")
    await until(lambda: len(site.opened) == 2)
    fake.ends[-1].transport.send_close(picows.WSCloseCode.OK)
    await until(lambda: len(site.opened) == 3)


async def test_output_before_the_welcome_is_passed_over(site: Site) -> None:
    fake = await Fake.start(site, greeting(), secret=b"another secret")
    fake.before_greeting = Output([Published(AUCTION, 1, 1, b"{}", b"", b"{}")])
    site.link()
    await site.tried()
    assert fake.frames
    assert site.published == []


@pytest.mark.parametrize("what", ["nothing", "text"])
async def test_who_never_proves_itself_is_closed(site: Site, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    await site.start_shard()
    monkeypatch.setattr(link_module, "LINK_GREETING_MS", 100)
    client = await Client.connect(site)
    if what == "text":
        client.transport.send(picows.WSMsgType.TEXT, b"no proof")
    await client.closed.wait()
    await until(lambda: not site.servers[-1].ends)
    assert len(client.frames) == 1


async def test_who_has_proved_itself_has_all_the_time(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    await site.start_shard()
    monkeypatch.setattr(link_module, "LINK_GREETING_MS", 1_000)
    proved = await Client.connect(site)
    await proved.prove()
    # This one connects later, and is closed when the first one's time has passed as well.
    late = await Client.connect(site)
    await late.closed.wait()
    assert not proved.closed.is_set()
    assert len(site.servers[-1].ends) == 1


# When it breaks


async def test_what_was_not_answered_goes_to_the_next_incarnation_and_counts_once(site: Site, asker: Asker) -> None:
    first = site.houses[-1]
    first.journal.after_append.clear()
    asker.submit(bid(ANNA, 1_000), bid(BEN, 2_000, bid_id=2))
    # Committed, but the answers never leave.
    await until(lambda: bids(site.store) == [2, 3])
    asker.submit(bid(ANNA, 3_000, bid_id=3))
    await until(lambda: first.shard._line == 3)
    await site.kill_shard()
    await until(lambda: not asker.link.is_open)
    asker.submit(bid(BEN, 4_000, bid_id=4), GET)
    await site.tried()
    assert asker.answers == []

    await site.start_shard()
    answers = await asker.all()
    assert [accepted(answer).seq for answer in answers[:4]] == [2, 3, 4, 5]
    assert isinstance(answers[4], AuctionView)
    assert answers[4].snapshot.bids == 4
    assert bids(site.store) == [2, 3, 4, 5]
    assert site.opened == [NUMBER, NUMBER]


async def test_of_what_may_have_been_done_nobody_says_that_it_was_not(site: Site, asker: Asker) -> None:
    """Committed, but not acknowledged; and the next incarnation cannot read the auction to find that out."""
    first = site.houses[-1]
    first.journal.after_append.clear()
    asker.submit(bid(ANNA, 1_000))
    await until(lambda: bids(site.store) == [2])
    await site.kill_shard_and_notice()
    # These are sent for the first time, so that a refusal is what it says.
    asker.submit(bid(BEN, 2_000, bid_id=2), GET)

    def make_unreadable(house: House) -> None:
        house.journal.load_errors[AUCTION] = Unreadable("away")

    second = await site.start_shard(prepare=make_unreadable)
    answers = await asker.all()
    assert [code(answer) for answer in answers] == ["outcome_unknown", "unavailable", "unavailable"]
    assert isinstance(answers[0], Rejection)
    assert answers[0].is_transient
    del second.journal.load_errors[AUCTION]
    asker.submit(bid(ANNA, 1_000))
    assert accepted((await asker.all())[-1]).seq == 2
    assert bids(site.store) == [2]


async def test_what_is_sent_again_and_meets_a_full_line_may_have_been_done(
    site: Site, asker: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = site.houses[-1]
    first.journal.after_append.clear()
    asker.submit(bid(ANNA, 1_000), GET)
    await until(lambda: bids(site.store) == [2])
    await site.kill_shard_and_notice()
    monkeypatch.setattr(shard_module, "SHARD_LINE_MAX", 0)
    await site.start_shard()
    assert [code(answer) for answer in await asker.all()] == ["outcome_unknown", "busy"]
    # What was sent once only is refused in plain words.
    asker.submit(bid(ANNA, 1_000))
    assert code((await asker.all())[-1]) == "busy"


async def test_a_verdict_on_what_is_sent_again_is_a_verdict(site: Site, asker: Asker) -> None:
    first = site.houses[-1]
    first.journal.hold()
    asker.submit(bid(ANNA, 1_000), bid(BEN, 2, bid_id=2))
    await until(lambda: first.shard._line == 2)
    await site.kill_shard_and_notice()
    await site.start_shard()
    answers = await asker.all()
    assert (accepted(answers[0]).seq, code(answers[1])) == (2, "bid_too_low")


class Screen:
    """A socket that keeps the numbers of the events that it is shown."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.is_behind = False

    def send(self, frame: bytes) -> None:
        message = msgspec.json.decode(frame)
        if message["type"] == "state":
            self.log += range(int(str(self.log[-1]).removeprefix("at ")) + 1, message["seq"] + 1)
        else:
            self.log += [event["seq"] for event in message["events"]]

    def close_as_too_slow(self) -> None:
        self.log.append("behind")

    def subscribed(self, answer: Subscribed | Rejection) -> None:
        self.log.append(f"at {answer.seq}" if isinstance(answer, Subscribed) else answer.code)


@pytest.mark.parametrize("is_new_incarnation", [False, True])
async def test_who_is_asked_for_anew_while_older_turns_are_on_their_way_gets_nothing_twice(
    site: Site, is_new_incarnation: bool
) -> None:
    house = await site.start_shard()
    await house.ask(opening())

    class Shards:
        def submit(self, payload: Payload, on_answer: Callable[[Answer], None]) -> None:
            link.submit(payload, on_answer)

        def shard_of(self, entity_id: UUID) -> int:
            return NUMBER

    def take_up(shard: int) -> None:
        site.opened.append(shard)
        fanout.resubscribe(shard)

    fanout = Fanout(Shards())
    link = Link(
        gateway="gateway",
        shard=NUMBER,
        secret=SECRET,
        network=WebSockets(),
        find_owner=site.find_owner,
        on_published=fanout.published,
        on_presence=fanout.presence,
        on_noticed=site.noticed.append,
        on_open=take_up,
    )
    site.links.append(link)
    await link.opened()
    asker, screen = Asker(link), Screen()
    fanout.subscribe(AUCTION, None, None, screen, screen.subscribed)
    await until(lambda: screen.log == ["at 1"])

    house.journal.hold()
    asker.submit(bid(ANNA, 1_000))
    await until(lambda: len(house.journal.appends) == 2)
    asker.submit(bid(BEN, 2_000, bid_id=2))
    await until(lambda: house.shard._line == 2)
    if is_new_incarnation:
        await site.kill_shard_and_notice()
        house = await site.start_shard(prepare=lambda house: house.journal.hold())
        await until(lambda: house.journal.appends[-1] != [])
    for end in list(site.servers[-1].ends):
        end.close()
    # A turn is on its way to the journal; behind it waits one with the answer to the new link's subscription.
    await until(lambda: list(house.shard._watchers.get(AUCTION, {}).values()) == [3])
    opened = len(site.opened)
    asker.submit(bid(ANNA, 3_000, bid_id=3))
    await until(lambda: house.shard._awake[AUCTION].seq == 4)
    late = Screen()
    fanout.subscribe(AUCTION, None, None, late, late.subscribed)
    asker.submit(bid(BEN, 4_000, bid_id=4))
    await until(lambda: house.shard._awake[AUCTION].seq == 5)
    house.journal.let_go()
    assert [accepted(answer).seq for answer in await asker.all()] == [2, 3, 4, 5]
    await until(lambda: screen.log[-1] == 5)
    assert screen.log == ["at 1", 2, 3, 4, 5]
    await until(lambda: late.log[-1:] == [5])
    # It waited for the answer that was on its way.
    assert late.log == ["at 3", 4, 5]
    assert len(site.opened) == opened == (3 if is_new_incarnation else 2)
    assert link.is_open


async def test_a_bid_that_waits_while_no_shard_is_there_is_placed_when_one_comes(site: Site) -> None:
    site.store = MemoryStore()
    asker = Asker(site.link())
    asker.submit(opening(), bid(ANNA, 1_000))
    await site.tried()
    assert asker.answers == []
    await site.start_shard()
    assert accepted((await asker.all())[1]).seq == 2


async def test_topics_are_asked_for_before_anything_is_sent_again(site: Site) -> None:
    house = await site.start_shard()
    await house.ask(opening())
    answers: list[Answer] = []

    def resubscribe(shard: int) -> None:
        link.submit(Watch(AUCTION, 0, []), answers.append)

    link = Link(
        gateway="gateway",
        shard=NUMBER,
        secret=SECRET,
        network=WebSockets(),
        find_owner=site.find_owner,
        on_published=site.published.append,
        on_presence=site.presence.append,
        on_noticed=site.noticed.append,
        on_open=resubscribe,
    )
    site.links.append(link)
    house.journal.hold()
    await link.opened()
    link.submit(bid(ANNA, 1_000), answers.append)
    await until(lambda: len(house.journal.appends) == 2)
    await site.kill_shard()
    await site.start_shard()
    await until(lambda: bool(site.published))
    # The first link's question was dropped with it.
    assert [type(answer) for answer in answers] == [Watched, BidAccepted]
    assert [(one.first, one.last) for one in site.published] == [(2, 2)]


async def test_a_command_in_flight_at_two_deaths_is_not_sent_again(site: Site, asker: Asker) -> None:
    for number in range(2):
        house = site.houses[-1]
        house.journal.hold()
        if number == 0:
            asker.submit(bid(ANNA, 1_000))
        await until(lambda house=house: house.shard._line == 1)  # type: ignore[misc]
        await site.kill_shard()
        if number == 0:
            await until(lambda: not asker.link.is_open)
            await site.start_shard()
    await until(lambda: not asker.link.is_open)
    # Asked while the shard was away: it was at no death yet.
    asker.submit(bid(BEN, 5_000))
    third = await site.start_shard()
    answers = await asker.all()
    assert code(answers[0]) == "internal"
    assert accepted(answers[1]).price == 5_000
    assert third.deaths == []


async def test_a_poisonous_command_is_only_asked_for_after_two_deaths(
    site: Site, asker: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decide(state: Any, command: Any, now: int) -> Any:
        if isinstance(command, PlaceBid) and command.amount == 666_666:
            raise ZeroDivisionError("a bug in the rules")
        return auction.decide(state, command, now)

    monkeypatch.setattr(shard_module, "decide", decide)
    asker.submit(bid(ANNA, 666_666))
    for _ in range(2):
        await site.houses[-1].died.wait()
        assert "a bug in the rules" in site.houses[-1].deaths[0]
        await site.kill_shard_and_notice()
        if len(site.houses) == 1:
            await site.start_shard()
    asker.submit(bid(BEN, 5_000))
    third = await site.start_shard()
    poisonous, other = await asker.all()
    assert isinstance(poisonous, Rejection)
    assert (poisonous.code, poisonous.is_transient) == ("internal", False)
    assert accepted(other).seq == 2
    assert third.deaths == []
    assert site.opened == [NUMBER] * len(site.opened)


async def test_what_was_done_before_two_deaths_is_told_without_doing_it_again(site: Site, asker: Asker) -> None:
    end = EndAuction(auction=AUCTION, caller=MAKER, role="admin", request_id=REQUEST, reason="Over.")
    house = site.houses[-1]
    house.journal.after_append.clear()
    asker.submit(bid(ANNA, 1_000), end, opening(), GET)
    await until(lambda: len(site.store.journal[AUCTION]) == 3)
    await site.kill_shard_and_notice()

    def hold_reading(house: House) -> None:
        house.journal.before_load.clear()

    for _ in range(2):
        # Not even the question what became of it outlives these.
        house = await site.start_shard(prepare=hold_reading)
        await until(lambda house=house: AUCTION in house.shard._waking)  # type: ignore[misc]
        await site.kill_shard_and_notice()
    await site.start_shard()
    await until(lambda: len(asker.answers) == 4)
    answers = dict(asker.answers)
    assert accepted(answers[0]).seq == 2
    for view in (answers[1], answers[2]):
        assert isinstance(view, AuctionView)
        assert (view.seq, view.snapshot.status) == (3, "ended")
    # A question is not asked for ever.
    assert isinstance(answers[3], Rejection)
    assert (answers[3].code, answers[3].is_transient) == ("internal", True)
    assert [row.kind for row in site.store.journal[AUCTION].values()] == ["opened", "bid_placed", "ended"]


async def test_a_topic_that_was_asked_for_at_two_deaths_is_not_asked_for_again(site: Site, asker: Asker) -> None:
    def hold_reading(house: House) -> None:
        house.journal.before_load.clear()

    asker.submit(bid(ANNA, 1_000))
    await asker.all()
    for _ in range(2):
        await site.kill_shard_and_notice()
        house = await site.start_shard(prepare=hold_reading)
        await asker.link.opened()
        asker.submit(Watch(AUCTION, None, []))
        await until(lambda house=house: AUCTION in house.shard._waking)  # type: ignore[misc]
    await site.kill_shard_and_notice()
    await site.start_shard()
    await asker.link.opened()
    # Nobody is told of what was dropped with its link.
    assert len(asker.answers) == 1
    asker.submit(Watch(AUCTION, None, []))
    assert code(asker.answers[-1][1]) == "internal"
    asker.submit(Watch(AUCTION, None, []))
    await until(lambda: len(asker.answers) == 3)
    assert isinstance(asker.answers[-1][1], Watched)


async def test_who_came_while_the_shard_was_away_was_at_no_death(site: Site, asker: Asker) -> None:
    await site.kill_shard_and_notice()
    asker.submit(bid(ANNA, 1_000))
    second = await site.start_shard(prepare=lambda house: house.journal.hold())
    await until(lambda: second.shard._line == 1)
    await site.kill_shard_and_notice()
    await site.start_shard()
    # It was sent to one that died, and to this one: that is not twice.
    assert accepted((await asker.all())[0]).seq == 2


async def test_a_broken_link_to_the_same_incarnation_is_no_death(site: Site, asker: Asker) -> None:
    house = site.houses[-1]
    house.journal.hold()
    asker.submit(bid(ANNA, 1_000))
    for times in range(1, 5):
        await until(lambda times=times: house.shard._line == times)  # type: ignore[misc]
        for end in list(site.servers[-1].ends):
            end.close()
    await until(lambda: house.shard._line == 5)
    house.journal.let_go()
    assert accepted((await asker.all())[0]).seq == 2
    assert bids(site.store) == [2]


async def test_a_process_that_settled_its_writes_meanwhile_has_not_died(site: Site, asker: Asker) -> None:
    """The epoch rises with each settling; what is in flight then may be sent as often as before."""
    house, server = site.houses[-1], site.servers[-1]
    house.journal.hold()
    asker.submit(bid(ANNA, 1_000))
    for times in range(1, 5):
        await until(lambda times=times: house.shard._line == times)  # type: ignore[misc]
        await house.journal.settle([], [], None)
        assert site.owner is not None
        # The directory may still name the epoch before, or the newest one.
        if times % 2 == 0:
            site.owner = site.owner._replace(epoch=server.epoch())
        for end in list(server.ends):
            end.close()
    await until(lambda: house.shard._line == 5)
    assert asker.link._epoch == server.epoch() == 5
    house.journal.let_go()
    assert accepted((await asker.all())[0]).seq == 2
    assert bids(site.store) == [2]


async def test_a_link_that_was_opened_before_a_settling_goes_on(site: Site, asker: Asker) -> None:
    house = site.houses[-1]
    epoch = asker.link._epoch
    await house.journal.settle([], [], None)
    asker.submit(bid(ANNA, 1_000))
    assert accepted((await asker.all())[0]).seq == 2
    assert asker.link._epoch == epoch
    assert site.opened == [NUMBER]


async def test_a_process_in_the_middle_of_greeting_may_settle(site: Site) -> None:
    """What was greeted in one epoch is proved in that epoch."""
    house = await site.start_shard()
    client = await Client.connect(site)
    await house.journal.settle([], [], None)
    await client.prove()
    late = await Client.connect(site)
    assert [message.epoch for message in (client.frames[0], late.frames[0])] == [1, 2]
    await late.prove()


@pytest.mark.parametrize("is_settling", [True, False])
async def test_only_another_process_in_a_higher_epoch_is_a_death(site: Site, asker: Asker, is_settling: bool) -> None:
    await site.kill_shard_and_notice()
    asker.submit(bid(ANNA, 1_000))
    sent = []
    for number in range(1, 4):
        epoch, owner = 10 + number, UUID(int=1 if is_settling else number)
        fake = await Fake.start(site, greeting(epoch=epoch, owner=owner), epoch=epoch)
        await until(lambda fake=fake: len(fake.frames) >= 2)  # type: ignore[misc]
        fake.close()
        await until(lambda fake=fake: not fake.is_connected())  # type: ignore[misc]
        frame = decode_gateway_frame(fake.frames[1])
        assert isinstance(frame, Batch)
        sent += [request.payload for request in frame.requests]
    last = bid(ANNA, 1_000) if is_settling else recall(bid(ANNA, 1_000))
    assert sent == [bid(ANNA, 1_000), bid(ANNA, 1_000), last]


async def test_what_breaks_with_the_link_under_it_is_sent_on_the_next(site: Site, asker: Asker) -> None:
    """The batch of this turn meets a link that has just broken."""
    assert asker.link._end is not None
    asker.submit(bid(ANNA, 1_000))
    asker.link._end.disconnect()
    asker.submit(GET)
    answers = await asker.all()
    assert accepted(answers[0]).seq == 2
    assert isinstance(answers[1], AuctionView)


async def test_one_clients_trouble_with_its_answer_is_not_the_links(
    site: Site, asker: Asker, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(answer: Answer) -> None:
        raise ZeroDivisionError("a bug in a gateway")

    asker.link.submit(GET, fail)
    asker.submit(GET)
    assert isinstance((await asker.all())[0], AuctionView)
    assert "a bug in a gateway" in caplog.text
    assert site.opened == [NUMBER]


async def test_a_link_that_cannot_be_taken_up_is_tried_again(site: Site, asker: Asker) -> None:
    opened = 0

    def fail_once(shard: int) -> None:
        nonlocal opened
        opened += 1
        if opened == 1:
            raise ZeroDivisionError("a bug in a gateway")

    asker.link._on_open = fail_once
    await site.kill_shard_and_notice()
    asker.submit(bid(ANNA, 1_000))
    await site.start_shard()
    assert accepted((await asker.all())[0]).seq == 2
    assert opened == 2


@pytest.mark.parametrize("error", [ConnectionRefusedError(), ZeroDivisionError("a bug in the directory")])
async def test_the_directory_may_be_away(site: Site, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    async def fail(shard: int) -> Owner | None:
        site.lookups += 1
        raise error

    find_owner = site.find_owner
    monkeypatch.setattr(site, "find_owner", fail)
    link = site.link()
    await site.tried()
    assert not link.is_open
    link._find_owner = find_owner
    await site.start_shard()
    await link.opened()


# Bounds


async def test_so_much_may_be_in_flight(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "LINK_IN_FLIGHT_MAX", 3)
    link = site.link()
    answers: list[Answer] = []
    for number in range(5):
        link.submit(bid(ANNA, 1_000, bid_id=number), answers.append)
    assert [code(answer) for answer in answers] == ["busy", "busy"]
    assert isinstance(answers[0], Rejection)
    assert (answers[0].is_transient, answers[0].retry_after_ms) == (True, 250)
    house = await site.start_shard()
    await house.ask(opening())
    await until(lambda: len(answers) == 5)
    link.submit(GET, answers.append)
    await until(lambda: len(answers) == 6)
    assert isinstance(answers[5], AuctionView)


async def test_only_bids_make_bids_busy(site: Site, asker: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "LINK_LINE_MAX", 1)
    house = site.houses[-1]
    house.journal.hold()
    asker.submit(GET, GET, Watch(AUCTION, None, []), bid(ANNA, 1_000), bid(BEN, 2_000, bid_id=2))
    assert [code(answer) for _, answer in asker.answers] == ["busy"]
    house.journal.let_go()
    await until(lambda: len(asker.answers) == 5)
    asker.submit(bid(BEN, 2_000, bid_id=2))
    await until(lambda: len(asker.answers) == 6)
    assert bids(site.store) == [2, 3]


async def test_who_waits_too_long_is_told(site: Site, asker: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    house = site.houses[-1]
    house.journal.hold()
    house.take(Recorder(), bid(BEN, 1_000))
    monkeypatch.setattr(link_module, "COMMAND_TIMEOUT_MS", 0)
    monkeypatch.setattr(link_module, "LINK_PING_MS", 5)
    asker.submit(bid(ANNA, 2_000), GET, Watch(AUCTION, None, []), bid(ANNA, 3_000, bid_id=2))
    answers = await asker.all()
    # The bids were sent, so they may count; a question that was not answered did nothing.
    assert [code(answer) for answer in answers] == ["outcome_unknown", "unavailable", "unavailable", "outcome_unknown"]
    assert all(isinstance(answer, Rejection) and answer.is_transient for answer in answers)
    monkeypatch.setattr(link_module, "COMMAND_TIMEOUT_MS", 8_000)
    house.journal.let_go()
    # The late answers are nobody's any more; the same bid_id tells what became of it.
    asker.submit(bid(ANNA, 2_000))
    await until(lambda: len(asker.answers) == 5)
    assert accepted(asker.answers[-1][1]).seq == 3


async def test_who_waits_too_long_for_a_shard_that_is_away_is_told_so(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "COMMAND_TIMEOUT_MS", 0)
    monkeypatch.setattr(link_module, "LINK_PING_MS", 5)
    asker = Asker(site.link())
    asker.submit(bid(ANNA, 1_000), GET)
    assert [code(answer) for answer in await asker.all()] == ["unavailable", "unavailable"]
    await site.start_shard()
    await asker.link.opened()
    assert site.houses[-1].journal.loads == []


# Silence


@pytest.fixture
def _quick_pulse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "LINK_PING_MS", 2)
    monkeypatch.setattr(link_module, "LINK_DEAD_MS", 8)


@pytest.mark.usefixtures("_quick_pulse")
async def test_a_silent_gateway_is_noticed(site: Site) -> None:
    await site.start_shard()
    client = await Client.connect(site, enable_auto_pong=False)
    await client.closed.wait()
    await until(lambda: not site.servers[-1].ends)


@pytest.mark.usefixtures("_quick_pulse")
async def test_a_silent_shard_is_noticed(site: Site) -> None:
    fake = await Fake.start(site, greeting(), auto_pong=False)
    site.link()
    await until(lambda: len(fake.ends) >= 3)


async def test_a_peer_that_answers_pings_is_not_silent(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "LINK_PING_MS", 5)
    monkeypatch.setattr(link_module, "LINK_DEAD_MS", 500)
    await site.start_shard()
    link = site.link()
    await link.opened()
    pings = 0
    assert link._end is not None
    pulse = link._end._pulse
    heard = pulse.heard

    def count() -> None:
        nonlocal pings
        pings += 1
        heard()

    monkeypatch.setattr(pulse, "heard", count)
    await until(lambda: pings >= 20)
    assert link.is_open
    assert site.opened == [NUMBER]


async def test_a_shard_that_never_greets_is_given_up(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "LINK_GREETING_MS", 20)
    fake = await Fake.start(site, greeting())
    fake.is_silent = True
    link = site.link()
    await until(lambda: len(fake.ends) >= 6)
    assert not link.is_open
    # And its connections are not kept.
    assert fake.ends[0].is_gone


async def test_who_goes_in_the_middle_of_the_handshake_is_not_waited_for() -> None:
    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(ConnectionResetError, match="broke the connection off"):
            await WebSockets().connect(picows.WSListener(), f"127.0.0.1:{port}")


async def test_a_link_that_is_closed_stays_closed(site: Site, asker: Asker) -> None:
    await asker.link.close()
    await until(lambda: not site.servers[-1].ends)
    lookups = site.lookups
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.02):
            await until(lambda: site.lookups > lookups)
    assert site.lookups == lookups
