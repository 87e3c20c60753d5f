"""The wiring of a gateway to the shards: links, the router, the fan-out and the notices."""

from functools import partial
from typing import NamedTuple

import asyncpg

from actors.bootstrap import Host
from actors.clock import Clock
from actors.directory import Directory, Owner
from actors.link import Link
from gateway.catalogue.auctions import list_joined
from gateway.fanout import Fanout
from gateway.people import People
from gateway.router import Router


class Parts(NamedTuple):
    """What sockets and the HTTP API are given."""

    router: Router
    fanout: Fanout
    people: People


async def connect(host: Host, name: str, pool: asyncpg.Pool, clock: Clock) -> Parts:
    """Link the gateway `name` to every shard. Returns when all of them can be reached."""
    directory = Directory(pool)

    async def find_owner(shard: int) -> Owner | None:
        return next((owner for owner in await directory.owners() if owner.shard == shard), None)

    def opened(shard: int) -> None:
        fanout.resubscribe(shard)
        people.follow_again(shard)

    def link(shard: int) -> Link:
        return Link(
            gateway=name,
            shard=shard,
            secret=host.secret,
            network=host.network,
            find_owner=find_owner,
            on_published=fanout.published,
            on_presence=fanout.presence,
            on_noticed=people.noticed,
            on_open=opened,
        )

    router = Router(await directory.slots())
    fanout = Fanout(router)
    people = People(router, partial(list_joined, pool), clock)
    router.connect({owner.shard: link(owner.shard) for owner in await directory.owners()})
    await router.opened()
    return Parts(router, fanout, people)
