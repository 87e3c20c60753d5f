"""The clients' live connection against a small real server that plays the protocol, and its bad days."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

import pytest
from websockets.asyncio.server import ServerConnection, serve

from gavel.client import LiveClient, Message
from gavel.errors import CommandError

AUCTION = uuid4()
TOPIC = f"auction:{AUCTION}"
FAST = 0.01
SNAPSHOT = {"auction": str(AUCTION), "status": "active", "price": 100}

Script = Callable[["Conversation"], Awaitable[None]]


class Conversation:
    """One connection, seen from the server."""

    def __init__(self, socket: ServerConnection) -> None:
        self.socket = socket

    async def receive(self, op: str) -> Message:
        """The client's next message, which must be this one; questions for the time are answered on the way."""
        while True:
            message: Message = json.loads(await self.socket.recv())
            if message["op"] == "time" != op:
                await self.answer(message, "time", t0=message["t0"], t1=message["t0"] + 5_000, t2=message["t0"] + 5_000)
                continue
            assert message["op"] == op, message
            return message

    async def answer(self, question: Message, kind: str, /, **fields: Any) -> None:
        await self.send({"type": kind, "ref": question["ref"], **fields})

    async def send(self, message: Message) -> None:
        await self.socket.send(json.dumps(message))

    async def welcome(self) -> Message:
        hello = await self.receive("hello")
        await self.answer(hello, "welcome", user=None)
        return hello

    async def accept_bid(self, seq: int) -> Message:
        bid = await self.receive("bid")
        await self.answer(bid, "ack", seq=seq, hash="00", bid_id=bid["bid_id"])
        return bid

    async def accept_subscription(self, seq: int, **fields: Any) -> Message:
        subscribe = await self.receive("subscribe")
        await self.answer(subscribe, "subscribed", topic=subscribe["topic"], seq=seq, **fields)
        return subscribe

    async def stay(self) -> None:
        """Keep the connection until the client closes it."""
        await self.socket.wait_closed()


@asynccontextmanager
async def server(*scripts: Script, port: int = 0) -> AsyncIterator[str]:
    """Serve one script a connection, in order; the test fails where a script does, or where one is left over."""
    waiting = list(scripts)
    failures: list[Exception] = []

    async def handle(socket: ServerConnection) -> None:
        try:
            assert waiting, "a connection too many"
            await waiting.pop(0)(Conversation(socket))
        except Exception as failure:  # noqa: BLE001 - raised again below
            failures.append(failure)
            # The client gives up, so the test need not wait.
            await socket.close(4500)

    async with serve(handle, "127.0.0.1", port) as listening:
        address = listening.sockets[0].getsockname()
        yield f"http://127.0.0.1:{address[1]}"
    assert failures == []
    assert waiting == [], "a script that was never played"


def client(url: str, **named: Any) -> LiveClient:
    return LiveClient(url, **{"backoff_max_s": FAST, "patience_s": 20.0, **named})


async def test_says_hello_with_its_token_and_bids() -> None:
    hellos, bids = [], []

    async def script(peer: Conversation) -> None:
        hellos.append(await peer.welcome())
        bids.append(await peer.accept_bid(2))
        await peer.stay()

    bid_id = uuid4()
    async with server(script) as url:
        async with client(url, token="a.b.c") as one:
            verdict = await one.bid(AUCTION, bid_id, max_amount=500)
        assert (verdict["type"], verdict["seq"], one.reconnects) == ("ack", 2, 0)
    assert hellos[0]["token"] == "a.b.c"
    fields = {name: bids[0][name] for name in ("auction", "bid_id", "max_amount")}
    assert fields == {"auction": str(AUCTION), "bid_id": str(bid_id), "max_amount": 500}
    assert "amount" not in bids[0]


async def test_answers_find_their_questions_in_any_order() -> None:
    async def script(peer: Conversation) -> None:
        await peer.welcome()
        bids = [await peer.receive("bid") for _ in range(3)]
        for bid in reversed(bids):
            await peer.answer(bid, "ack", seq=bid["amount"], hash="00")
        await peer.stay()

    async with server(script) as url, client(url) as one:
        verdicts = await asyncio.gather(*(one.bid(AUCTION, uuid4(), amount=amount) for amount in (1, 2, 3)))
    assert [verdict["seq"] for verdict in verdicts] == [1, 2, 3]


@pytest.mark.parametrize("code", [1006, 4000, 4001, 4002])
async def test_what_was_not_answered_is_sent_again_with_the_same_bid_id(code: int) -> None:
    seen: list[UUID] = []

    async def drops(peer: Conversation) -> None:
        await peer.welcome()
        seen.append(UUID((await peer.receive("bid"))["bid_id"]))
        if code == 1006:
            peer.socket.transport.abort()
        else:
            await peer.socket.close(code)

    async def accepts(peer: Conversation) -> None:
        await peer.welcome()
        seen.append(UUID((await peer.accept_bid(7))["bid_id"]))
        await peer.stay()

    bid_id = uuid4()
    async with server(drops, drops, accepts) as url, client(url) as one:
        verdict = await one.bid(AUCTION, bid_id, amount=500)
        assert (verdict["seq"], one.reconnects) == (7, 2)
    assert seen == [bid_id] * 3


async def test_a_gateway_that_drains_is_left_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def drains(peer: Conversation) -> None:
        await peer.welcome()
        await peer.receive("bid")
        await peer.socket.close(4000)

    async def accepts(peer: Conversation) -> None:
        await peer.welcome()
        await peer.accept_bid(7)
        await peer.stay()

    async with server(drains, accepts) as url, client(url, backoff_max_s=3_600.0) as one:
        # A pause would be the end of the test.
        monkeypatch.setattr(one, "_backoff_s", _never)
        await one.bid(AUCTION, uuid4(), amount=500)


def _never(_attempt: int) -> float:
    raise AssertionError("it paused")


@pytest.mark.parametrize("code", ["busy", "rate_limited", "unavailable", "too_many", "outcome_unknown"])
async def test_what_is_refused_for_the_moment_is_asked_again(code: str) -> None:
    seen = []

    async def script(peer: Conversation) -> None:
        await peer.welcome()
        bid = await peer.receive("bid")
        await peer.answer(bid, "error", code=code, message="Later.", retry_after_ms=1)
        seen.extend([bid["bid_id"], (await peer.accept_bid(2))["bid_id"]])
        await peer.stay()

    async with server(script) as url, client(url) as one:
        assert (await one.bid(AUCTION, uuid4(), amount=500))["type"] == "ack"
    assert seen[0] == seen[1]


@pytest.mark.parametrize(("kind", "code"), [("rejected", "bid_too_low"), ("error", "internal")])
async def test_a_final_no_is_the_verdict(kind: str, code: str) -> None:
    async def script(peer: Conversation) -> None:
        await peer.welcome()
        await peer.answer(await peer.receive("bid"), kind, code=code, message="No.")
        await peer.stay()

    async with server(script) as url, client(url) as one:
        verdict = await one.bid(AUCTION, uuid4(), amount=500)
    assert (verdict["type"], verdict["code"]) == (kind, code)


async def test_a_server_that_refuses_for_too_long_is_a_sentence() -> None:
    async def script(peer: Conversation) -> None:
        await peer.welcome()
        await peer.answer(await peer.receive("bid"), "error", code="busy", message="Later.")
        await peer.stay()

    async with server(script) as url, client(url, patience_s=0) as one:
        with pytest.raises(CommandError, match=r"goes on refusing .busy."):
            await one.bid(AUCTION, uuid4(), amount=500)


async def test_a_subscription_goes_on_where_it_was() -> None:
    got: list[int] = []
    complete = asyncio.Event()
    subscriptions = []

    def on_message(message: Message) -> None:
        got.extend(event["seq"] for event in message.get("events", ()))
        if 6 in got:
            complete.set()

    async def first(peer: Conversation) -> None:
        await peer.welcome()
        subscriptions.append(await peer.accept_subscription(1, recovered=False, snapshot=SNAPSHOT))
        await peer.send({"type": "events", "topic": TOPIC, "events": [event(2), event(3)]})
        peer.socket.transport.close()

    async def breaks_before_it_answers(peer: Conversation) -> None:
        await peer.welcome()
        subscriptions.append(await peer.receive("subscribe"))
        await peer.socket.close(4001)

    async def last(peer: Conversation) -> None:
        await peer.welcome()
        subscriptions.append(await peer.accept_subscription(5, recovered=True, events=[event(4), event(5)]))
        # What it has, it does not want twice.
        await peer.send({"type": "events", "topic": TOPIC, "events": [event(5), event(6)]})
        await peer.stay()

    async with server(first, breaks_before_it_answers, last) as url, client(url, on_message=on_message) as one:
        await one.subscribe(TOPIC)
        await complete.wait()
    assert got == [2, 3, 4, 5, 6]
    assert [subscription.get("since") for subscription in subscriptions] == [None, 3, 3]


async def test_a_state_covers_what_it_folds() -> None:
    got: list[int] = []
    complete = asyncio.Event()

    def on_message(message: Message) -> None:
        got.append(message["seq"] if message["type"] == "state" else message["events"][0]["seq"])
        if got[-1] == 10:
            complete.set()

    async def script(peer: Conversation) -> None:
        await peer.welcome()
        await peer.accept_subscription(1, recovered=True, events=[event(1)])
        await peer.send({"type": "events", "topic": TOPIC, "events": [event(2)]})
        await peer.send({"type": "state", "topic": TOPIC, "seq": 9, "snapshot": SNAPSHOT, "events": [event(5)]})
        await peer.send({"type": "events", "topic": TOPIC, "events": [event(9), event(10)]})
        await peer.stay()

    async with server(script) as url, client(url, on_message=on_message) as one:
        await one.subscribe(TOPIC)
        await complete.wait()
    assert got == [1, 2, 9, 10]


async def test_a_gap_is_asked_for() -> None:
    got: list[int] = []
    complete = asyncio.Event()

    def on_message(message: Message) -> None:
        got.extend(event["seq"] for event in message.get("events", ()))
        if 4 in got:
            complete.set()

    async def script(peer: Conversation) -> None:
        await peer.welcome()
        await peer.accept_subscription(1, recovered=False, snapshot=SNAPSHOT)
        await peer.send({"type": "events", "topic": TOPIC, "events": [event(3)]})
        again = await peer.accept_subscription(4, recovered=True, events=[event(2), event(3), event(4)])
        assert again["since"] == 1
        await peer.stay()

    async with server(script) as url, client(url, on_message=on_message) as one:
        await one.subscribe(TOPIC)
        await complete.wait()
    assert got == [2, 3, 4]


async def test_an_unsubscribed_topic_is_not_taken_up_again() -> None:
    async def first(peer: Conversation) -> None:
        await peer.welcome()
        await peer.accept_subscription(1, recovered=False, snapshot=SNAPSHOT)
        await peer.answer(await peer.receive("unsubscribe"), "unsubscribed", topic=TOPIC)
        await peer.receive("bid")
        await peer.socket.close(4001)

    async def second(peer: Conversation) -> None:
        await peer.welcome()
        await peer.accept_bid(2)
        await peer.stay()

    async with server(first, second) as url, client(url) as one:
        await one.subscribe(TOPIC)
        await one.unsubscribe(TOPIC)
        await one.bid(AUCTION, uuid4(), amount=500)


async def test_an_unknown_topic_is_a_sentence() -> None:
    async def script(peer: Conversation) -> None:
        await peer.welcome()
        await peer.answer(await peer.receive("subscribe"), "error", code="not_found", message="There is none.")
        await peer.stay()

    async with server(script) as url, client(url) as one:
        with pytest.raises(CommandError, match="There is none"):
            await one.subscribe(TOPIC)


async def test_the_server_has_the_time() -> None:
    async def script(peer: Conversation) -> None:
        await peer.welcome()
        await peer.accept_bid(2)
        await peer.stay()

    async with server(script) as url, client(url) as one:
        before = one.now_ms()
        await one.bid(AUCTION, uuid4(), amount=500)
        # The scripted clock is 5 s ahead; the answer came between the greeting and the bid's verdict.
        assert 4_000 < one.now_ms() - before < 20_000


@pytest.mark.parametrize(
    ("code", "sentence"), [(4500, "take us for a client"), (4501, "does not accept our token"), (1009, "too large")]
)
async def test_a_final_close_is_a_sentence(code: int, sentence: str) -> None:
    async def script(peer: Conversation) -> None:
        await peer.welcome()
        await peer.receive("bid")
        await peer.socket.close(code)

    async with server(script) as url, client(url) as one:
        with pytest.raises(CommandError, match=sentence):
            await one.bid(AUCTION, uuid4(), amount=500)
        with pytest.raises(CommandError, match=sentence):
            await one.bid(AUCTION, uuid4(), amount=500)
        with pytest.raises(CommandError, match=sentence):
            await one.gave_up()


async def test_a_token_that_is_refused_at_the_greeting_is_a_sentence() -> None:
    async def script(peer: Conversation) -> None:
        await peer.receive("hello")
        await peer.socket.close(4501)

    async with server(script) as url, client(url, token="old") as one:
        with pytest.raises(CommandError, match="issue a new one"):
            await one.subscribe(TOPIC)


async def test_a_server_that_comes_back_on_its_port_is_found_again() -> None:
    died = asyncio.Event()

    async def dies(peer: Conversation) -> None:
        await peer.welcome()
        await peer.receive("bid")
        peer.socket.transport.abort()
        died.set()

    async def accepts(peer: Conversation) -> None:
        await peer.welcome()
        await peer.accept_bid(2)
        await peer.stay()

    async with AsyncExitStack() as stack:
        async with server(dies) as url:
            # With a pause, so that there is no second connection to the server that is about to go.
            one = await stack.enter_async_context(client(url, backoff_max_s=0.2))
            bidding = asyncio.create_task(one.bid(AUCTION, uuid4(), amount=500))
            await died.wait()
        async with server(accepts, port=int(url.rpartition(":")[2])):
            assert (await bidding)["type"] == "ack"
            await stack.aclose()


async def test_patience_ends_in_a_sentence(unused_tcp_port: int) -> None:
    async with client(f"http://127.0.0.1:{unused_tcp_port}", patience_s=0.05) as one:
        with pytest.raises(CommandError, match=r"cannot be reached.*start it with `gavel up`"):
            await one.bid(AUCTION, uuid4(), amount=500)


def event(seq: int) -> Message:
    return {"seq": seq, "at": 0, "kind": "private"}
