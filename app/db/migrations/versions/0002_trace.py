"""The trace of an order, so that its page leads to it."""

from app.db.migrations.online import add_check, quickly

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    quickly("ALTER TABLE orders ADD COLUMN IF NOT EXISTS trace_id TEXT")
    add_check("orders", "orders_trace_id_check", "trace_id ~ '^[0-9a-f]{32}$'")
    quickly(
        "COMMENT ON COLUMN orders.trace_id IS 'The trace in which the order was received; NULL if it was not traced.'"
    )


def downgrade() -> None:
    quickly("ALTER TABLE orders DROP COLUMN IF EXISTS trace_id")
