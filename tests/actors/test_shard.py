"""A shard's turns: what is decided when, what is released when, and what happens when its journal says no."""

import asyncio
import json
from uuid import UUID

import pytest

from actors import entities, shard
from actors.directory import slot_of
from actors.journal import Fenced, Refused, Unreadable, Unsettled
from actors.messages import (
    Answered,
    GetAuction,
    Presence,
    Published,
    Unsubscribe,
    Viewers,
    Watch,
    Watched,
    You,
)
from engine.commands import CancelAuction, EndAuction, OpenAuction, PlaceBid
from engine.limits import GATHER_MS, GATHER_ROWS_MIN, RESUME_EVENTS_MAX, SLOTS
from engine.rejections import Rejection
from tests.engine.support import ANNA, AUCTION, BEN, CLEO, END, MAKER, NOW, SOFT_CLOSE
from tests.support.shards import (
    Died,
    House,
    Recorder,
    Start,
    accepted,
    bid,
    code,
    kinds,
    listed,
    opening,
    recall,
    seqs,
    viewed,
    watched,
)
from tests.support.waiting import LoopClock, quiet, turns, until

OTHER = UUID("a0000000-0000-4000-8000-000000000001")
GET = GetAuction(AUCTION, None)


# Deciding and releasing


async def test_nothing_leaves_before_its_commit(house: House) -> None:
    watcher, bidder = Recorder(), Recorder()
    await watcher.answer(*house.take(watcher, Watch(AUCTION, None, [])))
    watcher.messages.clear()
    house.journal.hold()
    house.take(bidder, bid(ANNA, 1_000))
    await turns(lambda: len(house.journal.appends) == 2)
    # Taken up while the append is on its way, and decided on a state that is not in the journal yet.
    low, get, missing, topic = house.take(
        bidder, bid(BEN, 1_000), GET, GetAuction(UUID(int=0), None), Watch(AUCTION, None, [])
    )
    await quiet()
    assert bidder.messages == watcher.messages == []
    assert len(house.store.journal[AUCTION]) == 1

    house.journal.let_go()
    await bidder.answer(topic)
    assert code(bidder.answers[low]) == "bid_too_low"
    assert viewed(bidder.answers[get]).snapshot.price == 1_000
    assert code(bidder.answers[missing]) == "not_found"
    assert seqs(watcher.published) == [2]


async def test_what_arrives_meanwhile_is_one_commit_and_decided_at_once(house: House) -> None:
    outlet = Recorder()
    house.journal.hold()
    (first,) = house.take(outlet, bid(ANNA, 1_000))
    await turns(lambda: len(house.journal.appends) == 2)
    numbers = []
    for number in range(10):
        numbers += house.take(outlet, bid(BEN if number % 2 == 0 else ANNA, 1_500 + 500 * number, bid_id=10 + number))
        await asyncio.sleep(0)
    house.journal.let_go()
    await outlet.answer(numbers[-1])
    assert [len(rows) for rows in house.journal.appends] == [1, 1, 10]
    assert [accepted(outlet.answers[number]).seq for number in [first, *numbers]] == list(range(2, 13))
    assert [message.request for message in outlet.messages if isinstance(message, Answered)] == [first, *numbers]


async def test_a_commit_after_a_large_one_waits_for_more(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = LoopClock(monkeypatch)
    outlet = Recorder()

    async def place(*numbers: int) -> None:
        house.take(
            outlet, *(bid(BEN if number % 2 else ANNA, 1_000 + 500 * number, bid_id=number) for number in numbers)
        )
        await quiet()

    def commits() -> list[int]:
        return [len(rows) for rows in house.journal.appends[1:]]

    few = GATHER_ROWS_MIN - 1
    await place(*range(few))
    await place(few)
    assert commits() == [few, 1]
    await place(*range(10, 10 + GATHER_ROWS_MIN))
    await place(30)
    await clock.advance(GATHER_MS / 2)
    await place(31)
    assert commits() == [few, 1, GATHER_ROWS_MIN]
    await clock.advance(GATHER_MS / 2)
    assert commits() == [few, 1, GATHER_ROWS_MIN, 2]
    await place(32)
    assert commits() == [few, 1, GATHER_ROWS_MIN, 2, 1]


async def test_answers_come_in_the_order_of_the_requests(house: House) -> None:
    await house.ask(opening(OTHER))
    outlet = Recorder()
    numbers = house.take(
        outlet,
        bid(ANNA, 1_000),
        GET,
        bid(ANNA, 900, auction=OTHER),
        bid(BEN, 1_200, bid_id=2),
        bid(BEN, 1_500, bid_id=3),
        GetAuction(OTHER, ANNA),
        GetAuction(AUCTION, ANNA),
    )
    await outlet.answer(numbers[-1])
    assert [message.request for message in outlet.messages if isinstance(message, Answered)] == numbers
    answers = list(outlet.answers.values())
    assert viewed(answers[1]).snapshot.price == 1_000
    assert code(answers[3]) == "bid_too_low"
    last = viewed(answers[6])
    assert (last.seq, last.snapshot.price) == (3, 1_500)
    assert last.you is not None
    assert not last.you.is_leading


async def test_a_turn_that_appends_nothing_is_released_after_a_check(house: House) -> None:
    checks = house.journal.checks
    assert viewed(await house.ask(GET)).seq == 1
    assert house.journal.checks == checks + 1


async def test_acknowledgements_tell_what_is_in_the_journal(house: House) -> None:
    answer = accepted(await house.ask(bid(ANNA, up_to=3_000)))
    row = house.store.journal[AUCTION][2]
    assert (answer.seq, answer.hash, answer.at) == (row.seq, row.hash, row.at)
    assert row.command_id == ANNA.bytes + UUID(int=1).bytes
    assert house.store.entities[AUCTION].status == "active"
    assert house.store.entities[AUCTION].due_at == END


async def test_an_extension_moves_the_stored_deadline_with_its_bid(start: Start) -> None:
    house = await start()
    await house.ask(opening(soft_close=SOFT_CLOSE))
    house.now = END - 10
    assert accepted(await house.ask(bid(ANNA, 1_000))).end_time == END - 10 + 90_000
    assert kinds(house.store) == ["opened", "bid_placed", "extended"]
    assert house.store.entities[AUCTION].due_at == END - 10 + 90_000


# Retries


async def test_a_retry_gets_the_first_verdict_while_awake_and_while_uncommitted(house: House) -> None:
    outlet = Recorder()
    house.journal.hold()
    (first,) = house.take(outlet, bid(ANNA, 1_000))
    await turns(lambda: len(house.journal.appends) == 2)
    same_turn = house.take(outlet, bid(ANNA, 9_999), bid(BEN, 1_500, bid_id=2), bid(BEN, 1_500, bid_id=2))
    house.journal.let_go()
    await outlet.answer(same_turn[-1])
    assert outlet.answers[same_turn[0]] == outlet.answers[first]
    assert outlet.answers[same_turn[2]] == outlet.answers[same_turn[1]]
    assert await house.answers(bid(ANNA, 1_000), bid(BEN, 1_500, bid_id=2)) == [
        outlet.answers[first],
        outlet.answers[same_turn[1]],
    ]
    assert kinds(house.store) == ["opened", "bid_placed", "bid_placed"]


async def test_a_retry_gets_the_first_verdict_after_sleep_and_after_restart(house: House, start: Start) -> None:
    verdicts = await house.answers(bid(ANNA, up_to=3_000), bid(BEN, 1_500, bid_id=2), bid(ANNA, up_to=4_000, bid_id=3))
    await house.put_to_sleep()
    retries = [bid(ANNA, 1_000), bid(BEN, 9_000, bid_id=2), bid(ANNA, 1_000, bid_id=3)]
    assert await house.answers(*retries) == verdicts
    await house.kill()
    second = await start(house.store)
    assert await second.answers(*retries) == verdicts
    assert kinds(house.store) == ["opened", "bid_placed", "bid_placed", "maximum_raised"]


async def test_a_retry_after_the_end_still_gets_its_verdict(house: House) -> None:
    verdict = await house.ask(bid(ANNA, 1_000))
    house.now = END
    assert code(await house.ask(bid(BEN, 5_000, bid_id=2))) == "ended"
    assert await house.ask(bid(ANNA, 1_000)) == verdict


async def test_a_verdict_that_left_the_memory_is_read_from_the_journal(
    house: House, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entities, "RESUME_EVENTS_MAX", 3)
    fresh = await start(house.store)
    verdict = await fresh.ask(bid(ANNA, up_to=2_000))
    for number in range(5):
        accepted(await fresh.ask(bid(ANNA, up_to=3_000 + number, bid_id=10 + number)))
    assert len(fresh.shard._awake[AUCTION].recent) == 3
    outlet = Recorder()
    late, now = fresh.take(outlet, bid(ANNA, up_to=2_000), GET)
    assert await outlet.answer(late) == verdict
    assert viewed(await outlet.answer(now)).seq == 7
    # The journal cannot be read just now: it was placed, so nobody may say that it was not.
    fresh.journal.read_error = Unreadable("away")
    unknown = await fresh.ask(bid(ANNA, up_to=2_000))
    assert (code(unknown), isinstance(unknown, Rejection) and unknown.is_transient) == ("outcome_unknown", True)
    fresh.journal.read_error = None
    assert await fresh.ask(bid(ANNA, up_to=2_000)) == verdict
    assert fresh.shard._line == 0


async def test_a_remembered_verdict_that_the_journal_lost_is_no_acknowledgement(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entities, "RESUME_EVENTS_MAX", 1)
    house = await start()
    await house.answers(opening(), bid(ANNA, 1_000), bid(BEN, 2_000, bid_id=2))
    row = house.store.journal[AUCTION].pop(2)
    assert code(await house.ask(bid(ANNA, 1_000))) == "outcome_unknown"
    # Nor is one that cannot be understood, and it does not end the process: each retry would do so again.
    house.store.journal[AUCTION][2] = row._replace(body=b"{")
    assert code(await house.ask(bid(ANNA, 1_000))) == "outcome_unknown"
    await quiet()
    assert house.deaths == []
    assert house.shard._line == 0


async def test_another_bidders_same_bid_id_is_another_bid(house: House) -> None:
    first, second = await house.answers(bid(ANNA, 1_000, bid_id=7), bid(BEN, 2_000, bid_id=7))
    assert (accepted(first).paddle, accepted(second).paddle) == (1, 2)
    assert accepted(second).seq == 3
    assert (await house.answers(bid(ANNA, 1, bid_id=7), bid(BEN, 1, bid_id=7))) == [first, second]


async def test_the_same_bid_id_in_another_auction_is_another_bid(house: House) -> None:
    await house.ask(opening(OTHER))
    first, second = await house.answers(bid(ANNA, 1_000), bid(ANNA, 1_200, auction=OTHER))
    assert (accepted(first).price, accepted(second).price) == (1_000, 1_200)


async def test_rejections_are_remembered_too_but_not_for_ever(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "VERDICTS_REMEMBERED", 2)
    rejected = await house.ask(bid(ANNA, 1))
    assert code(rejected) == "bid_too_low"
    # The same bid_id, though it would be high enough now; also after sleep.
    assert await house.ask(bid(ANNA, 1_000)) == rejected
    await house.put_to_sleep()
    assert await house.ask(bid(ANNA, 1_000)) == rejected
    assert code(await house.ask(bid(BEN, 1))) == "bid_too_low"
    assert code(await house.ask(bid(CLEO, 1))) == "bid_too_low"
    assert accepted(await house.ask(bid(ANNA, 1_000))).seq == 2


async def test_commands_of_makers_are_done_once(house: House) -> None:
    again = viewed(await house.ask(opening()))
    assert again.seq == 1
    assert code(await house.ask(opening(request_id=UUID(int=5)))) == "already_exists"
    end = EndAuction(auction=AUCTION, caller=MAKER, role="maker", request_id=UUID(int=6))
    ended = viewed(await house.ask(end))
    assert (ended.snapshot.status, ended.seq) == ("ended", 2)
    assert viewed(await house.ask(end)) == ended
    cancel = CancelAuction(auction=AUCTION, caller=MAKER, role="maker", request_id=UUID(int=7))
    assert code(await house.ask(cancel)) == "ended"
    assert code(await house.ask(EndAuction(auction=OTHER, caller=MAKER, role="maker", request_id=UUID(int=8)))) == (
        "not_found"
    )


async def test_a_reason_is_kept_beside_its_event(house: House, start: Start) -> None:
    outlet = Recorder()
    await outlet.answer(*house.take(outlet, Watch(AUCTION, None, [])))
    cancel = CancelAuction(
        auction=AUCTION, caller=MAKER, role="maker", request_id=UUID(int=6), reason="It broke.", salt=b"salt"
    )
    assert viewed(await house.ask(cancel)).snapshot.status == "cancelled"
    assert house.store.private[AUCTION, 2].body == b"It broke."
    assert b"broke" not in house.store.journal[AUCTION][2].body
    await outlet.events(2)
    assert listed(outlet.published[0].events)[0]["reason"] == "It broke."
    await house.kill()
    for reason in ("It broke.", None):
        later = await start(house.store)
        assert listed(watched(await later.ask(Watch(AUCTION, 1, []))).events)[0]["reason"] == reason
        await later.kill()
        house.store.private.clear()


async def test_a_bid_under_the_id_of_another_command_does_no_harm(house: House) -> None:
    """Ids are the clients': a maker's bid may carry the `request_id` under which it opened the auction."""
    request_id = UUID(int=77)
    await house.ask(opening(OTHER, request_id))
    outlet = Recorder()
    (number,) = house.take(outlet, bid(MAKER, 1_000, bid_id=77, auction=OTHER))
    assert code(await outlet.answer(number)) == "own_auction"
    assert viewed(await house.ask(opening(OTHER, request_id))).seq == 1
    assert house.deaths == []


@pytest.mark.parametrize("kind", [EndAuction, CancelAuction])
async def test_commands_of_different_kinds_under_one_id_are_different_commands(
    house: House, start: Start, kind: type[EndAuction | CancelAuction]
) -> None:
    # ANNA is an admin, and uses one id for everything.
    command = kind(auction=AUCTION, caller=ANNA, role="admin", request_id=UUID(int=7), reason="Why not.")
    placed = accepted(await house.ask(bid(ANNA, 1_000, bid_id=7)))
    closed = viewed(await house.ask(command))
    assert (closed.seq, closed.snapshot.status) == (3, "ended" if kind is EndAuction else "cancelled")
    await house.kill()
    for again in (house, await start(house.store)):
        if again is not house:
            assert accepted(await again.ask(bid(ANNA, 1_000, bid_id=7))) == placed
            assert viewed(await again.ask(command)) == closed
            # A bid under the id of what came first is a bid of its own as well, and comes too late.
            await again.ask(opening(OTHER))
            other = kind(auction=OTHER, caller=ANNA, role="admin", request_id=UUID(int=8), reason="Why not.")
            assert viewed(await again.ask(other)).seq == 2
            assert code(await again.ask(bid(ANNA, 1_000, bid_id=8, auction=OTHER))) == "ended"
            assert viewed(await again.ask(other)).seq == 2
            assert again.deaths == []


# What became of a command


async def test_what_became_of_a_command_is_told_without_doing_it(house: House, start: Start) -> None:
    placed, low, raised = bid(ANNA, 1_000), bid(BEN, 1, bid_id=2), bid(ANNA, up_to=5_000, bid_id=3)
    end = EndAuction(auction=AUCTION, caller=MAKER, role="admin", request_id=UUID(int=6), reason="Over.")
    cancel = CancelAuction(auction=OTHER, caller=MAKER, role="maker", request_id=UUID(int=6))
    await house.ask(opening(OTHER))
    verdicts = await house.answers(placed, low, raised)
    assert [code(answer) for answer in await house.answers(recall(end), recall(cancel))] == ["internal"] * 2
    view, cancelled = await house.answers(end, cancel)
    done: list[OpenAuction | PlaceBid | EndAuction | CancelAuction] = [placed, raised, opening(), end, cancel]
    told = [verdicts[0], verdicts[2], view, view, cancelled]
    assert await house.answers(recall(low), *(recall(one) for one in done)) == [verdicts[1], *told]
    await house.kill()
    later = await start(house.store)
    assert await later.answers(*(recall(one) for one in done)) == told
    assert kinds(house.store) == ["opened", "bid_placed", "maximum_raised", "ended"]
    assert kinds(house.store, OTHER) == ["opened", "cancelled"]


async def test_a_command_that_was_never_taken_is_not_taken_when_it_is_recalled(house: House) -> None:
    for never in (bid(ANNA, 1_000), opening(OTHER), bid(ANNA, 1_000, auction=UUID(int=5)), opening(request_id=ANNA)):
        answer = await house.ask(recall(never))
        assert code(answer) == "internal"
        # A verdict: it was not done, and the same command will not be tried again.
        assert isinstance(answer, Rejection)
        assert not answer.is_transient
    assert kinds(house.store) == ["opened"]
    assert list(house.store.journal) == [AUCTION]
    assert house.shard._line == 0


async def test_a_recalled_bid_may_have_left_the_memory(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entities, "RESUME_EVENTS_MAX", 1)
    house = await start()
    _, verdict, _ = await house.answers(opening(), bid(ANNA, 1_000), bid(BEN, 2_000, bid_id=2))
    assert await house.ask(recall(bid(ANNA, 1_000))) == verdict
    house.journal.read_error = Unreadable("away")
    assert code(await house.ask(recall(bid(ANNA, 1_000)))) == "outcome_unknown"


# The journal says no


async def test_a_refused_append_ends_the_process_and_releases_nothing(house: House) -> None:
    outlet = Recorder()
    await outlet.answer(*house.take(outlet, Watch(AUCTION, None, [])))
    outlet.messages.clear()
    house.journal.append_error = Refused("UniqueViolationError")
    house.take(outlet, bid(ANNA, 1_000), GET)
    await house.died.wait()
    await quiet()
    assert outlet.messages == []
    assert kinds(house.store) == ["opened"]
    assert "UniqueViolationError" in house.deaths[0]


@pytest.mark.parametrize("what", ["append", "check", "snapshot"])
async def test_a_new_owner_fences_whatever_the_old_one_writes_next(house: House, what: str) -> None:
    outlet = Recorder()
    house.store.take_over(0)
    match what:
        case "append":
            house.take(outlet, bid(ANNA, 1_000))
        case "check":
            house.take(outlet, GET)
        case _:
            house.shard.sleep_idle(house.now)
    await house.died.wait()
    await quiet()
    assert "another process" in house.deaths[0]
    assert outlet.messages == []
    assert kinds(house.store) == ["opened"]
    assert house.store.snapshots == {}


async def test_a_check_that_is_refused_ends_the_process(house: House) -> None:
    outlet = Recorder()
    house.journal.check_error = Refused("InsufficientPrivilegeError")
    house.take(outlet, GET)
    await house.died.wait()
    assert outlet.messages == []
    assert "InsufficientPrivilegeError" in house.deaths[0]


async def test_without_requests_the_epoch_is_checked_all_the_same(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "ALIVE_MS", 1)
    house = await start()
    await until(lambda: house.journal.checks >= 3)
    house.store.take_over(0)
    await house.died.wait()
    assert house.store.journal == {}


@pytest.mark.parametrize("error", [Fenced(), Refused("of 2 events the journal holds 1")])
async def test_what_cannot_be_settled_ends_the_process_and_releases_nothing(house: House, error: Exception) -> None:
    outlet = Recorder()
    house.journal.append_error = Unsettled("ConnectionDoesNotExistError")
    house.journal.settle_error = error
    house.take(outlet, bid(ANNA, 1_000), GET)
    await house.died.wait()
    await quiet()
    assert outlet.messages == []
    assert kinds(house.store) == ["opened"]
    assert ("another process" in house.deaths[0]) == isinstance(error, Fenced)


async def test_a_snapshot_that_is_refused_ends_the_process(house: House) -> None:
    house.journal.snapshot_error = Refused("NumericValueOutOfRangeError")
    house.shard.sleep_idle(house.now)
    await house.died.wait()
    assert "a snapshot" in house.deaths[0]
    assert house.store.snapshots == {}


async def test_a_writer_that_fails_otherwise_ends_the_process(house: House) -> None:
    outlet = Recorder()
    house.journal.append_error = RuntimeError("a bug")
    house.take(outlet, bid(ANNA, 1_000))
    await house.died.wait()
    assert "a bug" in house.deaths[0]
    assert outlet.messages == []


async def test_a_fault_while_deciding_ends_the_process(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    outlet = Recorder()

    def fail(*arguments: object) -> None:
        raise ZeroDivisionError("a bug in the rules")

    monkeypatch.setattr(shard, "decide", fail)
    with pytest.raises(Died):
        house.take(outlet, bid(ANNA, 1_000))
    assert "a bug in the rules" in house.deaths[0]
    await quiet()
    assert outlet.messages == []
    assert kinds(house.store) == ["opened"]


@pytest.mark.parametrize("is_awake", [True, False])
async def test_a_fault_in_one_due_auction_ends_the_process(
    house: House, monkeypatch: pytest.MonkeyPatch, is_awake: bool
) -> None:
    outlet = Recorder()
    await outlet.answer(*house.take(outlet, Watch(AUCTION, None, [])))
    if not is_awake:
        await house.put_to_sleep()

    def fail(*arguments: object) -> None:
        raise ZeroDivisionError("a bug in the rules")

    monkeypatch.setattr(shard, "decide", fail)
    house.now = END
    house.shard._fire()
    await house.died.wait()
    await quiet()
    assert "a bug in the rules" in house.deaths[0]
    assert outlet.published == []
    assert kinds(house.store) == ["opened"]


# Waking


async def test_what_is_asked_while_an_auction_is_read_waits_in_order(house: House, start: Start) -> None:
    second = await start(house.store)
    second.journal.before_load.clear()
    outlet = Recorder()
    numbers = second.take(outlet, bid(ANNA, 1_000), bid(BEN, 1_500, bid_id=2))
    await quiet()
    numbers += second.take(outlet, GET)
    second.journal.before_load.set()
    await outlet.answer(numbers[-1])
    assert second.journal.loads == [AUCTION]
    assert [message.request for message in outlet.messages if isinstance(message, Answered)] == numbers
    assert viewed(outlet.answers[numbers[-1]]).seq == 3


@pytest.mark.parametrize(
    ("error", "expected"), [(Unreadable("away"), "unavailable"), (ValueError("no reader"), "internal")]
)
async def test_an_auction_that_cannot_be_read_does_not_affect_others(
    house: House, start: Start, error: Exception, expected: str
) -> None:
    await house.ask(opening(OTHER))
    second = await start(house.store)
    second.journal.load_errors[AUCTION] = error
    answers = await second.answers(GET, GetAuction(OTHER, None), bid(ANNA, 1_000), bid(ANNA, 1_000, auction=OTHER))
    assert [code(answers[0]), code(answers[2])] == [expected, expected]
    assert viewed(answers[1]).seq == 1
    assert accepted(answers[3]).seq == 2
    assert second.deaths == []
    del second.journal.load_errors[AUCTION]
    assert accepted(await second.ask(bid(ANNA, 1_000))).seq == 2


async def test_a_journal_with_a_gap_is_not_served(house: House, start: Start) -> None:
    await house.answers(bid(ANNA, 1_000), bid(BEN, 1_500))
    del house.store.journal[AUCTION][2]
    second = await start(house.store)
    assert code(await second.ask(GET)) == "internal"
    assert second.deaths == []


async def test_what_is_unknown_is_not_kept_in_memory(house: House) -> None:
    unknown = [UUID(int=number) for number in range(50)]
    for auction in unknown:
        answers = await house.answers(
            GetAuction(auction, None), Watch(auction, None, []), bid(ANNA, 1_000, auction=auction)
        )
        assert [code(answer) for answer in answers] == ["not_found"] * 3
    assert not any(house.is_awake(auction) for auction in unknown)
    assert not house.shard._waking
    assert not house.shard._watchers


async def test_a_slot_that_is_not_its_own_is_refused(start: Start) -> None:
    house = await start(slots=[slot for slot in range(SLOTS) if slot != slot_of(AUCTION)])
    answers = await house.answers(opening(), GET, bid(ANNA, 1_000))
    assert [code(answer) for answer in answers] == ["unavailable"] * 3
    assert all(isinstance(answer, Rejection) and answer.is_transient for answer in answers)
    assert house.journal.loads == []


async def test_a_full_line_answers_busy_at_once(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "SHARD_LINE_MAX", 3)
    house.journal.hold()
    outlet = Recorder()
    bids = [bid(ANNA, up_to=1_000 + number, bid_id=number) for number in range(5)]
    numbers = house.take(outlet, *bids)
    assert sorted(outlet.answers) == numbers[3:]
    for answer in outlet.answers.values():
        assert isinstance(answer, Rejection)
        assert (answer.code, answer.is_transient, answer.retry_after_ms) == ("busy", True, 250)
    house.journal.let_go()
    await outlet.answer(numbers[2])
    # A transient refusal is not remembered: the same bid may come again.
    assert accepted(await house.ask(bids[4])).seq == 5


async def test_what_is_refused_of_one_delivery_is_refused_in_one(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "SHARD_LINE_MAX", 0)
    outlet = Recorder()
    numbers = house.take(outlet, GET, bid(ANNA, 1_000), Unsubscribe(AUCTION), Watch(AUCTION, None, []))
    assert [(number, code(answer)) for number, answer in outlet.answers.items()] == [
        (numbers[0], "busy"),
        (numbers[1], "busy"),
        (numbers[3], "busy"),
    ]
    assert outlet.deliveries == 1


async def test_unsubscribing_is_not_refused_by_a_full_line(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    outlet, stays = Recorder(), Recorder()
    for one in (outlet, stays):
        await one.answer(*house.take(one, Watch(AUCTION, None, [])))
    monkeypatch.setattr(shard, "SHARD_LINE_MAX", 1)
    house.journal.hold()
    house.take(stays, bid(ANNA, 1_000))
    (busy,) = house.take(outlet, GET)
    house.take(outlet, Unsubscribe(AUCTION))
    assert code(outlet.answers[busy]) == "busy"
    outlet.messages.clear()
    house.journal.let_go()
    await stays.events(2)
    assert outlet.messages == []
    assert house.shard._line == 0


async def test_unsubscribing_wakes_nobody(house: House) -> None:
    outlet = Recorder()
    await outlet.answer(*house.take(outlet, Watch(AUCTION, None, [])))
    await house.put_to_sleep()
    loads = len(house.journal.loads)
    house.take(outlet, Unsubscribe(AUCTION), Unsubscribe(OTHER))
    await quiet()
    assert len(house.journal.loads) == loads
    assert not house.shard._watchers
    assert house.shard._line == 0


@pytest.mark.parametrize("error", [None, Unreadable("away")])
async def test_unsubscribing_stays_behind_a_subscription_that_waits(house: House, error: Exception | None) -> None:
    await house.put_to_sleep()
    house.journal.before_load.clear()
    if error is not None:
        house.journal.load_errors[AUCTION] = error
    outlet = Recorder()
    numbers = house.take(outlet, Watch(AUCTION, None, []), Unsubscribe(AUCTION), GET)
    await quiet()
    house.journal.before_load.set()
    await outlet.answer(numbers[2])
    assert list(outlet.answers) == [numbers[0], numbers[2]]
    assert isinstance(outlet.answers[numbers[0]], Rejection if error else Watched)
    assert not house.shard._watchers
    assert house.shard._line == 0


async def test_unsubscribing_waits_only_behind_a_subscription_of_its_own(house: House) -> None:
    """What is never refused must not fill the memory."""
    watcher, other = Recorder(), Recorder()
    await watcher.answer(*house.take(watcher, Watch(AUCTION, None, [])))
    await house.put_to_sleep()
    house.journal.before_load.clear()
    (get,) = house.take(watcher, GET)
    (subscribed_at,) = house.take(other, Watch(AUCTION, None, []))
    for _ in range(10):
        house.take(watcher, Unsubscribe(AUCTION))
    assert house.shard._line == len(house.shard._waking[AUCTION]) == 2
    assert AUCTION not in house.shard._watchers
    house.journal.before_load.set()
    assert viewed(await watcher.answer(get)).seq == 1
    assert isinstance(await other.answer(subscribed_at), Watched)
    assert list(house.shard._watchers[AUCTION]) == [other]
    assert house.shard._line == 0


async def test_so_many_auctions_are_read_at_once(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "WAKING_MAX", 2)
    house = await start()
    house.journal.before_load.clear()
    outlet = Recorder()
    one, two, three = (UUID(int=number) for number in (1, 2, 3))
    numbers = house.take(outlet, *(GetAuction(auction, None) for auction in (one, two, three, one)))
    assert {number: code(answer) for number, answer in outlet.answers.items()} == {numbers[2]: "busy"}
    house.journal.before_load.set()
    await outlet.answer(numbers[3])
    assert house.journal.loads == [one, two]
    assert code(await house.ask(GetAuction(three, None))) == "not_found"


@pytest.mark.parametrize("body", [b"", b"\xc1", "cut off", "no UTF-8"])
async def test_a_damaged_snapshot_is_done_without(house: House, start: Start, body: bytes | str) -> None:
    verdict = await house.ask(bid(ANNA, 1_000))
    await house.put_to_sleep()
    saved = house.store.snapshots[AUCTION]
    if body == "cut off":
        body = saved.body[:-1]
    elif body == "no UTF-8":
        body = saved.body.replace(b"A bowl", b"A b\xffwl")
    assert isinstance(body, bytes)
    assert body != saved.body
    house.store.snapshots[AUCTION] = saved._replace(body=body)
    await house.kill()
    second = await start(house.store)
    assert await second.ask(bid(ANNA, 1_000)) == verdict
    assert accepted(await second.ask(bid(BEN, 2_000))).seq == 3


async def test_a_bid_that_was_taken_up_in_time_counts_though_reading_took_past_the_end(house: House) -> None:
    await house.put_to_sleep()
    house.journal.before_load.clear()
    outlet = Recorder()
    house.now = END - 1
    (in_time,) = house.take(outlet, bid(ANNA, 1_000))
    await quiet()
    house.now = END + 10
    house.shard._fire()
    (late, get) = house.take(outlet, bid(BEN, 9_000), GET)
    house.journal.before_load.set()
    await outlet.answer(get)
    assert accepted(outlet.answers[in_time]).at == END - 1
    assert code(outlet.answers[late]) == "ended"
    view = viewed(outlet.answers[get])
    assert (view.snapshot.outcome, view.snapshot.price, view.ended_at) == ("sold", 1_000, END + 10)
    assert [(row.kind, row.at) for row in house.store.journal[AUCTION].values()] == [
        ("opened", NOW),
        ("bid_placed", END - 1),
        ("ended", END + 10),
    ]


async def test_a_bid_counts_that_was_taken_up_in_time_behind_a_deadline(start: Start) -> None:
    house = await start()
    await house.ask(opening(start_time=NOW + 10, end_time=NOW + 20))
    await house.put_to_sleep()
    house.journal.before_load.clear()
    house.now = NOW + 10
    house.shard._fire()
    await turns(lambda: len(house.journal.loads) == 2)
    house.now = NOW + 15
    outlet = Recorder()
    (number,) = house.take(outlet, bid(ANNA, 1_000))
    house.now = NOW + 30
    house.journal.before_load.set()
    assert accepted(await outlet.answer(number)).at == NOW + 15
    await house.at_rest()
    assert [(row.kind, row.at) for row in house.store.journal[AUCTION].values()] == [
        ("scheduled", NOW),
        ("opened", NOW + 15),
        ("bid_placed", NOW + 15),
        ("ended", NOW + 30),
    ]


# Deadlines


async def test_an_auction_opens_and_ends_by_the_clock(start: Start) -> None:
    house = await start()
    outlet = Recorder()
    # Both deadlines are a moment ahead of the clock, which stands until it is moved.
    await house.ask(opening(start_time=NOW + 1, end_time=NOW + 2))
    await outlet.answer(*house.take(outlet, Watch(AUCTION, None, [])))
    assert kinds(house.store) == ["scheduled"]
    house.now = NOW + 1
    await outlet.events(2)
    assert kinds(house.store) == ["scheduled", "opened"]
    assert house.store.entities[AUCTION].due_at == NOW + 2
    house.now = NOW + 2
    await outlet.events(3)
    assert kinds(house.store) == ["scheduled", "opened", "ended"]
    stored = house.store.entities[AUCTION]
    assert (stored.status, stored.due_at) == ("ended", None)
    assert len(house.shard._deadlines) == 0
    assert house.shard._timer is None


async def test_deadlines_fire_for_what_sleeps_and_after_a_restart(house: House, start: Start) -> None:
    await house.ask(opening(OTHER, start_time=END - 300, end_time=END - 100))
    house.now = END - 500
    await house.ask(bid(ANNA, 1_000))
    await house.kill()
    # All moments have passed while nobody was there; that was too short to be paid back.
    second = await start(house.store, now=END)
    await turns(lambda: kinds(second.store) == ["opened", "bid_placed", "ended"])
    await turns(lambda: kinds(second.store, OTHER) == ["scheduled", "opened", "ended"])
    assert [row.at for row in second.store.journal[AUCTION].values()] == [NOW, END - 500, END]
    assert second.deaths == []


async def test_a_deadline_of_what_sleeps_is_tried_again_while_it_cannot_be_read(house: House, start: Start) -> None:
    await house.kill()
    second = await start(house.store)
    second.journal.load_errors[AUCTION] = Unreadable("away")
    second.now = END
    second.shard._fire()
    await until(lambda: second.shard._deadlines.next_at() == END + 1_000 and not second.shard._waking)
    del second.journal.load_errors[AUCTION]
    second.now = END + 1_000
    second.shard._fire()
    await turns(lambda: kinds(second.store) == ["opened", "ended"])


async def test_what_is_due_comes_before_any_command(house: House) -> None:
    await house.ask(opening(OTHER, start_time=NOW + 5, end_time=END))
    outlet = Recorder()
    await outlet.answer(*house.take(outlet, Watch(AUCTION, None, [])))
    house.now = NOW + 5
    assert accepted(await house.ask(bid(ANNA, 1_000, auction=OTHER))).seq == 3
    assert kinds(house.store, OTHER) == ["scheduled", "opened", "bid_placed"]
    house.now = END - 1
    assert accepted(await house.ask(bid(ANNA, 1_000))).seq == 2
    house.now = END
    late = await house.ask(bid(BEN, 9_000))
    assert code(late) == "ended"
    await outlet.events(3)
    assert seqs(outlet.published) == [2, 3]
    ended = listed(outlet.published[-1].events)[0]
    assert (ended["kind"], ended["by"], ended["price"], ended["at"]) == ("ended", "deadline", 1_000, END)


async def test_what_is_due_comes_before_the_command_that_wakes_an_auction(house: House) -> None:
    await house.put_to_sleep()
    house.now = END + 10
    view = viewed(await house.ask(GET))
    assert (view.snapshot.status, view.ended_at) == ("ended", END + 10)


async def test_the_clock_never_goes_below_the_last_event(house: House, start: Start) -> None:
    house.now = NOW + 500
    await house.ask(bid(ANNA, 1_000))
    house.now = NOW + 100
    assert accepted(await house.ask(bid(BEN, 2_000))).at == NOW + 500
    await house.kill()
    second = await start(house.store, now=NOW - 10_000)
    assert accepted(await second.ask(bid(CLEO, 3_000))).at == NOW + 500
    assert [row.at for row in house.store.journal[AUCTION].values()] == [NOW, NOW + 500, NOW + 500, NOW + 500]


async def test_a_clock_behind_the_last_event_does_not_open_an_auction_again(house: House, start: Start) -> None:
    house.now = END
    assert viewed(await house.ask(GET)).snapshot.status == "ended"
    await house.kill()
    second = await start(house.store, now=END - 1)
    assert code(await second.ask(bid(ANNA, 1_000))) == "ended"


# Sleep and snapshots


async def test_only_what_is_idle_and_committed_goes_to_sleep_with_a_snapshot(house: House) -> None:
    await house.ask(opening(OTHER))
    await house.ask(bid(ANNA, 1_000))
    house.now = NOW + 10
    await house.answers(Watch(OTHER, None, []), GET)
    # Whoever only looks keeps nothing awake.
    house.shard.sleep_idle(NOW + 9)
    assert (house.is_awake(AUCTION), house.is_awake(OTHER)) == (False, True)
    await turns(lambda: AUCTION in house.store.snapshots)
    assert house.store.snapshots[AUCTION].seq == 2
    assert house.store.snapshots[AUCTION].hash == house.store.journal[AUCTION][2].hash

    house.journal.hold()
    outlet = Recorder()
    (number,) = house.take(outlet, bid(ANNA, 1_000, auction=OTHER))
    await turns(lambda: len(house.journal.appends) == 4)
    house.shard.sleep_idle(NOW + 100)
    assert house.is_awake(OTHER)
    house.journal.let_go()
    await outlet.answer(number)
    house.shard.sleep_idle(NOW + 100)
    assert not house.is_awake(OTHER)


async def test_sleep_without_news_takes_no_second_snapshot(house: House) -> None:
    await house.put_to_sleep()
    saved = house.store.snapshots[AUCTION]
    await house.ask(GET)
    await house.put_to_sleep()
    assert house.store.snapshots[AUCTION] is saved


async def test_so_many_auctions_stay_awake(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest unused goes, but never with what is not committed yet."""
    monkeypatch.setattr(shard, "AWAKE_MAX", 10)
    house = await start()
    auctions = [UUID(int=number) for number in range(1, 14)]

    def awake() -> list[UUID]:
        return [auction for auction in auctions if house.is_awake(auction)]

    for auction in auctions[:10]:
        house.now += 1
        await house.ask(opening(auction))
    assert awake() == auctions[:10]
    house.now += 1
    await house.ask(bid(ANNA, 1_000, auction=auctions[0]))
    await house.ask(opening(auctions[10]))
    # One more than must go, so that there is room for a while.
    assert awake() == [auctions[0], *auctions[3:11]]
    await turns(lambda: {*auctions[1:3]} <= set(house.store.snapshots))

    house.journal.hold()
    outlet = Recorder()
    (number,) = house.take(outlet, bid(ANNA, 1_000, auction=auctions[3]))
    await turns(lambda: len(house.journal.appends) == 13)
    house.now += 1
    house.take(outlet, *(Watch(auction, None, []) for auction in awake() if auction != auctions[3]))
    *_, last = house.take(outlet, opening(auctions[11]), opening(auctions[12]))
    await quiet()
    assert house.is_awake(auctions[12])
    assert len(awake()) == 10
    assert house.is_awake(auctions[3])
    house.journal.let_go()
    await outlet.answer(last)
    assert accepted(outlet.answers[number]).seq == 2
    # What sleeps wakes as it was.
    assert accepted(await house.ask(bid(BEN, 1_000, auction=auctions[1]))).seq == 2
    assert accepted(await house.ask(bid(BEN, 2_000, auction=auctions[3]))).seq == 3


async def test_snapshots_do_not_hold_up_what_is_acknowledged(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "EVENTS_PER_SNAPSHOT", 2)
    house = await start()
    await house.ask(opening())
    house.journal.before_save.clear()
    # Its turn also takes a snapshot, whose saving goes on long after the answer.
    assert accepted(await house.ask(bid(ANNA, 1_000))).seq == 2
    assert house.store.snapshots == {}
    house.journal.before_save.set()
    await turns(lambda: AUCTION in house.store.snapshots)


async def test_between_two_appends_only_so_many_snapshots_are_saved(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "SNAPSHOTS_AT_ONCE", 2)
    house = await start()
    auctions = [UUID(int=number) for number in range(1, 6)]
    await house.answers(*map(opening, auctions))
    house.now += 1
    await house.ask(opening())
    house.journal.log.clear()
    house.journal.before_save.clear()
    house.shard.sleep_idle(NOW)
    await turns(lambda: house.journal.log == ["save 2"])
    outlet = Recorder()
    (number,) = house.take(outlet, bid(ANNA, 1_000))
    house.journal.before_save.set()
    await outlet.answer(number)
    await turns(lambda: len(house.store.snapshots) == 5)
    assert house.journal.log == ["save 2", "append 1", "save 2", "save 1"]


async def test_of_two_snapshots_that_wait_the_newer_is_saved(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "EVENTS_PER_SNAPSHOT", 1)
    house = await start()
    house.take(Recorder(), opening(), bid(ANNA, 1_000), bid(BEN, 2_000))
    await turns(lambda: AUCTION in house.store.snapshots)
    assert house.store.snapshots[AUCTION].seq == 3
    assert house.journal.log == ["append 3", "save 1"]


async def test_idle_auctions_are_put_to_sleep_by_themselves(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "IDLE_MS", 4)
    house = await start()
    await house.ask(opening())
    house.now = NOW + 4
    await until(lambda: not house.is_awake())
    assert viewed(await house.ask(GET)).seq == 1


async def test_watchers_of_what_sleeps_get_what_happens_after_it_wakes(house: House) -> None:
    outlet = Recorder()
    await outlet.answer(*house.take(outlet, Watch(AUCTION, None, [])))
    await house.put_to_sleep()
    await house.ask(bid(ANNA, 1_000))
    await outlet.events(2)
    assert seqs(outlet.published) == [2]


async def test_a_snapshot_every_so_many_events_holds_only_what_is_committed(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "EVENTS_PER_SNAPSHOT", 3)
    house = await start()
    await house.answers(opening(), bid(ANNA, up_to=1_000))
    assert house.store.snapshots == {}
    house.journal.hold()
    outlet = Recorder()
    numbers = house.take(outlet, bid(ANNA, up_to=1_001, bid_id=2), bid(ANNA, up_to=1_002, bid_id=3))
    # Decided while the turn with the snapshot waits for its commit: not in it.
    await turns(lambda: len(house.journal.appends) == 2)
    numbers += house.take(outlet, bid(ANNA, up_to=1_003, bid_id=4))
    await quiet()
    assert house.store.snapshots == {}
    house.journal.let_go()
    await outlet.answer(numbers[-1])
    await turns(lambda: AUCTION in house.store.snapshots)
    saved = house.store.snapshots[AUCTION]
    assert saved.seq == 3
    assert entities.decode_state(saved.body).bidders[ANNA].max_amount == 1_001
    assert saved.hash == house.store.journal[AUCTION][3].hash


# Watching


async def test_who_watches_gets_the_state_and_the_standings(house: House) -> None:
    await house.answers(bid(ANNA, up_to=4_000), bid(BEN, 1_500))
    answer = watched(await house.ask(Watch(AUCTION, None, [CLEO, ANNA, BEN])))
    state = json.loads(answer.snapshot)
    assert answer.seq == 3
    assert (state["price"], state["leader"], state["bids"]) == (2_000, 1, 2)
    assert answer.you == [None, You(1, 4_000, is_leading=True), You(2, 1_500, is_leading=False)]


async def test_who_watches_gets_what_was_missed(house: House) -> None:
    await house.answers(bid(ANNA, up_to=4_000), bid(BEN, 1_500), bid(ANNA, up_to=5_000, bid_id=2))
    for since in range(5):
        answer = watched(await house.ask(Watch(AUCTION, since, [])))
        assert (answer.seq, answer.first) == (4, since + 1)
        assert [event["seq"] for event in listed(answer.events)] == list(range(since + 1, 5))
    assert listed(watched(await house.ask(Watch(AUCTION, 3, []))).events) == [{"seq": 4, "at": NOW, "kind": "private"}]
    ahead = watched(await house.ask(Watch(AUCTION, 5, [])))
    assert (ahead.seq, ahead.first, ahead.events) == (4, 5, b"")


async def test_who_missed_too_much_gets_as_much_as_there_is(house: House) -> None:
    for number in range(RESUME_EVENTS_MAX):
        house.take(Recorder(), bid(ANNA, up_to=1_000 + number, bid_id=number))
    assert viewed(await house.ask(GET)).seq == RESUME_EVENTS_MAX + 1
    too_old, oldest = await house.answers(Watch(AUCTION, 0, []), Watch(AUCTION, 1, []))
    assert watched(too_old) == watched(oldest)
    assert watched(oldest).first == 2
    assert len(listed(watched(oldest).events)) == RESUME_EVENTS_MAX


async def test_who_asks_for_nothing_older_gets_as_much_as_fits(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    await house.answers(*(bid(ANNA, up_to=1_000 + number, bid_id=number) for number in range(9)))
    whole = watched(await house.ask(Watch(AUCTION, 0, [])))
    assert (await house.ask(Watch(AUCTION, None, []))) == whole
    last = listed(whole.events)[-3:]
    size = sum(len(json.dumps(event, separators=(",", ":"))) + 1 for event in last)
    for bytes_max, count in ((size, 3), (size - 1, 2), (0, 0)):
        monkeypatch.setattr(entities, "TOPIC_EVENTS_BYTES_MAX", bytes_max)
        some = watched(await house.ask(Watch(AUCTION, None, [])))
        assert listed(some.events) == (last[-count:] if count else [])
        assert (some.first, some.snapshot) == (some.seq + 1 - count, whole.snapshot)


async def test_events_stand_right_around_a_subscription_within_one_turn(house: House) -> None:
    watcher, bidder = Recorder(), Recorder()
    await watcher.answer(*house.take(watcher, Watch(AUCTION, None, [])))
    watcher.messages.clear()
    _, topic, _ = house.take(watcher, bid(ANNA, 1_000), Watch(AUCTION, None, []), bid(BEN, 2_000, bid_id=2))
    house.take(bidder, bid(CLEO, 3_000))
    await watcher.events(4)
    shown = []
    for message in watcher.messages:
        if isinstance(message, Published):
            shown += [("event", seq) for seq in seqs([message])]
        elif isinstance(message, Answered) and message.request == topic:
            shown.append(("subscribed", watched(message.answer).seq))
    assert shown == [("event", 2), ("subscribed", 2), ("event", 3), ("event", 4)]
    # Who only bids gets no events.
    assert bidder.published == []


async def test_who_subscribes_while_bids_wait_gets_them_once(house: House) -> None:
    outlet, late = Recorder(), Recorder()
    await outlet.answer(*house.take(outlet, Watch(AUCTION, None, [])))
    house.journal.hold()
    house.take(outlet, bid(ANNA, 1_000))
    await turns(lambda: len(house.journal.appends) == 2)
    (topic,) = house.take(late, Watch(AUCTION, 0, []))
    house.take(outlet, bid(BEN, 2_000))
    house.journal.let_go()
    await late.events(3)
    answer = watched(late.answers[topic])
    assert [event["seq"] for event in listed(answer.events)] == [1, 2]
    # What came before its `subscribed` is covered by it; after it, nothing is missing.
    after = late.messages[late.messages.index(Answered(topic, answer)) + 1 :]
    assert seqs([message for message in after if isinstance(message, Published)]) == [3]
    # Nor does it come before it: what was decided earlier is not for this outlet.
    assert seqs(late.published) == [3]
    assert seqs(outlet.published) == [2, 3]


async def test_a_batch_of_events_is_one_frame(house: House) -> None:
    watcher = Recorder()
    await watcher.answer(*house.take(watcher, Watch(AUCTION, None, [])))
    house.take(Recorder(), *(bid(BEN if n % 2 else ANNA, 1_000 + 500 * n, bid_id=n) for n in range(8)))
    await watcher.events(9)
    assert [(frame.first, frame.last) for frame in watcher.published] == [(2, 9)]


async def test_unsubscribing_and_leaving_end_the_events(house: House) -> None:
    await house.ask(opening(OTHER))
    one, two, three = Recorder(), Recorder(), Recorder()
    for outlet in (one, two, three):
        numbers = house.take(outlet, Watch(AUCTION, None, []), Watch(OTHER, None, []))
        await outlet.answer(numbers[-1])
    house.take(two, Unsubscribe(AUCTION))
    house.take(two, Unsubscribe(AUCTION))
    three.is_gone = True
    house.shard.leave(three)
    await house.answers(bid(ANNA, 1_000), bid(ANNA, 1_000, auction=OTHER))
    assert [frame.topic for frame in one.published] == [AUCTION, OTHER]
    assert [frame.topic for frame in two.published] == [OTHER]
    assert three.published == []
    await house.at_rest()
    house.shard.leave(one)
    house.shard.leave(two)
    assert not house.shard._watchers


async def test_who_left_while_its_auction_was_read_is_not_kept(house: House, start: Start) -> None:
    second = await start(house.store)
    second.journal.before_load.clear()
    outlet = Recorder()
    (number,) = second.take(outlet, Watch(AUCTION, None, []))
    outlet.is_gone = True
    second.shard.leave(outlet)
    second.journal.before_load.set()
    await outlet.answer(number)
    assert not second.shard._watchers


async def test_a_snapshot_goes_with_the_events_and_is_never_ahead_of_them(house: House) -> None:
    watcher = Recorder()
    await watcher.answer(*house.take(watcher, Watch(AUCTION, None, [])))
    house.journal.hold()
    house.take(Recorder(), bid(ANNA, 1_000))
    await turns(lambda: len(house.journal.appends) == 2)
    # Decided while the turn before it waits for its commit.
    house.take(Recorder(), bid(BEN, 2_000), bid(CLEO, 3_000))
    house.journal.let_go()
    await watcher.events(4)
    first, second = watcher.published
    assert (first.last, told(first)) == (2, (1, 1_000))
    assert (second.last, told(second)) == (4, (3, 3_000))


async def test_what_is_never_dropped_stands_beside_the_events(start: Start) -> None:
    house, watcher = await start(), Recorder()
    await house.ask(opening(soft_close=SOFT_CLOSE))
    await watcher.answer(*house.take(watcher, Watch(AUCTION, None, [])))
    house.now = END - 1_000
    house.take(Recorder(), bid(ANNA, 1_000), bid(BEN, 2_000))
    house.now = END + 40_000
    house.take(Recorder(), bid(ANNA, 3_000, bid_id=2))
    house.now = END + SOFT_CLOSE.max_extension_ms
    await house.ask(GET)
    events = [event for frame in watcher.published for event in listed(frame.events)]
    kept = [event for frame in watcher.published for event in listed(frame.kept)]
    assert kept == [event for event in events if event["kind"] != "bid_placed"]
    assert [event["kind"] for event in kept] == ["extended", "extended", "ended"]


async def test_in_the_midst_of_a_turn_there_is_no_snapshot(house: House) -> None:
    watcher, other = Recorder(), Recorder()
    await watcher.answer(*house.take(watcher, Watch(AUCTION, None, [])))
    house.take(other, bid(ANNA, 1_000), Watch(AUCTION, None, []), bid(BEN, 2_000), Watch(AUCTION, None, []))
    await watcher.events(3)
    first, second = watcher.published
    assert (first.last, first.snapshot) == (2, None)
    assert (second.last, told(second)) == (3, (2, 2_000))


async def test_without_watchers_nothing_is_encoded(house: House) -> None:
    await house.ask(bid(ANNA, 1_000))
    house.take(Recorder(), bid(BEN, 2_000))
    assert (house.shard._turn.watched, house.shard._turn.steps[0]) == ({}, house.shard._turn.steps[-1])


def told(published: Published) -> tuple[int, int]:
    """How many bids there are and what the price is, by a frame's snapshot."""
    assert published.snapshot is not None
    snapshot = json.loads(published.snapshot)
    return snapshot["bids"], snapshot["price"]


# Presence


async def test_viewers_are_summed_and_told_to_who_watches(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = LoopClock(monkeypatch)
    one, two, stranger = Recorder(), Recorder(), Recorder()
    for outlet in (one, two):
        await outlet.answer(*house.take(outlet, Watch(AUCTION, None, [])))
    house.take(one, Viewers(AUCTION, 3))
    house.take(stranger, Viewers(AUCTION, 9))
    # Until all have counted, one gateway's viewers are not all there are.
    await clock.advance(999)
    house.take(two, Viewers(AUCTION, 4))
    assert (viewers(one), viewers(two)) == ([], [])
    await clock.advance(1)
    assert (viewers(one), viewers(two), viewers(stranger)) == ([7], [7], [])
    house.take(one, Viewers(AUCTION, 1))
    assert viewers(one) == [7]
    await clock.advance(1_000)
    assert (viewers(one), viewers(two)) == ([7, 5], [7, 5])
    await clock.advance(1_000)
    house.take(one, Viewers(AUCTION, 1))
    assert viewers(two) == [7, 5]
    # Who leaves takes its viewers with it.
    two.is_gone = True
    house.shard.leave(two)
    assert viewers(one) == [7, 5, 1]
    house.take(one, Unsubscribe(AUCTION))
    await clock.advance(10_000)
    assert viewers(one) == [7, 5, 1]
    assert house.shard._audiences._audiences == {}
    assert house.deaths == []


async def test_a_full_room_is_told_less_often(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = LoopClock(monkeypatch)
    outlet = Recorder()
    await outlet.answer(*house.take(outlet, Watch(AUCTION, None, [])))
    house.take(outlet, Viewers(AUCTION, 10_000))
    await clock.advance(1_000)
    house.take(outlet, Viewers(AUCTION, 9_999))
    await clock.advance(9_999)
    assert viewers(outlet) == [10_000]
    await clock.advance(1)
    assert viewers(outlet) == [10_000, 9_999]


async def test_viewers_wake_nobody(house: House) -> None:
    await house.put_to_sleep()
    house.take(Recorder(), Viewers(AUCTION, 1))
    assert not house.is_awake()
    assert house.shard._line == 0


def viewers(outlet: Recorder) -> list[int]:
    return [message.viewers for message in outlet.messages if isinstance(message, Presence)]


# The end


async def test_stop_answers_what_was_taken_and_keeps_snapshots(house: House, start: Start) -> None:
    await house.ask(opening(OTHER))
    house.journal.hold()
    outlet = Recorder()
    (first,) = house.take(outlet, bid(ANNA, 1_000))
    await turns(lambda: len(house.journal.appends) == 3)
    (second,) = house.take(outlet, bid(BEN, 2_000))
    stopping = asyncio.create_task(house.shard.stop())
    await quiet()
    (refused,) = house.take(outlet, bid(CLEO, 9_000))
    assert code(outlet.answers[refused]) == "unavailable"
    assert not stopping.done()
    house.journal.let_go()
    await stopping
    assert [accepted(outlet.answers[number]).seq for number in (first, second)] == [2, 3]
    assert {auction: saved.seq for auction, saved in house.store.snapshots.items()} == {AUCTION: 3, OTHER: 1}
    assert house.deaths == []
    assert house.shard._timer is None or house.shard._timer.cancelled()

    later = await start(house.store)
    assert viewed(await later.ask(GET)).snapshot.price == 2_000


async def test_stop_keeps_no_snapshot_twice(house: House) -> None:
    await house.put_to_sleep()
    saved = house.store.snapshots[AUCTION]
    await house.ask(GET)
    house.journal.log.clear()
    await house.shard.stop()
    assert house.journal.log == []
    assert house.store.snapshots[AUCTION] is saved


async def test_stop_waits_for_what_is_being_read(house: House, start: Start) -> None:
    second = await start(house.store)
    second.journal.before_load.clear()
    outlet = Recorder()
    (number,) = second.take(outlet, bid(ANNA, 1_000))
    stopping = asyncio.create_task(second.shard.stop())
    await quiet()
    assert not stopping.done()
    second.journal.before_load.set()
    await stopping
    assert accepted(outlet.answers[number]).seq == 2


async def test_stop_waits_for_a_verdict_that_is_being_read(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entities, "RESUME_EVENTS_MAX", 1)
    house = await start()
    _, verdict, _ = await house.answers(opening(), bid(ANNA, 1_000), bid(BEN, 2_000, bid_id=2))
    outlet = Recorder()
    (number,) = house.take(outlet, bid(ANNA, 1_000))
    await house.shard.stop()
    assert outlet.answers[number] == verdict


async def test_stop_waits_for_snapshots_whatever_else_ends_meanwhile(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entities, "RESUME_EVENTS_MAX", 1)
    house = await start()
    _, verdict, _ = await house.answers(opening(), bid(ANNA, 1_000), bid(BEN, 2_000, bid_id=2))
    house.journal.before_save.clear()
    outlet = Recorder()
    (number,) = house.take(outlet, bid(ANNA, 1_000))
    stopping = asyncio.create_task(house.shard.stop())
    # The last thing that is asked is answered while the snapshots are on their way.
    assert await outlet.answer(number) == verdict
    await quiet()
    assert not stopping.done()
    house.journal.before_save.set()
    await stopping
    assert house.store.snapshots[AUCTION].seq == 3


async def test_who_unsubscribes_while_it_stops_is_not_refused(house: House) -> None:
    outlet = Recorder()
    await outlet.answer(*house.take(outlet, Watch(AUCTION, None, [])))
    outlet.messages.clear()
    house.journal.hold()
    house.take(Recorder(), bid(ANNA, 1_000))
    await turns(lambda: len(house.journal.appends) == 2)
    stopping = asyncio.create_task(house.shard.stop())
    await quiet()
    house.take(outlet, Unsubscribe(AUCTION))
    house.journal.let_go()
    await stopping
    assert outlet.messages == []


async def test_a_shard_with_nothing_to_do_stops(start: Start) -> None:
    house = await start()
    await house.shard.stop()
    assert house.deaths == []


async def test_it_does_not_start_on_a_journal_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    house = House()

    async def fail() -> list[tuple[UUID, int]]:
        raise Unreadable("away")

    monkeypatch.setattr(house.journal, "deadlines", fail)
    with pytest.raises(Unreadable):
        await house.start()
    assert not house.shard._tasks


async def test_ask_is_the_same_turn_without_a_link(house: House) -> None:
    verdict = await house.ask(bid(ANNA, 1_000))
    outlet = Recorder()
    assert await outlet.answer(*house.take(outlet, bid(ANNA, 1_000))) == verdict
    topic = watched(await house.ask(Watch(AUCTION, 0, [ANNA])))
    assert topic.you == [You(1, 1_000, is_leading=True)]
    # The outlet of an answered question takes what comes after, and does nothing with it.
    assert accepted(await house.ask(bid(BEN, 2_000))).seq == 3
