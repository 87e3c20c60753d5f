"""Who may neither act nor be connected."""

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the table."""
    op.execute(
        "CREATE TABLE suspensions (user_id uuid PRIMARY KEY, since timestamptz NOT NULL DEFAULT clock_timestamp())"
    )
