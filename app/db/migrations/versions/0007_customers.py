"""Orders of one customer, newest first: `GET /orders?customer_id=`, and how many came before in `GET /reviews`."""

from app.db.migrations import online

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    online.create_index(
        "orders_of_customer",
        "orders (customer_id, created_at DESC, id DESC) WHERE customer_id IS NOT NULL",
    )


def downgrade() -> None:
    online.drop_index("orders_of_customer")
