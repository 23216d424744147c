"""A mark on orders that wait for a second review."""

from alembic import op

revision = "0005"
down_revision = "0002"
branch_labels = None
depends_on = None

# Nothing is rewritten or scanned under the lock. Repeatable, as it is committed before the constraint is validated.
ADD = """
SET LOCAL lock_timeout = '5s';

ALTER TABLE orders ADD COLUMN IF NOT EXISTS reopened_for TEXT;
ALTER TABLE orders DROP CONSTRAINT IF EXISTS orders_reopened_for;
ALTER TABLE orders ADD CONSTRAINT orders_reopened_for CHECK (reopened_for IN ('address')) NOT VALID;

COMMENT ON COLUMN orders.reopened_for IS
    'What has changed since the review, while the order waits for a second one at `charged`.';
"""

VALIDATE = "ALTER TABLE orders VALIDATE CONSTRAINT orders_reopened_for"


def upgrade() -> None:
    op.execute(ADD)
    with op.get_context().autocommit_block():
        op.execute("SET lock_timeout = '5s'")
        op.execute(VALIDATE)
        op.execute("RESET lock_timeout")


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'; ALTER TABLE orders DROP COLUMN reopened_for")
