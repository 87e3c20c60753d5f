"""In which auctions somebody bids, and when an auction was over: what a user's standings are found by."""

from alembic import op

revision = "0003"
down_revision = "0002"

# Of all ids of commands only a bid's has 32 bytes: its bidder's, and the one that the bidder chose.
_CHANGES = """
CREATE TABLE bidders (
    user_id uuid NOT NULL,
    entity_id uuid NOT NULL,
    PRIMARY KEY (user_id, entity_id)
);
COMMENT ON TABLE bidders IS 'Written with the event of a bidder''s first accepted bid in an auction.';
INSERT INTO bidders (user_id, entity_id)
SELECT DISTINCT encode(substring(command_id FOR 16), 'hex')::uuid, entity_id FROM journal
WHERE length(command_id) = 32;
ALTER TABLE entities ADD ended_at bigint;
COMMENT ON COLUMN entities.ended_at IS 'When it was over, ended or cancelled; milliseconds since the epoch, UTC.';
UPDATE entities SET ended_at = last.at
FROM (SELECT entity_id, max(at) AS at FROM journal GROUP BY entity_id) AS last
WHERE last.entity_id = entities.entity_id AND status IN ('ended', 'cancelled');
"""


def upgrade() -> None:
    """Add the table and the column, and fill them from the journal."""
    for statement in _CHANGES.split(";\n"):
        if statement.strip():
            op.execute(statement)
