"""The judge of the topic `me`: what one user is told on one connection, beside what the oracle says of its auctions.

A notice may stand for others before it that a broken link has swallowed; it must be news, and true of the state that
it names.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple
from uuid import UUID

from engine.events import BidPlaced, Cancelled, Ended
from tests.simulation.history import Notice, Standings

if TYPE_CHECKING:
    from tests.simulation.checker import _Auction


class Wrong(NamedTuple):
    """What is wrong with a notice, or that there is none."""

    auction: UUID
    seq: int | None
    sentence: str


class Hearing:
    """What one user is told on one connection. `is_calm`: no link broke, so that each notice comes, and by itself."""

    def __init__(self, auctions: Mapping[UUID, "_Auction"], user: UUID, *, is_calm: bool) -> None:
        self._auctions = auctions
        self._user = user
        self._is_calm = is_calm
        self._is_open = False
        self._known: dict[UUID, tuple[int, int]] = {}
        """What was told last of each auction: it was so from one `seq` on, and not after another."""

    def judge(self, records: Sequence[Standings | Notice]) -> Iterator[Wrong]:
        """All that is wrong with what was told."""
        for record in records:
            if isinstance(record, Standings):
                self._is_open = True
                self._known.clear()
                for standing in record.standings:
                    yield from self._stand(UUID(standing["auction"]), standing)
            else:
                yield from self._hear(record)

    def judge_end(self, joined: set[UUID]) -> Iterator[Wrong]:
        """What should have been told by the end, of the auctions in which the user knows that it bids."""
        for entity_id in sorted(joined | self._known.keys()):
            auction = self._auctions[entity_id]
            if not self._is_open or not auction.is_played:
                continue
            missed = [seq for seq in self._due(auction) if seq > self._known.get(entity_id, (0, 0))[1]]
            is_over = auction.standings[-1].status in ("ended", "cancelled")
            if missed and (self._is_calm or is_over):
                yield Wrong(entity_id, missed[-1], f"{self._user} was never told")

    def _stand(self, entity_id: UUID, standing: dict[str, object]) -> Iterator[Wrong]:
        auction = self._auctions.get(entity_id)
        if auction is None or not auction.is_played:
            return
        seqs = [seq for seq in range(1, len(auction.rows) + 1) if self._standing(auction, seq) == standing]
        if seqs:
            self._known[entity_id] = seqs[0], seqs[-1]
        else:
            yield Wrong(entity_id, None, f"{self._user} never stood like this: {standing}")

    def _standing(self, auction: "_Auction", seq: int) -> dict[str, object] | None:
        you = auction.you(self._user, seq)
        return None if you is None else {**you, "auction": str(auction.id), "status": auction.standings[seq - 1].status}

    def _hear(self, notice: Notice) -> Iterator[Wrong]:
        auction, seq = self._auctions.get(notice.auction), notice.notice["seq"]
        if auction is None or not auction.is_played:
            return
        least, most = self._known.get(notice.auction, (0, 0))
        due = self._due(auction)
        if not self._is_open:
            yield Wrong(notice.auction, seq, f"a notice came before the subscription: {notice.notice}")
        elif not 1 <= seq <= len(auction.rows):
            yield Wrong(notice.auction, seq, f"the journal has {len(auction.rows)} events, but {notice.notice} came")
        elif notice.notice != (expected := self._expected(auction, seq)):
            yield Wrong(notice.auction, seq, f"{self._user} should be told {expected}, not {notice.notice}")
        elif not any(least < one <= seq for one in due):
            yield Wrong(notice.auction, seq, f"{self._user} knew that already, since {least}: {notice.notice}")
        elif self._is_calm and seq != (first := next(one for one in due if one > most)):
            yield Wrong(notice.auction, first, f"{self._user} was not told, though no link broke")
        self._known[notice.auction] = seq, seq

    def _due(self, auction: "_Auction") -> list[int]:
        """The events that are news for the user."""
        due, user = [], str(self._user)
        leader: str | None = None
        for row, event, standing in zip(auction.rows, auction.events, auction.standings, strict=True):
            match event:
                case BidPlaced():
                    is_news = event.bidder == self._user or (leader == user != standing.leader)
                case Ended() | Cancelled():
                    is_news = auction.you(self._user, row.seq) is not None
                case _:
                    is_news = False
            if is_news:
                due.append(row.seq)
            leader = standing.leader
        return due

    def _expected(self, auction: "_Auction", seq: int) -> dict[str, object] | None:
        """What the user may be told of an auction right after an event; None before it bids there."""
        you, now = auction.you(self._user, seq), auction.standings[seq - 1]
        if you is None:
            return None
        is_leading = you.pop("is_leading")
        if now.status == "ended":
            kind = "won" if is_leading and now.outcome == "sold" else "lost"
        elif now.status == "cancelled":
            kind = "cancelled"
        else:
            kind = "winning" if is_leading else "outbid"
        return {
            "type": "notice",
            "topic": "me",
            "kind": kind,
            "auction": str(auction.id),
            "seq": seq,
            "at": auction.rows[seq - 1].at,
            "price": now.price,
            **you,
            "minimum": now.minimum,
            "end_time": now.end_time,
        } | ({} if now.outcome is None else {"outcome": now.outcome})
