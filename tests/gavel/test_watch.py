"""What `gavel watch` makes of what it is told."""

from typing import Any

from gavel.watch import Watched

SNAPSHOT: dict[str, Any] = {
    "title": "A bowl",
    "currency": "USD",
    "status": "active",
    "price": 1_000,
    "leader": None,
    "bids": 0,
    "end_time": 1,
    "outcome": None,
}


def test_a_state_is_told_after_what_is_kept_of_what_it_covers() -> None:
    watched = Watched()
    watched.apply({"type": "subscribed", "seq": 1, "recovered": False, "snapshot": SNAPSHOT})
    watched.apply({"type": "presence", "viewers": 3})
    extended = {"seq": 5, "kind": "extended", "end_time": 2, "reason": "soft_close"}
    snapshot = SNAPSHOT | {"price": 2_000, "leader": 2, "bids": 4, "end_time": 2}
    watched.apply({"type": "state", "seq": 6, "snapshot": snapshot, "events": [extended]})
    assert watched.snapshot == snapshot
    assert watched.new_lines == [
        "seq 1: active, 10.00 USD, no bids yet, 0 bids",
        "seq 5: extended by a late bid",
        "seq 6: active, 20.00 USD, paddle 2 leads, 4 bids",
    ]
