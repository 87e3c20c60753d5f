"""Who may do how much: token buckets for connections, users and addresses, and how many connections an address has.

A bucket is one number: when it will be full again. One that is full is as good as one that never was, and is forgotten,
so that the tables hold only who was here just now. Pure: `now` is always milliseconds since the epoch.
"""

from collections import Counter, OrderedDict
from collections.abc import Hashable
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final
from uuid import UUID

from engine.limits import (
    ADDRESS_CONNECTIONS_MAX,
    ADDRESS_CONNECTIONS_RATE,
    ADDRESS_MESSAGES_RATE,
    BUCKETS_MAX,
    CONNECTION_MESSAGES_RATE,
    RAISED_ADDRESSES,
    SECOND_MS,
    USER_BIDS_RATE,
    Rate,
)
from engine.rejections import Rejection

Networks = tuple[IPv4Network | IPv6Network, ...]

_IPV6_PREFIX: Final = 64
"""A household, or a server, has a whole network of IPv6 addresses: this many bits name it."""


def networks(text: str) -> Networks:
    """Read addresses and networks (`10.0.0.0/8`), separated by commas. Raises `ValueError`."""
    return tuple(ip_network(part.strip()) for part in text.split(",") if part.strip())


def rate_limited(retry_after_ms: int) -> Rejection:
    """The refusal of what comes too often. Never a verdict."""
    return Rejection("rate_limited", "Too much at once; slow down.", is_transient=True, retry_after_ms=retry_after_ms)


class Bucket:
    """Holds up to `rate.burst` tokens, and gets `rate.per_second` of them a second."""

    __slots__ = ("_full_at", "_rate")

    def __init__(self, rate: Rate) -> None:
        self._rate = rate
        self._full_at = 0
        """In milliseconds times `per_second`, so that a token is `SECOND_MS` of them and nothing is ever rounded."""

    def take(self, now: int) -> int:
        """Take a token and return 0; or take none, and return the milliseconds until there will be one."""
        per_second, burst = self._rate
        at = now * per_second
        full_at = max(self._full_at, at) + SECOND_MS
        over = full_at - at - burst * SECOND_MS
        if over > 0:
            return -(-over // per_second)
        self._full_at = full_at
        return 0

    def is_full(self, now: int) -> bool:
        """Whether it is as good as a new one."""
        return self._full_at <= now * self._rate.per_second


class Buckets:
    """A bucket for each of many, by whatever tells them apart."""

    def __init__(self, rate: Rate) -> None:
        self._rate = rate
        self._buckets: OrderedDict[Hashable, Bucket] = OrderedDict()
        """The longest unused first."""

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, key: Hashable, now: int) -> int:
        """See `Bucket`."""
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = Bucket(self._rate)
        else:
            self._buckets.move_to_end(key)
        wait_ms = bucket.take(now)
        # More than the bound there are only if more come anew than leave: then the longest unused are let off.
        while len(self._buckets) > BUCKETS_MAX or next(iter(self._buckets.values())).is_full(now):
            self._buckets.popitem(last=False)
        return wait_ms


class Rates:
    """The rates of one gateway. Those who come from `raised` addresses have none."""

    def __init__(self, raised: Networks | None = None) -> None:
        raised = networks(RAISED_ADDRESSES) if raised is None else raised
        self._connections: Counter[str] = Counter()
        self._arrivals = Buckets(ADDRESS_CONNECTIONS_RATE)
        self._messages = Buckets(ADDRESS_MESSAGES_RATE)
        self._bids = Buckets(USER_BIDS_RATE)

        @lru_cache(maxsize=BUCKETS_MAX)
        def site_of(address: str) -> str | None:
            return _site(address, raised)

        self._site_of = site_of

    def enter(self, address: str, now: int) -> "Visit | None":
        """Let a connection in; None if its address has too many, or opens too many."""
        site = self._site_of(address)
        if site is not None:
            if self._connections[site] >= ADDRESS_CONNECTIONS_MAX or self._arrivals.take(site, now):
                return None
            self._connections[site] += 1
        return Visit(self, site)

    def leave(self, visit: "Visit") -> None:
        """A connection that was let in is gone."""
        site = visit.site
        if site is not None:
            self._connections[site] -= 1
            if not self._connections[site]:
                del self._connections[site]

    def bid(self, address: str, user: UUID, now: int) -> int:
        """Count a bid that came without a connection: 0, or the milliseconds to wait."""
        return 0 if self._site_of(address) is None else self._bids.take(user, now)


class Visit:
    """One connection, as the rates see it."""

    __slots__ = ("_messages", "_rates", "site")

    def __init__(self, rates: Rates, site: str | None) -> None:
        self._rates = rates
        self.site = site
        """Where it comes from; None if that is raised."""
        self._messages = Bucket(CONNECTION_MESSAGES_RATE)

    def message(self, now: int) -> int:
        """Count a message: 0, or the milliseconds to wait."""
        if self.site is None:
            return 0
        return self._messages.take(now) or self._rates._messages.take(self.site, now)

    def bid(self, user: UUID, now: int) -> int:
        """Count a bid, over all connections of its user: 0, or the milliseconds to wait."""
        return 0 if self.site is None else self._rates._bids.take(user, now)


def _site(address: str, raised: Networks) -> str | None:
    """The address, or the network of an IPv6 one; None for a raised one."""
    try:
        ip = ip_address(address)
    except ValueError:
        # The peer was gone before it could be asked for its address.
        return address
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if any(ip in network for network in raised):
        return None
    return str(ip) if isinstance(ip, IPv4Address) else str(ip_network((int(ip), _IPV6_PREFIX), strict=False))
