"""What the simulation stands on: virtual time and processes, the network, and the twin of Postgres."""

import asyncio
import os
import random
import subprocess
import sys
from collections.abc import Awaitable, Coroutine
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID, uuid4

import asyncpg
import pytest

from actors import journal
from actors.clock import Clock
from actors.database import ERRORS
from actors.directory import Directory, slot_of
from actors.journal import EntityRow, Fenced, PostgresJournal, Private, Refused, Row, SnapshotRow, Unsettled
from engine.limits import LINK_GREETING_MS, SLOTS
from tests.simulation.network import BINARY, KERNEL_BYTES, PING, PONG, TEXT, Frame, SimulatedNetwork, Transport, Wires
from tests.simulation.postgres import SimulatedPostgres, UnknownSQL, compiled
from tests.simulation.world import SECOND_US, Guest, Process, ProcessDied, World

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
A, B = UUID(int=0xA), UUID(int=0xB)


def finish(process: Process, work: Coroutine[Any, Any, T], seconds: float = 600) -> T:
    """Run a coroutine in a process to its end, and return what it returns."""
    task = process.spawn(work)
    task.add_done_callback(lambda _: process.world.stop())
    process.world.run(process.world.now_us + int(seconds * SECOND_US))
    assert task.done()
    return task.result()


def later(world: World, seconds: float) -> None:
    """Let time pass."""
    world.run(world.now_us + int(seconds * SECOND_US))


# Time and processes


def test_timers_go_off_in_order_and_what_is_ready_runs_first_come_first_served(seed: int) -> None:
    seen: list[object] = []
    with World(seed) as world:
        process = Process(world, "one")
        delays = [world.random.choice([0, 0.001, 0.5, 0.5, 2]) for _ in range(100)]
        for number, delay in enumerate(delays):
            process.call_later(delay, seen.append, (delay, number))
        begun = process.time()
        times: list[float] = []
        process.call_later(0.5, lambda: times.append(process.time() - begun))
        process.call_later(0.25, seen.append, "cancelled").cancel()
        later(world, 5)
        assert seen == sorted((delay, number) for number, delay in enumerate(delays))
        assert times == [pytest.approx(0.5, abs=1e-5)]
        seen.clear()
        for number in range(100):
            process.call_soon(seen.append, number)
        later(world, 0)
        assert seen == list(range(100))
    assert world.faults == []


def test_what_asyncio_offers_works_in_a_process(seed: int) -> None:
    async def work() -> list[object]:
        queue: asyncio.Queue[int] = asyncio.Queue()
        event, lock, condition = asyncio.Event(), asyncio.Lock(), asyncio.Condition()

        async def produce() -> str:
            for number in range(3):
                await asyncio.sleep(10)
                queue.put_nowait(number)
            event.set()
            async with lock, condition:
                condition.notify_all()
            return "produced"

        async def wait() -> str:
            async with condition:
                await condition.wait()
            return "notified"

        results = asyncio.gather(produce(), wait())
        found: list[object] = [await queue.get() for _ in range(3)]
        await event.wait()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3_600):
                await asyncio.Event().wait()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 5)
        sleeping = asyncio.create_task(asyncio.sleep(1_000))
        await asyncio.sleep(0)
        sleeping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.shield(sleeping)
        return [*found, *(await results)]

    with World(seed) as world:
        assert finish(Process(world, "one"), work(), 10_000) == [0, 1, 2, "produced", "notified"]
    assert world.faults == []


def test_a_killed_process_does_nothing_more(seed: int) -> None:
    seen: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(10)
            seen.append("slept")
        finally:
            seen.append("unwound")
            process.call_soon(seen.append, "called")
            process.create_task(work())
            await asyncio.sleep(1)
            seen.append("slept again")

    with World(seed) as world:
        process = Process(world, "one")
        deaths: list[str] = []
        process.on_death.append(lambda: deaths.append("told"))
        process.spawn(work())
        process.call_later(10, seen.append, "timer")
        later(world, 5)
        process.kill()
        process.kill()
        process.spawn(work())
        later(world, 100)
        assert seen == []
        assert deaths == ["told"]
    # Only then, for nothing, is it unwound.
    assert seen == ["unwound"]
    assert world.faults == []


def test_a_process_that_ends_itself_is_not_held_up(seed: int) -> None:
    seen: list[str] = []

    async def work() -> None:
        try:
            process.die("a test")
        except Exception:  # noqa: BLE001 (as broad as can be)
            seen.append("caught")
        seen.append("went on")

    with World(seed) as world:
        process = Process(world, "one")
        process.spawn(work())
        process.call_later(1, seen.append, "timer")
        later(world, 5)
        assert process.is_dead
        assert process.deaths == ["a test"]
        with pytest.raises(ProcessDied):
            process.die("again")
    assert seen == []
    assert world.faults == []


def test_a_paused_process_catches_up(seed: int) -> None:
    seen: list[object] = []
    with World(seed) as world:
        process = Process(world, "one")
        begun = process.time()
        process.call_later(2, lambda: seen.append(("two", round(process.time() - begun))))
        process.call_later(1, lambda: seen.append(("one", round(process.time() - begun))))
        process.pause()
        later(world, 30)
        process.call_soon(seen.append, "soon")
        later(world, 0)
        assert seen == []
        process.resume()
        later(world, 0)
        assert seen == ["soon", ("one", 30), ("two", 30)]
    assert world.faults == []


def test_clocks_differ_drift_and_jump(seed: int) -> None:
    with World(seed) as world:
        one, other = Process(world, "one"), Process(world, "other")
        seen: list[float] = []
        begun = one.monotonic_ns(), other.monotonic_ns()
        one.set_drift(100_000)
        one.call_later(11, lambda: seen.append(world.now_us))
        start_us = world.now_us
        later(world, 10)
        assert begun[0] != begun[1]
        assert one.monotonic_ns() - begun[0] == 11_000_000_000
        assert other.monotonic_ns() - begun[1] == 10_000_000_000
        assert seen == [pytest.approx(start_us + 10 * SECOND_US, abs=2)]
        other.call_later(100, seen.append, 0)
        other.jump(100_000_000_000)
        later(world, 0.001)
        assert len(seen) == 2
    assert world.faults == []


def test_a_busy_process_takes_up_together_what_came_meanwhile(seed: int) -> None:
    with World(seed) as world:
        process = Process(world, "one")
        process.turn_us = 1_000
        seen: list[int] = []
        for delay_us in (10, 20, 30, 500):
            process.call_later(delay_us / SECOND_US, lambda: seen.append(world.now_us))
        begun_us = world.now_us
        later(world, 1)
        assert [at - begun_us for at in seen] == [10, 1_010, 1_010, 1_010]


def test_what_nobody_handles_is_a_fault(seed: int) -> None:
    async def fail(what: str) -> None:
        await asyncio.sleep(1)
        raise ValueError(what)

    async def lose() -> None:
        asyncio.get_running_loop().create_task(fail("in a lost task"))

    def fail_at_once() -> None:
        raise ValueError("in a callback")

    with World(seed) as world:
        process = Process(world, "one")
        process.spawn(fail("in a task"))
        process.spawn(lose())
        process.call_soon(fail_at_once)
        later(world, 5)
    assert sorted(fault.text.strip().splitlines()[-1] for fault in world.faults) == [
        "ValueError: in a callback",
        "ValueError: in a lost task",
        "ValueError: in a task",
    ]
    assert {fault.process for fault in world.faults} == {"one"}


def test_random_bytes_ids_and_numbers_follow_from_the_seed(seed: int) -> None:
    found = []
    for _ in range(2):
        with World(seed):
            found.append((os.urandom(8), uuid4(), random.random()))
    assert found[0] == found[1]
    assert os.urandom(8) != found[0][0]
    assert random.random() != found[0][2]


# The network


class Listener:
    """Keeps what it is called with."""

    def __init__(self, echoes: bool = False) -> None:
        self.transport: Transport
        self.frames: list[bytes] = []
        self.calls: list[str] = []
        self.echoes = echoes

    def on_ws_connected(self, transport: Transport) -> None:
        self.transport = transport
        self.calls.append("connected")

    def on_ws_frame(self, transport: Transport, frame: Frame) -> None:
        self.frames.append(frame.get_payload_as_bytes() if frame.msg_type == BINARY else repr(frame.msg_type).encode())
        if self.echoes:
            transport.send(BINARY, frame.payload)

    def on_ws_disconnected(self, _transport: Transport) -> None:
        self.calls.append("disconnected")

    def pause_writing(self) -> None:
        self.calls.append("pause")

    def resume_writing(self) -> None:
        self.calls.append("resume")


class Pair:
    """Two processes, and the way to a connection between them."""

    def __init__(self, world: World, *, echoes: bool = False) -> None:
        self.world = world
        self.client, self.server = Process(world, "client"), Process(world, "server")
        self.network = SimulatedNetwork(world, self.client)
        self.listeners: list[Listener] = []
        self.echoes = echoes
        self.listening = SimulatedNetwork(world, self.server).listen_now(self._make_listener)

    def _make_listener(self) -> Listener:
        self.listeners.append(Listener(self.echoes))
        return self.listeners[-1]

    def connect(self) -> Listener:
        listener = Listener()
        finish(self.client, self.network.open(listener, self.listening.address))
        later(self.world, 0.5)
        return listener


def numbers(frames: list[bytes]) -> list[int]:
    return [int.from_bytes(frame, "big") for frame in frames]


def send_numbers(transport: Transport, count: int) -> None:
    for number in range(count):
        buffer = bytearray(14) + number.to_bytes(4, "big")
        transport.send_reuse_external_bytearray(BINARY, buffer, 14)
        # The buffer is the sender's, who may use it again.
        buffer[:] = bytes(18)


def test_frames_arrive_in_order_and_nothing_is_lost(seed: int) -> None:
    with World(seed) as world:
        pair = Pair(world, echoes=True)
        here = pair.connect()
        for _ in range(20):
            send_numbers(here.transport, 50)
            later(world, 0.001)
        later(world, 5)
        assert numbers(pair.listeners[0].frames) == list(range(50)) * 20
        assert here.frames == pair.listeners[0].frames
        here.transport.disconnect()
        later(world, 5)
        here.transport.send(BINARY, b"late")
        later(world, 5)
        assert here.calls == pair.listeners[0].calls == ["connected", "disconnected"]
        assert here.transport.is_disconnected
        assert Wires.of(world).connections == {}
    assert world.faults == []


def test_pings_are_answered_by_the_transport_unless_the_listener_does(seed: int) -> None:
    with World(seed) as world:
        pair = Pair(world)
        here = pair.connect()
        here.transport.send_ping()
        later(world, 1)
        assert here.frames == [repr(PONG).encode()]
        assert pair.listeners[0].frames == []
        pair.listening.auto_pong = False
        here = pair.connect()
        here.transport.send_ping()
        later(world, 1)
        assert here.frames == []
        assert pair.listeners[1].frames == [repr(PING).encode()]
    assert world.faults == []


def test_a_cut_lets_a_part_arrive_without_gaps(randomness: random.Random) -> None:
    arrived = set()
    for _ in range(60):
        with World(randomness.getrandbits(32)) as world:
            pair = Pair(world)
            here = pair.connect()
            send_numbers(here.transport, 10)
            send_numbers(pair.listeners[0].transport, 10)
            here.transport.cut()
            here.transport.send(BINARY, b"\xff")
            later(world, 5)
            there = pair.listeners[0]
            for end in (here, there):
                assert numbers(end.frames) == list(range(len(end.frames)))
                assert end.calls == ["connected", "disconnected"]
                arrived.add(len(end.frames))
        assert world.faults == []
    assert {0, 10} < arrived


def test_one_end_may_notice_a_cut_late(seed: int) -> None:
    with World(seed) as world:
        pair = Pair(world)
        here = pair.connect()
        here.transport.cut(late_us=3 * SECOND_US)
        later(world, 1)
        assert here.calls == ["connected", "disconnected"]
        assert pair.listeners[0].calls == ["connected"]
        later(world, 3)
        assert pair.listeners[0].calls == ["connected", "disconnected"]


def test_what_is_held_back_arrives_when_it_is_let_go(seed: int) -> None:
    with World(seed) as world:
        pair = Pair(world)
        here = pair.connect()
        wires = Wires.of(world)
        wires.part(pair.client, pair.server)
        send_numbers(here.transport, 5)
        with pytest.raises(TimeoutError):
            finish(pair.client, pair.network.open(Listener(), pair.listening.address))
        assert finish(pair.client, pair.network.refuses(pair.listening.address)) is False
        assert pair.listeners[0].frames == []
        here.transport.disconnect()
        later(world, 10)
        assert pair.listeners[0].calls == ["connected"]
        wires.join(pair.client, pair.server)
        later(world, 1)
        assert numbers(pair.listeners[0].frames) == list(range(5))
        assert pair.listeners[0].calls == ["connected", "disconnected"]
        pair.connect()
    assert [fault.text.splitlines()[0] for fault in world.faults] == ["a task of the process ended"]


def test_the_dead_refuse_and_the_paused_do_not_answer(seed: int) -> None:
    with World(seed) as world:
        pair = Pair(world)
        here = pair.connect()

        async def attempt() -> str:
            begun = pair.client.time()
            try:
                await pair.network.connect(Listener(), pair.listening.address)  # type: ignore[arg-type]
            except OSError as error:
                return f"{type(error).__name__} {round((pair.client.time() - begun) * 1_000, -2):.0f}"
            return "connected"

        pair.server.pause()
        assert finish(pair.client, attempt()) == f"TimeoutError {LINK_GREETING_MS}"
        send_numbers(here.transport, 3)
        later(world, 1)
        assert here.calls == ["connected"]
        pair.server.resume()
        later(world, 1)
        assert numbers(pair.listeners[0].frames) == [0, 1, 2]
        assert finish(pair.client, attempt()) == "connected"
        assert finish(pair.client, pair.network.refuses(pair.listening.address)) is False
        pair.server.kill()
        later(world, 1)
        assert here.calls == ["connected", "disconnected"]
        # At once, as far as the network's delays go: nobody waits for one that is dead.
        refusal, after_ms = finish(pair.client, attempt()).split()
        assert refusal == "ConnectionRefusedError"
        assert int(after_ms) < LINK_GREETING_MS
        assert finish(pair.client, pair.network.refuses(pair.listening.address)) is True
        assert pair.listeners[0].calls == ["connected"]
    assert world.faults == []


def fill(transport: Transport, bytes_waiting: int) -> None:
    """Send what the kernels hold, and so much more that waits in the write buffer."""
    for _ in range((KERNEL_BYTES + bytes_waiting) // 100):
        transport.send(BINARY, bytes(100))


def test_who_writes_more_than_is_read_is_told(seed: int) -> None:
    with World(seed) as world:
        pair = Pair(world)
        here = pair.connect()
        transport = here.transport.underlying_transport
        transport.set_write_buffer_limits(high=1_000)
        pair.server.pause()
        fill(transport, 1_000)
        assert transport.get_write_buffer_size() == 1_000
        assert here.calls == ["connected"]
        transport.send(BINARY, bytes(100))
        later(world, 1)
        assert transport.get_write_buffer_size() == 1_100
        assert here.calls == ["connected", "pause"]
        pair.server.resume()
        later(world, 1)
        assert transport.get_write_buffer_size() == 0
        assert here.calls == ["connected", "pause", "resume"]
        assert len(pair.listeners[0].frames) == KERNEL_BYTES // 100 + 11


def test_who_reads_slowly_gets_all_in_order_one_after_another(seed: int) -> None:
    with World(seed) as world:
        pair = Pair(world)
        here = pair.connect()
        there = pair.listeners[0]
        there.transport.dawdle(SECOND_US)
        send_numbers(here.transport, 10)
        later(world, 3.5)
        assert numbers(there.frames) in ([0, 1, 2], [0, 1])
        there.transport.stall()
        later(world, 5)
        assert len(there.frames) <= 4
        there.transport.unstall()
        there.transport.dawdle(0)
        later(world, 5)
        assert numbers(there.frames) == list(range(10))


def test_who_reads_nothing_for_a_while_gets_it_later(seed: int) -> None:
    with World(seed) as world:
        pair = Pair(world)
        here = pair.connect()
        reader = pair.listeners[0].transport.underlying_transport
        reader.pause_reading()
        # A fault that comes and goes meanwhile does not have it read on, nor the other way round.
        reader.stall()
        reader.unstall()
        send_numbers(here.transport, 5)
        later(world, 5)
        assert pair.listeners[0].frames == []
        reader.stall()
        reader.resume_reading()
        later(world, 5)
        assert pair.listeners[0].frames == []
        reader.unstall()
        later(world, 5)
        assert numbers(pair.listeners[0].frames) == list(range(5))
        assert not reader.is_closing()
        here.transport.disconnect()
        later(world, 1)
        assert reader.is_closing()
        with pytest.raises(RuntimeError):
            reader.pause_reading()
    assert world.faults == []


def test_what_waits_in_a_write_buffer_is_lost_with_its_process_and_sent_before_an_end(seed: int) -> None:
    for is_killed, frames in ((True, KERNEL_BYTES // 100), (False, KERNEL_BYTES // 100 + 10)):
        with World(seed) as world:
            pair = Pair(world)
            here = pair.connect()
            pair.server.pause()
            fill(here.transport, 1_000)
            later(world, 1)
            if is_killed:
                pair.client.kill()
            else:
                here.transport.disconnect()
            pair.server.resume()
            later(world, 5)
            assert len(pair.listeners[0].frames) == frames
            assert pair.listeners[0].calls == ["connected", "disconnected"]
        assert world.faults == []


def test_a_text_may_be_written_with_its_header(seed: int) -> None:
    with World(seed) as world:
        pair = Pair(world)
        here = pair.connect()
        there = pair.listeners[0]
        for size in (5, 300):
            here.transport.write(frame_header(size) + bytes(size))
        later(world, 1)
        assert there.frames == [repr(TEXT).encode()] * 2


def frame_header(size: int) -> bytes:
    """A short text's (RFC 6455, section 5.2)."""
    return bytes((0x81, size)) if size < 126 else bytes((0x81, 126)) + size.to_bytes(2, "big")


# Postgres


class Owner:
    """A process that owns a shard, with its ways to the database."""

    def __init__(self, server: SimulatedPostgres, name: str = "one", shard: int = 0) -> None:
        self.server = server
        self.world = server.world
        self.shard = shard
        self.process = Process(self.world, name)
        self.database = server.database(self.process)
        self.pool: asyncpg.Pool
        self.writer: asyncpg.Connection
        self.journal: PostgresJournal

    async def take_over(self) -> PostgresJournal:
        async def refuses(_address: str) -> bool:
            return True

        self.pool = await self.database.pool()
        self.writer = await self.database.connect(journal.session_name(self.shard))
        owner, pid = uuid4(), self.writer.get_server_pid()
        taken = await Directory(self.pool).take_over(self.shard, owner, pid, refuses)
        assert await Directory(self.pool).announce(self.shard, owner, "address")
        self.journal = PostgresJournal(
            database=self.database,
            writer=self.writer,
            readers=self.pool,
            shard=self.shard,
            owner=owner,
            epoch=taken.epoch,
        )
        return self.journal

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return finish(self.process, work)


def make_server(world: World) -> SimulatedPostgres:
    """A server that is never slow by chance, with two shards."""
    server = SimulatedPostgres(world)
    server.slow_chance = 0

    async def lay_out() -> None:
        pool = await server.database(process).pool()
        await Directory(pool).lay_out(2)
        await pool.close()

    process = Process(world, "command line")
    finish(process, lay_out())
    process.kill()
    later(world, 1)
    return server


def event(seq: int, entity: UUID = A, private: Private | None = None) -> Row:
    return Row(entity, seq, seq, "bid_placed", 1, b"%d" % seq, bytes(32), b"command %d" % seq, private)


def stored(server: SimulatedPostgres, entity: UUID = A) -> list[int]:
    return [row.seq for row in server.rows() if row.entity_id == entity]


async def outcome(work: Awaitable[Any]) -> str:
    """How something ended."""
    try:
        await work
    except Exception as error:  # noqa: BLE001 (to be compared)
        return type(error).__name__
    return "done"


def test_the_real_journal_and_directory_run_on_the_twin(seed: int) -> None:
    with World(seed) as world:
        server = make_server(world)
        one = Owner(server)

        async def work() -> None:
            mine = await one.take_over()
            slots = await Directory(one.pool).slots()
            assert slots == [slot % 2 for slot in range(SLOTS)]
            rows = [event(1, private=Private(b"salt", b"text")), event(2), event(3)]
            entity = EntityRow(A, slot_of(A), "auction", B, "active", 5_000, 1_000, 1)
            await mine.append(rows, [entity])
            await mine.append([event(4)], [entity._replace(status="ended", due_at=None)])
            assert await mine.read(A, 1) == rows[0]
            assert await mine.read(A, 9) is None
            assert (await mine.load(A, 1)).rows == [*rows, event(4)]
            snapshot = SnapshotRow(A, 2, bytes(32), 2, 1, b"state")
            await mine.save_snapshots([snapshot])
            await mine.save_snapshots([snapshot._replace(seq=1)])
            assert (await mine.load(A, 1)).snapshot == snapshot
            assert (await mine.load(A, 2)).snapshot is None
            clock = Clock(one.process.monotonic_ns)
            await clock.synchronise(one.pool)
            assert abs(clock() - server.clock_us() // 1_000) <= 2
            life = await mine.check()
            assert life.alive_at <= clock() + 2
            assert [owner.epoch for owner in await Directory(one.pool).owners()] == [2, 1]
            with pytest.raises(Refused):
                await mine.append([event(5), event(2)], [])
            with pytest.raises(Refused):
                await mine.append([event(0)], [])
            await mine.append([event(5)], [])

        one.run(work())
        assert [row.private for row in server.rows()][:2] == [Private(b"salt", b"text"), None]
        assert stored(server) == [1, 2, 3, 4, 5]
        assert server.tables["entities"].dicts()[0]["status"] == "ended"
    assert world.faults == []


def test_deadlines_are_those_of_the_shards_own_slots(seed: int) -> None:
    with World(seed) as world:
        server = make_server(world)
        owners = [Owner(server, "one", 0), Owner(server, "two", 1)]
        for owner in owners:
            entity = next(UUID(int=number) for number in range(99) if slot_of(UUID(int=number)) % 2 == owner.shard)

            async def work(owner: Owner = owner, entity: UUID = entity) -> None:
                mine = await owner.take_over()
                row = EntityRow(entity, slot_of(entity), "auction", B, "active", 5_000, 1_000, 1)
                await mine.append([event(1, entity)], [row])
                assert await mine.deadlines() == [(entity, 5_000)]
                assert await mine.closing(4_001) == [entity]
                assert await mine.closing(4_000) == []

            owner.run(work())
    assert world.faults == []


def test_whoever_waits_for_a_row_judges_the_newest_one(randomness: random.Random) -> None:
    """A stale writer waits for the takeover and then finds its epoch gone; a fence that only reads does not wait."""
    for _ in range(20):
        with World(randomness.getrandbits(32)) as world:
            server = make_server(world)
            old, new = Owner(server, "old"), Owner(server, "new")
            old.run(old.take_over())
            server.flush_us = (50_000, 50_000)
            taking = new.process.spawn(new.take_over())
            while not server._flushing:
                later(world, 0.000_1)
            fence = " FROM shards WHERE shard_id = $1 AND epoch = $2"
            reads = old.process.spawn(old.pool.fetch("SELECT epoch" + fence, 0, 2))
            writes = old.process.spawn(outcome(old.journal.append([event(1)], [])))
            later(world, 0.02)
            assert [tuple(row) for row in reads.result()] == [(2,)]
            assert not writes.done()
            later(world, 5)
            assert writes.result() == "Unsettled"
            assert taking.result().epoch == 3
            assert stored(server) == []
        assert world.faults == []


def test_a_key_that_is_being_inserted_is_waited_for(seed: int) -> None:
    with World(seed) as world:
        server = make_server(world)
        one = Owner(server)
        insert = "INSERT INTO slots SELECT slot, 0 FROM generate_series($1, $2) AS slot"

        async def work(ending: str) -> list[str]:
            async with one.pool.acquire() as first, one.pool.acquire() as second:
                await first.execute("BEGIN")
                await first.execute(insert, 2_000, 2_000)
                waiting = asyncio.create_task(outcome(second.execute(insert, 2_000, 2_001)))
                await asyncio.sleep(1)
                assert not waiting.done()
                await first.execute(ending)
                return [await waiting, str(await first.fetchval("SELECT count(*) FROM slots WHERE slot >= 2000"))]

        one.run(one.take_over())
        assert one.run(work("COMMIT")) == ["UniqueViolationError", "1"]
        later(world, 1)
        server.tables["slots"].put((2_000,), None)
        assert one.run(work("ROLLBACK")) == ["done", "2"]
    assert world.faults == []


def crowd(server: SimulatedPostgres, count: int) -> list["asyncio.Task[str]"]:
    """Have so many processes commit at about the same time, each to an entity of its own."""
    tasks = []
    for number in range(count):
        one = Owner(server, f"writer {number}")
        finish(one.process, one.take_over())
        insert = "INSERT INTO slots SELECT slot, 0 FROM generate_series($1, $1) AS slot"
        statement = one.writer.execute(insert, SLOTS + number)
        tasks.append((one.process, statement))
    return [process.spawn(outcome(statement)) for process, statement in tasks]


def test_commits_that_wait_are_flushed_together(seed: int) -> None:
    with World(seed) as world:
        server = make_server(world)
        server.flush_us = (10_000, 10_000)
        tasks = crowd(server, 20)
        flushes: list[int] = []
        server.on_commit = lambda table, row: flushes.append(world.now_us)
        later(world, 1)
        assert [task.result() for task in tasks] == ["done"] * 20
        assert len(flushes) == 20
        assert len(set(flushes)) == 2


@pytest.mark.parametrize("is_power_cut", [False, True])
def test_a_crash_keeps_the_beginning_of_what_was_on_its_way(randomness: random.Random, is_power_cut: bool) -> None:
    survivors = set()
    for _ in range(30):
        with World(randomness.getrandbits(32)) as world:
            server = make_server(world)
            server.flush_us = (10_000, 10_000)
            tasks = crowd(server, 5)
            while len(server._flushing) + len(server._logged) < 5:
                later(world, 0.000_1)
            order = [next(iter(one.writes))[1] for one in server._flushing + server._logged]
            server.power_cut() if is_power_cut else server.crash()
            kept = [row[:1] for row in server.tables["slots"].rows()[SLOTS:]]
            assert kept == order[: len(kept)]
            survivors.add(len(kept))
            later(world, 1)
            assert {task.result() for task in tasks} == {"ConnectionDoesNotExistError"}
            process = Process(world, "late")
            database = server.database(process)
            assert finish(process, outcome(database.connect("late"))) == "ConnectionRefusedError"
            server.start()
            assert finish(process, outcome(database.connect("late"))) == "CannotConnectNowError"
            pool = finish(process, database.pool())
            found = finish(process, pool.fetch("SELECT slot FROM slots WHERE slot >= $1", SLOTS))
            assert [tuple(row) for row in found] == kept
        assert world.faults == []
    assert survivors == {0} if is_power_cut else len(survivors) > 2


def test_a_server_that_is_away_goes_on_with_what_it_has_and_gets_the_rest_late(seed: int) -> None:
    with World(seed) as world:
        server = make_server(world)
        one = Owner(server)
        one.run(one.take_over())
        server.travel_us = (10_000, 10_000)
        server.execution_us = (10_000, 10_000)
        arrived = one.process.spawn(outcome(one.journal.append([event(1)], [])))
        later(world, 0.012)
        server.go_away()
        later(world, 1)
        assert stored(server) == [1]
        assert not arrived.done()
        later(world, 2)
        assert arrived.result() == "Unsettled"
        settling = one.process.spawn(outcome(one.journal.settle([event(1)], [], None)))
        later(world, 1)
        # Sent while the server is away, on a connection that nobody will hear of again.
        other = Owner(server, "other")
        sent = one.process.spawn(outcome(one.pool.execute("UPDATE shards SET address = $1 WHERE shard_id = 1", "here")))
        later(world, 10)
        assert [settling.result(), sent.result()] == ["Unsettled", "TimeoutError"]
        server.come_back()
        later(world, 1)
        assert server.tables["shards"].dicts()[1]["address"] == "here"
        assert other.run(other.take_over()).epoch == 3
        # The fence of the one is closed by now: it is another's.
        assert one.run(outcome(one.journal.settle([event(1)], [], None))) == "Fenced"


def test_an_ended_session_lets_its_locks_go_and_leaves_nothing(seed: int) -> None:
    with World(seed) as world:
        server = make_server(world)
        old, new = Owner(server, "old"), Owner(server, "new")
        old.run(old.take_over())
        server.execution_us = (SECOND_US, SECOND_US)
        stuck = old.process.spawn(outcome(old.journal.append([event(1)], [])))
        later(world, 0.7)
        assert server.tables["shards"].locks.keys() == {(0,)}
        assert server.terminate(old.writer.get_server_pid())
        assert server.tables["shards"].locks == {}
        server.execution_us = (50, 1_000)
        assert new.run(new.take_over()).epoch == 3
        assert stuck.result() == "Unsettled"
        assert old.writer.is_closed()
        later(world, 5)
        assert stored(server) == []
    assert world.faults == []


def test_a_takeover_ends_the_session_that_holds_the_row(seed: int) -> None:
    with World(seed) as world:
        server = make_server(world)
        old, new = Owner(server, "old"), Owner(server, "new")
        old.run(old.take_over())
        server.execution_us = (60 * SECOND_US, 60 * SECOND_US)
        old.process.spawn(outcome(old.journal.append([event(1)], [])))
        later(world, 1)
        server.execution_us = (50, 1_000)
        later(world, 29.5)
        # Nobody is there to cancel it, and it goes on for half a minute, with the row's lock.
        old.process.kill()
        begun = world.now_us
        assert new.run(new.take_over()).epoch in {3, 4}
        assert world.now_us - begun < 5 * SECOND_US
        later(world, 60)
        assert stored(server) == []
        assert old.writer.get_server_pid() not in server.sessions


def test_a_dead_clients_statement_commits_all_the_same(seed: int) -> None:
    with World(seed) as world:
        server = make_server(world)
        one = Owner(server)
        one.run(one.take_over())
        one.process.spawn(outcome(one.journal.append([event(1)], [])))
        later(world, 0.000_01)
        one.process.kill()
        later(world, 1)
        assert stored(server) == [1]
        assert server.sessions == {}
    assert world.faults == []


@pytest.mark.parametrize(("when", "is_stored"), [("request", False), ("reply", True)])
def test_a_connection_breaks_before_a_statement_or_after_its_commit(when: Any, is_stored: bool, seed: int) -> None:
    with World(seed) as world:
        server = make_server(world)
        one = Owner(server)
        one.run(one.take_over())
        server.break_connection(server.sessions[one.writer.get_server_pid()], when)
        assert one.run(outcome(one.journal.append([event(1)], []))) == "Unsettled"
        later(world, 1)
        assert one.writer.is_closed()
        assert stored(server) == ([1] if is_stored else [])
        # Settled, it is there once.
        one.run(one.journal.settle([event(1)], [], None))
        assert stored(server) == [1]
    assert world.faults == []


def test_a_statement_that_takes_too_long_is_cancelled_and_its_connection_can_be_used_again(seed: int) -> None:
    with World(seed) as world:
        server = make_server(world)
        one = Owner(server)
        one.run(one.take_over())

        async def work() -> None:
            update = "UPDATE shards SET address = $1 WHERE shard_id = 0"
            async with one.pool.acquire() as other, other.transaction():
                await other.execute("SELECT FROM shards FOR UPDATE")
                with pytest.raises(TimeoutError):
                    await one.writer.execute(update, "never", timeout=0.5)
                with pytest.raises(TimeoutError):
                    await one.writer.execute(update, "never", timeout=0.5)
            await one.writer.execute(update, "here", timeout=0.5)
            with pytest.raises(asyncpg.InterfaceError):
                await asyncio.gather(one.writer.execute(update, "one"), one.writer.execute(update, "two"))
            await asyncio.sleep(1)
            one.writer.terminate()
            with pytest.raises(asyncpg.InterfaceError):
                await one.writer.execute(update, "never")

        one.run(work())
        assert server.tables["shards"].dicts()[0]["address"] in {"one", "two"}
        assert server.tables["shards"].locks == {}


def test_a_transaction_is_all_or_nothing(seed: int) -> None:
    with World(seed) as world:
        server = make_server(world)
        one = Owner(server)
        one.run(one.take_over())
        update = "UPDATE shards SET epoch = epoch + 10 WHERE shard_id = $1"
        epoch = "SELECT epoch FROM shards WHERE shard_id = 0"

        async def fail(connection: Any) -> None:
            async with connection.transaction():
                await connection.execute(update, 0)
                assert await connection.fetchval(epoch) == 12
                assert await one.writer.fetchval(epoch) == 2
                await connection.execute("INSERT INTO slots SELECT 5, 0")

        async def work() -> None:
            async with one.pool.acquire() as connection:
                assert await outcome(fail(connection)) == "UniqueViolationError"
                async with connection.transaction():
                    await connection.execute(update, 1)

        one.run(work())
        assert [row["epoch"] for row in server.tables["shards"].dicts()] == [2, 11]


def test_the_servers_clock_jumps(seed: int) -> None:
    with World(seed) as world:
        server = make_server(world)
        one = Owner(server)
        one.run(one.take_over())
        server.jump_clock(-5_000)
        life = one.run(one.journal.check())
        assert life.alive_at == pytest.approx(world.now_us / 1_000 - 5_000, abs=10)
        server.jump_clock(30_000)
        # To the fence this is a gap in the life of its shard.
        assert one.run(outcome(one.journal.check())) == "Unsettled"


async def test_a_guest_uses_the_twin_from_asyncios_own_loop(seed: int) -> None:
    with World(seed) as world:
        server = make_server(world)
        guest = Guest(world, "guest")
        living = asyncio.create_task(guest.live())
        pool = await server.database(guest).pool()
        update = "UPDATE shards SET address = $1 WHERE shard_id = 0"
        async with pool.acquire() as connection, connection.transaction():
            await connection.execute(update, "here")
            with pytest.raises(TimeoutError):
                await pool.execute(update, "there", timeout=1)
        begun_us = world.now_us
        assert await pool.fetchval("SELECT address FROM shards WHERE shard_id = 0") == "here"
        assert world.now_us - begun_us < SECOND_US // 10
        living.cancel()
    assert world.faults == []


def test_unknown_sql_is_an_error_that_shows_it() -> None:
    for text in ("SELECT colour FROM shards", "TRUNCATE journal", "UPDATE shards SET epoch = sqrt(2)", "SELECT a ; b"):
        with pytest.raises(UnknownSQL) as error:
            compiled(text)
        assert text in str(error.value)


# Determinism


def play(seed: int) -> list[str]:
    """Some of everything, with faults; return the trace."""
    lines: list[str] = []
    with World(seed, lines.append) as world:
        server = make_server(world)
        server.slow_chance = 0.05
        pair = Pair(world, echoes=True)
        owners = [Owner(server, f"owner {number}") for number in range(3)]

        async def own(owner: Owner) -> None:
            while True:
                try:
                    mine = await owner.take_over()
                    for seq in range(1 + len((await mine.load(A, 1)).rows), 10_000):
                        await mine.append([event(seq)], [])
                except (Unsettled, Refused, Fenced, journal.Unreadable, *ERRORS) as error:
                    world.trace(owner.process.name, repr(error))
                await asyncio.sleep(world.random.random())

        async def talk() -> None:
            while True:
                listener = Listener()
                transport = await pair.network.open(listener, pair.listening.address)
                while not transport.is_disconnected:
                    transport.send(BINARY, os.urandom(8))
                    await asyncio.sleep(world.random.random())

        for owner in owners:
            owner.process.spawn(own(owner))
        for _ in range(3):
            pair.client.spawn(talk())

        def cut() -> None:
            for end in Wires.of(world).between(pair.client, pair.server):
                end.cut()

        def crash_or_start() -> None:
            server.crash() if server.is_up else server.start()

        one, two = owners[0].process, owners[1].process
        faults = [one.pause, one.resume, two.kill, crash_or_start, server.go_away, server.come_back, cut]
        for _ in range(12):
            later(world, world.random.random())
            world.random.choice(faults)()
    lines += [fault.text for fault in world.faults]
    return lines


def test_a_seed_decides_everything(seed: int) -> None:
    here = play(seed)
    assert len(here) > 50
    assert play(seed) == here
    assert play(seed + 1) != here
    script = f"from tests.simulation.test_kernel import play\nprint(*play({seed}), sep='\\n')"
    environment = os.environ | {"PYTHONHASHSEED": "12345", "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=True, cwd=ROOT, env=environment, text=True
    )
    assert found.stdout == "\n".join(here) + "\n"
