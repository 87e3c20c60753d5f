"""Which process owns a shard, since when time is owed to its auctions, and how near to its end an auction must be."""

from alembic import op

revision = "0002"
down_revision = "0001"

# What was opened before is looked into whenever it may be near enough: the longest window is a day.
_CHANGES = """
ALTER TABLE shards ADD owner uuid, ADD down_at timestamptz;
COMMENT ON COLUMN shards.owner IS 'The process that holds the newest epoch; it alone may raise it to settle a write.';
COMMENT ON COLUMN shards.down_at IS 'The last sign of life before an outage that was not paid back yet.';
ALTER TABLE entities ADD window_ms bigint NOT NULL DEFAULT 86400000;
ALTER TABLE entities ALTER window_ms DROP DEFAULT;
COMMENT ON COLUMN entities.window_ms IS 'So near to due_at an outage must be paid back.';
"""


def upgrade() -> None:
    """Add the columns."""
    for statement in _CHANGES.split(";\n"):
        if statement.strip():
            op.execute(statement)
