"""`gavel replay`: play a recorded bid history against an engine, and compare the closing prices.

Every id is derived from the run's name, so a run that broke off goes on under the same name and doubles nothing: the
engine answers what it knows with its first verdict.
"""

import asyncio
import csv
import json
import secrets
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Final, TextIO
from uuid import UUID, uuid5

import click

from engine.commands import Role
from engine.money import format_amount, to_decimal, to_minor
from gateway.tokens import issue
from gavel.client import PATIENCE_S, Api, ApiRefusal, LiveClient, Message
from gavel.errors import CommandError

CURRENCY: Final = "USD"
NAMESPACE: Final = UUID("6ba6f3f2-6f0c-5d5c-9d0e-6f4a1f0d7c11")
"""Of the ids that we derive; any fixed one would do."""
MAKER: Final = uuid5(NAMESPACE, "maker")
TOKEN_TTL_S: Final = 24 * 60 * 60
OPEN_MONTHS: Final = 6
COLUMNS: Final = ("auctionid", "bid", "bidtime", "bidder", "openbid", "price", "item")
VERDICT: Final = ("code", "seq", "hash", "outcome", "price", "paddle", "max_amount", "minimum", "end_time")
"""What a history tells of an answer."""


@dataclass(frozen=True)
class RecordedBid:
    """One row: the most that `bidder` would pay, in cents, placed `days` after the start."""

    bidder: str
    max_amount: int
    days: Decimal


@dataclass(frozen=True)
class RecordedAuction:
    """One auction of the history; its bids in the order in which they were placed."""

    name: str
    title: str
    starting_price: int
    published_price: int
    bids: tuple[RecordedBid, ...]


@dataclass(frozen=True)
class Closing:
    """How a replayed auction ended; `price` is None where nothing was sold."""

    recorded: RecordedAuction
    auction: UUID
    outcome: str | None
    price: int | None

    @property
    def is_as_published(self) -> bool:
        return self.price == self.recorded.published_price


@dataclass
class Tally:
    """What happened during a run."""

    acks: int = 0
    reconnects: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    closings: list[Closing] = field(default_factory=list)


@click.command(
    epilog="""\b
Examples:
  gavel replay ebay_palm_bids.csv
  gavel replay ebay_palm_bids.csv --auctions 20 --reserve-from-price
  gavel replay ebay_palm_bids.csv --run tuesday --json tuesday.json

A run that broke off goes on with the same --run."""
)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, readable=True, path_type=Path))
@click.option("--url", help="Where the engine is. [default: what GAVEL_HOST and GAVEL_PORT say]")
@click.option("--auctions", type=click.IntRange(min=1), help="Only the first so many auctions.")
@click.option("--reserve-from-price", is_flag=True, help="Give each auction its published price as hidden reserve.")
@click.option("--concurrency", type=click.IntRange(1, 1_000), default=50, show_default=True, help="Auctions at once.")
@click.option("--run", "run_name", help="The run's name, to begin or to go on with. [default: a random one]")
@click.option("--patience", type=click.FloatRange(min=0), default=PATIENCE_S, show_default=True, help="In seconds.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="The engine's data folder, for its key.")
@click.option("--history", "seen", type=click.File("a", lazy=False), help="Append each bid and answer to this file.")
@click.option("--json", "results", type=click.File("w"), help="Write the results to this file.")
def command(
    file: Path,
    *,
    url: str | None,
    auctions: int | None,
    reserve_from_price: bool,
    concurrency: int,
    run_name: str | None,
    patience: float,
    data_dir: Path | None,
    seen: TextIO | None,
    results: TextIO | None,
) -> None:
    """Play the bid history in FILE (CSV) against an engine, each bidder a user with a socket of its own."""
    from gavel.keys import read_keys
    from gavel.settings import load_settings

    history = read_history(file)[:auctions]
    settings = load_settings(data_dir=data_dir)
    replay = Replay(
        url or settings.url,
        read_keys(settings.data_dir).private_pem,
        run_name or secrets.token_hex(4),
        has_reserve=reserve_from_price,
        patience_s=patience,
        seen=seen,
    )
    click.echo(f"Run {replay.run}: to go on with it if it breaks off, add --run {replay.run}.", err=True)
    tally = play_with_progress(replay, history, concurrency)
    print_results(tally)
    if results is not None:
        json.dump(results_of(replay.run, tally), results, indent=2)
        results.write("\n")


# Reading the history


def read_history(path: Path) -> list[RecordedAuction]:
    """The auctions of a file, in the order of their first rows. Raises `CommandError`."""
    rows: dict[str, list[dict[str, str]]] = defaultdict(list)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                raise CommandError(f"{path} has no column {missing[0]}; it needs {', '.join(COLUMNS)}.")
            for row in reader:
                rows[row["auctionid"]].append({**row, "line": str(reader.line_num)})
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CommandError(f"{path} cannot be read as CSV ({error}); give a file as in the README.") from error
    if not rows:
        raise CommandError(f"{path} has no rows; give a file with bids.")
    return [_recorded(path, name, of_auction) for name, of_auction in rows.items()]


def _recorded(path: Path, name: str, rows: list[dict[str, str]]) -> RecordedAuction:
    line = rows[0]["line"]
    try:
        first = rows[0]
        bids = []
        for row in rows:
            line = row["line"]
            bids.append(RecordedBid(row["bidder"], to_minor(row["bid"], CURRENCY), _days(row["bidtime"])))
        starting_price, published_price = to_minor(first["openbid"], CURRENCY), to_minor(first["price"], CURRENCY)
    except (ValueError, TypeError, InvalidOperation):
        raise CommandError(
            f"{path}, line {line}: an amount or a time there is no number that we can use; correct or remove the row."
        ) from None
    # sorted() keeps the file's order among equals.
    in_order = tuple(sorted(bids, key=lambda bid: bid.days))
    return RecordedAuction(name, f"{first['item']}, eBay {name}", starting_price, published_price, in_order)


def _days(text: str) -> Decimal:
    """Not every Decimal is a time: NaN has no place in an order."""
    days = Decimal(text)
    if not days.is_finite():
        raise ValueError("not a time")
    return days


# Ids


def user_of(bidder: str) -> UUID:
    """A bidder is the same user in all auctions and runs."""
    return uuid5(NAMESPACE, f"bidder/{bidder}")


def auction_key(run: str, auction: str) -> UUID:
    """What a resumed run finds its auction by."""
    return uuid5(NAMESPACE, f"auction/{run}/{auction}")


def bid_id_of(run: str, auction: str, row: int) -> UUID:
    """The id of the bid that is `row`th (from 0) in its auction."""
    return uuid5(NAMESPACE, f"bid/{run}/{auction}/{row}")


def far_end(today: datetime) -> datetime:
    """An end far ahead, the same for a whole month: a resumed run must ask for the very same auction."""
    month = today.month - 1 + OPEN_MONTHS
    return datetime(today.year + month // 12, month % 12 + 1, 1, tzinfo=UTC)


# Playing


class Replay:
    """One run against one engine; `play` may be called for many auctions at once."""

    def __init__(
        self,
        url: str,
        private_pem: bytes,
        run: str,
        *,
        has_reserve: bool = False,
        patience_s: float = PATIENCE_S,
        seen: TextIO | None = None,
    ) -> None:
        self.run = run
        self.tally = Tally()
        self._url = url
        self._private_pem = private_pem
        self._has_reserve = has_reserve
        self._patience_s = patience_s
        self._seen = seen

    async def play_all(self, history: Iterable[RecordedAuction], concurrency: int, on_bid: Callable[[], None]) -> Tally:
        """Play auctions, `concurrency` at a time. Raises `CommandError` when patience is at an end."""
        # A wrong address shows at once; only an engine that was there is waited for.
        async with Api(self._url, patience_s=0) as api:
            await api.call("GET", "/health")
        places = asyncio.Semaphore(concurrency)

        async def play_in_turn(recorded: RecordedAuction) -> None:
            async with places:
                self.tally.closings.append(await self._play(api, recorded, on_bid))

        async with Api(self._url, patience_s=self._patience_s) as api:
            try:
                async with asyncio.TaskGroup() as group:
                    for recorded in history:
                        group.create_task(play_in_turn(recorded))
            except* CommandError as errors:
                raise _first(errors) from None
        return self.tally

    async def _play(self, api: Api, recorded: RecordedAuction, on_bid: Callable[[], None]) -> Closing:
        maker = self._token(MAKER, "maker")
        opened = await api.call(
            "POST", "/auctions", token=maker, key=auction_key(self.run, recorded.name), body=self._opening(recorded)
        )
        auction = UUID(opened["auction_id"])
        async with AsyncExitStack() as sockets:
            bidders: dict[str, Bidder] = {}
            for row, bid in enumerate(recorded.bids):
                if bid.bidder not in bidders:
                    bidders[bid.bidder] = self._bidder(auction, recorded.name, bid.bidder)
                    await sockets.enter_async_context(bidders[bid.bidder].client)
                verdict = await bidders[bid.bidder].bid(bid_id_of(self.run, recorded.name, row), bid.max_amount)
                self._count(verdict)
                on_bid()
            self.tally.reconnects += sum(bidder.client.reconnects for bidder in bidders.values())
        try:
            await api.call("POST", f"/auctions/{auction}/end", token=maker, body={"reason": "end of the replay"})
        except ApiRefusal as refusal:
            # Ended before: by this run until it broke off, or by a request whose answer was lost.
            if refusal.code != "ENDED":
                raise
        ended = await api.call("GET", f"/auctions/{auction}", token=maker)
        price = to_minor(str(ended["price"]), CURRENCY) if ended["outcome"] == "sold" else None
        return Closing(recorded, auction, ended["outcome"], price)

    def _opening(self, recorded: RecordedAuction) -> Message:
        reserve = recorded.published_price if self._has_reserve else None
        return {
            "title": recorded.title,
            "currency": CURRENCY,
            "starting_price": str(to_decimal(recorded.starting_price, CURRENCY)),
            "increments": "ebay_us",
            "end_time": far_end(datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "soft_close": None,
        } | ({} if reserve is None else {"reserve_price": str(to_decimal(reserve, CURRENCY))})

    def _bidder(self, auction: UUID, recorded: str, name: str) -> "Bidder":
        user = user_of(name)
        client = f"{recorded}/{name}"
        return Bidder(self._url, self._token(user, "viewer"), auction, user, client, self._patience_s, self._seen)

    def _count(self, verdict: Message) -> None:
        if verdict["type"] == "ack":
            self.tally.acks += 1
        else:
            self.tally.refusals[verdict["code"]] += 1

    def _token(self, user: UUID, role: Role) -> str:
        return issue(self._private_pem, user, role, TOKEN_TTL_S, time.time_ns() // 1_000_000)


class Bidder:
    """One bidder of one auction, on a socket of its own; it bids one bid after another.

    What it sends and hears goes to `seen`, a JSON object a line: the records of `tests/simulation/history.py`.
    """

    def __init__(
        self, url: str, token: str, auction: UUID, user: UUID, name: str, patience_s: float, seen: TextIO | None
    ) -> None:
        self.client = LiveClient(url, token=token, on_message=self.heard, patience_s=patience_s)
        self._auction = auction
        self._user = user
        self._name = name
        self._seen = seen
        self._bid_id: UUID | None = None
        self._max_amount = 0
        self._sent_on = 0
        """The connection on which the bid was sent last."""
        self._is_answered = True

    async def bid(self, bid_id: UUID, max_amount: int) -> Message:
        """Bid, and wait for the verdict, for as long as the client has patience."""
        self._bid_id, self._max_amount = bid_id, max_amount
        self._sent(max(1, self.client.connections))
        return await self.client.bid(self._auction, bid_id, max_amount=max_amount)

    def heard(self, message: Message) -> None:
        """Take a message of the client's."""
        if message["type"] not in ("ack", "rejected", "error"):
            return
        # The client sends by itself again: on each new connection, and after a refusal for the moment.
        for connection in range(self._sent_on + 1, self.client.connections + 1):
            self._sent(connection)
        if self._is_answered:
            self._sent(self._sent_on)
        self._is_answered = True
        self._write({"type": "verdict", "kind": message["type"]} | {name: message.get(name) for name in VERDICT})

    def _sent(self, connection: int) -> None:
        self._sent_on, self._is_answered = connection, False
        self._write({"type": "sent", "bidder": str(self._user), "max_amount": self._max_amount})

    def _write(self, record: dict[str, Any]) -> None:
        if self._seen is None:
            return
        record |= {"client": self._name, "connection": self._sent_on, "at": time.time_ns() // 1_000_000}
        record |= {"auction": str(self._auction), "bid_id": str(self._bid_id)}
        # Flushed: whoever checks that nothing acknowledged was lost may kill us, too.
        self._seen.write(json.dumps(record) + "\n")
        self._seen.flush()


def play_with_progress(replay: Replay, history: list[RecordedAuction], concurrency: int) -> Tally:
    """Play, with a progress bar where somebody looks on."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("bids"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task("bids", total=sum(len(recorded.bids) for recorded in history))
        return asyncio.run(replay.play_all(history, concurrency, lambda: progress.advance(task)))


def _first(errors: BaseExceptionGroup[Any]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


# Results


def results_of(run: str, tally: Tally) -> dict[str, Any]:
    """The results as JSON; amounts in cents."""
    return {
        "run": run,
        "auctions": len(tally.closings),
        "as_published": sum(closing.is_as_published for closing in tally.closings),
        "acks": tally.acks,
        "rejections": dict(tally.refusals),
        "reconnects": tally.reconnects,
        "closings": [
            {
                "auctionid": closing.recorded.name,
                "auction": str(closing.auction),
                "outcome": closing.outcome,
                "price": closing.price,
                "published_price": closing.recorded.published_price,
            }
            for closing in sorted(tally.closings, key=lambda closing: closing.recorded.name)
        ],
    }


def print_results(tally: Tally) -> None:
    """The auctions that closed differently, and the sums."""
    from rich.console import Console
    from rich.table import Table

    differing = [closing for closing in tally.closings if not closing.is_as_published]
    if differing:
        table = Table("auction", "closed at", "published", "outcome")
        for closing in sorted(differing, key=lambda closing: closing.recorded.name):
            price = "-" if closing.price is None else format_amount(closing.price, CURRENCY)
            published = format_amount(closing.recorded.published_price, CURRENCY)
            table.add_row(closing.recorded.name, price, published, closing.outcome or "-")
        Console().print(table)
    matching = len(tally.closings) - len(differing)
    click.echo(f"{matching} of {len(tally.closings)} auctions closed at the published price")
    refusals = ", ".join(f"{count} {code}" for code, count in sorted(tally.refusals.items())) or "none"
    click.echo(f"{tally.acks} bids acknowledged; rejected: {refusals}; reconnects: {tally.reconnects}")
