"""Orders of one customer, newest first: `GET /orders?customer_id=`, and how many came before in `GET /reviews`."""

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

# A build that was broken off leaves an index that nothing uses: it is made anew.
UPGRADE = (
    "SET lock_timeout = '5s'",
    "DROP INDEX CONCURRENTLY IF EXISTS orders_of_customer",
    """
    CREATE INDEX CONCURRENTLY orders_of_customer ON orders (customer_id, created_at DESC, id DESC)
    WHERE customer_id IS NOT NULL
    """,
    "RESET lock_timeout",
)


def upgrade() -> None:
    with op.get_context().autocommit_block():
        for statement in UPGRADE:
            op.execute(statement)


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'; DROP INDEX orders_of_customer")
