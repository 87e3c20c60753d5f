"""Run by Alembic: applies revisions on the connection that `migrations.upgrade` hands over."""

from alembic import context
from sqlalchemy import Connection


def run() -> None:
    """Apply what Alembic was asked to, in the transaction of the connection handed over."""
    connection = context.config.attributes.get("connection")
    if not isinstance(connection, Connection):
        message = "Migrations run on a connection that is handed over: call migrations.upgrade(database_url)."
        raise TypeError(message)
    # There are no SQLAlchemy models to compare with: revisions are written by hand.
    context.configure(connection=connection, target_metadata=None)
    with context.begin_transaction():
        context.run_migrations()


run()
