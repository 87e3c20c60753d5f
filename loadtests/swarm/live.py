"""Locust users with a WebSocket: they connect, watch an auction, lose the connection, come back and resume.

One greenlet a user: it reads until something is due. Everything is timed from the moment at which it was due, so that
a slow server, or a slow generator, cannot hide by making its users wait.
"""

import random
import time
from typing import Any, Final

import gevent
import msgspec
from locust import User, task
from locust.env import Environment
from locust.exception import StopUser

from loadtests.swarm.rooms import Room
from loadtests.swarm.socket import TIMEOUT_S, Disconnected, Socket
from loadtests.swarm.stream import Message, Stream, Violation, decode

SECOND_NS: Final = 1_000_000_000
SILENCE_NS: Final = 45 * SECOND_NS
"""The server pings every 15 s; one that says nothing for so long is away."""
BACKOFF_MIN_S: Final = 0.2
BACKOFF_MAX_S: Final = 10.0
TOO_MANY_WAIT_S: Final = (60.0, 70.0)

# Close codes
DRAINING: Final = 4000
NOT_PROTOCOL: Final = 4500
NOT_WELCOME: Final = 4501
TOO_MANY: Final = 4502
TOO_LARGE: Final = 1009

TOPIC_REF: Final = 0
"""The `ref` of what concerns the subscription; bids count from 1."""


class Unexpected(Exception):
    """A failure, as its sentence, which is what Locust's table shows of it."""

    def __repr__(self) -> str:
        return str(self)


class LostOnPurpose(Exception):
    """This user cut its own connection, as a lost network would."""


class LiveUser(User):
    """A user that watches the auction in a room, one after another. Subclasses act: `due_ns` says when, `act` what."""

    abstract = True

    def __init__(self, environment: Environment, url: str, room: Room, drop_every_s: float) -> None:
        super().__init__(environment)
        self.room = room
        self.stream: Stream | None = None
        # How often its network fails, on average; 0: never.
        self._drop_every_s = drop_every_s
        self._url = url
        self._socket: Socket | None = None
        self._is_connected = False
        self._attempt = 0
        # The first moment at which it could have come back, once it has lost its connection.
        self._back_ns: int | None = None

    # What subclasses say

    def token(self) -> str | None:
        """Its access token; None for a guest."""
        return None

    def renew_token(self) -> bool:
        """Get another token, since this one is not accepted; False if there is none."""
        return False

    def due_ns(self) -> int | None:
        """When it wants to `act` next, if at all."""
        return None

    def act(self, due_ns: int) -> None:
        """Do what was due."""

    def on_connected(self) -> None:
        """It is connected and subscribed, for the first time or again."""

    def on_dropped(self, back_ns: int) -> None:
        """It has cut its own connection, and is away until then: no server is to blame for what waits meanwhile."""

    def on_answer(self, message: Message, now_ns: int) -> None:
        """An answer to something that it sent."""

    # Locust's side

    @task
    def live(self) -> None:
        """Stay connected for as long as the test runs."""
        while True:
            try:
                self._connect()
                self.on_connected()
                self._stay()
            except (Disconnected, LostOnPurpose) as over:
                self._close()
                gevent.sleep(self._pause_s(over))

    def on_stop(self) -> None:
        """The test is over, or this user is."""
        self._close()

    def report(self, name: str, began_ns: int, ended_ns: int, failure: str | None = None) -> None:
        """Put a request into Locust's table."""
        self.environment.events.request.fire(
            request_type="WS",
            name=name,
            response_time=(ended_ns - began_ns) / 1_000_000,
            response_length=0,
            exception=None if failure is None else Unexpected(failure),
            context={},
        )

    def report_violations(self, violations: list[Violation]) -> None:
        """Put broken promises into Locust's table."""
        for violation in violations:
            self.report(f"check: {violation.check}", 0, 0, failure=violation.sentence)

    # The conversation

    def send(self, message: dict[str, Any]) -> None:
        """Send a message, or raise `Disconnected`."""
        assert self._socket is not None
        self._socket.send(msgspec.json.encode(message))

    def _connect(self) -> None:
        """Connect, say hello, and subscribe: for the first time, or from where it was."""
        began_ns = time.perf_counter_ns()
        try:
            self._socket = Socket(self._url)
            token = self.token()
            self.send({"op": "hello"} if token is None else {"op": "hello", "token": token})
            self._await("welcome")
        except Disconnected as error:
            self.report("connect", began_ns, time.perf_counter_ns(), failure=str(error))
            raise
        self.report("connect", began_ns, time.perf_counter_ns())
        self._is_connected = True
        self._subscribe()

    def _subscribe(self) -> None:
        """Subscribe to the room's auction; to the one that it has been watching from the last `seq` on."""
        if self.stream is None or self._is_over():
            auction = self.room.enter()
            if auction is None:
                raise Disconnected("its auction could not be opened")
            self.stream = Stream(auction)
        message: dict[str, Any] = {"op": "subscribe", "topic": self._topic(), "ref": TOPIC_REF}
        name, began_ns = "subscribe", time.perf_counter_ns()
        if self._back_ns is not None and self.stream.seq is not None:
            # Failed attempts count: it is the time without the auction, but for the pause that was its own choice.
            name, began_ns = "resume", self._back_ns
            message["since"] = self.stream.seq
        try:
            self.send(message)
            self._await("subscribed")
        except Disconnected as error:
            self.report(name, began_ns, time.perf_counter_ns(), failure=str(error))
            raise
        self.report(name, began_ns, time.perf_counter_ns())
        self._back_ns = None
        self._attempt = 0

    def _await(self, kind: str) -> None:
        """Read until a message of this kind has come."""
        deadline_ns = time.perf_counter_ns() + int(TIMEOUT_S * SECOND_NS)
        while (left_ns := deadline_ns - time.perf_counter_ns()) > 0:
            if kind in self._read(left_ns):
                return
        raise Disconnected(f"no {kind} within {TIMEOUT_S:.0f} s")

    def _stay(self) -> None:
        """Read, and act when it is time, until the connection is lost."""
        assert self._socket is not None
        drop_ns = None
        if self._drop_every_s > 0:
            drop_ns = time.perf_counter_ns() + int(random.expovariate(1 / self._drop_every_s) * SECOND_NS)
        while True:
            if self._is_over():
                self._move_on()
            now_ns, due_ns = time.perf_counter_ns(), self.due_ns()
            silent_ns = self._socket.heard_ns + SILENCE_NS
            if now_ns >= silent_ns:
                raise Disconnected("silent for too long")
            if drop_ns is not None and now_ns >= drop_ns:
                raise LostOnPurpose
            if due_ns is not None and now_ns >= due_ns:
                self.act(due_ns)
                # What has come meanwhile is read before the next act, if there is one due already.
                due_ns = self.due_ns()
            wakes_ns = min(at_ns for at_ns in (silent_ns, drop_ns, due_ns) if at_ns is not None)
            self._read(max(0, wakes_ns - now_ns))

    def _is_over(self) -> bool:
        """Whether there is nothing more to see in this auction, and another to go to."""
        return self.stream is not None and self.stream.is_over and not self.room.plan.is_together

    def _move_on(self) -> None:
        assert self.stream is not None
        # Nothing comes after the end.
        self.report_violations(self.stream.missing(time.perf_counter_ns()))
        self.send({"op": "unsubscribe", "topic": self._topic(), "ref": TOPIC_REF})
        self.room.leave(self.stream.auction)
        self._subscribe()

    def _topic(self) -> str:
        assert self.stream is not None
        return f"auction:{self.stream.auction}"

    # Reading

    def _read(self, timeout_ns: int) -> list[str]:
        """Take what has come, waiting for it at most so long; the types of the messages."""
        assert self._socket is not None
        texts = self._socket.receive(timeout_ns / SECOND_NS)
        now_ns = time.perf_counter_ns()
        return [self._take(text, now_ns) for text in texts]

    def _take(self, text: bytes, now_ns: int) -> str:
        try:
            message = decode(text)
        except msgspec.MsgspecError as error:
            raise Disconnected(f"a message that cannot be read: {error}") from error
        kind, stream = message.type, self.stream
        if kind in ("events", "state", "subscribed"):
            # Of an auction that it has just left, events may still be on their way.
            if stream is not None and message.topic == self._topic():
                before = stream.seq
                self.report_violations(stream.take(message))
                # A subscription brings what was on other screens when this one was away.
                if kind != "subscribed" and before is not None and stream.seq is not None:
                    self.room.shown(stream.auction, before, stream.seq, now_ns)
        elif kind == "error" and message.ref in (None, TOPIC_REF):
            raise Disconnected(f"refused with {message.code}")
        else:
            self.on_answer(message, now_ns)
        return kind

    # Coming back

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _pause_s(self, over: Disconnected | LostOnPurpose) -> float:
        """How long to wait before connecting again. Raises `StopUser` where that would end the same way."""
        code = over.code if isinstance(over, Disconnected) else None
        if self._is_connected and isinstance(over, Disconnected) and code != DRAINING:
            now_ns = time.perf_counter_ns()
            self.report("connection", now_ns, now_ns, failure=str(over))
        self._is_connected = False
        if code in (NOT_PROTOCOL, TOO_LARGE) or (code == NOT_WELCOME and not self.renew_token()):
            raise StopUser
        self._attempt += 1
        if code == TOO_MANY:
            pause_s = random.uniform(*TOO_MANY_WAIT_S)
        elif code == DRAINING and self._attempt == 1:
            pause_s = 0.0
        else:
            ceiling_s = min(BACKOFF_MAX_S, BACKOFF_MIN_S * 2 ** min(self._attempt, 16))
            pause_s = random.uniform(BACKOFF_MIN_S, ceiling_s)
        back_ns = time.perf_counter_ns() + int(pause_s * SECOND_NS)
        if self._back_ns is None:
            self._back_ns = back_ns
        if isinstance(over, LostOnPurpose):
            self.on_dropped(back_ns)
        return pause_s
