"""The swarm's own options, and where it may send its load."""

import socket
from argparse import Namespace
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
    parser.add_argument("--auctions", type=int, default=20, help="How many auctions are open at the same time.")
    parser.add_argument("--auction-s", type=float, default=60.0, help="How long an auction lasts, in seconds.")
    parser.add_argument(
        "--bid-every-s", type=float, default=10.0, help="Seconds between the bids of a Bidder, on average."
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


def problem(url: str, options: Namespace) -> str | None:
    """Why no load of this kind goes to this address, in a sentence; None where it may."""
    for name, least, most in (("auctions", 1, 10_000), ("auction_s", 1, 86_400), ("bid_every_s", 0.01, 86_400)):
        if not least <= getattr(options, name) <= most:
            return f"--{name.replace('_', '-')} is from {least} to {most}."
    if not options.drop_every_s >= 0:
        return "--drop-every-s is a number of seconds, or 0."
    try:
        parts = urlsplit(url)
        is_address = parts.scheme == "http" and parts.hostname is not None and parts.port != 0
        found = socket.getaddrinfo(parts.hostname, None) if is_address else []
    except (ValueError, OSError):
        found = []
    if not found:
        return f"{url!r} is not the address of an engine; write it like {HOST}."
    if not options.anywhere and not all(ip_address(str(one[4][0]).partition("%")[0]).is_loopback for one in found):
        return f"{url} is not this machine; load goes there only with --anywhere, and only if it is yours."
    return None
