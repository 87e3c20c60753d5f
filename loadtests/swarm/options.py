"""The swarm's own options, and where it may send its load."""

import socket
from argparse import ArgumentTypeError
from ipaddress import ip_address
from typing import Final
from urllib.parse import urlsplit

from locust.argument_parser import LocustArgumentParser

from loadtests.swarm.shapes import SHAPES

HOST: Final = "http://127.0.0.1:8700"
"""Where `gavel up` listens if nobody says otherwise."""


def add_options(parser: LocustArgumentParser) -> None:
    """Add them to Locust's."""
    parser.add_argument(
        "--data-dir",
        metavar="FOLDER",
        include_in_web_ui=False,
        env_var="GAVEL_DATA_DIR",
        help="The engine's data folder, for the key that signs access tokens. Default: where `gavel up` has it.",
    )
    parser.add_argument(
        "--tokens",
        metavar="FILE",
        include_in_web_ui=False,
        help="A file with access tokens instead, one a line: the first is a maker's, the others are bidders'.",
    )
    parser.add_argument(
        "--shape",
        choices=["none", *SHAPES],
        default="none",
        include_in_web_ui=False,
        help="How -u users come: at the rate -r (none); in the last minute of auctions that all end together "
        "(closing-minute); over a tenth of -t, to stay (steady).",
    )
    parser.add_argument("--auctions", type=_count, default=20, help="How many auctions are open at the same time.")
    parser.add_argument("--auction-s", type=_seconds, default=60.0, help="How long an auction lasts, in seconds.")
    parser.add_argument(
        "--bid-every-s", type=_seconds, default=10.0, help="Seconds between the bids of a Bidder, on average."
    )
    parser.add_argument(
        "--drop-every-s",
        type=float,
        default=120.0,
        help="Seconds until a user loses its connection and comes back, on average; 0: never.",
    )
    parser.add_argument(
        "--anywhere",
        action="store_true",
        include_in_web_ui=False,
        help="Allow a host that is not this machine. It must be yours: this is a load test.",
    )


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100_000:  # noqa: PLR2004 - more than a process can tell apart
        raise ArgumentTypeError(f"{text!r} is not a whole number from 1 to 100000")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 86_400:  # noqa: PLR2004 - a day
        raise ArgumentTypeError(f"{text!r} is not a number of seconds from 0.1 to 86400")
    return seconds


def refusal(url: str, *, is_anywhere: bool) -> str | None:
    """Why no load goes to this address, in a sentence; None where it may."""
    try:
        parts = urlsplit(url)
        is_address = parts.scheme == "http" and parts.hostname is not None and parts.port != 0
        found = socket.getaddrinfo(parts.hostname, None) if is_address else []
    except (ValueError, OSError):
        found = []
    if not found:
        return f"{url!r} is not the address of an engine; write it like {HOST}."
    if not is_anywhere and not all(ip_address(str(one[4][0]).partition("%")[0]).is_loopback for one in found):
        return f"{url} is not this machine; load goes there only with --anywhere, and only if it is yours."
    return None
