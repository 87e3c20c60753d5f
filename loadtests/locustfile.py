"""A Locust swarm against a running engine: people who watch, bid, snipe and read lists, and who check what they see.

    locust -f loadtests/locustfile.py --headless -u 2000 -r 200 -t 60s -H http://127.0.0.1:8700

The swarm's own options stand in the README and in `swarm/options.py`. Requests of type WS in Locust's table:

- `connect`: from opening the connection to `welcome`
- `subscribe`, `resume`: to `subscribed`; `resume` from the first moment at which a lost user could have come back
- `bid ack`: from the moment for which the bid was scheduled to its `ack`; `bid rejected`: to a refusal that is part of
  any auction, such as a bid that somebody else outbid on the way
- `bid to screen`: from the same moment to its arrival at each screen of the same process, one by one
- `connection`, `check: …`: only as failures: lost connections, and broken promises (see `swarm/stream.py`)
"""

import heapq
import itertools
import random
import sys
import time
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID, uuid4

from locust import FastHttpUser, between, events, task
from locust.contrib.fasthttp import FastHttpSession
from locust.env import Environment
from locust.exception import StopTest
from locust.runners import MasterRunner, Runner, WorkerRunner

from gavel.errors import CommandError
from loadtests.swarm.generator import Generator
from loadtests.swarm.live import SECOND_NS, LiveUser
from loadtests.swarm.options import HOST, add_options, problem
from loadtests.swarm.rooms import STEP, Plan, Room
from loadtests.swarm.shapes import SHAPES
from loadtests.swarm.stream import Message
from loadtests.swarm.tokens import Tokens, read_tokens

HTTP_TIMEOUT_S: Final = 10.0
LATE_NS: Final = 10 * SECOND_NS
"""An acknowledged bid that is not in the stream, or a bid that has no answer, after so long is a failure."""
IN_FLIGHT_MAX: Final = 16
"""Bids of one user that wait for an answer; the engine allows 64."""
TIME_REF: Final = -1
"""The `ref` of a question for the server's clock; bids count from 1."""

IN_THE_GAME: Final = frozenset({"bid_too_low", "ended", "max_not_raised", "not_started"})
"""Refusals that happen to honest bidders."""
TRANSIENT: Final = frozenset({"busy", "rate_limited", "too_many", "unavailable", "outcome_unknown"})
"""Answers after which the same bid, with the same `bid_id`, is to be sent again."""
RETRY_MS: Final = 500
"""When, where the answer does not say."""

# The users


class Visitor(LiveUser):
    """Somebody in one of the run's rooms."""

    abstract = True
    host = HOST

    def __init__(self, environment: Environment) -> None:
        shared = the_swarm()
        super().__init__(environment, shared.url, random.choice(shared.rooms), shared.drop_every_s)
        self.shared = shared


class Watcher(Visitor):
    """A guest who watches."""

    weight = 80


@dataclass
class Bid:
    """A bid on its way. It was due at `due_ns`, from which everything counts."""

    bid_id: UUID
    auction: str
    message: dict[str, Any]
    due_ns: int


class Bidder(Visitor):
    """Bids now and then, at moments that follow from no answer (a Poisson process)."""

    weight = 10

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self._token = self.shared.tokens.bidder()
        self._refs = itertools.count(1)
        self._bids: dict[int, Bid] = {}
        # Bids to be sent again: when, and their ref.
        self._again: list[tuple[int, int]] = []
        self._next_ns = self._after(time.perf_counter_ns())
        # Until when it was away by its own doing.
        self._away_ns = 0
        # In the auction that it is in: its paddle and its maximum.
        self._auction = ""
        self._paddle = 0
        self._max_amount = 0

    def token(self) -> str:
        return self._token

    def renew_token(self) -> bool:
        self._token = self.shared.tokens.bidder()
        return self.shared.tokens.is_issuer

    def on_connected(self) -> None:
        # The protocol: what was not answered is sent again, with the same `bid_id`.
        self._again.clear()
        for bid in self._bids.values():
            self.send(bid.message)

    def on_dropped(self, back_ns: int) -> None:
        self._away_ns = back_ns
        away_ns = back_ns - time.perf_counter_ns()
        for bid in self._bids.values():
            bid.due_ns += away_ns

    def due_ns(self) -> int | None:
        at_ns = self.next_bid_ns()
        if self._again and (at_ns is None or self._again[0][0] < at_ns):
            return self._again[0][0]
        return at_ns

    def act(self, due_ns: int) -> None:
        if self._again and self._again[0][0] == due_ns:
            bid = self._bids.get(heapq.heappop(self._again)[1])
            if bid is not None:
                self.send(bid.message)
            return
        self.bid(max(due_ns, self._away_ns))

    def next_bid_ns(self) -> int | None:
        """When it wants to bid next, if at all."""
        return self._next_ns

    def bid(self, due_ns: int) -> None:
        """Place the bid that was due."""
        self._next_ns = self._after(due_ns)
        self.place(due_ns)

    def place(self, due_ns: int) -> None:
        """Bid a little, or up to a maximum; a leader raises its own."""
        stream = self.stream
        if stream is None or stream.status != "active":
            return
        self.report_violations(stream.missing(time.perf_counter_ns() - LATE_NS))
        if len(self._bids) >= IN_FLIGHT_MAX:
            self.report("bid ack", due_ns, time.perf_counter_ns(), failure="too many bids without an answer")
            return
        if stream.auction != self._auction:
            self._auction, self._paddle, self._max_amount = stream.auction, 0, 0
        ref, bid_id = next(self._refs), uuid4()
        message: dict[str, Any] = {"op": "bid", "ref": ref, "auction": stream.auction, "bid_id": str(bid_id)}
        if self._paddle and stream.leader == self._paddle:
            message["max_amount"] = max(self._max_amount, stream.price) + STEP * random.randint(1, 20)
        elif random.random() < 0.5:  # noqa: PLR2004 - one half
            message["max_amount"] = stream.minimum + STEP * random.randint(1, 20)
        else:
            message["amount"] = stream.minimum + STEP * random.randint(0, 2)
        self._bids[ref] = Bid(bid_id, stream.auction, message, due_ns)
        self.send(message)

    def on_answer(self, message: Message, now_ns: int) -> None:
        bid = self._bids.get(message.ref or 0)
        if bid is None or message.ref is None:
            return
        if message.type == "ack":
            del self._bids[message.ref]
            self.report("bid ack", bid.due_ns, now_ns)
            self._on_ack(bid, message, now_ns)
        elif message.is_transient or message.code in TRANSIENT:
            # A failure for who looks at the table, but this user does not give up.
            self.report("bid ack", bid.due_ns, now_ns, failure=message.code)
            again_ns = now_ns + (message.retry_after_ms or RETRY_MS) * 1_000_000
            heapq.heappush(self._again, (again_ns, message.ref))
        elif message.type in ("rejected", "error"):
            del self._bids[message.ref]
            is_usual = message.code in IN_THE_GAME
            failure = None if is_usual else f"{message.type} with {message.code}"
            self.report("bid rejected" if is_usual else "bid ack", bid.due_ns, now_ns, failure=failure)

    def on_stop(self) -> None:
        now_ns = time.perf_counter_ns()
        for bid in self._bids.values():
            if now_ns - bid.due_ns > LATE_NS:
                self.report("bid ack", bid.due_ns, now_ns, failure="no answer")
        if self.stream is not None:
            self.report_violations(self.stream.missing(now_ns - LATE_NS))
        super().on_stop()

    def _on_ack(self, bid: Bid, ack: Message, now_ns: int) -> None:
        self.report_violations(self.room.acknowledged(bid.auction, ack.seq, bid.bid_id, bid.due_ns))
        if self.stream is not None and self.stream.auction == bid.auction:
            self.report_violations(self.stream.acknowledged(ack.seq, ack.paddle, now_ns))
        if bid.auction == self._auction:
            self._paddle, self._max_amount = ack.paddle, ack.max_amount

    def _after(self, at_ns: int) -> int:
        return at_ns + int(random.expovariate(1 / self.shared.bid_every_s) * SECOND_NS)


class Sniper(Bidder):
    """Bids in an auction's last second, and in the next last second where that moved its end."""

    weight = 5

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        # By how much the server's clock is ahead of ours, once we have asked.
        self._ahead_ms: float | None = None
        self._sniped: tuple[str, int] | None = None
        self._lead_ms = random.uniform(100, 900)

    def on_connected(self) -> None:
        super().on_connected()
        self.send({"op": "time", "t0": _now_ms(), "ref": TIME_REF})

    def on_answer(self, message: Message, now_ns: int) -> None:
        if message.type == "time":
            self._ahead_ms = message.t1 - (message.t0 + _now_ms()) / 2
        else:
            super().on_answer(message, now_ns)

    def next_bid_ns(self) -> int | None:
        stream = self.stream
        if stream is None or stream.status != "active" or self._ahead_ms is None:
            return None
        if self._sniped == (stream.auction, stream.end_time):
            return None
        left_ms = stream.end_time - self._lead_ms - self._ahead_ms - time.time_ns() / 1_000_000
        return time.perf_counter_ns() + int(left_ms * 1_000_000)

    def bid(self, due_ns: int) -> None:
        assert self.stream is not None
        self._sniped = (self.stream.auction, self.stream.end_time)
        self._lead_ms = random.uniform(100, 900)
        self.place(due_ns)


class FeedReader(FastHttpUser):
    """Reads lists over HTTP, and looks at auctions."""

    weight = 5
    host = HOST
    wait_time = between(1, 3)
    network_timeout = HTTP_TIMEOUT_S
    connection_timeout = HTTP_TIMEOUT_S

    def __init__(self, environment: Environment) -> None:
        self.host = the_swarm().url
        super().__init__(environment)
        self._auctions: list[str] = []

    def on_start(self) -> None:
        self.read_list()

    @task(3)
    def read_list(self) -> None:
        """The newest auctions."""
        answer = self.client.get("/api/v1/auctions?status=active&limit=20", name="GET /auctions")
        if answer.status_code == 200:  # noqa: PLR2004 - HTTP
            self._auctions = [auction["auction_id"] for auction in answer.json()["data"]["auctions"]]

    @task(6)
    def look(self) -> None:
        """One of them."""
        if self._auctions:
            self.client.get(f"/api/v1/auctions/{random.choice(self._auctions)}", name="GET /auctions/{id}")

    @task(2)
    def read_bids(self) -> None:
        """The bids in one of them."""
        if self._auctions:
            self.client.get(f"/api/v1/auctions/{random.choice(self._auctions)}/bids", name="GET /auctions/{id}/bids")


# What the users of a process share


class Swarm:
    """A run, as this process has a part in it."""

    def __init__(self, environment: Environment, tokens: Tokens) -> None:
        options = environment.parsed_options
        assert options is not None
        self.tokens = tokens
        # Where this run began: on the page, the host can be changed while it lasts.
        self.url = environment.host or HOST
        self.drop_every_s = float(options.drop_every_s)
        self.bid_every_s = float(options.bid_every_s)
        self._request_event = environment.events.request
        self._maker = tokens.maker(UUID(options.swarm_run))
        self._http = FastHttpSession(
            self.url,
            self._request_event,
            user=None,
            network_timeout=HTTP_TIMEOUT_S,
            connection_timeout=HTTP_TIMEOUT_S,
        )
        plan = Plan(
            run=UUID(options.swarm_run),
            began_s=options.swarm_began_s,
            rooms=options.auctions,
            auction_s=options.auction_s,
            is_together=options.shape == "closing-minute",
        )
        self.rooms = [Room(number, plan, self._open, self._show) for number in range(plan.rooms)]

    def _open(self, key: UUID, terms: dict[str, Any]) -> dict[str, Any] | None:
        headers = {"Authorization": f"Bearer {self._maker}", "Idempotency-Key": str(key)}
        answer = self._http.post("/api/v1/auctions", name="POST /auctions", headers=headers, json=terms)
        if answer.status_code != 201:  # noqa: PLR2004 - HTTP
            return None
        data: dict[str, Any] = answer.json()["data"]
        return data

    def _show(self, took_ms: float) -> None:
        self._request_event.fire(
            request_type="WS",
            name="bid to screen",
            response_time=took_ms,
            response_length=0,
            exception=None,
            context={},
        )


_swarms: list[Swarm] = []
"""The run that is under way, if there is one: Locust gives its users nothing but the environment."""


def the_swarm() -> Swarm:
    """The run that is under way."""
    return _swarms[0]


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


# What happens when


def _check(environment: Environment) -> None:
    """Raise `CommandError` where such a load must not be."""
    assert environment.parsed_options is not None
    sentence = problem(environment.host or HOST, environment.parsed_options)
    if sentence is not None:
        raise CommandError(sentence)


def _on_init(environment: Environment, runner: Runner, **_named: object) -> None:
    options = environment.parsed_options
    assert options is not None
    tokens = None
    try:
        _check(environment)
        # A master brings no users.
        if not isinstance(runner, MasterRunner):
            tokens = read_tokens(options.data_dir, options.tokens)
    except CommandError as error:
        sys.exit(f"gavel: {error}")
    if options.shape != "none" and not isinstance(runner, WorkerRunner):
        environment.shape_class = SHAPES[options.shape]()
        environment.shape_class.runner = runner
    Generator(environment)

    def start(**_named: object) -> None:
        try:
            # Again: whoever started this run on the page may have changed what it shows.
            _check(environment)
        except CommandError as error:
            environment.process_exit_code = 1
            raise StopTest(str(error)) from None
        if not isinstance(runner, WorkerRunner):
            # Locust hands a run's options to its workers, these two among them.
            options.swarm_run, options.swarm_began_s = str(uuid4()), time.time()
        if tokens is not None:
            _swarms[:] = [Swarm(environment, tokens)]

    environment.events.test_start.add_listener(start)


events.init_command_line_parser.add_listener(add_options)
events.init.add_listener(_on_init)
