"""`gavel suspend`: lock a user out, or let it in again."""

import asyncio
from uuid import UUID

import asyncpg
import click

from actors.database import ERRORS
from engine.limits import SUSPENDED_MAX
from gateway.suspensions import lift, suspend
from gavel.errors import CommandError
from gavel.postgres import reachable_database, reason_of
from gavel.settings import load_settings


@click.command(
    epilog="""\b
Examples:
  gavel suspend 5f0c3f5e-8a53-4c0a-9d53-1f6f1a2b3c4d
  gavel suspend 5f0c3f5e-8a53-4c0a-9d53-1f6f1a2b3c4d --lift"""
)
@click.argument("user_id", type=click.UUID)
@click.option("--lift", "is_lifted", is_flag=True, help="End the suspension.")
@click.option("--data-dir", help="The engine's data folder.")
def command(user_id: UUID, *, is_lifted: bool, data_dir: str | None) -> None:
    """Suspend USER_ID (a UUID): it can neither connect nor ask for anything until that is lifted.

    A running engine closes its connections within 5 seconds. Bids that were placed stand.
    """
    with reachable_database(load_settings(data_dir=data_dir)) as database_url:
        asyncio.run(_suspend(database_url, user_id, is_lifted=is_lifted))
    click.echo(f"{user_id} is {'not suspended' if is_lifted else 'suspended'}.")


async def _suspend(database_url: str, user: UUID, *, is_lifted: bool) -> None:
    try:
        connection = await asyncpg.connect(database_url)
        try:
            if is_lifted:
                await lift(connection, user)
            elif not await suspend(connection, user):
                raise CommandError(f"{SUSPENDED_MAX:,} users are suspended, and no more can be; lift some with --lift.")
        finally:
            await connection.close()
    except (*ERRORS, ValueError) as error:
        raise CommandError(f"The database cannot be used ({reason_of(error)}); is it the engine's?") from error
