"""The page on capacity: its bounds are those of the code, and its tables follow from its own costs and formulas."""

import re
from pathlib import Path

import pytest

from engine.limits import AWAKE_MAX, LINK_PING_MS, SLOTS, SOCKETS_MAX, USER_BIDS_RATE
from gavel.settings import Settings

PAGE = (Path(__file__).parents[2] / "docs" / "capacity.md").read_text(encoding="utf-8")
SHARD_COMMITS = 900
GATEWAY_BUSY, OTHERS_BUSY = 0.6, 0.5


def table_under(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its head."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (table, *_) = re.findall(r"^\|.*\n\| ---.*\n((?:\|.*\n)+)", section, re.MULTILINE)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]


def number(cell: str) -> float:
    """The first number of a cell."""
    found = re.search(r"\d[\d,]*(?:\.\d+)?", cell)
    assert found, cell
    return float(found[0].replace(",", ""))


COSTS = {name: number(value) for name, value, _ in table_under("What each costs")}
FRAME, HEARTBEAT = COSTS["a frame"] / 1e6, COSTS["a socket, its heartbeats"] / 1e6
GATEWAY_BID, SHARD_BID = COSTS["a bid, in a gateway"] / 1e6, COSTS["a bid, in its shard"] / 1e6
COMMIT, POSTGRES_BID = COSTS["a commit, in Postgres"] / 1e6, COSTS["a bid, in Postgres, beside its commit"] / 1e6
LOG_BYTES = COSTS["a bid, in the log (WAL)"]


def postgres_cores(bids: float, commits: float) -> float:
    return (commits * COMMIT + bids * POSTGRES_BID) / OTHERS_BUSY


def about(value: float) -> object:
    return pytest.approx(value, rel=0.03)


@pytest.mark.parametrize("row", table_under("A cluster of a given size"), ids=lambda row: f"{row[0]}+{row[1]}")
def test_a_cluster_takes_what_its_costs_leave(row: list[str]) -> None:
    gateways, shards = 4 * number(row[0]), 4 * number(row[1])
    bids = shards * OTHERS_BUSY / SHARD_BID
    assert [number(cell) for cell in row[2:]] == [
        gateways * SOCKETS_MAX,
        about(gateways * GATEWAY_BUSY / FRAME),
        about(bids),
        shards * AWAKE_MAX,
        about(postgres_cores(bids, shards * SHARD_COMMITS)),
        about(bids * LOG_BYTES / 1e6),
    ]


@pytest.mark.parametrize(
    ("heading", "sockets", "frames", "bids", "awake", "shards", "named"),
    [
        # Which of the two bounds of gateways and of shards the page names as the binding one.
        ("250,000 monthly users", 20_000, 1, 1_000, 2_000, 2, (0.53, 0.2)),
        ("1,000,000 at the same time", 1_000_000, 0.5, 25_000, 100_000, 12, (20, 10)),
    ],
)
def test_the_two_plans_follow_from_the_formulas(
    heading: str, sockets: float, frames: float, bids: float, awake: float, shards: int, named: tuple[float, float]
) -> None:
    (gateways, needed_shards, postgres, *_) = (row[1] for row in table_under(heading))
    by_time = (sockets * frames * FRAME + sockets * HEARTBEAT + bids * GATEWAY_BID) / GATEWAY_BUSY
    assert max(sockets / SOCKETS_MAX, by_time) == about(named[0])
    assert number(gateways) == pytest.approx(named[0], abs=0.05)
    assert max(bids * SHARD_BID / OTHERS_BUSY, awake / AWAKE_MAX) == about(named[1])
    assert number(needed_shards) == named[1]
    assert number(postgres) == about(postgres_cores(bids, min(bids, shards * SHARD_COMMITS)))


def test_its_bounds_are_those_of_the_code() -> None:
    assert f"at most {SOCKETS_MAX:,} each" in PAGE
    assert f"at most {AWAKE_MAX:,} each" in PAGE
    assert f"{SLOTS:,} slots" in PAGE
    assert f"Both ends ping every {LINK_PING_MS} ms" in PAGE
    assert f"A person may bid {USER_BIDS_RATE.per_second} times a second" in PAGE
    for name in ("gateways", "shards"):
        bounds = [bound.le for bound in Settings.model_fields[name].metadata if hasattr(bound, "le")]
        assert re.search(rf"`GAVEL_{name.upper()}` (?:ends )?at {bounds[0]}\b", PAGE), name
