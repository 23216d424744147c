"""The trace of an order, so that its page leads to it."""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

UPGRADE = """
ALTER TABLE orders ADD COLUMN trace_id TEXT CHECK (trace_id ~ '^[0-9a-f]{32}$');

COMMENT ON COLUMN orders.trace_id IS 'The trace in which the order was received; NULL if it was not traced.';
"""


def upgrade() -> None:
    op.execute(UPGRADE)


def downgrade() -> None:
    op.execute("ALTER TABLE orders DROP COLUMN trace_id")
