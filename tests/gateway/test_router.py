"""Which shard a request goes to; the links are stand-ins."""

import asyncio
from collections.abc import Callable
from typing import cast
from uuid import UUID, uuid4

from actors.directory import slot_of
from actors.link import Link
from actors.messages import Answer, Follow, Followed, GetAuction, Payload, Unfollow
from engine.limits import SLOTS
from engine.rejections import Rejection
from gateway.router import Router

ANSWER = Rejection("not_found", "There is no such auction.")


class FakeLink:
    def __init__(self) -> None:
        self.submitted: list[tuple[Payload | Follow | Unfollow, Callable[[Answer], None]]] = []
        self.opening = asyncio.Event()
        self.is_closed = False

    @property
    def is_open(self) -> bool:
        return self.opening.is_set()

    def submit(self, payload: Payload | Follow | Unfollow, on_answer: Callable[[Answer], None]) -> None:
        self.submitted.append((payload, on_answer))

    async def opened(self) -> None:
        await self.opening.wait()

    async def close(self) -> None:
        self.is_closed = True


def make_router(shards: int = 3) -> tuple[Router, list[FakeLink]]:
    router = Router([slot % shards for slot in range(SLOTS)])
    links = [FakeLink() for _ in range(shards)]
    router.connect(cast("dict[int, Link]", dict(enumerate(links))))
    return router, links


async def test_a_request_goes_to_the_shard_of_its_auction() -> None:
    router, links = make_router()
    for auction in (uuid4() for _ in range(100)):
        payload = GetAuction(auction, None)
        router.submit(payload, lambda _: None)
        shard = slot_of(auction) % 3
        assert router.shard_of(auction) == shard
        assert links[shard].submitted[-1][0] is payload
    assert sum(len(link.submitted) for link in links) == 100


async def test_asking_waits_for_the_answer() -> None:
    router, links = make_router(1)
    asking = asyncio.create_task(router.ask(GetAuction(UUID(int=1), None)))
    await asyncio.sleep(0)
    ((_, on_answer),) = links[0].submitted
    on_answer(ANSWER)
    assert await asking == ANSWER


async def test_what_is_about_no_auction_goes_to_one_shard() -> None:
    router, links = make_router()
    assert list(router.shards) == [0, 1, 2]
    asking = asyncio.create_task(router.ask_shard(1, Follow([UUID(int=1)])))
    await asyncio.sleep(0)
    router.submit_to(2, Unfollow([UUID(int=1)]), lambda _: None)
    assert [[payload for payload, _ in link.submitted] for link in links] == [
        [],
        [Follow([UUID(int=1)])],
        [Unfollow([UUID(int=1)])],
    ]
    links[1].submitted[0][1](Followed())
    assert await asking == Followed()


async def test_an_answer_for_somebody_who_has_gone_is_let_go() -> None:
    router, links = make_router(1)
    asking = asyncio.create_task(router.ask(GetAuction(UUID(int=1), None)))
    await asyncio.sleep(0)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    links[0].submitted[0][1](ANSWER)


async def test_it_is_open_when_every_link_is() -> None:
    router, links = make_router()
    opening = asyncio.create_task(router.opened())
    links[0].opening.set()
    links[2].opening.set()
    for _ in range(5):
        await asyncio.sleep(0)
    assert not opening.done()
    assert router.unreachable() == [1]
    links[1].opening.set()
    await opening
    assert router.unreachable() == []


async def test_closing_closes_every_link() -> None:
    router, links = make_router()
    await router.close()
    assert all(link.is_closed for link in links)
