"""What this database belongs to: the id of its Temporal namespace."""

from app.db.migrations import online

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

# Facts about the installation as a whole, one row each.
SYSTEM = """
CREATE TABLE IF NOT EXISTS system (
    key    TEXT PRIMARY KEY,
    value  TEXT NOT NULL,
    set_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp()
)
"""

MEANING = "What this database belongs to; temporal_namespace_id is written by the first worker."


def upgrade() -> None:
    online.quickly(SYSTEM)
    online.quickly(f"COMMENT ON TABLE system IS '{MEANING}'")


def downgrade() -> None:
    online.quickly("DROP TABLE IF EXISTS system")
