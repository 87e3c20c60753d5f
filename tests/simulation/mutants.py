"""Mistakes that the simulator must find: one line of the real code is changed, and some seed must fail.

A mutant is applied to the source while the module is imported, in a process of its own.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import NamedTuple


class Mutant(NamedTuple):
    """One line of a module, and what stands in its place."""

    name: str
    module: str
    line: str
    """As it stands in the source, without its indentation; it must be there once."""
    changed: str

    def apply(self, source: str) -> str:
        """Change the source. Raises `ValueError` where the line is not there, or not only once."""
        lines = source.splitlines(keepends=True)
        places = [place for place, line in enumerate(lines) if line.strip() == self.line]
        if len(places) != 1:
            raise ValueError(f"mutant {self.name!r}: its line stands {len(places)} times in {self.module}")
        lines[places[0]] = lines[places[0]].replace(self.line, self.changed)
        return "".join(lines)


MUTANTS = (
    # Who may write
    Mutant(
        "a fence that only reads",
        "actors.journal",
        '_APPEND_EVENTS = f"WITH owner AS ({_FENCE}){_APPENDED}{_COUNT}"',
        '_APPEND_EVENTS = f"WITH owner AS (SELECT alive_at, down_at FROM shards WHERE shard_id = $1 AND epoch = $2)'
        '{_APPENDED}{_COUNT}"',
    ),
    Mutant(
        "the journal is read while the old owner can still write",
        "actors.directory",
        "SET epoch = epoch + 1, owner = $3, address = NULL, backend_pid = $4, alive_at = clock_timestamp(),",
        "SET owner = $3, address = NULL, backend_pid = $4, alive_at = clock_timestamp(),",
    ),
    Mutant(
        "a refusal released without the epoch's check",
        "actors.shard",
        "if turn.rows or turn.steps or self._is_sign_wanted:",
        "if turn.rows or self._is_sign_wanted:",
    ),
    # What is not known
    Mutant(
        "settling without a new epoch",
        "actors.journal",
        "SET epoch = epoch + 1, backend_pid = $3, alive_at = clock_timestamp(), down_at = coalesce(down_at, alive_at)",
        "SET backend_pid = $3, alive_at = clock_timestamp(), down_at = coalesce(down_at, alive_at)",
    ),
    Mutant(
        "settling that appends what is there",
        "actors.journal",
        "if stored == 0 and (rows or paid_until is not None):",
        "if rows or paid_until is not None:",
    ),
    Mutant(
        "settling that appends nothing",
        "actors.journal",
        "if stored == 0 and (rows or paid_until is not None):",
        "if paid_until is not None:",
    ),
    Mutant(
        "a command that was on its way called not taken",
        "actors.link",
        "if waiting.links > 1 and isinstance(answer, Rejection) and answer.is_transient and waiting.is_command:",
        "if False:",
    ),
    Mutant(
        "acknowledged before the commit",
        "actors.shard",
        "rows, entities = turn.rows, list(turn.entities.values())",
        "rows, entities = turn.rows, list(turn.entities.values()); self._release(turn); turn.steps = []; "
        "turn.requests = 0",
    ),
    # One order
    Mutant(
        "sent again out of order",
        "actors.link",
        "waiting = list(self._in_flight.values())",
        "waiting = list(reversed(self._in_flight.values()))",
    ),
    Mutant(
        "since, off by one",
        "actors.entities",
        "return [recorded for recorded in self.recent if recorded.seq > since]",
        "return [recorded for recorded in self.recent if recorded.seq > since + 1]",
    ),
    Mutant(
        "a broken topic taken up from too far on",
        "gateway.topic",
        "missed = run.after(self.seq)",
        "missed = run.after(self.seq + 1)",
    ),
    Mutant(
        "events recalled from too far on",
        "gateway.topic",
        'events = b",".join([run.after(since) for run in self._ring if run.last > since])',
        'events = b",".join([run.after(since) for run in self._ring if run.last > since + 1])',
    ),
    Mutant(
        "a fold that drops what is kept",
        "gateway.topic",
        'kept = b",".join([run.encoded for run in self._kept if run.last > sent])',
        'kept = b""',
    ),
    Mutant(
        "a fold ahead of what is committed",
        "actors.shard",
        "seq, snapshot = views[topic]",
        "seq, snapshot = last, encode_snapshot(self._awake[topic].state)",
    ),
    Mutant(
        "a fold on a link that drops what is kept",
        "actors.link",
        "if published.kept:",
        "if False:",
    ),
    Mutant(
        "a catch-up from too far on",
        "gateway.fanout",
        "_send_rest(topic, sink, sent)",
        "_send_rest(topic, sink, sent + 1)",
    ),
    Mutant(
        "a ring that is taken to reach further back",
        "gateway.topic",
        "if not self._ring or not self._ring[0].first <= since + 1 <= self.seq "
        "or self.seq - since > RESUME_EVENTS_MAX:",
        "if not self._ring or not self._ring[0].first <= since + 2 <= self.seq + 1 "
        "or self.seq - since > RESUME_EVENTS_MAX:",
    ),
    Mutant(
        "put to sleep before the commit",
        "actors.shard",
        "if entity.turn <= self._released and entity.id not in self._waking:",
        "if entity.id not in self._waking:",
    ),
    Mutant(
        "a snapshot of what is not committed",
        "actors.shard",
        "life = await self._journal.append(rows, entities, turn.paid_until)",
        "life = (turn.snapshots and await self._journal.save_snapshots(turn.snapshots)) or "
        "await self._journal.append(rows, entities, turn.paid_until)",
    ),
    # Who watches
    Mutant(
        "viewers that are gone still counted",
        "actors.shard",
        "self._audiences.leave(topic, outlet)",
        "pass",
    ),
    Mutant(
        "viewers not counted again after a break",
        "gateway.fanout",
        "topic.counted = None",
        "pass",
    ),
    # What concerns one user
    Mutant(
        "outbid told to the wrong one",
        "engine.notices",
        'yield state.leader, "outbid"',
        'yield event.bidder, "outbid"',
    ),
    Mutant(
        "not followed again after a break",
        "gateway.bootstrap",
        "people.follow_again(shard)",
        "pass",
    ),
    Mutant(
        "what was missed in a break not asked for",
        "gateway.people",
        "self._catch_up_with(users, shard)",
        "pass",
    ),
    Mutant(
        "standings read before the user is followed",
        "gateway.people",
        "await self._follow(user)",
        "[self._shards.submit_to(shard, Follow([user]), _ignore) for shard in self._shards.shards]",
    ),
    Mutant(
        "a notice released before the commit",
        "actors.shard",
        "turn.steps.append(noticed(entity, recorded, user, kind))",
        "[outlet.deliver([noticed(entity, recorded, user, kind)]) for outlet in self._followers.by_user[user]]",
    ),
    # Verdicts
    Mutant(
        "bid_ids forgotten in sleep",
        "actors.entities",
        "entity.accepted = dict(loaded.commands)",
        "entity.accepted = {}",
    ),
    Mutant(
        "another bidder's verdict",
        "engine.commands",
        "return command.bidder.bytes + command.bid_id.bytes",
        "return command.bid_id.bytes + command.bid_id.bytes",
    ),
    # The clock
    Mutant(
        "a clock below the last event",
        "actors.shard",
        "now = max(taken_at, entity.last_at)",
        "now = taken_at",
    ),
    Mutant(
        "an end that ignores a bid already taken up",
        "actors.shard",
        "moment = max(waiting[0].taken_at if waiting else self._clock(), entity.last_at, self._back_at)",
        "moment = max(self._clock(), entity.last_at, self._back_at)",
    ),
    Mutant(
        "a bid taken at the end itself",
        "actors.shard",
        "return due is not None and due <= max(now, entity.last_at)",
        "return due is not None and due < max(now, entity.last_at)",
    ),
    # Outages
    Mutant(
        "a deadline executed in an outage",
        "actors.shard",
        "if self._is_away or is_gap or (due is not None and self._alive_at < due <= moment):",
        "if self._is_away or is_gap:",
    ),
    Mutant(
        "what waited in an outage counted as of then",
        "actors.shard",
        "moment = max(waiting[0].taken_at if waiting else self._clock(), entity.last_at, self._back_at)",
        "moment = max(waiting[0].taken_at if waiting else self._clock(), entity.last_at)",
    ),
    Mutant(
        "an outage counted twice",
        "actors.journal",
        "appended, *life = await self._write(_PAY_BACK, *columns, paid_until, rows=len(rows))",
        "appended, *life = await self._write(_APPEND_ALL, *columns); life[1] = None",
    ),
    Mutant(
        "an outage forgotten by a takeover",
        "actors.directory",
        "down_at = CASE WHEN alive_at > '-infinity' THEN coalesce(down_at, alive_at) END",
        "down_at = NULL",
    ),
    Mutant(
        "a cap that does not move along",
        "engine.auction",
        "cap = None if state.end_time_max is None else state.end_time_max + end_time - state.end_time",
        "cap = state.end_time_max",
    ),
    # The rules
    Mutant(
        "a raise that extends",
        "engine.auction",
        "return [raised] if price == state.price else [raised, ReserveReached(price, least)]",
        'return [raised, Extended(state.end_time + 1_000, state.end_time_max, "soft_close")]',
    ),
    Mutant(
        "an equal maximum that takes the lead",
        "engine.auction",
        "if leader is None or offered > leader.max_amount:",
        "if leader is None or offered >= leader.max_amount:",
    ),
)


def mutant_called(name: str) -> Mutant:
    """Find a mutant by its name."""
    return next(mutant for mutant in MUTANTS if mutant.name == name)


class MutantImporter(importlib.abc.MetaPathFinder):
    """Imports one module with its mutant. To be put first into `sys.meta_path`, before anything imports it."""

    def __init__(self, mutant: Mutant) -> None:
        if mutant.module in sys.modules:
            raise ImportError(f"{mutant.module} was imported before it could be changed")
        self._mutant = mutant

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._mutant.module:
            return None
        found = importlib.machinery.PathFinder.find_spec(fullname, path)
        assert found is not None
        assert found.origin is not None
        return importlib.util.spec_from_loader(fullname, _Loader(self._mutant, found.origin), origin=found.origin)


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, mutant: Mutant, path: str) -> None:
        super().__init__(mutant.module, path)
        self._mutant = mutant

    def get_code(self, fullname: str) -> CodeType:
        source = self._mutant.apply(Path(self.path).read_text())
        return compile(source, self.path, "exec", dont_inherit=True)
