"""What this database belongs to: the id of its Temporal namespace."""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

UPGRADE = """
SET LOCAL lock_timeout = '5s';

-- Facts about the installation as a whole, one row each.
CREATE TABLE system (
    key    TEXT PRIMARY KEY,
    value  TEXT NOT NULL,
    set_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp()
);

COMMENT ON TABLE system IS 'What this database belongs to; temporal_namespace_id is written by the first worker.';
"""


def upgrade() -> None:
    op.execute(UPGRADE)


def downgrade() -> None:
    op.execute("DROP TABLE system")
