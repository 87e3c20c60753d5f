"""`gavel watch`: follow one auction in the terminal, as a guest, until it ends."""

import asyncio
import sys
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import click

from engine.money import CURRENCIES, format_amount
from gavel.client import OVER, Api, LiveClient, Message, follow

if TYPE_CHECKING:
    from rich.panel import Panel

LINES: Final = 10
FRAME_S: Final = 0.2


@click.command(
    epilog="""\b
Examples:
  gavel watch 5f0c3f5e-8a53-4c0a-9d53-1f6f1a2b3c4d
  gavel watch 5f0c3f5e-8a53-4c0a-9d53-1f6f1a2b3c4d --url https://gavel.example"""
)
@click.argument("auction", type=click.UUID)
@click.option("--url", help="Where the engine is. [default: what GAVEL_HOST and GAVEL_PORT say]")
def command(auction: UUID, url: str | None) -> None:
    """Follow AUCTION (a UUID) until it ends; without a terminal, one line per event."""
    from gavel.settings import load_settings

    asyncio.run(watch(url or load_settings().url, auction, is_live=sys.stdout.isatty()))


class Watched:
    """What we know of the auction, and the last lines about it."""

    def __init__(self) -> None:
        self.snapshot: dict[str, Any] = {}
        self.lines: deque[str] = deque(maxlen=LINES)
        self.new_lines: list[str] = []

    @property
    def is_over(self) -> bool:
        return self.snapshot.get("status") in OVER

    def apply(self, message: Message) -> None:
        """Take in a message of the auction's topic."""
        self.snapshot = follow(self.snapshot, message)
        for event in message.get("events", ()):
            line = self._line(event)
            if line is not None:
                self._say(f"seq {event['seq']}: {line}")
        # After what led there: with a `state` come some of the events that it covers.
        if "snapshot" in message:
            self._say(f"seq {message['seq']}: {self._standing()}")

    def _line(self, event: Message) -> str | None:
        match event["kind"]:
            case "bid_placed":
                answer = "" if event["leader"] == event["paddle"] else f", outbid at once by paddle {event['leader']}"
                return f"paddle {event['paddle']} bids{answer}: {self.amount(event['price'])}"
            case "reserve_reached":
                return f"the reserve is reached: {self.amount(event['price'])}"
            case "extended":
                return "extended after an outage" if event["reason"] == "outage" else "extended by a late bid"
            case "ended":
                return self._ending(event)
            case "cancelled":
                return f"cancelled by the {event['by']}"
            case "scheduled" | "opened":
                return str(event["kind"])
        return None

    def _ending(self, event: Message) -> str:
        if event["outcome"] == "sold":
            return f"sold to paddle {event['paddle']} for {self.amount(event['price'])}"
        return "ended under its reserve" if event["outcome"] == "reserve_not_met" else "ended without a bid"

    def _standing(self) -> str:
        shown = self.snapshot
        leader = "no bids yet" if shown["leader"] is None else f"paddle {shown['leader']} leads"
        return f"{shown['status']}, {self.amount(shown['price'])}, {leader}, {shown['bids']} bids"

    def _say(self, line: str) -> None:
        self.lines.append(printable(line))
        self.new_lines.append(printable(line))

    def amount(self, minor: int) -> str:
        """An amount as people write it."""
        currency = self.snapshot["currency"]
        return format_amount(minor, currency) if currency in CURRENCIES else f"{minor} {currency}"


async def watch(url: str, auction: UUID, *, is_live: bool) -> None:
    """Follow an auction until it is over. Raises `CommandError` if there is none, or no server for too long."""
    async with Api(url, patience_s=0) as api:
        await api.call("GET", f"/auctions/{auction}")
    watched = Watched()
    changed = asyncio.Event()

    def on_message(message: Message) -> None:
        if message.get("topic") == f"auction:{auction}":
            watched.apply(message)
            changed.set()

    async with LiveClient(url, on_message=on_message) as client:
        await client.subscribe(f"auction:{auction}")
        show = _show_live(watched, client, changed) if is_live else _print_lines(watched, changed)
        showing, giving_up = asyncio.create_task(show), asyncio.create_task(client.gave_up())
        done, pending = await asyncio.wait((showing, giving_up), return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for task in done:
            task.result()


async def _print_lines(watched: Watched, changed: asyncio.Event) -> None:
    while True:
        await changed.wait()
        changed.clear()
        for line in watched.new_lines:
            click.echo(line)
        watched.new_lines.clear()
        if watched.is_over:
            return


async def _show_live(watched: Watched, client: LiveClient, changed: asyncio.Event) -> None:
    from rich.live import Live

    with Live(_panel(watched, client.now_ms()), auto_refresh=False) as live:
        while not watched.is_over:
            # The clock runs on when nothing else happens.
            with suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), FRAME_S)
            changed.clear()
            watched.new_lines.clear()
            live.update(_panel(watched, client.now_ms()), refresh=True)
        live.update(_panel(watched, client.now_ms()), refresh=True)


def _panel(watched: Watched, now: float) -> "Panel":
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    shown = watched.snapshot
    facts = Table.grid(padding=(0, 2))
    leader = "nobody yet" if shown["leader"] is None else f"paddle {shown['leader']}"
    for name, value in (
        ("status", shown["status"]),
        ("price", watched.amount(shown["price"])),
        ("leader", leader),
        ("next bid from", "-" if watched.is_over else watched.amount(shown["minimum"])),
        ("bids", str(shown["bids"])),
        ("time left", "-" if watched.is_over else time_left(shown["end_time"] - now)),
    ):
        facts.add_row(Text(name, style="dim"), Text(printable(str(value)), style="bold"))
    return Panel(Group(facts, Text(), Text("\n".join(watched.lines))), title=Text(printable(shown["title"])))


def time_left(milliseconds: float) -> str:
    """`1 d 02:03:04`, `02:03:04` or `03:04`; never under zero: the end is the server's to say."""
    seconds = max(0, int(milliseconds / 1_000))
    days, seconds = divmod(seconds, 24 * 60 * 60)
    hours, seconds = divmod(seconds, 60 * 60)
    clock = f"{seconds // 60:02}:{seconds % 60:02}"
    if days:
        return f"{days} d {hours:02}:{clock}"
    return f"{hours:02}:{clock}" if hours else clock


def printable(text: str) -> str:
    """What other people wrote, without the control characters that would steer our terminal."""
    return "".join(character if character.isprintable() else " " for character in text)
