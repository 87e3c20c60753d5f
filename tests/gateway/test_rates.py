"""Token buckets: never more than they allow, and no memory of those who keep to it."""

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.limits import ADDRESS_CONNECTIONS_RATE, CONNECTION_MESSAGES_RATE, USER_BIDS_RATE, Rate
from gateway import rates as rates_module
from gateway.rates import Bucket, Buckets, Rates, Visit, networks

NOW = 1_700_000_000_000
ANNA, BEN = UUID(int=1), UUID(int=2)
RATES = st.builds(Rate, st.integers(1, 5_000), st.integers(1, 50))


@pytest.fixture
def rates() -> Rates:
    return Rates(())


def entered(rates: Rates, address: str, now: int = NOW) -> Visit:
    visit = rates.enter(address, now)
    assert visit is not None
    return visit


@given(RATES, st.lists(st.integers(0, 500), min_size=1, max_size=200))
def test_never_more_than_the_burst_and_the_rate(rate: Rate, pauses: list[int]) -> None:
    bucket = Bucket(rate)
    taken: list[int] = []
    now = NOW
    for pause in pauses:
        now += pause
        if bucket.take(now) == 0:
            taken.append(now)
    for first, begun in enumerate(taken):
        for last, ended in enumerate(taken[first:], first):
            assert (last - first + 1 - rate.burst) * 1_000 <= rate.per_second * (ended - begun)


@given(RATES, st.integers(0, 200))
def test_who_waits_as_long_as_it_is_told_gets_a_token_and_no_sooner(rate: Rate, spent: int) -> None:
    bucket = Bucket(rate)
    for _ in range(spent):
        bucket.take(NOW)
    wait_ms = bucket.take(NOW)
    assert (wait_ms > 0) == (spent >= rate.burst)
    if wait_ms:
        assert bucket.take(NOW + wait_ms - 1) == 1
        assert bucket.take(NOW + wait_ms) == 0


@given(RATES, st.lists(st.tuples(st.integers(0, 9), st.integers(0, 50)), min_size=1, max_size=100))
def test_a_table_of_buckets_is_each_bucket_by_itself(rate: Rate, steps: list[tuple[int, int]]) -> None:
    buckets = Buckets(rate)
    alone = [Bucket(rate) for _ in range(10)]
    now = NOW
    for key, pause in steps:
        now += pause
        assert buckets.take(key, now) == alone[key].take(now)


def test_a_bucket_at_rest_is_forgotten() -> None:
    buckets = Buckets(Rate(10, burst=3))
    for key in range(1_000):
        buckets.take(key, NOW)
    assert len(buckets) == 1_000
    buckets.take("later", NOW + 100)
    assert len(buckets) == 1


def test_of_too_many_buckets_the_longest_unused_is_let_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates_module, "BUCKETS_MAX", 3)
    buckets = Buckets(Rate(1, burst=1))
    for key in "abcad":
        buckets.take(key, NOW)
    assert len(buckets) == 3
    assert buckets.take("a", NOW) == 1_000
    assert buckets.take("b", NOW) == 0


def test_messages_count_for_their_connection(rates: Rates) -> None:
    one, other = entered(rates, "192.0.2.1"), entered(rates, "192.0.2.1")
    assert [one.message(NOW) for _ in range(CONNECTION_MESSAGES_RATE.burst)] == [0] * CONNECTION_MESSAGES_RATE.burst
    assert one.message(NOW) == 50
    assert other.message(NOW) == 0


def test_messages_count_for_their_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates_module, "ADDRESS_MESSAGES_RATE", Rate(1, burst=2))
    rates = Rates(())
    one, other, neighbour = (entered(rates, address) for address in ("192.0.2.1", "192.0.2.1", "192.0.2.2"))
    assert [one.message(NOW), other.message(NOW), other.message(NOW), neighbour.message(NOW)] == [0, 0, 1_000, 0]


def test_bids_count_for_their_user_wherever_they_come_from(rates: Rates) -> None:
    one, other = entered(rates, "192.0.2.1"), entered(rates, "192.0.2.2")
    for _ in range(USER_BIDS_RATE.burst // 2):
        assert one.bid(ANNA, NOW) == 0
        assert other.bid(ANNA, NOW) == 0
    assert rates.bid("192.0.2.3", ANNA, NOW) == 100
    assert other.bid(ANNA, NOW) == 100
    assert other.bid(BEN, NOW) == 0


def test_an_address_opens_so_many_connections_at_once(rates: Rates) -> None:
    for _ in range(ADDRESS_CONNECTIONS_RATE.burst):
        rates.leave(entered(rates, "192.0.2.1"))
    assert rates.enter("192.0.2.1", NOW) is None
    entered(rates, "192.0.2.2")
    entered(rates, "192.0.2.1", NOW + 50)


def test_an_address_has_so_many_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates_module, "ADDRESS_CONNECTIONS_MAX", 2)
    rates = Rates(())
    first, _ = entered(rates, "192.0.2.1"), entered(rates, "192.0.2.1")
    assert rates.enter("192.0.2.1", NOW) is None
    rates.leave(first)
    second = entered(rates, "192.0.2.1")
    rates.leave(second)
    assert rates._connections == {"192.0.2.1": 1}


@pytest.mark.parametrize(
    ("address", "site"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("", ""),
        ("10.1.2.3", None),
        ("::ffff:10.1.2.3", None),
        ("::1", None),
    ],
)
def test_where_a_connection_comes_from(address: str, site: str | None) -> None:
    rates = Rates(networks("10.0.0.0/8, ::1"))
    assert entered(rates, address).site == site


def test_a_raised_address_has_no_rates() -> None:
    rates = Rates()
    for _ in range(2 * ADDRESS_CONNECTIONS_RATE.burst):
        visit = entered(rates, "127.0.0.1")
    for _ in range(2 * CONNECTION_MESSAGES_RATE.burst):
        assert visit.message(NOW) == visit.bid(ANNA, NOW) == rates.bid("127.0.0.1", ANNA, NOW) == 0
    rates.leave(visit)
