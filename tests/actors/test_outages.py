"""A shard without its journal: what it does meanwhile, how it comes back, and how it gives the time back."""

import asyncio
import random
from collections.abc import Sequence
from uuid import UUID

import pytest

from actors import shard
from actors.directory import slot_of
from actors.journal import EntityRow, Life, Loaded, Row, Unreadable
from actors.memory import MemoryStore
from actors.messages import Answered, GetAuction, Unsubscribe, Watch
from engine.commands import SoftClose
from engine.events import Extended, decode
from engine.limits import OUTAGE_MS, READ_AHEAD_MS, READ_TRIES, SLOTS
from engine.rejections import Rejection
from tests.engine.support import ANNA, AUCTION, BEN, CLEO, END, NOW, SOFT_CLOSE
from tests.support.shards import House, Recorder, Start, accepted, bid, code, kinds, listed, opening, seqs, viewed
from tests.support.waiting import quiet, turns, until

OTHER = UUID("a0000000-0000-4000-8000-000000000001")
GET = GetAuction(AUCTION, None)


@pytest.fixture(autouse=True)
def _settle_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "SETTLE_RETRY_MS", 1)


def beat(house: House) -> None:
    """The moment has come to give a sign of life."""
    house.shard._is_sign_wanted = True
    house.shard._work.set()


async def lose_journal(house: House) -> None:
    """The database goes away, and the shard has noticed."""
    house.journal.is_away = True
    beat(house)
    await turns(lambda: house.shard._is_away)


async def find_journal(house: House) -> None:
    """The database is back, and the shard in service."""
    house.journal.is_away = False
    await until(lambda: not house.shard._is_away)


async def notice(house: House) -> None:
    """The shard notices that it gave no sign of life, and comes back."""
    settled = len(house.journal.settled)
    beat(house)
    await turns(lambda: len(house.journal.settled) > settled and not house.shard._is_away)


def extensions(store: MemoryStore, auction: UUID = AUCTION) -> list[tuple[int, int, int | None]]:
    """When an outage was paid back, until when the auction goes on, and its new cap."""
    found = []
    for row in store.journal[auction].values():
        event = decode(row.kind, row.version, row.body)
        if isinstance(event, Extended) and event.reason == "outage":
            found.append((row.at, event.end_time, event.end_time_max))
    return found


# Away


async def test_while_it_is_away_all_is_refused_and_nothing_leaves(house: House) -> None:
    watcher, outlet = Recorder(), Recorder()
    await watcher.answer(*house.take(watcher, Watch(AUCTION, None, [])))
    watcher.messages.clear()
    house.journal.is_away = True
    on_their_way = house.take(outlet, bid(ANNA, 1_000), GET)
    await turns(lambda: house.shard._is_away)
    refused = house.take(outlet, bid(BEN, 2_000), GET, Watch(AUCTION, None, []), GetAuction(OTHER, None))
    await quiet()
    assert list(outlet.answers) == refused
    for answer in outlet.answers.values():
        assert isinstance(answer, Rejection)
        assert (answer.code, answer.is_transient) == ("unavailable", True)
    assert watcher.messages == []
    assert kinds(house.store) == ["opened"]

    await find_journal(house)
    assert accepted(await outlet.answer(on_their_way[0])).seq == 2
    assert viewed(await outlet.answer(on_their_way[1])).snapshot.price == 1_000
    assert seqs(watcher.published) == [2]
    # It was never taken up, so the same bid is a new one.
    assert accepted(await house.ask(bid(BEN, 2_000))).seq == 3
    assert house.deaths == []
    assert house.shard._line == 0


@pytest.mark.parametrize("lost", ["write", "reply"])
@pytest.mark.parametrize("is_long", [False, True])
async def test_bids_on_their_way_are_acknowledged_once_and_in_order(house: House, lost: str, is_long: bool) -> None:
    watcher, outlet = Recorder(), Recorder()
    await watcher.answer(*house.take(watcher, Watch(AUCTION, None, [])))
    epoch = house.journal.epoch
    house.journal.hold()
    house.journal.loses = "write" if lost == "write" else "reply"
    numbers = house.take(outlet, bid(ANNA, 1_000))
    await turns(lambda: len(house.journal.appends) == 2)
    # Decided on what may not be in the journal.
    numbers += house.take(outlet, bid(BEN, 2_000), GET)
    numbers += house.take(outlet, bid(BEN, 1_500, bid_id=2), bid(CLEO, 3_000))
    if is_long:
        house.be_out(NOW + 10_000)
    house.journal.let_go()
    await outlet.answer(numbers[-1])
    assert [message.request for message in outlet.messages if isinstance(message, Answered)] == numbers
    assert [accepted(outlet.answers[number]).seq for number in (numbers[0], numbers[1], numbers[4])] == [2, 3, 4]
    assert viewed(outlet.answers[numbers[2]]).snapshot.price == 2_000
    assert code(outlet.answers[numbers[3]]) == "max_not_raised"
    assert [row.seq for row in house.journal.settled[0]] == [2]
    assert kinds(house.store) == ["opened", "bid_placed", "bid_placed", "bid_placed"]
    assert seqs(watcher.published) == [2, 3, 4]
    assert house.journal.epoch > epoch
    assert house.deaths == []


async def test_a_write_that_fails_again_and_again_is_settled_again_and_again(house: House) -> None:
    outlet = Recorder()
    house.journal.is_away = True
    (number,) = house.take(outlet, bid(ANNA, 1_000))
    await until(lambda: len(house.journal.settled) >= 3)
    # It comes, takes a new epoch, and is away again before the rows are stored.
    house.journal.loses = "write"
    house.journal.is_away = False
    assert accepted(await outlet.answer(number)).seq == 2
    assert all([row.seq for row in rows] == [2] for rows in house.journal.settled)
    assert kinds(house.store) == ["opened", "bid_placed"]


async def test_what_is_settled_is_what_was_decided_whatever_came_since(house: House) -> None:
    outlet = Recorder()
    house.journal.loses = "write"
    house.journal.hold()
    (first,) = house.take(outlet, bid(ANNA, 1_000))
    await turns(lambda: len(house.journal.appends) == 2)
    house.now = NOW + 500
    (second,) = house.take(outlet, bid(BEN, 2_000))
    house.journal.let_go()
    answers = [accepted(await outlet.answer(number)) for number in (first, second)]
    assert [(answer.seq, answer.at) for answer in answers] == [(2, NOW), (3, NOW + 500)]
    assert [answer.hash for answer in answers] == [house.store.journal[AUCTION][seq].hash for seq in (2, 3)]


async def test_unsubscribing_while_it_is_away_ends_the_events(house: House) -> None:
    outlet = Recorder()
    await outlet.answer(*house.take(outlet, Watch(AUCTION, None, [])))
    await lose_journal(house)
    outlet.messages.clear()
    house.take(outlet, Unsubscribe(AUCTION))
    await find_journal(house)
    await house.ask(bid(ANNA, 1_000))
    assert outlet.messages == []


async def test_what_waits_for_its_auction_to_be_read_is_told_that_it_cannot_be(house: House) -> None:
    await house.put_to_sleep()
    house.journal.before_load.clear()
    outlet = Recorder()
    numbers = house.take(outlet, bid(ANNA, 1_000), GET)
    await turns(lambda: len(house.journal.loads) == 2)
    await lose_journal(house)
    house.journal.before_load.set()
    await quiet()
    # Not even that is said before it is sure that this process owns the shard.
    assert outlet.messages == []
    await find_journal(house)
    assert [code(await outlet.answer(number)) for number in numbers] == ["unavailable"] * 2


async def test_what_waited_over_an_outage_counts_as_of_its_end(house: House) -> None:
    await house.put_to_sleep()
    house.journal.before_load.clear()
    outlet = Recorder()
    (number,) = house.take(outlet, bid(ANNA, 1_000))
    await turns(lambda: len(house.journal.loads) == 2)
    house.be_out(NOW + 20_000)
    await notice(house)
    house.journal.before_load.set()
    answer = accepted(await outlet.answer(number))
    assert (answer.seq, answer.at) == (2, NOW + 20_000)
    assert house.deaths == []


async def test_what_is_read_for_somebody_is_not_read_again_to_be_paid_back(house: House) -> None:
    house.now = END - 10_000
    await house.put_to_sleep()
    house.journal.before_load.clear()
    outlet = Recorder()
    (number,) = house.take(outlet, bid(ANNA, 1_000))
    await turns(lambda: len(house.journal.loads) == 2)
    house.be_out(END)
    beat(house)
    await turns(lambda: house.journal.closings > 0)
    await quiet()
    assert house.shard._is_away
    house.journal.before_load.set()
    assert accepted(await outlet.answer(number)).end_time == END + 10_000
    assert house.journal.loads == [AUCTION, AUCTION]
    assert kinds(house.store) == ["opened", "extended", "bid_placed"]


async def test_snapshots_that_an_outage_kept_from_being_saved_are_done_without(house: House) -> None:
    """They only save time, and what could not be saved once may never be: it must not be an outage again and again."""
    await house.ask(bid(ANNA, 1_000))
    house.journal.is_away = True
    house.shard.sleep_idle(house.now)
    await turns(lambda: house.shard._is_away)
    await find_journal(house)
    await house.at_rest()
    assert not house.shard._unsaved
    assert house.journal.log.count("save 1") == 1
    assert house.store.snapshots == {}
    assert accepted(await house.ask(bid(BEN, 2_000))).seq == 3
    assert house.deaths == []


async def test_of_a_snapshot_that_could_not_be_saved_a_newer_one_is_saved(house: House) -> None:
    await house.ask(bid(ANNA, 1_000))
    house.journal.is_away = True
    house.shard.sleep_idle(house.now)
    await turns(lambda: house.shard._is_away)
    await find_journal(house)
    await house.ask(bid(BEN, 2_000))
    await house.put_to_sleep()
    assert house.store.snapshots[AUCTION].seq == 3


async def test_nobody_is_put_to_sleep_while_it_is_away(house: House) -> None:
    """Time may be owed to them, and an outage may last longer than auctions stay awake unused."""
    await lose_journal(house)
    house.shard.sleep_idle(NOW + 1_000_000)
    assert house.is_awake()
    await find_journal(house)
    house.shard.sleep_idle(NOW + 1_000_000)
    assert not house.is_awake()


async def test_stop_waits_until_what_was_taken_is_settled(house: House) -> None:
    outlet = Recorder()
    house.journal.is_away = True
    (number,) = house.take(outlet, bid(ANNA, 1_000))
    await turns(lambda: house.shard._is_away)
    stopping = asyncio.create_task(house.shard.stop())
    await until(lambda: len(house.journal.settled) >= 3)
    assert not stopping.done()
    assert outlet.messages == []
    house.journal.is_away = False
    await stopping
    assert accepted(outlet.answers[number]).seq == 2
    assert house.store.snapshots[AUCTION].seq == 2
    assert house.deaths == []


async def test_a_deadline_is_not_lost_while_it_stops_without_its_journal(house: House, start: Start) -> None:
    house.now = END - 2_000
    await house.ask(bid(ANNA, 1_000))
    house.journal.is_away = True
    house.take(Recorder(), GET)
    await turns(lambda: house.shard._is_away)
    stopping = asyncio.create_task(house.shard.stop())
    house.be_out(END + 1_000)
    house.shard._fire()
    house.journal.is_away = False
    await stopping
    later = await start(house.store, now=END + 2_000)
    assert kinds(later.store) == ["opened", "bid_placed", "extended"]
    assert accepted(await later.ask(bid(BEN, 2_000))).seq == 4


# Deadlines


async def test_no_deadline_is_executed_while_it_is_away(house: House) -> None:
    watcher = Recorder()
    await watcher.answer(*house.take(watcher, Watch(AUCTION, None, [])))
    house.now = END - 2_000
    await lose_journal(house)
    house.be_out(END + 10_000)
    house.shard._fire()
    await quiet()
    assert kinds(house.store) == ["opened"]
    await find_journal(house)
    await quiet()
    # So much is left as was left when it went away, or as long as it was away.
    assert extensions(house.store) == [(END + 10_000, END + 22_000, None)]
    assert kinds(house.store) == ["opened", "extended"]
    assert house.store.entities[AUCTION].due_at == END + 22_000
    assert [event["end_time"] for event in listed(watcher.published[0].events)] == [END + 22_000]
    assert accepted(await house.ask(bid(ANNA, 1_000))).end_time == END + 22_000
    house.now = END + 22_000
    house.shard._fire()
    await watcher.events(4)
    assert kinds(house.store) == ["opened", "extended", "bid_placed", "ended"]


async def test_deadlines_are_armed_again_when_it_is_back(house: House) -> None:
    await house.ask(opening(OTHER, end_time=NOW + 100_000))
    house.now = NOW + 20_000
    await lose_journal(house)
    loads = len(house.journal.loads)
    house.now = NOW + 100_000
    house.shard._fire()
    await quiet()
    # Nobody is woken for it, and it is not forgotten.
    assert house.shard._waking == {}
    assert house.shard._overdue == set()
    assert len(house.journal.loads) == loads
    await find_journal(house)
    await until(lambda: kinds(house.store, OTHER) == ["opened", "ended"])


async def test_whoever_wakes_after_a_deadline_does_not_execute_it_but_moves_it(house: House) -> None:
    """The process was stopped, and has not noticed yet: the first thing it hears is its own timer, then a bid."""
    house.now = END - 2_000
    await house.ask(GET)
    house.be_out(END + 30_000)
    house.shard._fire()
    outlet = Recorder()
    (number,) = house.take(outlet, bid(ANNA, 1_000))
    answer = accepted(await outlet.answer(number))
    assert (answer.seq, answer.at, answer.end_time) == (3, END + 30_000, END + 62_000)
    assert kinds(house.store) == ["opened", "extended", "bid_placed"]


async def test_a_deadline_waits_for_a_sign_of_life_after_it(house: House) -> None:
    await house.ask(opening(OTHER))
    house.journal.hold()
    outlet = Recorder()
    house.take(outlet, bid(ANNA, 1_000, auction=OTHER))
    await turns(lambda: len(house.journal.appends) == 3)
    house.now = END
    house.shard._fire()
    (late,) = house.take(outlet, GET)
    await quiet()
    # Nobody knows yet if this shard was there until the end.
    assert house.shard._awake[AUCTION].seq == 1
    house.journal.let_go()
    assert viewed(await outlet.answer(late)).ended_at == END


async def test_what_comes_while_a_deadline_waits_keeps_its_order_and_its_moment(start: Start) -> None:
    house = await start()
    await house.answers(opening(OTHER), opening(end_time=NOW + 5_000, start_time=NOW + 1_000), Watch(AUCTION, None, []))
    house.journal.hold()
    outlet = Recorder()
    house.take(outlet, bid(CLEO, 1_000, auction=OTHER))
    await turns(lambda: len(house.journal.appends) == 2)
    numbers = []
    for moment, payloads in (
        (999, [bid(ANNA, 1_000)]),
        (1_003, [bid(ANNA, 1_000, bid_id=2), GET]),
        (1_005, [bid(BEN, 2_000, bid_id=3), Unsubscribe(AUCTION), bid(ANNA, 1_500, bid_id=4)]),
        (4_999, [bid(CLEO, 3_000, bid_id=5)]),
        (5_001, [bid(BEN, 9_000, bid_id=6), GET]),
    ):
        house.now = NOW + moment
        numbers += house.take(outlet, *payloads)
    del numbers[4]  # It has no answer.
    house.now = NOW + 6_000
    await quiet()
    assert outlet.messages == []
    house.journal.let_go()
    await outlet.answer(numbers[-1])
    answers = [message for message in outlet.messages if isinstance(message, Answered)]
    assert [message.request for message in answers][1:] == numbers
    early, first, get, second, low, third, late, last = (outlet.answers[number] for number in numbers)
    assert [code(answer) for answer in (early, low, late)] == ["not_started", "bid_too_low", "ended"]
    assert [accepted(answer).at - NOW for answer in (first, second, third)] == [1_003, 1_005, 4_999]
    assert viewed(get).snapshot.price == 1_000
    assert (viewed(last).snapshot.price, viewed(last).ended_at) == (3_000, NOW + 5_001)
    assert [(row.kind, row.at - NOW) for row in house.store.journal[AUCTION].values()] == [
        ("scheduled", 0),
        ("opened", 1_003),
        ("bid_placed", 1_003),
        ("bid_placed", 1_005),
        ("bid_placed", 4_999),
        ("ended", 5_001),
    ]
    assert house.shard._line == 0


async def test_a_deadline_waits_for_the_databases_clock(house: House) -> None:
    behind = 7
    house.store.clock = lambda: house.now - behind
    house.now = END
    house.shard._fire()
    checks = house.journal.checks
    await until(lambda: house.journal.checks >= checks + 2)
    assert kinds(house.store) == ["opened"]
    outlet = Recorder()
    numbers = house.take(outlet, bid(ANNA, 1_000))
    house.now = END + behind
    assert code(await outlet.answer(*numbers)) == "ended"
    # It ends at the moment of the first who comes too late.
    assert [(row.kind, row.at) for row in house.store.journal[AUCTION].values()] == [("opened", NOW), ("ended", END)]


# Giving back


WINDOW = 60_000


@pytest.mark.parametrize("how", ["restarted", "stopped", "without its journal"])
@pytest.mark.parametrize(
    ("down", "back", "end_time"),
    [
        # As much is left as was left...
        (END - 20_000, END - 15_000, END + 5_000),
        (END - 1, END + 1_001, None),
        # ... or as it took, if that is more...
        (END - 2_000, END + 10_000, END + 22_000),
        # ... but a minute at the most.
        (END - 2_000, END + 500_000, END + 560_000),
        (END - 90_000, END + 500_000, END + 590_000),
        # Away from its end nobody was kept from bidding at the end.
        (END - WINDOW - 20_000, END - WINDOW, END),
        (END - WINDOW - 20_000, END - WINDOW + 1, END - WINDOW + 1 + WINDOW + 20_000),
        (NOW + 5_000, NOW + 500_000, END),
        # Up to a second is no outage.
        (END - 2_000, END - 2_000 + OUTAGE_MS, END),
        (END - 2_000, END - 2_000 + OUTAGE_MS + 1, END + OUTAGE_MS + 1),
    ],
)
async def test_an_auction_without_soft_close_gets_its_time_back(
    house: House, start: Start, how: str, down: int, back: int, end_time: int | None
) -> None:
    if end_time is None:
        end_time = back + (back - down)
    await house.ask(bid(ANNA, 1_000))
    house.now = down
    if how == "restarted":
        await house.kill()
        house = await start(house.store, now=back)
    elif how == "stopped":
        house.be_out(back)
        if back - down > OUTAGE_MS:
            await notice(house)
    else:
        await lose_journal(house)
        house.be_out(back)
        await find_journal(house)
    assert viewed(await house.ask(GET)).snapshot.end_time == end_time
    assert extensions(house.store) == ([] if end_time == END else [(back, end_time, None)])
    assert house.store.entities[AUCTION].due_at == end_time
    assert house.store.shards[0].down_at is None
    assert house.deaths == []


@pytest.mark.parametrize("is_restarted", [False, True])
async def test_with_soft_close_the_window_is_its_own_and_the_cap_moves_along(start: Start, is_restarted: bool) -> None:
    house = await start()
    small = SoftClose(window_ms=5_000, extension_ms=5_000, max_extension_ms=20_000)
    large = SoftClose(window_ms=600_000, extension_ms=5_000, max_extension_ms=0)
    auctions = [UUID(int=number) for number in range(3)]
    await house.answers(
        *(opening(auction, soft_close=rule) for auction, rule in zip(auctions, (small, large, SOFT_CLOSE), strict=True))
    )
    house.now = END - 30_000
    await house.ask(GetAuction(auctions[0], None))
    if is_restarted:
        await house.kill()
        house = await start(house.store, now=END - 10_000)
    else:
        house.be_out(END - 10_000)
        await notice(house)
    end_time = END - 10_000 + 30_000
    assert extensions(house.store, auctions[0]) == []
    assert extensions(house.store, auctions[1]) == [(END - 10_000, end_time, end_time)]
    assert extensions(house.store, auctions[2]) == [(END - 10_000, end_time, end_time + 150_000)]
    # A late bid moves the end up to the cap that has moved.
    house.now = end_time - 1
    assert accepted(await house.ask(bid(ANNA, 1_000, auction=auctions[1]))).end_time == end_time
    assert accepted(await house.ask(bid(ANNA, 1_000, auction=auctions[2]))).end_time == end_time - 1 + 90_000


@pytest.mark.parametrize("is_restarted", [False, True])
@pytest.mark.parametrize(
    ("start_time", "end_time", "expected"),
    [
        # Since it was to open so much was lost: the rest of the outage was not its own.
        (NOW + 5_000, NOW + 30_000, ["scheduled", "opened", "extended"]),
        (NOW + 5_000, NOW + 15_000, ["scheduled", "opened", "extended"]),
        (NOW + 5_000, NOW + 500_000, ["scheduled", "opened"]),
        # To open later: nothing was lost.
        (NOW + 20_001, NOW + 30_000, ["scheduled"]),
    ],
)
async def test_what_was_to_open_meanwhile_opens_on_return(
    start: Start, is_restarted: bool, start_time: int, end_time: int, expected: list[str]
) -> None:
    house = await start()
    await house.ask(opening(start_time=start_time, end_time=end_time))
    back = NOW + 20_000
    if is_restarted:
        await house.kill()
        house = await start(house.store, now=back)
    else:
        house.be_out(back)
        await notice(house)
    await quiet()
    assert kinds(house.store) == expected
    assert [row.at for row in house.store.journal[AUCTION].values()] == [NOW, back, back][: len(expected)]
    if "extended" in expected:
        left = max(end_time - start_time, back - start_time)
        assert extensions(house.store) == [(back, back + left, None)]
        assert house.store.entities[AUCTION].due_at == back + left


async def test_what_was_to_open_earlier_but_was_not_opened_lost_the_whole_outage(start: Start) -> None:
    """Its moment had come, but no sign of life after it."""
    house = await start()
    await house.ask(opening(start_time=NOW + 1_000, end_time=NOW + 30_000))
    house.now = NOW + 2_000
    await house.kill()
    house = await start(house.store, now=NOW + 12_000)
    assert extensions(house.store) == [(NOW + 12_000, NOW + 12_000 + 28_000, None)]


@pytest.mark.parametrize("is_restarted", [False, True])
async def test_what_was_over_before_is_over(house: House, start: Start, is_restarted: bool) -> None:
    await house.ask(bid(ANNA, 1_000))
    # It lived at the end, and had no time to say so.
    house.now = END
    if is_restarted:
        await house.kill()
        house = await start(house.store, now=END + 30_000)
    else:
        house.be_out(END + 30_000)
        await notice(house)
        house.shard._fire()
    await turns(lambda: kinds(house.store) == ["opened", "bid_placed", "ended"])
    assert code(await house.ask(bid(BEN, 5_000))) == "ended"
    assert extensions(house.store) == []


async def test_what_has_ended_or_was_cancelled_gets_nothing(house: House) -> None:
    house.now = END
    assert viewed(await house.ask(GET)).snapshot.status == "ended"
    house.be_out(END + 30_000)
    await notice(house)
    await quiet()
    assert kinds(house.store) == ["opened", "ended"]


async def test_each_outage_of_several_is_paid_back(house: House, start: Start) -> None:
    house.now = END - 10_000
    house.be_out(END + 5_000)
    await notice(house)
    assert extensions(house.store) == [(END + 5_000, END + 20_000, None)]
    house.now = END + 12_000
    house.be_out(END + 14_000)
    await notice(house)
    assert extensions(house.store)[1:] == [(END + 14_000, END + 22_000, None)]
    house.now = END + 15_000
    await house.kill()
    house = await start(house.store, now=END + 30_000)
    assert extensions(house.store)[2:] == [(END + 30_000, END + 45_000, None)]
    # Each once: nothing is owed when it comes again at once.
    await house.kill()
    house = await start(house.store, now=END + 30_000)
    assert len(extensions(house.store)) == 3


async def test_bids_that_were_decided_before_the_outage_stand_before_the_payment(house: House) -> None:
    house.now = END - 10_000
    await house.ask(GET)
    house.journal.hold()
    house.be_out(END - 10_000 + OUTAGE_MS)
    outlet = Recorder()
    (number,) = house.take(outlet, bid(ANNA, 1_000))
    await turns(lambda: [row.kind for row in house.journal.appends[-1]] == ["bid_placed"])
    house.be_out(END - 5_000)
    house.journal.let_go()
    answer = accepted(await outlet.answer(number))
    assert (answer.seq, answer.at, answer.end_time) == (2, END - 10_000 + OUTAGE_MS, END)
    await turns(lambda: extensions(house.store) == [(END - 5_000, END + 5_000, None)])
    assert kinds(house.store) == ["opened", "bid_placed", "extended"]


async def test_bids_that_come_after_a_gap_are_decided_when_the_time_has_been_given_back(start: Start) -> None:
    """The process was stopped, and the first thing that it hears is a bid: an end is not to be moved twice."""
    house = await start()
    await house.ask(opening(soft_close=SoftClose(window_ms=30_000, extension_ms=25_000, max_extension_ms=600_000)))
    house.now = END - 20_000
    await house.ask(GET)
    house.be_out(END - 10_000)
    outlet = Recorder()
    numbers = house.take(outlet, bid(ANNA, 1_000), bid(BEN, 2_000, bid_id=2), GET)
    await quiet()
    answers = [accepted(await outlet.answer(number)) for number in numbers[:2]]
    # As much is left as was left, and then the bids' own time.
    assert extensions(house.store) == [(END - 10_000, END + 10_000, END + 610_000)]
    assert [(answer.seq, answer.at, answer.end_time) for answer in answers] == [
        (3, END - 10_000, END + 15_000),
        (5, END - 10_000, END + 15_000),
    ]
    assert kinds(house.store) == ["opened", "extended", "bid_placed", "extended", "bid_placed"]
    assert viewed(await outlet.answer(numbers[2])).seq == 5
    assert house.shard._line == 0


@pytest.mark.parametrize("gap", [OUTAGE_MS, OUTAGE_MS + 1])
async def test_after_a_gap_that_is_an_outage_nothing_is_decided_at_once(house: House, gap: int) -> None:
    house.be_out(NOW + gap)
    house.journal.hold()
    outlet = Recorder()
    (number,) = house.take(outlet, bid(ANNA, 1_000))
    assert (house.shard._awake[AUCTION].seq == 1) == (gap > OUTAGE_MS)
    house.journal.let_go()
    # It takes a sign of life, and no time beside that.
    await turns(lambda: number in outlet.answers)
    answer = accepted(outlet.answers[number])
    assert (answer.seq, answer.at) == (2, NOW + gap)


async def test_a_gap_by_its_own_clock_alone_is_over_with_the_next_sign(house: House) -> None:
    """The database's clock stood still meanwhile: nothing is owed, and it is in service all the same."""
    house.store.clock = lambda: NOW
    house.be_out(NOW + 30_000)
    outlet = Recorder()
    (number,) = house.take(outlet, bid(ANNA, 1_000))
    await turns(lambda: number in outlet.answers)
    assert accepted(outlet.answers[number]).seq == 2
    assert house.journal.settled == []


@pytest.mark.parametrize("lost", ["write", "reply"])
async def test_an_outage_in_the_middle_of_paying_back_is_paid_once(house: House, lost: str) -> None:
    house.now = END - 10_000
    house.be_out(END + 5_000)
    # The sign of life meets a closed fence; the next append is the payment.
    house.journal.loses = "write" if lost == "write" else "reply"
    await notice(house)
    await house.at_rest()
    assert extensions(house.store) == [(END + 5_000, END + 20_000, None)]
    assert house.journal.settled[-1] != []
    assert house.store.shards[0].down_at is None
    assert house.deaths == []


async def test_an_outage_goes_on_while_its_payment_cannot_be_stored(house: House) -> None:
    house.now = END - 10_000
    house.be_out(END + 5_000)
    house.journal.hold()
    appends = len(house.journal.appends)
    beat(house)
    await turns(lambda: len(house.journal.appends) == appends + 1)
    assert [row.kind for row in house.journal.appends[-1]] == ["extended"]
    house.be_out(END + 7_000)
    house.journal.let_go()
    await turns(lambda: not house.shard._is_away)
    # The second one begins where the first was paid to, and pays for twice as long as that took.
    assert extensions(house.store) == [(END + 5_000, END + 20_000, None), (END + 11_000, END + 26_000, None)]
    assert house.store.shards[0].down_at is None


@pytest.mark.parametrize("took", [OUTAGE_MS, 1_500, 2_500])
async def test_a_payment_that_takes_long_to_store_comes_to_an_end(
    house: House, monkeypatch: pytest.MonkeyPatch, took: int
) -> None:
    """Each one takes as long as the one before; time that is lost while it is stored is paid with it."""
    house.now = END - 10_000
    house.be_out(END + 5_000)
    append = house.journal.append

    async def append_slowly(rows: Sequence[Row], entities: Sequence[EntityRow], paid_until: int | None = None) -> Life:
        house.be_out(house.now + took)
        return await append(rows, entities, paid_until)

    with monkeypatch.context() as patched:
        patched.setattr(house.journal, "append", append_slowly)
        await notice(house)
    first = (END + 5_000, END + 20_000, None)
    back = END + 5_000 + took + 2 * took
    second = (back, back + 15_000, None)
    assert extensions(house.store) == ([first] if took == OUTAGE_MS else [first, second])
    assert house.store.shards[0].down_at is None
    assert accepted(await house.ask(bid(ANNA, 1_000))).seq == len(house.store.journal[AUCTION])


async def test_who_dies_before_it_has_paid_leaves_the_debt_to_the_next(house: House, start: Start) -> None:
    house.now = END - 10_000
    await house.kill()
    second = House(house.store, now=END + 5_000)
    second.journal.hold()
    starting = asyncio.create_task(second.start())
    await turns(lambda: second.journal.appends != [])
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    await second.kill()
    third = await start(house.store, now=END + 9_000)
    assert extensions(third.store) == [(END + 9_000, END + 9_000 + 19_000, None)]


async def test_who_dies_right_after_it_has_paid_has_paid(house: House, start: Start) -> None:
    house.now = END - 10_000
    await house.kill()
    second = House(house.store, now=END + 5_000)
    second.journal.after_append.clear()
    starting = asyncio.create_task(second.start())
    await turns(lambda: extensions(house.store) != [])
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    await second.kill()
    third = await start(house.store, now=END + 5_500)
    assert extensions(third.store) == [(END + 5_000, END + 20_000, None)]


async def test_who_owes_to_many_reads_them_bit_by_bit_and_goes_on_living(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "READ_AT_ONCE", 2)
    house = await start()
    auctions = [UUID(int=number) for number in range(5)]
    far = UUID(int=99)
    await house.answers(*map(opening, auctions), opening(far, end_time=END + 1_000_000))
    house.now = END - 10_000
    await house.kill()
    second = await start(house.store, now=END)
    assert sorted(second.journal.loads) == auctions
    assert second.journal.checks == 3
    assert all(extensions(second.store, auction) == [(END, END + 10_000, None)] for auction in auctions)
    # All of it in one write.
    assert [len(rows) for rows in second.journal.appends] == [5]


async def test_when_it_is_back_no_more_stay_awake_than_may(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    house = await start()
    auctions = [UUID(int=number) for number in range(5)]
    await house.answers(*map(opening, auctions))
    house.now = END - 10_000
    await house.kill()
    monkeypatch.setattr(shard, "AWAKE_MAX", 2)
    second = await start(house.store, now=END)
    assert all(extensions(second.store, auction) == [(END, END + 10_000, None)] for auction in auctions)
    assert len(second.shard._awake) == 2


async def test_one_that_cannot_be_read_for_now_is_waited_for(house: House) -> None:
    house.now = END - 10_000
    await house.kill()
    second = House(house.store, now=END)
    load = second.journal.load
    errors = [Unreadable("away")] * (READ_TRIES - 1)

    async def fail_at_first(entity_id: UUID, snapshot_version: int) -> Loaded:
        if errors:
            raise errors.pop()
        return await load(entity_id, snapshot_version)

    second.journal.load = fail_at_first  # type: ignore[method-assign]
    await second.start()
    assert extensions(second.store) == [(END, END + 10_000, None)]
    await second.kill()


async def test_one_that_cannot_be_read_again_and_again_holds_the_others_up_no_longer(
    house: House, start: Start
) -> None:
    await house.ask(opening(OTHER))
    house.now = END - 10_000
    await house.kill()
    second = House(house.store, now=END - 5_000)
    second.journal.load_errors[AUCTION] = Unreadable("too large to be read in time")
    await second.start()
    assert second.journal.loads.count(AUCTION) == READ_TRIES
    assert second.journal.loads.count(OTHER) == 1
    assert extensions(second.store, OTHER) == [(END - 5_000, END + 5_000, None)]
    assert code(await second.ask(GET)) == "unavailable"
    assert accepted(await second.ask(bid(ANNA, 1_000, auction=OTHER))).seq == 3
    # Nothing was decided about it.
    assert kinds(second.store) == ["opened"]
    await second.kill()


async def test_what_cannot_be_read_now_is_one_line_and_what_is_broken_is_a_traceback(
    house: House, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """While Postgres is away each request may meet it."""
    second = await start(house.store)
    second.journal.load_errors = {AUCTION: Unreadable("TimeoutError"), OTHER: ValueError("no reader")}
    caplog.clear()
    await second.answers(GET, GetAuction(OTHER, None))
    lines = {record.__dict__["auction"]: record for record in caplog.records}
    assert len(lines) == len(caplog.records) == 2
    passing = lines[AUCTION]
    assert (passing.levelname, passing.exc_info, passing.getMessage()) == (
        "WARNING",
        None,
        "the auction cannot be read now",
    )
    assert passing.__dict__["error"] == "TimeoutError"
    assert lines[OTHER].exc_info is not None


async def test_one_that_cannot_be_read_at_all_keeps_nobody_waiting(house: House, start: Start) -> None:
    await house.ask(opening(OTHER))
    house.now = END - 10_000
    await house.kill()
    row = house.store.journal[AUCTION][1]
    house.store.journal[AUCTION][1] = row._replace(version=9)
    second = await start(house.store, now=END)
    assert extensions(second.store, OTHER) == [(END, END + 10_000, None)]
    # It is out of service, not ended.
    assert code(await second.ask(GET)) == "internal"
    assert [row.kind for row in second.store.journal[AUCTION].values()] == ["opened"]


async def test_what_it_owes_may_not_be_readable_for_a_while(house: House) -> None:
    house.now = END - 10_000
    await house.kill()
    second = House(house.store, now=END)

    async def go_away(*arguments: object) -> list[tuple[UUID, int]]:
        second.journal.is_away = True
        return []

    second.journal.deadlines = go_away  # type: ignore[method-assign]
    starting = asyncio.create_task(second.start())
    await until(lambda: second.journal.closings >= 3)
    second.journal.is_away = False
    await starting
    assert extensions(second.store) == [(END, END + 10_000, None)]
    await second.kill()


@pytest.mark.parametrize("took", [900, READ_AHEAD_MS + 900])
async def test_an_auction_that_comes_near_its_end_while_others_are_read_is_not_forgotten(
    house: House, took: int
) -> None:
    """Reading takes its time; what was far from its end when it began may be near it when time is given back."""
    await house.ask(opening(OTHER, end_time=END + took - 400))
    house.now = END - WINDOW - 20_000
    await house.kill()
    back = END - WINDOW + 1
    second = House(house.store, now=back)
    second.journal.before_load.clear()
    starting = asyncio.create_task(second.start())
    await turns(lambda: AUCTION in second.journal.loads)
    second.now = back + took
    second.journal.before_load.set()
    await starting
    left = WINDOW + 20_000
    assert extensions(second.store) == [(back + took, back + took + left, None)]
    assert extensions(second.store, OTHER) == [(back + took, back + took + left + took - 400, None)]
    await second.kill()


async def test_the_databases_clock_may_have_jumped_ahead(house: House) -> None:
    """Then a gap is seen that the process knows nothing of, and paying up to its own time would never be enough."""
    house.now = END - 10_000
    await house.ask(GET)
    house.store.clock = lambda: house.now + 5_000
    await notice(house)
    assert house.store.shards[0].down_at is None
    assert house.deaths == []


async def test_what_sleeps_is_paid_too_when_the_databases_clock_is_far_ahead(house: House) -> None:
    """The machine was suspended, and its own clock stood still: by that nobody is near to an end."""
    house.now = down = END - WINDOW - READ_AHEAD_MS - 5_000
    await house.put_to_sleep()
    ahead = READ_AHEAD_MS + 10_000
    house.store.clock = lambda: house.now + ahead
    await notice(house)
    back = down + ahead
    assert extensions(house.store) == [(back, back + END - down, None)]
    assert house.store.shards[0].down_at is None


async def test_a_clock_behind_the_last_event_pays_no_time_that_was_not_lost(house: House, start: Start) -> None:
    house.now = END - 10_000
    await house.ask(bid(ANNA, 1_000))
    await house.kill()
    second = await start(house.store, now=END - 15_000)
    assert extensions(second.store) == []
    assert accepted(await second.ask(bid(BEN, 2_000))).at == END - 10_000


async def test_slots_of_others_are_not_its_own_to_pay(start: Start) -> None:
    mine = next(UUID(int=number) for number in range(100) if slot_of(UUID(int=number)) % 2 == 0)
    others = next(UUID(int=number) for number in range(100) if slot_of(UUID(int=number)) % 2 == 1)
    store = MemoryStore()
    house = await start(store)
    await house.answers(opening(mine), opening(others))
    house.now = END - 10_000
    await house.kill()
    store.owned = {0: frozenset(range(0, SLOTS, 2))}
    await start(store, slots=range(0, SLOTS, 2), now=END)
    assert extensions(store, mine) == [(END, END + 10_000, None)]
    assert extensions(store, others) == []


async def test_a_long_life_with_outages_loses_nothing(start: Start, randomness: random.Random) -> None:
    """At random: bids, time, gaps, lost writes and lost replies. Each acknowledged bid is there once."""
    house = await start()
    await house.ask(opening(soft_close=SOFT_CLOSE, end_time=NOW + 200_000))
    outlet = Recorder()
    asked: dict[int, int] = {}
    amount, bid_id = 1_000, 0
    for _ in range(150):
        step = randomness.random()
        if step < 0.5:
            amount, bid_id = amount + 500, bid_id + 1
            bidder = randomness.choice([ANNA, BEN, CLEO])
            (number,) = house.take(outlet, bid(bidder, up_to=amount, bid_id=bid_id))
            asked[number] = bid_id
        elif step < 0.6:
            house.now += randomness.randrange(3_000)
        elif step < 0.7:
            house.be_out(house.now + randomness.randrange(5_000))
        elif step < 0.85:
            house.journal.loses = randomness.choice(["write", "reply"])
        else:
            await quiet()
    house.journal.loses = None
    await until(lambda: len(outlet.answers) == len(asked))
    rows = house.store.journal[AUCTION]
    stored = [row.command_id for row in rows.values() if row.command_id is not None]
    assert len(stored) == len(set(stored))
    for answer in outlet.answers.values():
        if isinstance(answer, Rejection):
            assert answer.code in {"ended", "unavailable", "max_not_raised", "bid_too_low"}
        else:
            verdict = accepted(answer)
            assert verdict.hash == rows[verdict.seq].hash
    assert [row.at for row in rows.values()] == sorted(row.at for row in rows.values())
    assert list(rows) == list(range(1, len(rows) + 1))
    assert house.deaths == []
