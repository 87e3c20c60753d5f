"""Who owns what, the journal, its snapshots and private parts, and one row for each entity."""

from alembic import op

revision = "0001"
down_revision = None

_SCHEMA = """
CREATE TABLE shards (
    shard_id smallint PRIMARY KEY CHECK (shard_id >= 0),
    epoch bigint NOT NULL DEFAULT 0,
    address text,
    alive_at timestamptz NOT NULL DEFAULT '-infinity',
    backend_pid integer
);
COMMENT ON TABLE shards IS 'Only the holder of the newest epoch may append; every append is its sign of life.';

CREATE TABLE slots (
    slot smallint PRIMARY KEY CHECK (slot BETWEEN 0 AND 1023),
    shard_id smallint NOT NULL REFERENCES shards
);
COMMENT ON TABLE slots IS 'crc32(entity_id) % 1024 is an entity''s slot; the slot says which shard serves it.';

CREATE TABLE entities (
    entity_id uuid PRIMARY KEY,
    slot smallint NOT NULL,
    kind text NOT NULL,
    owner_id uuid NOT NULL,
    status text NOT NULL,
    due_at bigint,
    created_at bigint NOT NULL
);
COMMENT ON TABLE entities IS 'One row an entity, written with the events that change it; due_at is its next deadline.';
CREATE INDEX entities_due ON entities (slot) INCLUDE (entity_id, due_at) WHERE due_at IS NOT NULL;
CREATE INDEX entities_newest ON entities (kind, created_at, entity_id);
CREATE INDEX entities_status ON entities (kind, status, created_at, entity_id);
CREATE INDEX entities_owner ON entities (owner_id, kind, created_at, entity_id);

CREATE TABLE journal (
    entity_id uuid NOT NULL,
    seq bigint NOT NULL CHECK (seq > 0),
    at bigint NOT NULL,
    kind text NOT NULL,
    version smallint NOT NULL,
    body bytea NOT NULL,
    hash bytea NOT NULL,
    command_id bytea,
    PRIMARY KEY (entity_id, seq)
);
COMMENT ON COLUMN journal.at IS 'Milliseconds since the epoch, UTC, by the shard''s clock.';
COMMENT ON COLUMN journal.command_id IS 'On the first event of a command: who asked (16 bytes) and its id (16 bytes).';

CREATE TABLE snapshots (
    entity_id uuid PRIMARY KEY,
    seq bigint NOT NULL,
    hash bytea NOT NULL,
    last_at bigint NOT NULL,
    version smallint NOT NULL,
    body bytea NOT NULL
);

CREATE TABLE private (
    entity_id uuid NOT NULL,
    seq bigint NOT NULL,
    salt bytea NOT NULL,
    body bytea NOT NULL,
    PRIMARY KEY (entity_id, seq),
    FOREIGN KEY (entity_id, seq) REFERENCES journal
);
COMMENT ON TABLE private IS 'What people wrote; its event holds the salted SHA-256, so that erasing breaks no chain.';
"""


def upgrade() -> None:
    """Create the tables."""
    for statement in _SCHEMA.split(";\n"):
        if statement.strip():
            op.execute(statement)
