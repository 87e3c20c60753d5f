"""Every bound of the engine, with the relations between them asserted.

Amounts are integers in a currency's minor unit, times and durations integer milliseconds.
"""

from typing import NamedTuple


class Rate(NamedTuple):
    """So much a second on the whole, and `burst` of it at once."""

    per_second: int
    burst: int


SECOND_MS = 1_000
MINUTE_MS = 60 * SECOND_MS
HOUR_MS = 60 * MINUTE_MS
DAY_MS = 24 * HOUR_MS

MEBIBYTE = 1024 * 1024

# Numbers and amounts
INTEGER_MAX = 2**53 - 1
"""JSON readers that hold numbers as doubles lose integers above this one (RFC 8259, section 6)."""
AMOUNT_MAX = 9_999_999_999
"""99,999,999.99 in cents: the product keeps amounts as `DECIMAL(10,2)`."""
AMOUNT_DIGITS_MAX = 20
"""Of a decimal before it is taken for an amount, and of its exponent: arithmetic with as many is exact."""

# Auctions
TITLE_LENGTH_MAX = 200
REASON_LENGTH_MAX = 500
SALT_BYTES = 16
INCREMENT_STEPS_MAX = 64
AUCTION_DURATION_MS_MAX = 366 * DAY_MS
AUCTION_NOTICE_MS_MAX = 366 * DAY_MS
SOFT_CLOSE_WINDOW_MS_MAX = DAY_MS
SOFT_CLOSE_EXTENSION_MS_MAX = DAY_MS
SOFT_CLOSE_TOTAL_MS_MAX = 30 * DAY_MS
OUTAGE_MS = 1 * SECOND_MS
"""A shard that gave no sign of life for longer was out, and owes its auctions time."""
OUTAGE_WINDOW_MS = MINUTE_MS
"""An auction without soft close gets time back when it is this near to its end."""
OUTAGE_LEAST_MS = MINUTE_MS
"""So much time is left after an outage, or as much as it took."""

# Client sockets
FRAME_BYTES_MAX = 16 * 1024
REF_LENGTH_MAX = 64
TOKEN_LENGTH_MAX = 4 * 1024
SUBSCRIPTIONS_MAX = 100
IN_FLIGHT_MAX = 64
ERRORS_MAX = 50
"""So many malformed messages within `ERRORS_WINDOW_MS` close a socket."""
ERRORS_WINDOW_MS = 10 * SECOND_MS
HEADERS_TIMEOUT_MS = 10 * SECOND_MS
"""Of a connection's first HTTP request; later ones have uvicorn's keep-alive time-out."""
HELLO_TIMEOUT_MS = 5 * SECOND_MS
HEARTBEAT_MS = 15 * SECOND_MS
HEARTBEATS_MISSED_MAX = 2
TOKEN_TTL_MS_MAX = 366 * DAY_MS
TOKEN_GRACE_MS = 60 * SECOND_MS
SUSPENDED_MAX = 10_000
"""Users that are suspended at the same time: each gateway knows them all."""
SUSPENSIONS_MS = 1 * SECOND_MS
"""So often a gateway asks who is suspended, and so long it waits for the answer."""
SUSPENDED_MS_MAX = 5 * SECOND_MS
"""A suspended user's connections are closed within this time."""
CLOSE_TIMEOUT_MS = 1 * SECOND_MS
"""How long a socket's peer may take to answer a close before the connection is cut."""
CLOSE_REASON_BYTES_MAX = 123
"""A control frame holds 125 bytes, a close's code two of them (RFC 6455, section 5.5)."""
SOCKET_WRITE_BYTES_MAX = 1024 * 1024
"""Bytes that a client has not read; over it the socket is closed as too slow."""
SOCKETS_MAX = 50_000
"""Sockets of one gateway, where it may open that many files."""
FILES_RESERVED = 1_024
"""Files that a gateway keeps for all else: links, logs, Postgres, HTTP, and sockets that are refused or closing."""
SOCKET_BEHIND_BYTES = 64 * 1024
"""With more unread a socket is behind: until it has read on, what happens in its topics is folded for it."""
SOCKET_KERNEL_BYTES = 64 * 1024
"""So much of what a client has not read the kernel is asked to hold, beside our own buffer."""
SOCKET_BEHIND_MS_MAX = 30 * SECOND_MS
"""A socket that is behind for longer is closed as too slow: its unread bytes are memory."""
SOCKETS_PER_SLICE = 25
"""Broadcasts are written to so many sockets in one go, so that acknowledgements pass between the slices."""
CONNECTIONS_PER_SLICE = 10
"""Of so many new connections the first request is looked at in one go, for the same reason."""

# Topics at a gateway
TICK_MS = 20
"""The broadcasts of one topic begin at least so far apart."""
TOPIC_EVENTS_BYTES_MAX = 64 * 1024
"""Of each topic's last events so much is remembered, for those who come back."""
TOPICS_EVENTS_BYTES_MAX = 256 * MEBIBYTE
"""Of all topics' together; those without news for longest forget theirs first."""
TOPIC_KEPT_BYTES_MAX = 64 * 1024
"""Of the events that folding never drops so much is remembered, for those who are behind."""
WATCH_VIEWERS_MAX = 1_000
"""So many people's standings are asked for at once; who comes after them goes with the next request."""
WATCHES_AT_ONCE = 64
"""Topics that a gateway asks a shard for at the same time."""
PRESENCE_MS = 1 * SECOND_MS
"""Viewers are counted, and their number is told, at most so often."""

# Rates. Who is over one is told when to come back; raised addresses have none.
RAISED_ADDRESSES = "127.0.0.0/8,::1"
"""Whose rates are raised by default: load tests, and a proxy on this machine."""
CONNECTION_MESSAGES_RATE = Rate(20, burst=200)
"""A client that bids by itself sends a few a second; one that comes back asks at once for all its topics, and sends
again all that was not answered."""
USER_BIDS_RATE = Rate(10, burst=64)
"""An eager person bids twice a second; a program that answers each bid in several closing auctions some more."""
ADDRESS_MESSAGES_RATE = Rate(500, burst=4_000)
"""An office of 200 behind one address: each may bid twice a second, and all come back at once with 20 topics each."""
ADDRESS_CONNECTIONS_RATE = Rate(20, burst=400)
"""The same 200, with two devices each, come back at once after a gateway's end."""
ADDRESS_CONNECTIONS_MAX = 1_000
RATE_REFUSALS_MAX = 100
"""Who goes on after so many refusals within `ERRORS_WINDOW_MS` is closed."""
BUCKETS_MAX = 100_000
"""Users, or addresses, of which a gateway knows how much they did just now."""

# Links between gateways and shards
LINK_FRAME_BYTES_MAX = 16 * 1024 * 1024
LINK_BATCH_MAX = 64
LINK_IN_FLIGHT_MAX = 8_192
"""Requests that a gateway has with a shard, or keeps for one that is away."""
LINK_LINE_MAX = 512
"""So many bids among these, and one more is `busy`. Two shards on one slow core do as many each in 0.06 s, so that a
bid that is taken waits hardly longer; and only after a pause of 0.1 s is any of 5,000 bids a second refused."""
LINK_OUTPUT_BYTES = 1024 * 1024
"""About so much a shard puts into one frame."""
LINK_FOLD_BYTES = 4 * 1024 * 1024
"""With more unread a gateway is behind: until it has read on, events are folded for it."""
LINK_WRITE_BYTES_MAX = 64 * 1024 * 1024
"""Bytes that a gateway has not read; over it its link is cut."""
LINK_PING_MS = 250
LINK_DEAD_MS = 1 * SECOND_MS
LINK_GREETING_MS = 2 * SECOND_MS
LINK_RETRY_MS = 50
"""So soon a gateway tries again to link to a shard that it could not reach."""
LINK_DEATHS_MAX = 2
"""A command that was in flight at so many deaths of a shard is not sent again: it may be what kills it."""
COMMAND_TIMEOUT_MS = 8 * SECOND_MS
"""How long a gateway keeps a command for a shard that is away before it tells the client."""
FOLLOWED_MAX = SOCKETS_MAX
"""Users that a gateway follows at a shard: those with a socket that asked for the topic `me`."""
FOLLOWED_AT_ONCE = 500
"""Users in one request to follow them."""
STANDINGS_MAX = 100
"""Auctions of which a gateway tells one user how it stands: those that are open, and then the newest of the others."""
STANDINGS_MS = DAY_MS
"""So long after its end an auction is among a user's standings."""
LOOKUPS_AT_ONCE = 4
"""Users whose standings a gateway asks for at the same time."""
LOOKUP_RETRY_MS = 1 * SECOND_MS

# Shards
SLOTS = 1_024
SHARD_LINE_MAX = 8_192
"""Commands that a shard holds undecided or uncommitted before it answers `busy`."""
GATHER_MS = 2
"""Under load commits begin about so far apart: fewer of them, and larger ones."""
GATHER_ROWS_MIN = 4
"""A commit of so many events is load. Once there is one, 2,000 bids a second on a shard keep it so."""
VERDICTS_REMEMBERED = 10_000
AWAKE_MAX = 10_000
"""Auctions that a shard keeps in memory; the longest unused make room for others."""
WAKING_MAX = 1_000
"""Auctions that a shard reads from the journal at the same time."""
SNAPSHOTS_AT_ONCE = 50
"""Snapshots that are saved between two appends."""
EVENTS_PER_SNAPSHOT = 2_000
RESUME_EVENTS_MAX = 1_000
"""A subscriber that missed more than this gets a snapshot."""
IDLE_MS = 60 * SECOND_MS
ALIVE_MS = 500
OWNER_SILENT_MS = 2 * SECOND_MS
CLAIM_RETRY_MS = 100
"""So soon a process that waits for a shard tries again to take it over."""
PROBE_TIMEOUT_MS = SECOND_MS // 2
"""An owner that has not refused a connection by then may still live."""
WRITE_TIMEOUT_MS = 2 * SECOND_MS
"""A write that is not answered for so long may have been done or not: the outcome is settled."""
WRITE_ROWS_PER_MS = 10
"""A large write is given more time."""
TAKEOVER_TIMEOUT_MS = SECOND_MS // 2
"""A takeover that waits longer ends the session of the old owner, which holds the lock."""
SETTLE_RETRY_MS = 100
READ_AT_ONCE = 50
"""Auctions that are read at the same time after an outage, between two signs of life."""
READ_TRIES = 3
"""After so many an auction that cannot be read holds up its shard's return no longer."""
READ_AHEAD_MS = 10 * SECOND_MS
"""So much nearer to its end an auction may come while all of these are read."""
BUSY_RETRY_MS = 250
BUSY_REST_MS = 120
"""About so long nothing is read from a socket that was told `busy`; what it sent meanwhile is then read at once."""
BUSY_READ_MS = 5
"""So long it may take to read that."""
CLOCK_SYNC_MS = MINUTE_MS
CLOCK_ROUND_TRIP_MS_MAX = 50
"""A reading of the clock that took longer is not precise enough."""
DATABASE_TIMEOUT_MS = 5 * SECOND_MS
"""Reads that take longer are given up."""
DATABASE_RETRY_MS = 200
"""So soon a process that starts tries again to connect."""
READERS_MAX = 4
"""Connections of one process for reading."""

# Processes
ACTOR_CALLS_MAX = 1_000
"""Ray's calls of an actor at the same time."""
LOG_BYTES_MAX = 10 * MEBIBYTE
"""Of each file; then a new one is begun."""
LOG_FILES_OLD_MAX = 3

# HTTP
BACKLOG_MAX = 4_096
"""Connections that wait to be taken."""
DRAIN_MS = 5 * SECOND_MS
"""So long a gateway that ends waits for what it still has to answer."""
HEALTH_TIMEOUT_MS = 2 * SECOND_MS
"""Postgres is well if it answers within this time."""
LIST_TIMEOUT_MS = 2 * SECOND_MS
"""How long a list may take, waiting for a connection to Postgres included."""
REQUEST_ID_LENGTH_MAX = 64
"""Of an id that a client gives its request."""
BODY_BYTES_MAX = 1024 * 1024
LINGER_BYTES_MAX = 8 * BODY_BYTES_MAX
"""So much of what is left of too large a body is read, and thrown away, so that the answer is not lost with it,"""
LINGER_MS = 2 * SECOND_MS
"""and for no longer than this."""
PAGE_LIMIT_DEFAULT = 20
PAGE_LIMIT_MAX = 100

assert AMOUNT_MAX <= INTEGER_MAX < 10**AMOUNT_DIGITS_MAX
# A verdict that is not committed yet must still be remembered when its retry arrives.
assert SHARD_LINE_MAX < VERDICTS_REMEMBERED
assert LINK_LINE_MAX < LINK_IN_FLIGHT_MAX <= SHARD_LINE_MAX
# Who comes back may subscribe to all that it had and send again all that was not answered.
assert CONNECTION_MESSAGES_RATE.burst > SUBSCRIPTIONS_MAX + IN_FLIGHT_MAX
assert USER_BIDS_RATE.burst >= IN_FLIGHT_MAX
# A client that waits as it is told finds its socket read again.
assert BUSY_REST_MS * 3 // 2 + BUSY_READ_MS < BUSY_RETRY_MS
# A minute after it was told to come back then, all of an address can.
assert ADDRESS_CONNECTIONS_RATE.per_second * 60 >= ADDRESS_CONNECTIONS_MAX
assert LINK_OUTPUT_BYTES + RESUME_EVENTS_MAX * 1_024 < LINK_FRAME_BYTES_MAX
assert LINK_BATCH_MAX * FRAME_BYTES_MAX <= LINK_FRAME_BYTES_MAX
assert LINK_BATCH_MAX * WATCH_VIEWERS_MAX * 20 <= LINK_FRAME_BYTES_MAX
# One frame with answers does not make a gateway one that is behind, nor one frame to a socket one that is too slow.
assert LINK_OUTPUT_BYTES < LINK_FOLD_BYTES < LINK_WRITE_BYTES_MAX
assert SOCKET_BEHIND_BYTES < SOCKET_WRITE_BYTES_MAX
# A socket is looked at with each heartbeat: soon enough for what may come nearer meanwhile.
assert min(TOKEN_GRACE_MS, SOCKET_BEHIND_MS_MAX) > HEARTBEAT_MS
assert TOPIC_EVENTS_BYTES_MAX < TOPICS_EVENTS_BYTES_MAX
assert TOPIC_EVENTS_BYTES_MAX + TOPIC_KEPT_BYTES_MAX < SOCKET_WRITE_BYTES_MAX
assert FOLLOWED_MAX >= SOCKETS_MAX
assert FOLLOWED_AT_ONCE * 32 <= FRAME_BYTES_MAX
# Watching takes part of what a shard wakes at the same time; and all the answers fit into what a link holds.
assert WATCHES_AT_ONCE < WAKING_MAX
assert WATCHES_AT_ONCE * RESUME_EVENTS_MAX * 1_024 <= LINK_WRITE_BYTES_MAX
# Bids for auctions that all sleep wake them.
assert LINK_LINE_MAX < WAKING_MAX
assert LINK_PING_MS * 2 < LINK_DEAD_MS
assert ALIVE_MS * 2 <= OUTAGE_MS < OWNER_SILENT_MS
# Whoever waits for a shard has asked its owner before it may take it for gone.
assert CLAIM_RETRY_MS + PROBE_TIMEOUT_MS < OWNER_SILENT_MS
assert LINK_RETRY_MS < LINK_DEAD_MS
assert SOFT_CLOSE_EXTENSION_MS_MAX <= SOFT_CLOSE_TOTAL_MS_MAX
assert TOKEN_LENGTH_MAX < FRAME_BYTES_MAX
# Who is sent away at a gateway's end is cut off before it.
assert CLOSE_TIMEOUT_MS < DRAIN_MS
# What waits for Postgres can still say so.
assert max(HEALTH_TIMEOUT_MS, LIST_TIMEOUT_MS) < DATABASE_TIMEOUT_MS
# Asked in vain, asked and answered, and cut off.
assert SUSPENSIONS_MS * 4 + CLOSE_TIMEOUT_MS <= SUSPENDED_MS_MAX
