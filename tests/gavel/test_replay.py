"""The replay's reading of a history, and its ids; the playing itself is tested against a server."""

import io
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from gavel.client import Message
from gavel.errors import CommandError
from gavel.replay import (
    Bidder,
    Closing,
    RecordedAuction,
    Tally,
    auction_key,
    bid_id_of,
    far_end,
    print_results,
    read_history,
    results_of,
    user_of,
)
from tests.simulation.history import Sent, Verdict, decode

HEADER = "auctionid,bid,bidtime,bidder,bidderrate,openbid,price,item,auction_type\n"


def write(folder: Path, *rows: str) -> Path:
    path = folder / "history.csv"
    path.write_text(HEADER + "\n".join(rows) + "\n")
    return path


def test_a_history_is_read_by_auction_and_in_time_order(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "7,2.50,0.9,ann,1,0.01,9.99,thing,3 day auction",
        "8,5,0.1,bob,2,5,5,other,3 day auction",
        "7,1,0.10,bob,2,0.01,9.99,thing,3 day auction",
        "7,3,0.9,cid,0,0.01,9.99,thing,3 day auction",
        "7,4,0.900,ann,1,0.01,9.99,thing,3 day auction",
        "7,2,1e-2,cid,0,0.01,9.99,thing,3 day auction",
    )
    first, second = read_history(path)
    assert (first.name, first.title, first.starting_price, first.published_price) == ("7", "thing, eBay 7", 1, 999)
    assert second.name == "8"
    # By time as a number; among equals as in the file.
    assert [(bid.bidder, bid.max_amount) for bid in first.bids] == [
        ("cid", 200),
        ("bob", 100),
        ("ann", 250),
        ("cid", 300),
        ("ann", 400),
    ]


@pytest.mark.parametrize("row", ["7,a,0.1,ann,1,1,1,t,x", "7,1,,ann,1,1,1,t,x", "7,1.001,0,ann,1,1,1,t,x", "7,1"])
def test_a_row_that_cannot_be_used_is_named(tmp_path: Path, row: str) -> None:
    with pytest.raises(CommandError, match="line 3: "):
        read_history(write(tmp_path, "7,1,0.1,ann,1,1,1,t,x", row))


def test_files_that_are_no_history_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="has no rows"):
        read_history(write(tmp_path))
    other = tmp_path / "other"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(CommandError, match="has no column auctionid"):
        read_history(other)
    other.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CommandError, match="cannot be read as CSV"):
        read_history(other)


@pytest.mark.parametrize("bidtime", ["NaN", "sNaN", "Infinity", "soon", ""])
def test_a_time_that_is_none_is_refused_with_its_line(tmp_path: Path, bidtime: str) -> None:
    path = tmp_path / "history.csv"
    path.write_text(f"{HEADER}1,5,{bidtime},ann,1,1,5,thing,3 day auction\n")
    with pytest.raises(CommandError, match="line 2"):
        read_history(path)


def test_ids_follow_from_names_and_do_not_change_between_versions() -> None:
    assert bid_id_of("tuesday", "7", 0) == UUID("fcdddc93-174c-5571-95c1-9c7623b5f936")
    assert auction_key("tuesday", "7") == UUID("b966f41f-6c0b-590a-9940-107dec3aec75")
    assert user_of("ann") == UUID("b92283e7-3ca8-5387-bfda-513bd9968af0")


def test_ids_differ_where_they_should() -> None:
    ids = {bid_id_of(run, auction, row) for run in ("a", "b") for auction in ("1", "11") for row in (1, 11)}
    assert len(ids) == 8
    assert auction_key("a", "1") != auction_key("b", "1")


def test_a_run_asks_for_the_same_end_all_month_and_within_a_year() -> None:
    assert far_end(datetime(2026, 11, 1, tzinfo=UTC)) == far_end(datetime(2026, 11, 30, 23, 59, tzinfo=UTC))
    for month in range(1, 13):
        today = datetime(2027, month, 28, tzinfo=UTC)
        assert 100 < (far_end(today) - today).days < 366


async def test_what_a_bidder_sends_and_hears_is_a_history(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = io.StringIO()
    auction, user, bid_id = UUID(int=1), UUID(int=2), UUID(int=3)
    bidder = Bidder("http://127.0.0.1:8700", "token", auction, user, "7/ann", 0, seen)
    ack: Message = {
        "seq": 2,
        "hash": "00",
        "outcome": "leading",
        "price": 1,
        "paddle": 1,
        "max_amount": 5,
        "minimum": 2,
    }

    async def bid(auction: UUID, bid_id: UUID, *, max_amount: int) -> Message:
        """Refused for the moment, sent again, sent again on each of two new connections, acknowledged."""
        bidder.client.connections = 1
        bidder.heard({"type": "welcome"})
        bidder.heard({"type": "error", "ref": 1, "code": "busy", "message": "No room.", "retry_after_ms": 250})
        bidder.client.connections = 3
        bidder.heard({"type": "ack", "ref": 2, "bid_id": str(bid_id), "end_time": 9, **ack})
        return ack

    monkeypatch.setattr(bidder.client, "bid", bid)
    assert await bidder.bid(bid_id, 5) == ack
    history = decode(seen.getvalue().splitlines())
    assert [(type(record), getattr(record, "connection", 0)) for record in history] == [
        (Sent, 1),
        (Verdict, 1),
        (Sent, 2),
        (Sent, 3),
        (Verdict, 3),
    ]
    first, refused, _, _, acknowledged = history
    here: dict[str, Any] = {"client": "7/ann", "auction": auction, "bid_id": bid_id}
    assert first == Sent(**here, connection=1, bidder=user, max_amount=5, at=first.at)
    assert refused == Verdict(**here, connection=1, kind="error", code="busy", at=refused.at)
    assert acknowledged == Verdict(**here, connection=3, kind="ack", end_time=9, **ack, at=acknowledged.at)


def test_the_results_name_what_differs_and_sum_up(capsys: pytest.CaptureFixture[str]) -> None:
    same, other = (RecordedAuction(name, "thing", 1, 999, ()) for name in ("7", "8"))
    tally = Tally(acks=3, reconnects=1)
    tally.refusals.update(["bid_too_low", "bid_too_low", "max_not_raised"])
    tally.closings += [Closing(other, UUID(int=8), "reserve_not_met", None), Closing(same, UUID(int=7), "sold", 999)]
    print_results(tally)
    printed = capsys.readouterr().out
    assert "reserve_not_met" in printed
    assert "1 of 2 auctions closed at the published price" in printed
    assert "3 bids acknowledged; rejected: 2 bid_too_low, 1 max_not_raised; reconnects: 1" in printed
    results = results_of("tuesday", tally)
    assert (results["auctions"], results["as_published"]) == (2, 1)
    assert [closing["auctionid"] for closing in results["closings"]] == ["7", "8"]
