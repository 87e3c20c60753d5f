"""The peer `ray_calls`: Gavel's own shards, with a Ray call for each bid, the way a newcomer to Ray would do it.

A WebSocket route of FastAPI awaits `shard.submit.remote(bid)`, as in Ray's documentation ("AsyncIO / Concurrency for
Actors"). Shards, journal and rules are the engine's, and there are as many shards as it has by default; what differs is
the way to them. Calls to an actor whose methods are asynchronous may overtake one another.
"""

import asyncio
import secrets
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import asyncpg
import msgspec
import ray

import migrations
from actors import shard_actor
from actors.bootstrap import Place
from actors.directory import Directory, slot_of
from actors.messages import AuctionView, BidAccepted, GetAuction, Payload
from actors.ray_actor import NAMESPACE
from engine.commands import OpenAuction, PlaceBid
from engine.rejections import Rejection
from gateway.wire import Subscribed
from loadtests.peers.door import auction_id, main, now_ms, running_postgres, terms_from

SHARDS: Final = 2
_OPENED_AT_ONCE: Final = 500
_OBJECT_STORE_BYTES: Final = 200 * 1024 * 1024


class RayCalls:
    """Auctions in shards, each asked by a call of Ray's."""

    def __init__(self, shards: list[Any], slots: list[int]) -> None:
        self._shards = shards
        self._slots = slots

    async def bid(self, bid: PlaceBid) -> BidAccepted | Rejection:
        """See `Auctions`."""
        answer: BidAccepted | Rejection = await self._submit(bid)
        return answer

    async def look(self, auction: UUID) -> Subscribed | Rejection:
        """See `Auctions`."""
        view: AuctionView | Rejection = await self._submit(GetAuction(auction, None))
        if isinstance(view, Rejection):
            return view
        return Subscribed(seq=view.seq, events=None, snapshot=msgspec.json.encode(view.snapshot), you=None)

    async def open(self, count: int) -> None:
        """Open so many auctions; those that are there already stay as they are."""
        terms = terms_from(now_ms())
        maker = UUID(int=0)
        for first in range(0, count, _OPENED_AT_ONCE):
            some = map(auction_id, range(first, min(first + _OPENED_AT_ONCE, count)))
            opening = (OpenAuction(auction=one, maker=maker, request_id=one, terms=terms) for one in some)
            await asyncio.gather(*map(self._submit, opening))

    async def _submit(self, payload: Payload) -> Any:  # noqa: ANN401 (Ray's calls have no type)
        return await self._shards[self._slots[slot_of(payload.auction)]].submit.remote(payload)


@asynccontextmanager
async def open_auctions(data_dir: Path, count: int) -> AsyncIterator[RayCalls]:
    """Start the database, Ray and the shards, and open the auctions."""
    async with running_postgres(data_dir) as url:
        await migrations.upgrade(url)
        async with asyncpg.create_pool(url, min_size=1, max_size=1) as pool:
            directory = Directory(pool)
            await directory.lay_out(SHARDS)
            slots = await directory.slots()
        with tempfile.TemporaryDirectory(prefix="gavel-ray-") as folder:
            shards = _start_shards(url, data_dir, folder)
            try:
                await asyncio.gather(*(shard.ready.remote() for shard in shards))
                auctions = RayCalls(shards, slots)
                await auctions.open(count)
                yield auctions
                await asyncio.gather(*(shard.stop.remote() for shard in shards))
            finally:
                ray.shutdown()


def _start_shards(url: str, data_dir: Path, folder: str) -> list[Any]:
    secret = data_dir / "secret"
    secret.write_bytes(secrets.token_bytes(32))
    place = Place(database_url=url, secret_path=str(secret), log_dir=str(data_dir), log_level="warning")
    ray.init(
        address="local",
        namespace=NAMESPACE,
        log_to_driver=False,
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        resources={shard_actor.RESOURCE: SHARDS},
        _temp_dir=folder,
    )
    return [shard_actor.create(place, number) for number in range(SHARDS)]


if __name__ == "__main__":
    main(open_auctions)
