"""The twin of a Postgres server, and of asyncpg in front of it, for the statements that our code uses.

Statements are compiled from their text, clause by clause and condition by condition, to Python: a changed condition is
a changed behaviour. Isolation is READ COMMITTED with row locks; commits are flushed in groups; and what the server, its
machine, its network and its clients may do at a bad moment is done on demand.

The parts, from the top down: the server and its sessions; asyncpg's connections and pools; executing; compiling.
"""

import asyncio
import math
import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterable
from contextlib import asynccontextmanager
from decimal import ROUND_HALF_UP, Decimal
from functools import lru_cache
from itertools import zip_longest
from typing import Any, Final, Literal, NamedTuple, cast

import asyncpg

from actors.journal import Private, Row
from engine.limits import DATABASE_RETRY_MS, DATABASE_TIMEOUT_MS, READERS_MAX, SECOND_MS, WRITE_TIMEOUT_MS
from tests.simulation.world import Process, World

Values = tuple[Any, ...]
Key = tuple[Any, ...]

_CONNECT_TIMEOUT_S: Final = 60.0
"""asyncpg's own."""
_COMMAND_TIMEOUT_S: Final = DATABASE_TIMEOUT_MS / SECOND_MS
SLOW_CHANCE: Final = 0.002
SLOW_EXECUTION_US: Final = (5_000, 3_000_000)
_INFINITY: Final = float("inf")


# The server


class Schema(NamedTuple):
    """What a table holds; see `migrations/`."""

    columns: tuple[str, ...]
    key: int
    """So many of the first columns are the primary key."""
    defaults: dict[str, Any]
    at_least: dict[str, int]
    references: tuple[str, int]
    """Another table, and the first of the columns that hold its primary key; `""` for none."""


def _schema(
    columns: str, key: int, *, references: tuple[str, int] = ("", 0), defaults: Any = None, **at_least: int
) -> Schema:
    return Schema(tuple(columns.split()), key, defaults or {}, at_least, references)


SCHEMAS: Final = {
    "shards": _schema(
        "shard_id epoch address alive_at backend_pid owner down_at",
        1,
        defaults={"epoch": 0, "alive_at": -_INFINITY},
        shard_id=0,
    ),
    "slots": _schema("slot shard_id", 1, references=("shards", 1), slot=0),
    "entities": _schema("entity_id slot kind owner_id status due_at created_at window_ms ended_at", 1),
    "bidders": _schema("user_id entity_id", 2),
    "journal": _schema("entity_id seq at kind version body hash command_id", 2, seq=1),
    "snapshots": _schema("entity_id seq hash last_at version body", 1),
    "private": _schema("entity_id seq salt body", 2, references=("journal", 0)),
}


class Table:
    """Committed rows, and the locks on them. Rows are tuples, grouped by the first column of the primary key."""

    def __init__(self, name: str, schema: Schema) -> None:
        self.name = name
        self.columns = schema.columns
        self.key = schema.key
        self.checks = [(schema.columns.index(column), least) for column, least in schema.at_least.items()]
        self.groups: dict[Any, dict[Key, Values]] = {}
        self.locks: dict[Key, Lock] = {}

    def get(self, key: Key) -> Values | None:
        group = self.groups.get(key[0])
        return None if group is None else group.get(key)

    def put(self, key: Key, row: Values | None) -> None:
        if row is not None:
            self.groups.setdefault(key[0], {})[key] = row
        else:
            self.groups.get(key[0], {}).pop(key, None)

    def rows(self) -> list[Values]:
        return [row for group in self.groups.values() for row in group.values()]

    def dicts(self) -> list[dict[str, Any]]:
        """The committed rows; times are microseconds since the epoch."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows()]


class Lock:
    """A row's lock, or that on a key under which a row is being inserted."""

    __slots__ = ("holder", "waiting")

    def __init__(self, holder: "Transaction") -> None:
        self.holder = holder
        self.waiting: deque[Session] = deque()


class Transaction:
    """What a session has done and not yet committed."""

    __slots__ = ("is_explicit", "is_failed", "is_logged", "locks", "session", "writes")

    def __init__(self, session: "Session", *, is_explicit: bool = False) -> None:
        self.session = session
        self.is_explicit = is_explicit
        self.is_failed = False
        self.is_logged = False
        """Whether its commit record is written, after which it can no longer be rolled back."""
        self.writes: dict[tuple[Table, Key], Values | None] = {}
        """New rows by key; None where a row was deleted."""
        self.locks: dict[tuple[Table, Key], Lock] = {}


class Line:
    """One direction of a connection: what is sent on it arrives in order."""

    __slots__ = ("last_us", "process")

    def __init__(self, process: Process) -> None:
        self.process = process
        """The client's."""
        self.last_us = 0


class Session:
    """A backend of the server, for one connection."""

    __slots__ = ("connection", "execution", "is_client_gone", "is_dead", "name", "pid", "transaction", "waits_for")

    def __init__(self, pid: int, name: str, connection: "Connection") -> None:
        self.pid = pid
        self.name = name
        self.connection = connection
        self.transaction: Transaction | None = None
        self.execution: Execution | None = None
        """What is being executed, up to its answer."""
        self.waits_for: Lock | None = None
        self.is_client_gone = False
        self.is_dead = False


class SimulatedPostgres:
    """A server. Its delays are (least, most) microseconds; where one is slow, by chance, it is so in its own range."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.travel_us = (50, 500)
        self.execution_us = (50, 1_000)
        self.flush_us = (100, 1_000)
        self.slow_chance = SLOW_CHANCE
        self.slow_execution_us = SLOW_EXECUTION_US
        self.slow_flush_us = (1_000, 300_000)
        self.recovery_us = (50_000, 2_000_000)
        self.tables = {name: Table(name, schema) for name, schema in SCHEMAS.items()}
        self.sessions: dict[int, Session] = {}
        """Those that live, by their backend's pid."""
        self.statements = 0
        self.commits = 0
        self.on_commit: Callable[[Table, Values], None] | None = None
        """Told of each row that becomes visible, in the order of commits."""
        self.clock_offset_us = 0
        self.is_away = False
        self.is_up = True
        self._serves_from_us = 0
        self._next_pid = 1_000
        self.cut_off: set[Process] = set()
        """To and from these nothing passes."""
        self._held: list[tuple[Line, Callable[..., None], tuple[Any, ...]]] = []
        self._flushing: list[Transaction] = []
        self._logged: list[Transaction] = []
        """Those whose commit records wait for the next flush."""

    def database(self, process: Process) -> "SimulatedDatabase":
        """The way to this server from a process: see `Database`."""
        return SimulatedDatabase(self, process)

    def current_database(self) -> str:
        """`current_database()`: it has one."""
        return "gavel"

    def clock_us(self) -> int:
        """`clock_timestamp()`, microseconds since the epoch."""
        return self.world.now_us + self.clock_offset_us

    def rows(self) -> list[Row]:
        """The journal as it is committed, by entity and seq, with what is private."""
        private = self.tables["private"]
        rows = []
        for values in sorted(self.tables["journal"].rows(), key=lambda row: row[:2]):
            hidden = private.get(values[:2])
            rows.append(Row._make((*values, None if hidden is None else Private(*hidden[2:]), None)))
        return rows

    # What may happen to it

    def jump_clock(self, duration_ms: int) -> None:
        """Put the server's clock forward, or back."""
        self._trace(f"its clock JUMPS by {duration_ms} ms")
        self.clock_offset_us += duration_ms * 1_000

    def crash(self) -> None:
        """The server dies. Of the commits that were not flushed yet the operating system has kept a part."""
        logged = self._flushing + self._logged
        self._stop("CRASHES", self.world.random.randint(0, len(logged)))

    def power_cut(self) -> None:
        """The server's machine dies: what was not flushed is gone."""
        self._stop("loses its POWER", 0)

    def start(self) -> None:
        """Start again after `crash` or `power_cut`; it recovers for a while before it lets anybody in."""
        self._trace("starts again")
        self.is_up = True
        self._serves_from_us = self.world.now_us + self._draw(self.recovery_us)

    def go_away(self, process: Process | None = None) -> None:
        """Let nothing pass between the server and a process, or anybody, without a word; what has begun goes on."""
        self._trace("is AWAY" + (f" for {process.name}" if process else ""))
        if process is None:
            self.is_away = True
        else:
            self.cut_off.add(process)

    def come_back(self, process: Process | None = None) -> None:
        """Pass on what was sent meanwhile, as TCP does, and all that follows."""
        self._trace("is back" + (f" for {process.name}" if process else ""))
        if process is None:
            self.is_away = False
        else:
            self.cut_off.discard(process)
        held, self._held = self._held, []
        for line, callback, arguments in held:
            self._pass(line, callback, arguments)

    def break_connection(self, session: Session, when: Literal["now", "request", "reply"] = "now") -> None:
        """Cut a connection: now, or before its next statement arrives, or after that is done, before the answer."""
        if when == "now":
            self._trace(f"the connection of {session.name} is CUT")
            session.connection.is_cut = True
            self.carry(session.connection.down, session.connection.lose)
            self.carry(session.connection.up, self.hang_up, session)
        else:
            session.connection.breaks_at = when

    def terminate(self, pid: int) -> bool:
        """Do what `pg_terminate_backend` does. Whose commit record is written commits all the same."""
        session = self.sessions.get(pid)
        if session is None:
            return False
        self._trace(f"ends the session of {session.name}")
        self._end(session)
        self.carry(session.connection.down, session.connection.lose)
        return True

    # What comes over the network

    def carry(self, line: Line, callback: Callable[..., None], *arguments: Any) -> None:
        """Let a message travel between the server and a client."""
        line.last_us = max(self.world.now_us + self._draw(self.travel_us), line.last_us + 1)
        self.world.at(line.last_us, self._pass, line, callback, arguments)

    def admit(self, name: str, connection: "Connection") -> None:
        """Somebody wants to connect."""
        if connection.is_closed():
            return
        if not self.is_up:
            self.carry(connection.down, connection.refuse, ConnectionRefusedError("Postgres does not listen"))
        elif self.world.now_us < self._serves_from_us:
            error = asyncpg.CannotConnectNowError("the database system is starting up")
            self.carry(connection.down, connection.refuse, error)
        else:
            self._next_pid += 1
            session = self.sessions[self._next_pid] = Session(self._next_pid, name, connection)
            self.carry(connection.down, connection.accept, session)

    def receive(self, session: Session, request: int, text: str, arguments: Values) -> None:
        """A statement has arrived: it begins after the time that it takes before it touches anything."""
        connection = session.connection
        if connection.breaks_at == "request":
            connection.breaks_at = None
            self.break_connection(session)
        if session.is_dead or connection.is_cut:
            return
        self.statements += 1
        execution = session.execution = Execution(self, session, request, text, arguments)
        execution_us = self._draw(self.execution_us)
        slow_us = self._draw_slow(self.slow_execution_us)
        # A statement is as likely to be slow before it takes its locks as while it holds them.
        is_late = slow_us > 0 and self.world.random.random() < 0.5
        execution.rest_us = execution_us // 2 + (slow_us if is_late else 0)
        self.world.after(execution_us // 2 + (0 if is_late else slow_us), self._begin, session, execution)

    def request_cancel(self, session: Session, request: int) -> None:
        """Somebody does not want an answer any more, and says so on a connection of its own, if that can be made."""
        self.world.after(2 * self._draw(self.travel_us), self._cancel, session, request)

    def _cancel(self, session: Session, request: int) -> None:
        execution = session.execution
        if self.is_away or session.connection.up.process in self.cut_off:
            return
        if execution is not None and execution.request == request and not execution.transaction.is_logged:
            self._trace(f"cancels {execution.compiled.title} of {session.name}")
            error = asyncpg.QueryCanceledError("canceling statement due to user request")
            self._fail(session, execution, error)

    def hang_up(self, session: Session) -> None:
        """The client is gone. What the session executes goes on and commits; then the session ends."""
        session.is_client_gone = True
        if session.execution is None and not session.is_dead:
            self._end(session)

    # Executing

    def _begin(self, session: Session, execution: "Execution") -> None:
        if session.execution is not execution:
            return
        if execution.transaction.is_failed and execution.compiled.control not in {"rollback", "commit"}:
            self._fail(session, execution, asyncpg.InFailedSQLTransactionError("the transaction is aborted"))
            return
        execution.steps = execution.compiled.run(execution)
        self.proceed(session, execution)

    def proceed(self, session: Session, execution: "Execution") -> None:
        """Go on until the statement is done, or must wait for a lock."""
        if session.execution is not execution:
            return
        try:
            lock = next(execution.steps)
        except StopIteration as stop:
            execution.found = stop.value
            self.world.after(execution.rest_us, self._finish, session, execution)
        except asyncpg.PostgresError as error:
            self._fail(session, execution, error)
        else:
            if self.world.is_tracing:
                self._trace(f"{session.name} waits for a lock of {lock.holder.session.name}")
            session.waits_for = lock
            lock.waiting.append(session)

    def _finish(self, session: Session, execution: "Execution") -> None:
        """The statement has done its work: commit, unless it is part of something larger."""
        if session.execution is not execution:
            return
        transaction = execution.transaction
        if self.world.is_tracing:
            self._trace(f"{session.name} did {execution.describe()}")
        if execution.compiled.control == "rollback" or (
            execution.compiled.control == "commit" and transaction.is_failed
        ):
            self._roll_back(transaction)
        elif execution.compiled.control == "commit" or not transaction.is_explicit:
            if transaction.writes:
                transaction.is_logged = True
                self._logged.append(transaction)
                if not self._flushing:
                    self._flush()
                return
            self._release(transaction)
            session.transaction = None
        self._reply(session, execution)

    def _flush(self) -> None:
        """Flush all commit records that are written by now; those that come meanwhile wait for the next time."""
        self._flushing, self._logged = self._logged, []
        flush_us = self._draw(self.flush_us) + self._draw_slow(self.slow_flush_us)
        self.world.after(flush_us, self._flushed, self._flushing)

    def _flushed(self, flushed: list[Transaction]) -> None:
        if flushed is not self._flushing:
            return
        self._flushing = []
        for transaction in flushed:
            self._commit(transaction)
            session = transaction.session
            session.transaction = None
            if session.execution is not None and not session.is_dead:
                self._reply(session, session.execution)
        if self._logged and not self._flushing:
            self._flush()

    def _commit(self, transaction: Transaction) -> None:
        """Let everybody see what was done."""
        self.commits += 1
        if self.world.is_tracing:
            tables = ", ".join(dict.fromkeys(table.name for table, _ in transaction.writes))
            self._trace(f"{transaction.session.name} COMMITS ({tables})")
        for (table, key), row in transaction.writes.items():
            table.put(key, row)
            if self.on_commit is not None and row is not None:
                self.on_commit(table, row)
        self._release(transaction)

    def _roll_back(self, transaction: Transaction) -> None:
        transaction.writes.clear()
        self._release(transaction)
        transaction.session.transaction = None

    def _release(self, transaction: Transaction) -> None:
        """Give the locks to those who wait, first come, first served."""
        for (table, key), lock in transaction.locks.items():
            self._pass_on(table, key, lock)
        transaction.locks = {}

    def _pass_on(self, table: Table, key: Key, lock: Lock) -> None:
        if not lock.waiting:
            del table.locks[key]
            return
        session = lock.waiting.popleft()
        execution = session.execution
        assert execution is not None
        session.waits_for = None
        lock.holder = execution.transaction
        execution.transaction.locks[table, key] = lock
        self.world.after(self.world.random.randint(5, 50), self.proceed, session, execution)

    def give_up(self, transaction: Transaction, table: Table, key: Key) -> None:
        """Let go of a row that turned out to be none of this statement's business."""
        self._pass_on(table, key, transaction.locks.pop((table, key)))

    def _fail(self, session: Session, execution: "Execution", error: Exception) -> None:
        """Nothing of the statement, or of the transaction around it, remains."""
        if self.world.is_tracing:
            self._trace(f"{session.name} failed: {execution.compiled.title}: {error}")
        self._abandon(session, execution)
        transaction = execution.transaction
        transaction.writes.clear()
        self._release(transaction)
        if transaction.is_explicit:
            transaction.is_failed = True
        else:
            session.transaction = None
        self._reply(session, execution, error)

    def _abandon(self, session: Session, execution: "Execution") -> None:
        """Stop executing."""
        execution.steps.close()
        if session.waits_for is not None:
            session.waits_for.waiting.remove(session)
            session.waits_for = None

    def _reply(self, session: Session, execution: "Execution", error: Exception | None = None) -> None:
        session.execution = None
        connection = session.connection
        if session.is_client_gone:
            self._end(session)
        elif connection.breaks_at == "reply":
            connection.breaks_at = None
            self.break_connection(session)
        else:
            self.carry(connection.down, connection.answer, execution, error)

    def _end(self, session: Session) -> None:
        """End a session; what it has not committed is rolled back."""
        session.is_dead = True
        self.sessions.pop(session.pid, None)
        execution, session.execution = session.execution, None
        transaction = session.transaction
        if execution is not None:
            transaction = execution.transaction
            self._abandon(session, execution)
        if transaction is not None and not transaction.is_logged:
            self._roll_back(transaction)

    def _stop(self, how: str, survivors: int) -> None:
        """Lose all that is in memory; so many of the commits on their way survive."""
        logged = self._flushing + self._logged
        self._trace(f"{how}: {survivors} of {len(logged)} commits on their way survive")
        self.is_up = False
        self._flushing, self._logged = [], []
        for session in self.sessions.values():
            session.is_dead = True
            if session.execution is not None:
                session.execution.steps.close()
                session.execution = None
            self.carry(session.connection.down, session.connection.lose)
        self.sessions.clear()
        for table in self.tables.values():
            table.locks.clear()
        for transaction in logged[:survivors]:
            transaction.locks.clear()
            self._commit(transaction)

    def _pass(self, line: Line, callback: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if self.is_away or line.process in self.cut_off:
            self._held.append((line, callback, arguments))
        else:
            callback(*arguments)

    def _draw(self, between_us: tuple[int, int]) -> int:
        least, most = between_us
        return least + int((most - least) * self.world.random.random())

    def _draw_slow(self, between_us: tuple[int, int]) -> int:
        """Now and then something is slow, and then by any order of magnitude."""
        if self.world.random.random() >= self.slow_chance:
            return 0
        least, most = between_us
        return int(least * (most / least) ** self.world.random.random())

    def _trace(self, text: str) -> None:
        if self.world.is_tracing:
            self.world.trace("postgres", text)


# asyncpg


class Record(tuple[Any, ...]):
    """A row as asyncpg gives it: by position, and by name."""

    __slots__ = ()
    columns: dict[str, int]

    def __getitem__(self, key: Any) -> Any:
        return tuple.__getitem__(self, self.columns[key] if isinstance(key, str) else key)


class SimulatedDatabase:
    """A process's way to a server: see `Database`."""

    def __init__(self, server: SimulatedPostgres, process: Process) -> None:
        self._server = server
        self.process = process

    async def pool(self) -> asyncpg.Pool:
        """See `Database`."""
        pool = Pool(self._server, self.process)
        while True:
            try:
                await pool.open()
            except (OSError, asyncpg.CannotConnectNowError):
                await asyncio.sleep(DATABASE_RETRY_MS / SECOND_MS)
            else:
                return cast("asyncpg.Pool", pool)

    async def connect(self, name: str) -> asyncpg.Connection:
        """See `Database`."""
        connection = Connection(self._server, self.process, None)
        await connection.open(name, WRITE_TIMEOUT_MS / SECOND_MS)
        return cast("asyncpg.Connection", connection)


class Connection:
    """A client's end of a session. One statement at a time; `timeout`s are seconds."""

    def __init__(self, server: SimulatedPostgres, process: Process, command_timeout_s: float | None) -> None:
        self.is_cut = False
        self.breaks_at: Literal["request", "reply"] | None = None
        self.session: Session | None = None
        self.up, self.down = Line(process), Line(process)
        self._server = server
        self.process = process
        self._command_timeout_s = command_timeout_s
        self._opening: asyncio.Future[None] | None = None
        self._waiter: asyncio.Future[Execution] | None = None
        """For the answer to what was sent last."""
        self._requests = 0
        self._timer: Any = None
        self._cancelling: asyncio.Future[None] | None = None
        """Set when the server has answered what nobody waits for any more: until then nothing can be sent."""
        self._is_closed = False

    # As asyncpg has it

    async def fetch(self, query: str, *args: Any, timeout: float | None = None) -> list[Record]:
        return (await self._ask(query, args, timeout)).records()

    async def fetchrow(self, query: str, *args: Any, timeout: float | None = None) -> Record | None:
        records = (await self._ask(query, args, timeout)).records()
        return records[0] if records else None

    async def fetchval(self, query: str, *args: Any, timeout: float | None = None) -> Any:
        found = (await self._ask(query, args, timeout)).found
        return found[0][0] if found else None

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        return (await self._ask(query, args, timeout)).compiled.title

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        await self.execute("BEGIN")
        try:
            yield
        except BaseException:
            if not (self._is_closed or self.process.is_dead):
                await self.execute("ROLLBACK")
            raise
        await self.execute("COMMIT")

    def get_server_pid(self) -> int:
        assert self.session is not None
        return self.session.pid

    def is_closed(self) -> bool:
        return self._is_closed

    async def close(self, *, timeout: float | None = None) -> None:
        try:
            if not self._is_closed:
                await self._settled(timeout)
        finally:
            self.terminate()

    def terminate(self) -> None:
        if self._is_closed:
            return
        if self.session is not None:
            # What was sent before is still carried by the operating system.
            self._server.carry(self.up, self._server.hang_up, self.session)
        self.lose()

    # Between client and server

    async def open(self, name: str, timeout_s: float) -> None:
        """Connect. Raises what asyncpg raises."""
        self._opening = self.process.create_future()
        self.process.on_death.append(self._abandoned)
        # A greeting, a password and its check, before the server forks a session and it answers.
        self._server.carry(self.up, self._server.carry, self.up, self._server.admit, name, self)
        try:
            async with asyncio.timeout(timeout_s):
                await self._opening
        except BaseException:
            self.terminate()
            raise

    def accept(self, session: Session) -> None:
        """The server has let us in."""
        if self._opening is None or self._opening.done() or self.process.is_dead:
            self._server.carry(self.up, self._server.hang_up, session)
            return
        self.session = session
        self._opening.set_result(None)

    def refuse(self, error: Exception) -> None:
        """The server has not let us in."""
        if self._opening is not None and not self._opening.done() and not self.process.is_dead:
            self._opening.set_exception(error)

    def answer(self, execution: "Execution", error: Exception | None) -> None:
        """The server's answer has come."""
        if self._is_closed or self.is_cut or self.process.is_dead:
            return
        waiter, self._waiter = self._waiter, None
        self._settle()
        if waiter is not None and not waiter.done():
            if error is not None:
                waiter.set_exception(error)
            else:
                waiter.set_result(execution)

    def lose(self) -> None:
        """The connection is gone."""
        if self._is_closed or self.process.is_dead:
            return
        self._is_closed = True
        error = asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")
        self.refuse(error)
        waiter, self._waiter = self._waiter, None
        self._settle()
        if waiter is not None and not waiter.done():
            waiter.set_exception(error)
        if self._abandoned in self.process.on_death:
            self.process.on_death.remove(self._abandoned)

    async def _ask(self, query: str, arguments: Values, timeout: float | None) -> "Execution":
        if timeout is None:
            timeout = self._command_timeout_s
        if self._cancelling is not None:
            timeout = await self._settled(timeout)
        if self._is_closed:
            raise asyncpg.InterfaceError("connection is closed")
        if self._waiter is not None:
            raise asyncpg.InterfaceError("cannot perform operation: another operation is in progress")
        server = self._server
        waiter: asyncio.Future[Execution]
        waiter = self._waiter = self.process.create_future()
        if timeout is not None:
            self._timer = self.process.call_later(timeout, self._time_out, waiter)
        self._requests += 1
        server.carry(self.up, server.receive, self.session, self._requests, query, arguments)
        try:
            return await waiter
        except asyncio.CancelledError:
            self._request_cancel(waiter)
            raise

    def _time_out(self, waiter: "asyncio.Future[Execution]") -> None:
        if waiter is self._waiter and not waiter.done():
            waiter.set_exception(TimeoutError())
            self._request_cancel(waiter)

    def _request_cancel(self, waiter: "asyncio.Future[Execution]") -> None:
        """Have the server stop, over another connection, as asyncpg does; until it has, this one is of no use."""
        if waiter is not self._waiter or self._cancelling is not None or self.process.is_dead:
            return
        self._settle()
        self._cancelling = self.process.create_future()
        assert self.session is not None
        self._server.request_cancel(self.session, self._requests)
        if self._command_timeout_s is not None:
            self._timer = self.process.call_later(self._command_timeout_s, self.terminate)

    def _settle(self) -> None:
        """Nothing is under way any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._cancelling is not None:
            self._cancelling.set_result(None)
            self._cancelling = None

    async def _settled(self, timeout: float | None) -> float | None:
        """Wait until the server has stopped what nobody waits for; return what is left of the time."""
        if self._cancelling is None:
            return timeout
        begun = self.process.time()
        try:
            async with asyncio.timeout(timeout):
                await asyncio.shield(self._cancelling)
        except TimeoutError:
            self.terminate()
            raise
        return None if timeout is None else timeout - (self.process.time() - begun)

    def _abandoned(self) -> None:
        """The process is dead; the operating system closes the connection."""
        if self.session is not None:
            self._server.carry(self.up, self._server.hang_up, self.session)


class Pool:
    """Connections that are lent out: asyncpg's pool, which connects when it must, and resets what comes back."""

    def __init__(self, server: SimulatedPostgres, process: Process) -> None:
        self._server = server
        self.process = process
        self._free: asyncio.LifoQueue[Connection | None] = asyncio.LifoQueue()
        self._is_closing = False

    async def open(self) -> None:
        """Connect once, so that the server is known to be there."""
        first = await self._connect()
        for _ in range(READERS_MAX - 1):
            self._free.put_nowait(None)
        self._free.put_nowait(first)

    @asynccontextmanager
    async def acquire(self, *, timeout: float | None = None) -> AsyncIterator[Connection]:
        if self._is_closing:
            raise asyncpg.InterfaceError("pool is closing")
        async with asyncio.timeout(timeout):
            connection = await self._take()
        try:
            yield connection
        finally:
            # Whoever is cancelled must not keep it.
            if not self.process.is_dead:
                releasing = asyncio.ensure_future(self._release(connection, timeout))
                # If it fails then, the connection is ended, and nobody needs to hear of it.
                releasing.add_done_callback(lambda task: task.cancelled() or task.exception())
                await asyncio.shield(releasing)

    async def fetch(self, query: str, *args: Any, timeout: float | None = None) -> list[Record]:
        async with self.acquire() as connection:
            return await connection.fetch(query, *args, timeout=timeout)

    async def fetchrow(self, query: str, *args: Any, timeout: float | None = None) -> Record | None:
        async with self.acquire() as connection:
            return await connection.fetchrow(query, *args, timeout=timeout)

    async def fetchval(self, query: str, *args: Any, timeout: float | None = None) -> Any:
        async with self.acquire() as connection:
            return await connection.fetchval(query, *args, timeout=timeout)

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        async with self.acquire() as connection:
            return await connection.execute(query, *args, timeout=timeout)

    async def close(self) -> None:
        self._is_closing = True
        for _ in range(READERS_MAX):
            connection = await self._free.get()
            if connection is not None:
                await connection.close()

    def terminate(self) -> None:
        self._is_closing = True
        while not self._free.empty():
            connection = self._free.get_nowait()
            if connection is not None:
                connection.terminate()

    async def _take(self) -> Connection:
        connection = await self._free.get()
        if connection is None or connection.is_closed():
            try:
                connection = await self._connect()
            except BaseException:
                self._free.put_nowait(None)
                raise
        return connection

    async def _release(self, connection: Connection, timeout: float | None) -> None:
        try:
            if not connection.is_closed():
                await connection.execute("RESET ALL", timeout=timeout)
        except BaseException:
            connection.terminate()
            raise
        finally:
            self._free.put_nowait(connection)

    async def _connect(self) -> Connection:
        connection = Connection(self._server, self.process, _COMMAND_TIMEOUT_S)
        await connection.open("gavel", _CONNECT_TIMEOUT_S)
        return connection


# Executing


class Execution:
    """One statement, being executed in a session."""

    __slots__ = (
        "_memory",
        "arguments",
        "compiled",
        "found",
        "request",
        "rest_us",
        "results",
        "server",
        "steps",
        "transaction",
    )

    def __init__(self, server: SimulatedPostgres, session: Session, request: int, text: str, arguments: Values) -> None:
        self.server = server
        self.request = request
        self.arguments = arguments
        self.compiled = compiled(text)
        if session.transaction is None:
            session.transaction = Transaction(session, is_explicit=self.compiled.control == "begin")
        self.transaction = session.transaction
        self.steps: Generator[Lock, None, list[Values]] = _nothing()
        self.found: list[Values] = []
        self.rest_us = 0
        self.results: list[list[Values]] = []
        """What each clause so far has returned."""
        self._memory: dict[int, Any] = {}

    def records(self) -> list[Record]:
        make = self.compiled.record
        return [make(row) for row in self.found]

    def describe(self) -> str:
        """For a reader of traces."""
        arguments = ", ".join(
            f"[{len(value)}]" if isinstance(value, list | tuple) else str(value) for value in self.arguments
        )
        return f"{self.compiled.title} ({arguments}): {len(self.found)} rows"

    # What compiled clauses call

    def rows(self, name: str) -> list[Values]:
        """All rows that the statement sees: what is committed, and what its transaction did before it."""
        table = self.server.tables[name]
        if not self.transaction.is_explicit:
            return table.rows()
        rows: dict[Key, Values | None] = {row[: table.key]: row for row in table.rows()}
        rows.update({key: row for (written, key), row in self.transaction.writes.items() if written is table})
        return [row for row in rows.values() if row is not None]

    def group(self, name: str, first: Any) -> list[Values]:
        """Those whose primary key begins with this value."""
        if self.transaction.is_explicit:
            return [row for row in self.rows(name) if row[0] == first]
        group = self.server.tables[name].groups.get(first)
        return list(group.values()) if group else []

    def once(self, number: int, work: Callable[["Execution", Values], Any]) -> Any:
        """Do something on first use only: a subquery that is the same for every row."""
        if number not in self._memory:
            self._memory[number] = work(self, self.arguments)
        return self._memory[number]

    def activity(self) -> list[Values]:
        """`pg_stat_activity`."""
        return [
            (
                session.pid,
                session.name,
                "active" if session.execution else "idle in transaction" if session.transaction else "idle",
                "Lock" if session.waits_for else None,
                self.server.current_database(),
            )
            for session in self.server.sessions.values()
        ]

    def current(self, table: Table, key: Key) -> Values | None:
        """The newest version of a row that is locked by us."""
        writes = self.transaction.writes
        return writes[table, key] if (table, key) in writes else table.get(key)

    def lock(self, table: Table, key: Key) -> Generator[Lock, None, bool]:
        """Hold a row's lock, or that of a key; return whether it was free."""
        lock = table.locks.get(key)
        if lock is None:
            lock = table.locks[key] = Lock(self.transaction)
            self.transaction.locks[table, key] = lock
        elif lock.holder is not self.transaction:
            yield lock
            return False
        return True


def _nothing() -> Generator[Lock, None, list[Values]]:
    yield from ()
    return []


class Clause(ABC):
    """A part of a statement, compiled."""

    columns: list[str]
    """The names of what it returns."""

    @abstractmethod
    def run(self, execution: Execution) -> Generator[Lock, None, list[Values]]:
        """Do it, waiting for locks where it must, and return rows."""


class Select(Clause):
    def __init__(self, columns: list[str], select: Callable[[Execution, Values], list[Values]]) -> None:
        self.columns = columns
        self.select = select

    def run(self, execution: Execution) -> Generator[Lock, None, list[Values]]:
        yield from ()
        return self.select(execution, execution.arguments)


class Update(Clause):
    """UPDATE, and by what it changes a row to: DELETE (to None) and SELECT … FOR UPDATE (to itself)."""

    def __init__(self, table: str, columns: list[str], functions: dict[str, Callable[..., Any]]) -> None:
        self.table = table
        self.columns = columns
        self.candidates = functions["candidates"]
        self.matches = functions["matches"]
        self.changed = functions["changed"]
        self.returned = functions.get("returned")

    def run(self, execution: Execution) -> Generator[Lock, None, list[Values]]:
        table, arguments = execution.server.tables[self.table], execution.arguments
        returned = []
        for row in self.candidates(execution, arguments):
            key = row[: table.key]
            was_free = yield from execution.lock(table, key)
            newest = execution.current(table, key)
            # After a wait the newest version counts; one that was not changed meanwhile is not judged again.
            if newest is None or (newest is not row and not self.matches(execution, arguments, newest)):
                if not was_free:
                    execution.server.give_up(execution.transaction, table, key)
                continue
            changed = self.changed(execution, arguments, newest)
            if changed is not newest:
                execution.transaction.writes[table, key] = changed
            if self.returned is not None:
                returned.append(self.returned(execution, arguments, newest if changed is None else changed))
        return returned


class Insert(Clause):
    """INSERT, with or without ON CONFLICT."""

    def __init__(
        self,
        table: str,
        columns: list[str],
        functions: dict[str, Callable[..., Any]],
        *,
        raises: bool,
    ) -> None:
        self.table = table
        self.columns = columns
        self.raises = raises
        """Whether a row whose key exists is an error."""
        self.references, self.referring = SCHEMAS[table].references
        self.rows = functions["rows"]
        self.returned = functions.get("returned")
        self.matches = functions.get("matches")
        self.changed = functions.get("changed")

    def run(self, execution: Execution) -> Generator[Lock, None, list[Values]]:
        table, arguments = execution.server.tables[self.table], execution.arguments
        writes = execution.transaction.writes
        returned = []
        for row in self.rows(execution, arguments):
            for index, least in table.checks:
                if row[index] < least:
                    raise asyncpg.CheckViolationError(f"{table.columns[index]} {row[index]} violates a check")
            key = row[: table.key]
            # Whoever is inserting the same key is waited for.
            yield from execution.lock(table, key)
            newest = execution.current(table, key)
            if newest is None:
                stored = row
            elif self.raises:
                raise asyncpg.UniqueViolationError(f"a row of {table.name} with this key exists: {key}")
            elif self.matches is None or self.changed is None or not self.matches(execution, arguments, newest, row):
                continue
            else:
                stored = self.changed(execution, arguments, newest, row)
            writes[table, key] = stored
            if self.returned is not None:
                returned.append(self.returned(execution, arguments, stored))
        return returned

    def check_references(self, execution: Execution) -> None:
        """Refuse rows that name a row of another table which is not there."""
        table, other = execution.server.tables[self.table], execution.server.tables[self.references]
        for (written, _), row in execution.transaction.writes.items():
            if written is table and row is not None:
                key = row[self.referring : self.referring + other.key]
                if execution.current(other, key) is None:
                    raise asyncpg.ForeignKeyViolationError(f"a row of {table.name} refers to no {other.name}: {key}")


class Compiled(NamedTuple):
    """A statement that can be executed."""

    title: str
    """Its verbs and tables."""
    clauses: list[Clause]
    record: type[Record]
    control: Literal["", "begin", "commit", "rollback"]

    def run(self, execution: Execution) -> Generator[Lock, None, list[Values]]:
        """Do clause after clause; what the last one returns is the answer."""
        found: list[Values] = []
        for clause in self.clauses:
            found = yield from clause.run(execution)
            execution.results.append(found)
        for clause in self.clauses:
            if isinstance(clause, Insert) and clause.references:
                clause.check_references(execution)
        return found


# Compiling


class UnknownSQL(Exception):
    """A statement that the twin does not understand."""


def _known(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of an unknown value (NULL) nothing follows but that it is unknown."""

    def lifted(*values: Any) -> Any:
        return None if None in values else function(*values)

    return lifted


def _both(one: bool | None, other: bool | None) -> bool | None:
    if one is False or other is False:
        return False
    return None if one is None or other is None else True


def _either(one: bool | None, other: bool | None) -> bool | None:
    if one is True or other is True:
        return True
    return None if one is None or other is None else False


def _coalesce(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _divided(one: Any, other: Any) -> Any:
    return int(one / other) if isinstance(one, int) and isinstance(other, int) else one / other


def _bigint(value: Any) -> int:
    if isinstance(value, int):
        return value
    if not math.isfinite(value):
        raise asyncpg.FeatureNotSupportedError("cannot convert infinity to bigint")
    return int(Decimal(value).to_integral_value(ROUND_HALF_UP))


def _epoch(time_us: Any) -> Decimal:
    return Decimal(time_us) / 1_000_000


def _unnest(*arrays: Iterable[Any]) -> list[Values]:
    return list(zip_longest(*arrays))


def _series(first: int, last: int) -> list[Values]:
    return [(number,) for number in range(first, last + 1)]


def _in(value: Any, values: Iterable[Any]) -> bool | None:
    return None if value is None else value in values


# Times are microseconds since the epoch, intervals microseconds, infinity is Python's.
_ENVIRONMENT: Final[dict[str, Any]] = {
    "Decimal": Decimal,
    "INFINITY": _INFINITY,
    "add": _known(lambda one, other: one + other),
    "bigint": _known(_bigint),
    "both": _both,
    "coalesce": _coalesce,
    "divide": _known(_divided),
    "either": _either,
    "epoch": _known(_epoch),
    "eq": _known(lambda one, other: one == other),
    "ge": _known(lambda one, other: one >= other),
    "gt": _known(lambda one, other: one > other),
    "in_": _in,
    "largest": lambda values: max((value for value in values if value is not None), default=None),
    "le": _known(lambda one, other: one <= other),
    "lt": _known(lambda one, other: one < other),
    "multiply": _known(lambda one, other: one * other),
    "ne": _known(lambda one, other: one != other),
    "not_": _known(lambda value: not value),
    "remainder": _known(lambda one, other: int(math.fmod(one, other))),
    "series": _series,
    "smallest": lambda values: min((value for value in values if value is not None), default=None),
    "subtract": _known(lambda one, other: one - other),
    "to_timestamp": _known(lambda seconds: round(float(seconds) * 1_000_000)),
    "unnest": _unnest,
}
_TOKEN: Final = re.compile(
    r"\s*(\d+(?:\.\d+)?|'(?:[^']|'')*'|\$\d+|[a-z_][a-z_0-9]*|::|<>|<=|>=|[-+*/%=<>(),.\[\]])", re.IGNORECASE
)
_COMPARISONS: Final = {"=": "eq", "<>": "ne", "<": "lt", "<=": "le", ">": "gt", ">=": "ge"}
_SUMS: Final = {"+": "add", "-": "subtract"}
_PRODUCTS: Final = {"*": "multiply", "/": "divide", "%": "remainder"}
_CALLS: Final = {
    "clock_timestamp": "q.server.clock_us",
    "coalesce": "coalesce",
    "current_database": "q.server.current_database",
    "pg_terminate_backend": "q.server.terminate",
    "to_timestamp": "to_timestamp",
}
_AGGREGATES: Final = {"count": "len", "max": "largest", "min": "smallest"}
_INTEGERS: Final = {"bigint", "int", "integer", "smallint"}
_UNITS_US: Final = {"m": 1_000, "millisecond": 1_000, "second": 1_000_000, "minute": 60_000_000}
"""Without the plural's s, so that `ms` is `m`."""
_ACTIVITY: Final = ("pid", "application_name", "state", "wait_event_type", "datname")
_ENDS_ITEMS: Final = {"from", "where", "order", "for", "on", "returning", ")", ""}


class _Source(NamedTuple):
    """Something that a clause reads rows from."""

    alias: str
    columns: tuple[str, ...]
    variable: str
    """What a row of it is called in Python."""
    rows: str
    """All of its rows, in Python."""
    table: str = ""
    """If it is a table, its name."""
    condition: str = ""
    """Of the rows that are joined to those before."""
    is_optional: bool = False
    """Whether a row of unknown values stands in where none is joined."""


class _Selected(NamedTuple):
    """A SELECT that was read."""

    function: str
    items: list[tuple[str, str]]
    """What it returns: in Python, and by name."""
    sources: list[_Source]
    conditions: list[str]


class _Compiler:
    """Reads a statement once, from the left to the right, and writes Python functions.

    These take `q` (the `Execution`), `a` (its arguments) and the rows `s0`, `s1`, … of what they read.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = self._split(text)
        self._at = 0
        self._functions: list[str] = []
        self._results: dict[str, tuple[int, tuple[str, ...]]] = {}
        """The clauses before, by name: which it was, and what it returned."""
        self._sources: list[_Source] = []
        self._aggregates: list[str] = []
        self._title: list[str] = []

    def compile(self) -> Compiled:
        """Compile the whole statement."""
        control = self._peek() if self._peek() in {"begin", "commit", "rollback"} else ""
        clauses: list[Clause] = []
        if control or self._peek() == "reset":
            self._title.append(self._text.lower())
        else:
            if self._accept("with"):
                clauses.append(self._named())
                while self._accept(","):
                    clauses.append(self._named())
            clauses.append(self._clause())
            if self._peek():
                raise self._unknown()
        columns = clauses[-1].columns if clauses else []
        record = type("Record", (Record,), {"__slots__": (), "columns": {name: at for at, name in enumerate(columns)}})
        return Compiled(" + ".join(self._title), clauses, record, cast("Any", control))

    # Tokens

    def _split(self, text: str) -> list[str]:
        tokens, at, end = [], 0, len(text.rstrip())
        while at < end:
            found = _TOKEN.match(text, at)
            if found is None:
                raise UnknownSQL(f"{text[at:]!r} in:\n{text}")
            token = found[1]
            tokens.append(token if token.startswith("'") else token.lower())
            at = found.end()
        return tokens

    def _peek(self, offset: int = 0) -> str:
        at = self._at + offset
        return self._tokens[at] if at < len(self._tokens) else ""

    def _take(self) -> str:
        self._at += 1
        return self._tokens[self._at - 1]

    def _accept(self, *words: str) -> bool:
        if all(self._peek(offset) == word for offset, word in enumerate(words)):
            self._at += len(words)
            return True
        return False

    def _expect(self, *words: str) -> None:
        if not self._accept(*words):
            raise self._unknown()

    def _unknown(self) -> UnknownSQL:
        return UnknownSQL(f"{' '.join(self._tokens[self._at : self._at + 8])!r} in:\n{self._text}")

    def _function(self, parameters: str, *lines: str) -> str:
        """Write a function; return its name."""
        name = f"f{len(self._functions)}"
        self._functions.append("\n ".join([f"def {name}({parameters}):", *lines]))
        return name

    def _made(self, **names: str) -> dict[str, Callable[..., Any]]:
        """The functions of a clause, by what they are for."""
        space = dict(_ENVIRONMENT)
        exec("\n".join(self._functions), space)  # noqa: S102 (what this compiler has just written)
        return {purpose: space[name] for purpose, name in names.items() if name}

    # Clauses

    def _named(self) -> Clause:
        name = self._take()
        self._expect("as", "(")
        clause = self._clause()
        self._expect(")")
        self._results[name] = len(self._results), tuple(clause.columns)
        return clause

    def _clause(self) -> Clause:
        self._sources = []
        match self._peek():
            case "select":
                return self._select_clause()
            case "insert":
                return self._insert()
            case "update" | "delete":
                return self._update()
        raise self._unknown()

    def _select_clause(self) -> Clause:
        selected = self._select()
        columns = [name for _, name in selected.items]
        tables = [source.table or source.alias for source in selected.sources]
        self._title.append(" ".join(["SELECT", *tables]))
        if not self._accept("for", "update"):
            return Select(columns, self._made(select=selected.function)["select"])
        (source,) = selected.sources
        returned = self._function("q, a, s0", f"return {_row([code for code, _ in selected.items])}")
        return Update(source.table, columns, self._locking(source, selected.conditions, "s0", returned))

    def _update(self) -> Clause:
        verb = self._take()
        self._expect("from") if verb == "delete" else None
        table = self._table("s0")
        self._sources = [table]
        self._title.append(f"{verb.upper()} {table.table}")
        changed = "None"
        if verb == "update":
            self._expect("set")
            changed = self._assignments(table, [f"s0[{index}]" for index in range(len(table.columns))])
        conditions = self._where()
        returned, columns = self._returning()
        return Update(table.table, columns, self._locking(table, conditions, changed, returned))

    def _locking(
        self, source: _Source, conditions: list[str], changed: str, returned: str
    ) -> dict[str, Callable[..., Any]]:
        condition = " and ".join(conditions) or "True"
        return self._made(
            candidates=self._function(
                "q, a", f"return [s0 for s0 in {self._narrowed(source, conditions)} if {condition}]"
            ),
            matches=self._function("q, a, s0", f"return {condition}"),
            changed=self._function("q, a, s0", f"return {changed}"),
            returned=returned,
        )

    def _insert(self) -> Clause:
        self._expect("insert", "into")
        name = self._take()
        if name not in SCHEMAS:
            raise self._unknown()
        schema = SCHEMAS[name]
        self._title.append(f"INSERT {name}")
        columns = self._names() if self._peek() == "(" else list(schema.columns)
        selected = self._select()
        columns = columns[: len(selected.items)]
        values = [
            f"r[{columns.index(column)}]" if column in columns else _literal(schema.defaults.get(column))
            for column in schema.columns
        ]
        rows = selected.function
        if columns != list(schema.columns):
            rows = self._function("q, a", f"return [{_row(values)} for r in {rows}(q, a)]")
        self._sources = [_Source(name, schema.columns, "s0", "", name)]
        names = {"rows": rows}
        raises = not self._accept("on", "conflict")
        if not raises:
            if self._peek() == "(":
                self._names()
            self._expect("do")
            if not self._accept("nothing"):
                names |= self._on_conflict()
        names["returned"], returning = self._returning()
        return Insert(name, returning, self._made(**names), raises=raises)

    def _on_conflict(self) -> dict[str, str]:
        self._expect("update", "set")
        (table,) = self._sources
        self._sources.append(_Source("excluded", table.columns, "s1", ""))
        changed = self._assignments(table, [f"s0[{index}]" for index in range(len(table.columns))])
        condition = " and ".join(self._where()) or "True"
        self._sources.pop()
        return {
            "matches": self._function("q, a, s0, s1", f"return {condition}"),
            "changed": self._function("q, a, s0, s1", f"return {changed}"),
        }

    def _assignments(self, table: _Source, values: list[str]) -> str:
        """Read `column = value, (column, column) = (SELECT …)`; return the changed row."""
        while True:
            if self._peek() == "(":
                names = self._names()
                self._expect("=", "(")
                found = self._once("rows[0]")
                self._expect(")")
                for index, name in enumerate(names):
                    values[table.columns.index(name)] = f"{found}[{index}]"
            else:
                name = self._take()
                if name not in table.columns:
                    raise self._unknown()
                self._expect("=")
                values[table.columns.index(name)] = self._expression()
            if not self._accept(","):
                return _row(values)

    def _returning(self) -> tuple[str, list[str]]:
        """Read what a statement that writes returns: nothing, if it does not say so."""
        if not self._accept("returning"):
            return "", []
        items = self._items()
        return self._function("q, a, s0", f"return {_row([code for code, _ in items])}"), [name for _, name in items]

    # Selecting

    def _select(self) -> _Selected:
        self._expect("select")
        outer, self._sources = self._sources, []
        outer_aggregates, self._aggregates = self._aggregates, []
        # What is selected can only be understood when it is known from where.
        items_at = self._at
        self._skip_items()
        ended_at = self._at
        if self._accept("from"):
            self._from()
        rest_at, self._at = self._at, items_at
        items = self._items()
        if self._at != ended_at:
            raise self._unknown()
        self._at = rest_at
        conditions = self._where()
        order = self._order()
        function = self._loops(items, conditions, order)
        if self._accept("limit"):
            function = self._function("q, a", f"return {function}(q, a)[: {self._primary()}]")
        selected = _Selected(function, items, self._sources, conditions)
        self._sources, self._aggregates = outer, outer_aggregates
        return selected

    def _skip_items(self) -> None:
        depth = 0
        while depth > 0 or self._peek() not in _ENDS_ITEMS:
            depth += {"(": 1, ")": -1}.get(self._take(), 0)
            if self._at >= len(self._tokens):
                return

    def _loops(self, items: list[tuple[str, str]], conditions: list[str], order: list[str]) -> str:
        """Write the function of a SELECT: nested loops over its sources."""
        lines = ["out = []", *(f"g{index} = []" for index in range(len(self._aggregates)))]
        indent = ""
        for source in self._sources:
            rows = self._narrowed(source, conditions)
            if source.condition:
                rows = f"[{source.variable} for {source.variable} in {rows} if {source.condition}]"
                if source.is_optional:
                    rows += f" or [{(None,) * len(source.columns)}]"
            lines.append(f"{indent}for {source.variable} in {rows}:")
            indent += " "
        if conditions:
            lines.append(f"{indent}if {' and '.join(conditions)}:")
            indent += " "
        row = _row([code for code, _ in items])
        if self._aggregates:
            lines += [f"{indent}g{index}.append({code})" for index, code in enumerate(self._aggregates)]
            lines.append(f"return [{row}]")
            return self._function("q, a", *lines)
        if order:
            lines += [
                f"{indent}out.append(({_row(order)}, {row}))",
                "out.sort(key=lambda one: one[0])",
                "return [row for _, row in out]",
            ]
        else:
            lines += [f"{indent}out.append({row})", "return out"]
        return self._function("q, a", *lines)

    def _narrowed(self, source: _Source, conditions: list[str]) -> str:
        """Read only those rows of a table whose primary key begins with what a condition asks for."""
        if source.table:
            first = f"{source.variable}[0]"
            for condition in [*conditions, *source.condition.split(" and ")]:
                left, _, right = condition.removeprefix("eq(").removesuffix(")").partition(", ")
                if not condition.startswith("eq(") or first not in (left, right):
                    continue
                value = right if left == first else left
                earlier = [one.variable for one in self._sources[: self._sources.index(source)]]
                if re.fullmatch(r"a\[\d+\]", value) or re.match(r"\w+", value)[0] in earlier:  # type: ignore[index]
                    return f"q.group({source.table!r}, {value})"
        return source.rows

    def _from(self) -> None:
        self._sources.append(self._source())
        while True:
            if self._accept(","):
                self._sources.append(self._source())
            elif self._peek() in {"join", "left"}:
                is_optional = self._accept("left")
                self._expect("join")
                source = self._source()
                left = list(self._sources)
                self._sources.append(source)
                condition = self._join_condition(left, source)
                self._sources[-1] = source._replace(condition=condition, is_optional=is_optional)
            else:
                return

    def _join_condition(self, left: list[_Source], right: _Source) -> str:
        if self._accept("on"):
            return self._expression()
        self._expect("using")
        pairs = []
        for name in self._names():
            source = next(one for one in left if name in one.columns)
            pairs.append(f"eq({_column(source, name)}, {_column(right, name)})")
        return " and ".join(pairs)

    def _source(self) -> _Source:
        variable = f"s{len(self._sources)}"
        name = self._peek()
        if name in SCHEMAS:
            return self._table(variable)
        self._take()
        if name == "pg_stat_activity":
            return _Source(self._alias(name), _ACTIVITY, variable, "q.activity()")
        if name in self._results:
            index, columns = self._results[name]
            return _Source(self._alias(name), columns, variable, f"q.results[{index}]")
        if name not in {"unnest", "generate_series"}:
            raise self._unknown()
        arguments = self._arguments()
        alias = self._alias(name)
        if name == "generate_series":
            return _Source(alias, (alias,), variable, f"series({', '.join(arguments)})")
        columns = tuple(self._names()) if self._peek() == "(" else tuple(f"_{index}" for index in range(len(arguments)))
        return _Source(alias, columns, variable, f"unnest({', '.join(arguments)})")

    def _table(self, variable: str) -> _Source:
        name = self._take()
        if name not in SCHEMAS:
            raise self._unknown()
        return _Source(self._alias(name), SCHEMAS[name].columns, variable, f"q.rows({name!r})", name)

    def _alias(self, name: str) -> str:
        if self._accept("as"):
            return self._take()
        return name

    def _where(self) -> list[str]:
        """Read conditions that must all hold."""
        if not self._accept("where"):
            return []
        begun_at = self._at
        conditions = [self._negation()]
        while self._accept("and"):
            conditions.append(self._negation())
        if self._peek() == "or":
            self._at = begun_at
            return [self._expression()]
        return conditions

    def _order(self) -> list[str]:
        if not self._accept("order", "by"):
            return []
        order = [self._expression()]
        while self._accept(","):
            order.append(self._expression())
        return order

    def _items(self) -> list[tuple[str, str]]:
        """Read what is to be returned: expressions in Python, with their names."""
        items: list[tuple[str, str]] = []
        while self._peek() not in _ENDS_ITEMS:
            if self._accept("*"):
                items += [item for source in self._sources for item in self._items_of(source)]
            elif self._peek(1) == "." and self._peek(2) == "*":
                alias = self._peek()
                source = next((one for one in self._sources if one.alias == alias), None)
                if source is None:
                    raise self._unknown()
                self._at += 3
                items += self._items_of(source)
            else:
                name = self._peek(2) if self._peek(1) == "." else self._peek()
                code = self._expression()
                items.append((code, self._alias(name)))
            if not self._accept(","):
                break
        return items

    def _items_of(self, source: _Source) -> list[tuple[str, str]]:
        return [(_column(source, name), name) for name in source.columns]

    # Expressions

    def _expression(self) -> str:
        left = self._conjunction()
        while self._accept("or"):
            left = f"either({left}, {self._conjunction()})"
        return left

    def _conjunction(self) -> str:
        left = self._negation()
        while self._accept("and"):
            left = f"both({left}, {self._negation()})"
        return left

    def _negation(self) -> str:
        return f"not_({self._negation()})" if self._accept("not") else self._comparison()

    def _comparison(self) -> str:
        left = self._sum()
        while True:
            if self._peek() in _COMPARISONS:
                left = f"{_COMPARISONS[self._take()]}({left}, {self._sum()})"
            elif self._accept("is", "null"):
                left = f"({left} is None)"
            elif self._accept("is", "not", "null"):
                left = f"({left} is not None)"
            elif self._accept("in"):
                left = f"in_({left}, {self._set()})"
            elif self._accept("not", "in"):
                left = f"not_(in_({left}, {self._set()}))"
            else:
                return left

    def _set(self) -> str:
        self._expect("(")
        if self._peek() == "select":
            found = self._once("{row[0] for row in rows}")
            self._expect(")")
            return found
        self._at -= 1
        return f"({', '.join(self._arguments())},)"

    def _sum(self) -> str:
        left = self._product()
        while self._peek() in _SUMS:
            left = f"{_SUMS[self._take()]}({left}, {self._product()})"
        return left

    def _product(self) -> str:
        left = self._cast()
        while self._peek() in _PRODUCTS:
            left = f"{_PRODUCTS[self._take()]}({left}, {self._cast()})"
        return left

    def _cast(self) -> str:
        value = f"subtract(0, {self._primary()})" if self._accept("-") else self._primary()
        while self._accept("::"):
            name = self._take()
            if self._accept("[", "]"):
                continue
            if name in _INTEGERS and not value.startswith("a["):
                value = f"bigint({value})"
        return value

    def _primary(self) -> str:
        token = self._take()
        if token[0].isdigit():
            return token if "." not in token else f"Decimal({token!r})"
        if token.startswith("'"):
            return {"'infinity'": "INFINITY", "'-infinity'": "-INFINITY"}.get(token, repr(token[1:-1]))
        if token.startswith("$"):
            return f"a[{int(token[1:]) - 1}]"
        if token in {"null", "true", "false"}:
            return {"null": "None", "true": "True", "false": "False"}[token]
        if token == "(":
            found = self._once("rows[0][0] if rows else None") if self._peek() == "select" else self._expression()
            self._expect(")")
            return found
        if token == "case":
            return self._case()
        if token == "interval":
            count, unit = self._take().strip("'").split()
            return str(int(count) * _UNITS_US[unit.removesuffix("s")])
        self._at -= 1
        return self._call() if self._peek(1) == "(" else self._column()

    def _call(self) -> str:
        name = self._take()
        if name == "extract":
            self._expect("(", "epoch", "from")
            found = self._expression()
            self._expect(")")
            return f"epoch({found})"
        if name in _AGGREGATES:
            argument = "1" if self._accept("(", "*", ")") else self._arguments()[0]
            self._aggregates.append(argument)
            return f"{_AGGREGATES[name]}(g{len(self._aggregates) - 1})"
        if name == "generate_series":
            # In the place of a value it makes a row for each of its own.
            variable = f"s{len(self._sources)}"
            self._sources.append(_Source(name, (name,), variable, f"series({', '.join(self._arguments())})"))
            return f"{variable}[0]"
        if name not in _CALLS:
            self._at -= 1
            raise self._unknown()
        return f"{_CALLS[name]}({', '.join(self._arguments())})"

    def _case(self) -> str:
        branches = []
        while self._accept("when"):
            condition = self._expression()
            self._expect("then")
            branches.append((condition, self._expression()))
        otherwise = self._expression() if self._accept("else") else "None"
        self._expect("end")
        for condition, value in reversed(branches):
            otherwise = f"({value} if {condition} else {otherwise})"
        return otherwise

    def _column(self) -> str:
        name, qualifier = self._take(), None
        if self._accept("."):
            qualifier, name = name, self._take()
        for source in self._sources:
            if name in source.columns and qualifier in (None, source.alias):
                return _column(source, name)
        self._at -= 1
        raise self._unknown()

    def _once(self, what: str) -> str:
        """Read a subquery, which is the same for every row; return what its `rows` amount to."""
        name = self._function("q, a", f"rows = {self._select().function}(q, a)", f"return {what}")
        return f"q.once({name[1:]}, {name})"

    def _names(self) -> list[str]:
        self._expect("(")
        names = [self._take()]
        while self._accept(","):
            names.append(self._take())
        self._expect(")")
        return names

    def _arguments(self) -> list[str]:
        self._expect("(")
        arguments = []
        while not self._accept(")"):
            arguments.append(self._expression())
            self._accept(",")
        return arguments


def _row(values: list[str]) -> str:
    """A tuple; a row that is taken over whole is not taken apart."""
    variable = values[0].partition("[")[0] if values else ""
    is_whole = len(values) > 1 and values == [f"{variable}[{index}]" for index in range(len(values))]
    return f"{variable}[:{len(values)}]" if is_whole else f"({''.join(f'{value}, ' for value in values)})"


def _column(source: _Source, name: str) -> str:
    return f"{source.variable}[{source.columns.index(name)}]"


def _literal(value: Any) -> str:
    return "-INFINITY" if value == -_INFINITY else repr(value)


@lru_cache(maxsize=1_000)
def compiled(text: str) -> Compiled:
    """Compile a statement, once."""
    return _Compiler(text).compile()
