"""The wiring of a gateway to the shards: links, the router and the fan-out."""

from typing import NamedTuple

from actors.bootstrap import Host
from actors.directory import Directory, Owner
from actors.link import Link
from gateway.fanout import Fanout
from gateway.router import Router


class Parts(NamedTuple):
    """What sockets and the HTTP API are given."""

    router: Router
    fanout: Fanout


async def connect(host: Host, name: str, directory: Directory) -> Parts:
    """Link the gateway `name` to every shard. Returns when all of them can be reached."""

    async def find_owner(shard: int) -> Owner | None:
        return next((owner for owner in await directory.owners() if owner.shard == shard), None)

    def link(shard: int) -> Link:
        return Link(
            gateway=name,
            shard=shard,
            secret=host.secret,
            network=host.network,
            find_owner=find_owner,
            on_published=fanout.published,
            on_presence=fanout.presence,
            on_open=fanout.resubscribe,
        )

    router = Router(await directory.slots())
    fanout = Fanout(router)
    router.connect({owner.shard: link(owner.shard) for owner in await directory.owners()})
    await router.opened()
    return Parts(router, fanout)
