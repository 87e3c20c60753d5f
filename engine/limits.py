"""Every bound of the engine, with the relations between them asserted.

Amounts are integers in a currency's minor unit, times and durations integer milliseconds.
"""

SECOND_MS = 1_000
MINUTE_MS = 60 * SECOND_MS
HOUR_MS = 60 * MINUTE_MS
DAY_MS = 24 * HOUR_MS

# Numbers and amounts
INTEGER_MAX = 2**53 - 1
"""JSON readers that hold numbers as doubles lose integers above this one (RFC 8259, section 6)."""
AMOUNT_MAX = 9_999_999_999
"""99,999,999.99 in cents: the product keeps amounts as `DECIMAL(10,2)`."""

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
TOKEN_GRACE_MS = 60 * SECOND_MS
CLOSE_TIMEOUT_MS = 1 * SECOND_MS
"""How long a socket's peer may take to answer a close before the connection is cut."""
CLOSE_REASON_BYTES_MAX = 123
"""A control frame holds 125 bytes, a close's code two of them (RFC 6455, section 5.5)."""
SOCKET_WRITE_BYTES_MAX = 1024 * 1024
"""Bytes that a client has not read; over it the socket is closed as too slow."""
SOCKETS_MAX = 20_000
"""Sockets of one gateway."""
SOCKET_BEHIND_BYTES = 64 * 1024
"""With more unread a socket is behind: until it has read on, what happens in its topics is folded for it."""
SOCKET_KERNEL_BYTES = 64 * 1024
"""So much of what a client has not read the kernel is asked to hold, beside our own buffer."""
SOCKETS_PER_SLICE = 100
"""A broadcast is written to so many sockets in one go, so that acknowledgements pass between its slices."""

# Topics at a gateway
TICK_MS = 20
"""The broadcasts of one topic begin at least so far apart."""
TOPIC_EVENTS_BYTES_MAX = 64 * 1024
"""Of each topic's last events so much is remembered, for those who come back."""
TOPIC_KEPT_BYTES_MAX = 64 * 1024
"""Of the events that folding never drops so much is remembered, for those who are behind."""
WATCH_VIEWERS_MAX = 1_000
"""So many people's standings are asked for at once; who comes after them goes with the next request."""
PRESENCE_MS = 1 * SECOND_MS
"""Viewers are counted, and their number is told, at most so often."""

# Links between gateways and shards
LINK_FRAME_BYTES_MAX = 16 * 1024 * 1024
LINK_BATCH_MAX = 64
LINK_IN_FLIGHT_MAX = 8_192
LINK_OUTPUT_BYTES = 1024 * 1024
"""About so much a shard puts into one frame."""
LINK_FOLD_BYTES = 4 * 1024 * 1024
"""With more unread a gateway is behind: until it has read on, events are folded for it."""
LINK_WRITE_BYTES_MAX = 64 * 1024 * 1024
"""Bytes that a gateway has not read; over it its link is cut."""
LINK_PING_MS = 250
LINK_DEAD_MS = 1 * SECOND_MS
LINK_GREETING_MS = 2 * SECOND_MS
COMMAND_TIMEOUT_MS = 8 * SECOND_MS
"""How long a gateway keeps a command for a shard that is away before it tells the client."""

# Shards
SLOTS = 1_024
SHARD_LINE_MAX = 8_192
"""Commands that a shard holds undecided or uncommitted before it answers `busy`."""
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
CLOCK_SYNC_MS = MINUTE_MS
CLOCK_ROUND_TRIP_MS_MAX = 50
"""A reading of the clock that took longer is not precise enough."""
DATABASE_TIMEOUT_MS = 5 * SECOND_MS
"""Reads that take longer are given up."""

# HTTP
BODY_BYTES_MAX = 1024 * 1024
PAGE_LIMIT_DEFAULT = 20
PAGE_LIMIT_MAX = 100

assert AMOUNT_MAX <= INTEGER_MAX
# A verdict that is not committed yet must still be remembered when its retry arrives.
assert SHARD_LINE_MAX < VERDICTS_REMEMBERED
assert LINK_IN_FLIGHT_MAX <= SHARD_LINE_MAX
assert LINK_OUTPUT_BYTES + RESUME_EVENTS_MAX * 1_024 < LINK_FRAME_BYTES_MAX
assert LINK_BATCH_MAX * FRAME_BYTES_MAX <= LINK_FRAME_BYTES_MAX
assert LINK_BATCH_MAX * WATCH_VIEWERS_MAX * 20 <= LINK_FRAME_BYTES_MAX
# One frame with answers does not make a gateway one that is behind, nor one frame to a socket one that is too slow.
assert LINK_OUTPUT_BYTES < LINK_FOLD_BYTES < LINK_WRITE_BYTES_MAX
assert SOCKET_BEHIND_BYTES < SOCKET_WRITE_BYTES_MAX
assert TOPIC_EVENTS_BYTES_MAX + TOPIC_KEPT_BYTES_MAX < SOCKET_WRITE_BYTES_MAX
assert LINK_PING_MS * 2 < LINK_DEAD_MS
assert ALIVE_MS * 2 <= OUTAGE_MS < OWNER_SILENT_MS
assert SOFT_CLOSE_EXTENSION_MS_MAX <= SOFT_CLOSE_TOTAL_MS_MAX
assert TOKEN_LENGTH_MAX < FRAME_BYTES_MAX
