"""The histogram against the list that it stands for, and what a run keeps."""

import json
import math
import random

import pytest

from loadtests.measured import BUSY_PERCENT, LATE_MS, NS_PER_MS, NS_PER_US, Latencies, Run, bottleneck_notes


def histogram(values: list[int]) -> Latencies:
    latencies = Latencies()
    latencies.add_many(values)
    return latencies


@pytest.mark.parametrize("percent", [1, 50, 90, 99, 99.9])
def test_a_percentile_is_at_most_one_percent_off(randomness: random.Random, percent: float) -> None:
    values = sorted(int(10 ** randomness.uniform(3, 10)) for _ in range(5_000))
    exact_ms = values[math.ceil(len(values) * percent / 100) - 1] / NS_PER_MS
    assert exact_ms <= histogram(values).percentile_ms(percent) * (1 + 1e-9)
    assert histogram(values).percentile_ms(percent) <= exact_ms * 1.01


def test_the_maximum_is_exact(randomness: random.Random) -> None:
    values = [randomness.randrange(1, 10**10) for _ in range(1_000)]
    assert histogram(values).percentile_ms(100) == max(values) / NS_PER_MS


def test_no_percentile_is_over_the_maximum() -> None:
    assert histogram([1_234_567] * 100).percentile_ms(50) == pytest.approx(1.234567)


def test_what_takes_under_a_microsecond_counts_as_one() -> None:
    latencies = histogram([0, 1, 999, NS_PER_US * 1_000])
    assert latencies.percentile_ms(50) == NS_PER_US / NS_PER_MS


def test_without_latencies_there_is_no_percentile() -> None:
    assert math.isnan(Latencies().percentile_ms(99))
    assert math.isnan(histogram([]).percentile_ms(100))


def test_parts_that_are_merged_are_the_whole(randomness: random.Random) -> None:
    values = [randomness.randrange(1, 10**9) for _ in range(1_000)]
    merged = histogram(values[:300])
    merged.merge(histogram(values[300:]))
    assert merged.to_dict() == histogram(values).to_dict()


def test_a_histogram_survives_json() -> None:
    latencies = histogram([5_000, 7_000_000, 7_000_000])
    latencies.add(9_000_000)
    kept = Latencies.from_dict(json.loads(json.dumps(latencies.to_dict())))
    assert kept.to_dict() == latencies.to_dict()
    assert kept.percentile_ms(50) == latencies.percentile_ms(50)


def test_a_run_is_json_even_where_nothing_was_measured() -> None:
    run = Run("bids", "gavel", "100 bids/s", 0, latencies={"ack": Latencies()})
    run.add_percentiles("ack")
    kept = json.loads(json.dumps(run.to_dict(), allow_nan=False))
    assert kept["figures"] == {"ack_p50_ms": None, "ack_p90_ms": None, "ack_p99_ms": None, "ack_max_ms": None}


def test_a_generator_says_when_it_was_the_bottleneck() -> None:
    assert bottleneck_notes({"generator_cpu_percent": BUSY_PERCENT, "late_p99_ms": LATE_MS}) == []
    assert bottleneck_notes({}) == []
    assert "bottleneck" in bottleneck_notes({"generator_cpu_percent": BUSY_PERCENT + 1})[0]
    assert "6.0 ms late" in bottleneck_notes({"late_p99_ms": LATE_MS + 1})[0]


def test_a_latency_can_be_added_many_times() -> None:
    latencies = histogram([])
    latencies.add(7_000_000, 3)
    latencies.add(100, 2)
    assert latencies.to_dict() == histogram([7_000_000] * 3 + [100] * 2).to_dict()
