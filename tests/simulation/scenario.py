"""One seed: an engine, its clients and its faults, and what came of it."""

from collections.abc import Callable
from functools import partial
from random import Random
from typing import Final, Literal, NamedTuple
from uuid import UUID

from actors.directory import slot_of
from actors.messages import Answer, AuctionView
from actors.shard import Shard
from engine.commands import CancelAuction, EndAuction, OpenAuction, PlaceBid, SoftClose, Terms
from engine.increments import Step, flat
from engine.rejections import Rejection
from tests.simulation.checker import Outage, check
from tests.simulation.client import Client, Lot
from tests.simulation.history import Answered, Asked, Record, Sent, verdict
from tests.simulation.house import SHARDS, House
from tests.simulation.network import Transport, Wires
from tests.simulation.postgres import SLOW_CHANCE, SLOW_EXECUTION_US
from tests.simulation.world import SECOND_US, START_US, Process, World

_SETTLE_S: Final = 240
"""Long enough for the longest outage to be paid back, and every auction to end."""
_COUNT_S: Final = 60
"""Long enough for those who watch to be counted, and told, once the longest pause is over."""
_CLOCK_ERROR_MS: Final = 20
"""So far at most the clocks of processes are from Postgres's."""
_BROKEN_CLOCK_ERROR_MS: Final = 2_000
"""And so far while they drift and jump."""
_SUSPENDED_MS: Final = 30_000
_FAIR_DEATHS: Final = ("could not start", "stopped", "another process has taken")
"""How the reasons begin for which a shard's process may end itself."""
_RETRY_US: Final = 400_000


class Result(NamedTuple):
    """What came of a seed."""

    seed: int
    violations: list[str]
    commands: int
    faults: dict[str, int]
    """How often each kind of fault happened."""
    strained: dict[str, int]
    """How often there was more than a bound allows, by what came of it."""
    events: int
    """In the journal, at the end."""
    simulated_s: float


def run(seed: int, on_trace: Callable[[str], None] | None = None) -> Result:
    """Simulate a seed and judge it."""
    with World(seed, on_trace) as world:
        scenario = Scenario(world)
        scenario.play()
        violations = scenario.judge()
        simulated_s = (world.now_us - START_US) / SECOND_US
    violations += [f"[fault] {fault.process}: {fault.text}" for fault in world.faults]
    return Result(
        seed=seed,
        violations=violations,
        commands=scenario.commands,
        faults=scenario.nemesis.done,
        strained=dict(scenario.house.observer.strained),
        events=len(scenario.house.postgres.rows()),
        simulated_s=simulated_s,
    )


class Scenario:
    """A house with a few auctions and clients, and somebody who breaks things."""

    def __init__(self, world: World) -> None:
        self.world = world
        random = self._random = Random(f"scenario {world.seed}")
        self.house = House(world)
        self.history: list[Record] = []
        self.acts_s = random.uniform(3, 8)
        """So long clients bid and things break."""
        self.people = Process(world, "clients")
        self.maker = UUID(int=random.getrandbits(128), version=4)
        self.openings = [self._opening() for _ in range(random.choice((1, 1, 2, 3)))]
        self._lots = [
            Lot(
                opening.auction,
                opening.terms.starting_price,
                opening.terms.increments[0].increment,
                opening.terms.end_time,
            )
            for opening in self.openings
        ]
        self.clients = self._make_clients()
        self.nemesis = Nemesis(self)
        self._asked = 0

    def play(self) -> None:
        """Let it all happen, heal what is broken, and wait until everything is settled."""
        world = self.world
        for opening in self.openings:
            world.after(self._random.randint(0, SECOND_US), self._ask, "open", opening)
            if self._random.random() < 0.15:
                world.after(self._random.randint(SECOND_US, int(self.acts_s * SECOND_US)), self._stop_early, opening)
        for client in self.clients:
            self.people.spawn(client.live())
            self.people.spawn(client.bid())
        world.after(self._random.randint(0, SECOND_US), self._keep_calling)
        self.nemesis.plan(self.acts_s)
        world.run(START_US + int(self.acts_s * SECOND_US))
        self.nemesis.heal()
        self._wait(_SETTLE_S, self._is_settled)
        # Meanwhile somebody may place a last bid.
        self._wait(_COUNT_S, lambda: self._is_settled() and self._is_counted())

    def _wait(self, longest_s: int, is_so: Callable[[], bool]) -> None:
        deadline_us = self.world.now_us + longest_s * SECOND_US
        while not is_so() and self.world.now_us < deadline_us:
            self.world.run(self.world.now_us + SECOND_US // 5)

    def judge(self) -> list[str]:
        """All that is wrong."""
        violations = []
        for process in self.house.shards:
            violations += [
                f"[death] {process.name}: {reason}" for reason in process.deaths if not reason.startswith(_FAIR_DEATHS)
            ]
        found = check(
            self.history,
            self.house.postgres.rows(),
            true_time=True,
            outages=self._outages(),
            taken=self.house.observer.taken,
            clock_error_ms=self.nemesis.clock_error_ms,
            is_calm=not self.nemesis.done and not self.house.observer.strained["gateway cut off"],
            watching=self._viewers().keys(),
        )
        violations += [str(violation) for violation in found]
        if not self._is_settled():
            violations += [f"[stuck] {client.describe()}" for client in self.clients]
        return violations

    @property
    def commands(self) -> int:
        """How many commands clients sent."""
        return self._asked + sum(client.sent for client in self.clients)

    def _is_settled(self) -> bool:
        return all(client.is_settled for client in self.clients)

    def _is_counted(self) -> bool:
        """Whether all clients watch all auctions, and were told that so many do."""
        viewers = self._viewers()
        everybody = len(self.clients)
        return len(viewers) == everybody * len(self._lots) and all(told == everybody for told in viewers.values())

    def _viewers(self) -> dict[tuple[str, int, UUID], int]:
        return {key: told for client in self.clients for key, told in client.viewers.items()}

    def _outages(self) -> list[Outage]:
        of_shard = {
            shard: frozenset(opening.auction for opening in self.openings if slot_of(opening.auction) % SHARDS == shard)
            for shard in range(SHARDS)
        }
        return [Outage(of_shard[shard], down, back) for shard, down, back in self.house.observer.outages]

    # Who is there

    def _opening(self) -> OpenAuction:
        random = self._random
        now = START_US // 1_000
        start = random.choice((None, None, now + random.randint(500, 4_000)))
        soft_close = SoftClose(
            window_ms=random.choice((1_000, 2_000, 5_000)),
            extension_ms=random.choice((1_000, 2_000, 4_000)),
            max_extension_ms=random.choice((0, 3_000, 20_000)),
            anchor=random.choice(("reset", "append")),
        )
        starting_price = random.choice((1, 100, 1_000))
        return OpenAuction(
            auction=UUID(int=random.getrandbits(128), version=4),
            maker=self.maker,
            request_id=UUID(int=random.getrandbits(128), version=4),
            terms=Terms(
                title="A bowl",
                currency="EUR",
                starting_price=starting_price,
                increments=random.choice((flat(1), flat(50), (Step(0, 5), Step(500, 25)))),
                start_time=start,
                end_time=now + random.choice((3_000, 6_000, 9_000)) + random.randint(2_000, 4_000),
                reserve_price=random.choice((None, starting_price + 300)),
                soft_close=random.choice((None, soft_close, soft_close)),
            ),
        )

    def _make_clients(self) -> list[Client]:
        random = self._random
        users: list[UUID | None] = [UUID(int=random.getrandbits(128), version=4) for _ in range(random.randint(2, 5))]
        # Some are on two devices, and some are guests.
        users += random.sample(users, random.choice((0, 1)))
        users += [None] * random.choice((0, 1, 3))
        joined: set[tuple[UUID, UUID]] = set()
        gap_s = random.choice((0.03, 0.1, 0.6))
        shared_ids = [UUID(int=random.getrandbits(128), version=4) for _ in range(3)]
        return [
            Client(
                name=f"client-{number}",
                user=user,
                process=self.people,
                random=Random(random.getrandbits(64)),
                gap_s=gap_s,
                addresses=self.house.addresses,
                lots=self._lots,
                shared_ids=shared_ids,
                joined=joined,
                history=self.history,
                bids_until_us=START_US + int(self.acts_s * SECOND_US),
            )
            for number, user in enumerate(users, 1)
        ]

    # What a notebook asks for, over Ray: it may have hold of a process that has been replaced

    def _keep_calling(self) -> None:
        random = self._random
        if self.house.running:
            self.call(random.choice(list(self.house.running)))
        if self.world.now_us < START_US + int(self.acts_s * SECOND_US):
            self.world.after(random.randint(50_000, 400_000), self._keep_calling)

    def call(self, process: Process) -> None:
        """Place a bid that is too low, to hear the price."""
        random = self._random
        number = self.house.numbers[process]
        openings = [opening for opening in self.openings if slot_of(opening.auction) % SHARDS == number]
        running = self.house.running.get(process)
        if running is None or not openings or process.is_dead:
            return
        bid_id, bidder = UUID(int=random.getrandbits(128), version=4), UUID(int=random.getrandbits(128), version=4)
        bid = PlaceBid(auction=random.choice(openings).auction, bidder=bidder, bid_id=bid_id, amount=1)
        self._asked += 1
        self.history.append(
            Sent(
                client="notebook",
                connection=1,
                auction=bid.auction,
                bid_id=bid_id,
                bidder=bidder,
                amount=1,
                at=self._now_ms(),
            )
        )
        process.spawn(self._hear(running.shard, bid))

    async def _hear(self, shard: Shard, bid: PlaceBid) -> None:
        answer = await shard.ask(bid)
        if isinstance(answer, Rejection):
            told = verdict(
                "notebook",
                1,
                bid.auction,
                bid.bid_id,
                {
                    "type": "error" if answer.is_transient else "rejected",
                    "code": answer.code,
                    "minimum": answer.minimum,
                },
                self._now_ms(),
            )
            self.history.append(told)

    # What the maker asks for, over HTTP

    def _stop_early(self, opening: OpenAuction) -> None:
        random = self._random
        command = random.choice((EndAuction, CancelAuction))(
            auction=opening.auction,
            caller=self.maker,
            role=random.choice(("maker", "admin")),
            request_id=UUID(int=random.getrandbits(128), version=4),
            reason="a reason",
            salt=random.randbytes(16),
        )
        self._ask("end" if isinstance(command, EndAuction) else "cancel", command)

    def _ask(self, op: Literal["open", "end", "cancel"], command: OpenAuction | EndAuction | CancelAuction) -> None:
        """Ask until there is an answer that lasts."""
        caller = command.maker if isinstance(command, OpenAuction) else command.caller
        is_answered = False

        def answered(answer: Answer) -> None:
            nonlocal is_answered
            if is_answered:
                return
            is_answered = True
            code = answer.code if isinstance(answer, Rejection) else None
            self.history.append(
                Answered(
                    client="maker",
                    op=op,
                    auction=command.auction,
                    caller=caller,
                    request_id=command.request_id,
                    code=code,
                    at=self._now_ms(),
                )
            )
            assert isinstance(answer, AuctionView | Rejection)
            if isinstance(answer, Rejection) and (answer.is_transient or code in ("internal", "not_found")):
                self.world.after(_RETRY_US, self._ask, op, command)
            elif op == "open" and isinstance(answer, Rejection):
                # An outage went on until after its end: it never opens, and nobody waits for it.
                self._lots[:] = [lot for lot in self._lots if lot.auction != command.auction]

        def give_up() -> None:
            nonlocal is_answered
            if not is_answered:
                is_answered = True
                self._ask(op, command)

        if self.house.submit(command, self.people, answered):
            self._asked += 1
            self.history.append(
                Asked(
                    client="maker",
                    op=op,
                    auction=command.auction,
                    caller=caller,
                    request_id=command.request_id,
                    at=self._now_ms(),
                )
            )
            self.world.after(10 * SECOND_US, give_up)
        else:
            self.world.after(_RETRY_US, self._ask, op, command)

    def _now_ms(self) -> int:
        return self.world.now_us // 1_000


class Nemesis:
    """Who breaks things: of all kinds of faults a few in each seed, at times drawn from the seed."""

    def __init__(self, scenario: Scenario) -> None:
        self.world = scenario.world
        self.house = scenario.house
        self.people = scenario.people
        self._openings = scenario.openings
        self._call = scenario.call
        self.done: dict[str, int] = {}
        self._random = Random(f"nemesis {self.world.seed}")
        self._wires = Wires.of(self.world)
        self._is_over = False
        self._kinds: dict[str, Callable[[], bool]] = {
            "shard killed": self._kill_shard,
            "shard killed in a write": self._kill_shard_in_write,
            "shard killed near an end": self._kill_shard_near_end,
            "shard paused": self._pause_shard,
            "shard stopped in order": self._stop_shard,
            "second incarnation": self._start_rival,
            "shard replaced unawares": self._replace_unawares,
            "shard replaced while it lives": self._replace_living,
            "machine paused": self._pause_machine,
            "gateway killed": self._kill_gateway,
            "gateway paused": self._pause_gateway,
            "link cut": self._cut_link,
            "link silent": self._silence_link,
            "gateway reads its link slowly": self._slow_link,
            "gateway stops reading its link": self._stall_link,
            "client cut off": self._cut_client,
            "client reads slowly": self._slow_client,
            "client stops reading": self._stall_client,
            "database crashed": self._crash_database,
            "power cut": self._cut_power,
            "power cut in a write": self._cut_power_in_write,
            "database away": self._lose_database,
            "database away from one": self._part_from_database,
            "database connection cut": self._cut_connection,
            "database connection cut in a write": self._cut_write,
            "shard parted and cut": self._part_and_cut,
            "database slow": self._slow_database,
            "database slow near an end": self._slow_database_near_end,
            "database clock jumped": self._jump_database_clock,
            "everything suspended": self._suspend,
            "process clock jumped": self._jump_clock,
            "process clock drifts": self._drift,
            "network slow": self._slow_network,
        }

    @property
    def clock_error_ms(self) -> int:
        """So far at most one clock was from another."""
        error_ms = _BROKEN_CLOCK_ERROR_MS if any("clock" in kind for kind in self.done) else _CLOCK_ERROR_MS
        return error_ms + (_SUSPENDED_MS if "everything suspended" in self.done else 0)

    def plan(self, acts_s: float) -> None:
        """Draw what will happen, and when."""
        random = self._random
        kinds = random.sample(list(self._kinds), random.choice((0, 1, 1, 2, 3, 5, 8)))
        for _ in range(random.choice((4, 8, 12)) if kinds else 0):
            kind = random.choice(kinds)
            self.world.after(int(random.uniform(0.2, acts_s) * SECOND_US), self._happen, kind)

    def heal(self) -> None:
        """Begin nothing new, and mend what is broken."""
        self._is_over = True
        for process in self.house.living():
            process.set_drift(0)

    def _happen(self, kind: str) -> None:
        if not self._is_over and self._kinds[kind]():
            self.done[kind] = self.done.get(kind, 0) + 1
            if self.world.is_tracing:
                self.world.trace("nemesis", kind)

    def _later(self, least_s: float, most_s: float, action: Callable[..., object], *arguments: object) -> None:
        self.world.after(int(self._random.uniform(least_s, most_s) * SECOND_US), action, *arguments)

    # Processes

    def _pick(self, processes: list[Process]) -> Process | None:
        living = [process for process in processes if not process.is_dead and not process.is_paused]
        return self._random.choice(living) if living else None

    def _pick_running(self) -> Process | None:
        """A shard that serves, and has auctions."""
        numbers = {slot_of(opening.auction) % SHARDS for opening in self._openings}
        return self._pick([process for process in self.house.running if self.house.numbers[process] in numbers])

    def _pick_gateway(self) -> Process | None:
        return self._pick([gateway.process for gateway in self.house.gateways])

    def _kill_shard(self) -> bool:
        process = self._pick(self.house.shards)
        if process is not None:
            process.kill()
        return process is not None

    def _kill_shard_in_write(self) -> bool:
        """What it has sent goes on without it; perhaps a spare stands by."""
        process = self._pick_running()
        if process is None:
            return False
        if self._random.random() < 0.7:
            self.house.start_shard(self.house.numbers[process], is_kept=False)

        def strike() -> None:
            self._slow_database_for(0.01, 1.0, (200_000, 2_500_000))
            self._later(0.002, 0.02, process.kill)

        self.world.after(SECOND_US // 2, self._at_write, process, strike)
        return True

    def _kill_shard_near_end(self) -> bool:
        """Who takes over must read the auction while its last bids come."""
        opening = self._random.choice(self._openings)
        kill_us = opening.terms.end_time * 1_000 - self._random.randint(200_000, 900_000)
        number = slot_of(opening.auction) % SHARDS
        if kill_us <= self.world.now_us + SECOND_US // 2:
            return False

        def strike() -> None:
            self._slow_database_for(1, 0.15, (50_000, 800_000))
            for process in self.house.running:
                if self.house.numbers[process] == number:
                    process.kill()

        self.world.at(kill_us - SECOND_US // 2, partial(self.house.start_shard, number, is_kept=False))
        self.world.at(kill_us, strike)
        return True

    def _pause_shard(self) -> bool:
        return self._pause(self._pick(self.house.shards))

    def _stop_shard(self) -> bool:
        process = self._pick_running()
        if process is not None:
            self.house.stop_shard(process)
        return process is not None

    def _start_rival(self) -> bool:
        """Ray has lost sight of a process that lives, or a spare stands by."""
        self.house.start_shard(self._random.randrange(SHARDS), is_kept=False)
        return True

    def _replace_unawares(self) -> bool:
        """A shard loses Postgres and is replaced; some gateways have found the new one, some still ask the old one."""
        process, gateway = self._pick_running(), self._pick_gateway()
        if process is None or gateway is None:
            return False
        self._lose_database_for(process, self._random.uniform(4, 10))
        self.house.start_shard(self.house.numbers[process], is_kept=False)
        self._later(2.5, 4, self._cut_all, process, gateway)
        return True

    def _replace_living(self) -> bool:
        """A firewall refuses new connections to a shard that lives and serves, so a spare takes it for dead."""
        process, gateway = self._pick_running(), self._pick_gateway()
        if process is None or gateway is None:
            return False
        self.house.start_shard(self.house.numbers[process], is_kept=False)
        self.world.after(SECOND_US // 2, self._wires.refuse, process, True)
        self.world.after(SECOND_US, self._wires.refuse, process, False)
        self._later(0.52, 0.6, self._cut_all, process, gateway)
        for end in self._wires.of_process(self.people):
            self._later(0.6, 1.1, end.cut)
        for _ in range(24):
            self._later(0.65, 1.1, self._call, process)
        return True

    def _pause_machine(self) -> bool:
        """A shard and a gateway stand still together, so that neither finds the other silent; the shard is replaced."""
        process, gateway = self._pick_running(), self._pick_gateway()
        if process is None or gateway is None:
            return False
        duration_s = self._random.uniform(3, 5)
        for one in (process, gateway):
            one.pause()
            self._later(duration_s, duration_s, one.resume)
        for _ in range(3):
            self._later(2.5, duration_s, self._call, process)
        self.house.start_shard(self.house.numbers[process], is_kept=False)
        return True

    def _cut_all(self, one: Process, other: Process) -> None:
        for end in self._wires.between(one, other):
            end.cut()

    def _kill_gateway(self) -> bool:
        process = self._pick_gateway()
        if process is not None:
            process.kill()
        return process is not None

    def _pause_gateway(self) -> bool:
        return self._pause(self._pick_gateway())

    def _pause(self, process: Process | None) -> bool:
        if process is None:
            return False
        process.pause()
        longest_s = self._random.choice((0.5, 2, 5, 30))
        self._later(longest_s / 2, longest_s, process.resume)
        return True

    # The network

    def _pick_link(self) -> Transport | None:
        """A link, by the gateway's end."""
        return self._pick_end([end for end in self._wires.connections if end.process is not self.people])

    def _pick_client(self) -> Transport | None:
        """A client's connection, by its own end."""
        return self._pick_end([end for end in self._wires.connections if end.process is self.people])

    def _pick_end(self, ends: list[Transport]) -> Transport | None:
        ends = [end for end in ends if end.is_open]
        return self._random.choice(ends) if ends else None

    def _cut_link(self) -> bool:
        return self._cut(self._pick_link())

    def _cut_client(self) -> bool:
        return self._cut(self._pick_client())

    def _cut(self, end: Transport | None) -> bool:
        if end is not None:
            end.cut(self._random.choice((0, 0, 300_000)))
        return end is not None

    def _silence_link(self) -> bool:
        end = self._pick_link()
        if end is not None:
            end.hold()
            self._later(0.2, 4, end.release)
        return end is not None

    def _slow_link(self) -> bool:
        return self._dawdle(self._pick_link())

    def _slow_client(self) -> bool:
        return self._dawdle(self._pick_client())

    def _dawdle(self, end: Transport | None) -> bool:
        if end is not None:
            end.dawdle(self._random.choice((10_000, 50_000, 200_000)))
            self._later(0.5, 4, end.dawdle, 0)
        return end is not None

    def _stall_link(self) -> bool:
        """Hardly long enough for the link to be given up."""
        return self._stall(self._pick_link(), 1.1)

    def _stall_client(self) -> bool:
        return self._stall(self._pick_client(), 4)

    def _stall(self, end: Transport | None, longest_s: float) -> bool:
        if end is not None:
            end.stall()
            self._later(longest_s / 5, longest_s, end.unstall)
        return end is not None

    def _slow_network(self) -> bool:
        self._wires.delay_us = (50, self._random.choice((10_000, 100_000)))
        self._later(0.5, 3, setattr, self._wires, "delay_us", (50, 2_000))
        return True

    # Postgres

    def _crash_database(self) -> bool:
        return self._end_database(self.house.postgres.crash)

    def _cut_power(self) -> bool:
        return self._end_database(self.house.postgres.power_cut)

    def _end_database(self, end: Callable[[], None]) -> bool:
        postgres = self.house.postgres
        if not postgres.is_up:
            return False
        end()
        self._later(0.2, self._random.choice((0.5, 3, 12)), postgres.start)
        return True

    def _lose_database(self) -> bool:
        postgres = self.house.postgres
        if postgres.is_away:
            return False
        postgres.go_away()
        self._later(0.2, self._random.choice((1, 4, 12)), postgres.come_back)
        return True

    def _part_from_database(self) -> bool:
        process = self._pick(self.house.living())
        if process is not None:
            self._lose_database_for(process, self._random.choice((0.4, 1.5, 6)))
        return process is not None

    def _part_and_cut(self) -> bool:
        """A shard loses Postgres in a write, then its links: what is on its way is sent again to one that is away."""
        process = self._pick_running()
        if process is None:
            return False

        def strike() -> None:
            self._later(0.0, 0.004, self._lose_database_for, process, self._random.uniform(3.5, 6))
            cut_s = self._random.uniform(2.2, 3)
            for gateway in self.house.gateways:
                self._later(cut_s, cut_s, self._cut_all, process, gateway.process)

        self._at_write(process, strike)
        return True

    def _lose_database_for(self, process: Process, duration_s: float) -> None:
        self.house.postgres.go_away(process)
        self._later(duration_s, duration_s, self.house.postgres.come_back, process)

    def _cut_connection(self) -> bool:
        sessions = list(self.house.postgres.sessions.values())
        if sessions:
            moments: list[Literal["now", "request", "reply"]] = ["now", "request", "reply"]
            self.house.postgres.break_connection(self._random.choice(sessions), self._random.choice(moments))
        return bool(sessions)

    def _cut_write(self) -> bool:
        """A writer's connection breaks, while what it has sent is on its way and takes its time."""
        process = self._pick_running()
        if process is None:
            return False

        def strike() -> None:
            self._slow_database_for(0.1, 1.0, (2_000, 30_000))
            for session in self.house.postgres.sessions.values():
                if session.connection.process is process and session.name != "gavel":
                    self._later(0.0005, 0.02, self.house.postgres.break_connection, session)

        self._at_write(process, strike)
        return True

    def _cut_power_in_write(self) -> bool:
        process = self._pick_running()
        if process is not None:
            self._at_write(process, partial(self._later, 0.0, 0.004, self._cut_power))
        return process is not None

    def _at_write(self, process: Process, strike: Callable[[], None]) -> None:
        """Do something when a shard next appends events."""
        if not process.is_dead:
            self.house.observer.at_write[process] = strike

    def _slow_database(self) -> bool:
        self._slow_database_for(self._random.uniform(0.5, 4), self._random.choice((0.05, 0.3)))
        return True

    def _slow_database_near_end(self) -> bool:
        """What comes in the last moments must wait until the auction is read, and the end comes meanwhile."""
        opening = self._random.choice(self._openings)
        end_us = opening.terms.end_time * 1_000
        number = slot_of(opening.auction) % SHARDS
        if end_us < self.world.now_us + SECOND_US // 2:
            return False
        self.world.at(end_us - 120_000, self._slow_database_for, 0.15, 0.6, (30_000, 300_000))
        for process in self.house.running:
            if self.house.numbers[process] == number:
                for _ in range(3):
                    self.world.at(end_us - self._random.randint(25_000, 100_000), self._call, process)
        return True

    def _slow_database_for(
        self, duration_s: float, chance: float, slow_us: tuple[int, int] = SLOW_EXECUTION_US
    ) -> None:
        postgres = self.house.postgres
        postgres.slow_chance, postgres.slow_execution_us = chance, slow_us
        self._later(duration_s, duration_s, self._hurry_database)

    def _hurry_database(self) -> None:
        postgres = self.house.postgres
        postgres.slow_chance, postgres.slow_execution_us = SLOW_CHANCE, SLOW_EXECUTION_US

    def _jump_database_clock(self) -> bool:
        self.house.postgres.jump_clock(self._random.choice((-800, -50, 50, 800)))
        return True

    # Clocks

    def _suspend(self) -> bool:
        """The only machine sleeps for a while: when it wakes, all clocks but the calendar's have stood still."""
        if "everything suspended" in self.done:
            return False
        self.house.postgres.jump_clock(_SUSPENDED_MS)
        return True

    def _jump_clock(self) -> bool:
        process = self._pick(self.house.living())
        if process is not None:
            process.jump(self._random.choice((20, 400)) * 1_000_000)
        return process is not None

    def _drift(self) -> bool:
        process = self._pick(self.house.living())
        if process is not None:
            process.set_drift(self._random.choice((-20_000, -500, 500, 20_000)))
        return process is not None
