"""What the frames of many sockets say about when a bid was on all screens."""

import numpy as np
import pytest

from loadtests import watchers
from loadtests.measured import NS_PER_MS, NS_PER_S
from loadtests.watchers import Bids, Numbers, screens_of

# Three bids, a second apart, in events 11, 13 and 14.
BIDS = Bids([11, 13, 14], [0, NS_PER_S, 2 * NS_PER_S], ended_ns=3 * NS_PER_S)
GIVEN_UP_NS = 9 * NS_PER_S


def _frames(*rows: tuple[int, int, int]) -> Numbers:
    """Frames: the millisecond at which one came, and after which `seq` up to which it brought its socket."""
    frames = np.array(rows, dtype=np.int64).reshape(-1, 3)
    frames[:, 0] *= NS_PER_MS
    return frames


def test_each_pair_of_a_bid_and_a_socket_counts_once() -> None:
    one_by_one = [(5, 10, 11), (1_010, 11, 13), (2_020, 13, 14)]
    other = [(40, 10, 11), (1_030, 11, 13), (2_020, 13, 14)]
    screens = screens_of(_frames(*one_by_one, *other), BIDS, sockets=2, given_up_ns=GIVEN_UP_NS)
    assert screens.latencies.count == 6
    assert screens.latencies.percentile_ms(100) == 40
    assert screens.latencies.percentile_ms(1) == pytest.approx(5, rel=0.02)
    assert [second for second, _ in screens.by_second] == [0, 1, 2]
    assert (screens.frames, screens.missing, screens.backlog, screens.drained_s) == (6, 0, 0, 0)


def test_a_bid_is_on_the_screen_with_the_first_frame_that_reaches_its_seq() -> None:
    # One frame covers two bids; one that brings nothing new of them covers none.
    screens = screens_of(
        _frames((1_500, 10, 13), (1_600, 13, 13), (2_001, 13, 20)), BIDS, sockets=1, given_up_ns=GIVEN_UP_NS
    )
    assert screens.latencies.count == 3
    assert screens.latencies.max_ns == 1_500 * NS_PER_MS
    assert screens.by_second[1][1] == pytest.approx(500, rel=0.02)
    assert screens.missing == 0


def test_what_comes_after_the_load_is_backlog_and_what_never_comes_is_missing() -> None:
    screens = screens_of(_frames((10, 10, 11), (4_500, 11, 13)), BIDS, sockets=2, given_up_ns=GIVEN_UP_NS)
    assert screens.backlog == 5
    assert screens.drained_s == 1.5
    assert screens.missing == 4
    assert screens.frames == 1


def test_what_never_comes_counts_until_it_is_given_up() -> None:
    bids = Bids(BIDS.seqs, BIDS.scheduled_ns, BIDS.ended_ns, unanswered_ns=[2 * NS_PER_S])
    screens = screens_of(_frames((10, 10, 14)), bids, sockets=2, given_up_ns=GIVEN_UP_NS)
    assert screens.missing == 3
    # Three bids on one socket came, those on the other did not; nor did the unanswered one on both.
    assert screens.latencies.count == 3 + 3 + 2
    assert screens.latencies.percentile_ms(100) == 9_000
    assert screens.by_second[2][1] == pytest.approx(7_000, rel=0.02)


def test_frames_are_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = _frames(*((2_500, 10, 14) for _ in range(10)))
    whole = screens_of(frames, BIDS, sockets=10, given_up_ns=GIVEN_UP_NS)
    monkeypatch.setattr(watchers, "FRAMES_AT_ONCE", 3)
    assert (
        screens_of(frames, BIDS, sockets=10, given_up_ns=GIVEN_UP_NS).latencies.to_dict() == whole.latencies.to_dict()
    )
    assert whole.latencies.count == 30


def test_without_bids_or_frames_nothing_is_said() -> None:
    screens = screens_of(_frames(), Bids([], [], ended_ns=0), sockets=5, given_up_ns=GIVEN_UP_NS)
    assert (screens.latencies.count, screens.missing, screens.backlog) == (0, 0, 0)
