"""A mark on orders that wait for a second review."""

from app.db.migrations import online

revision = "0005"
down_revision = "0002"
branch_labels = None
depends_on = None

MEANING = "What has changed since the review, while the order waits for a second one at `charged`."


def upgrade() -> None:
    online.quickly("ALTER TABLE orders ADD COLUMN IF NOT EXISTS reopened_for TEXT")
    online.quickly(f"COMMENT ON COLUMN orders.reopened_for IS '{MEANING}'")
    online.add_check("orders", "orders_reopened_for", "reopened_for IN ('address')")


def downgrade() -> None:
    online.quickly("ALTER TABLE orders DROP COLUMN IF EXISTS reopened_for")
