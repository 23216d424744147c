"""Orders, payments, events: the tables, and every invariant that SQL can hold."""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

UPGRADE = """
-- One row per order, written by the activity `receive`; `state` follows the workflow.
CREATE TABLE orders (
    id                  TEXT PRIMARY KEY CHECK (id ~ '^[A-Za-z0-9._-]{1,64}$'),
    state               TEXT NOT NULL CHECK (state IN (
                            'received', 'awaiting_review', 'charging', 'charged', 'prepared', 'shipped',
                            'rejected', 'expired', 'cancelled', 'payment_failed', 'shipping_failed')),
    address_json        JSONB CHECK (jsonb_typeof(address_json) = 'object'),
    created_at          TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    state_since         TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    last_error          TEXT,
    payment_id          TEXT,
    request_hash        TEXT,
    run_id              TEXT,
    customer_id         TEXT,
    items_json          JSONB NOT NULL DEFAULT '[]' CHECK (jsonb_typeof(items_json) = 'array'),
    total               NUMERIC(14, 2) NOT NULL DEFAULT 0 CHECK (total >= 0),
    currency            TEXT NOT NULL DEFAULT 'USD' CHECK (currency ~ '^[A-Z]{3}$'),
    review_deadline     TIMESTAMPTZ,
    dispatch_started_at TIMESTAMPTZ,
    tracking            TEXT,
    CHECK (state <> 'awaiting_review' OR review_deadline IS NOT NULL)
);

-- GET /orders, newest first, with and without a filter by step; GET /reviews, most urgent first; and the look-up
-- of a payment id at start.
CREATE INDEX orders_newest ON orders (created_at DESC, id DESC);
CREATE INDEX orders_newest_in_state ON orders (state, created_at DESC, id DESC);
CREATE INDEX orders_in_review ON orders (review_deadline, id) WHERE state = 'awaiting_review';
CREATE INDEX orders_payment ON orders (payment_id);

COMMENT ON TABLE orders IS 'One row per order. Moves between states are checked by the trigger orders_moves.';
COMMENT ON COLUMN orders.state_since IS 'When the order entered its state.';
COMMENT ON COLUMN orders.last_error IS 'The latest failed attempt until the next success; then why the order failed.';
COMMENT ON COLUMN orders.request_hash IS 'Tells a repeated start from a conflicting one, also after Temporal forgot.';
COMMENT ON COLUMN orders.run_id IS 'Run of the OrderWorkflow that received the order.';
COMMENT ON COLUMN orders.dispatch_started_at IS 'From here on the address is frozen.';

-- The life of an order as a table of moves; `app/steps.py` holds the same one and a test compares them.
CREATE FUNCTION orders_moves() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (OLD.state, NEW.state) NOT IN (VALUES
        ('received', 'awaiting_review'), ('received', 'rejected'), ('received', 'cancelled'),
        ('awaiting_review', 'charging'), ('awaiting_review', 'rejected'), ('awaiting_review', 'expired'),
        ('awaiting_review', 'cancelled'),
        ('charging', 'charged'), ('charging', 'payment_failed'), ('charging', 'cancelled'),
        ('charged', 'prepared'), ('charged', 'cancelled'), ('charged', 'shipping_failed'),
        ('prepared', 'shipped'), ('prepared', 'cancelled'), ('prepared', 'shipping_failed'))
    THEN
        RAISE EXCEPTION 'order % cannot go from % to %', OLD.id, OLD.state, NEW.state
            USING ERRCODE = 'check_violation', CONSTRAINT = 'orders_moves';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER orders_moves BEFORE UPDATE OF state ON orders
    FOR EACH ROW WHEN (OLD.state IS DISTINCT FROM NEW.state) EXECUTE FUNCTION orders_moves();

-- One row per payment id, written before the provider is asked and settled after it answered.
CREATE TABLE payments (
    payment_id         TEXT PRIMARY KEY,
    order_id           TEXT NOT NULL UNIQUE REFERENCES orders (id) ON DELETE CASCADE,
    status             TEXT NOT NULL CHECK (status IN ('INIT', 'CHARGED', 'FAILED', 'REFUNDED')),
    amount             NUMERIC(14, 2) NOT NULL DEFAULT 0 CHECK (amount >= 0),
    created_at         TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    currency           TEXT NOT NULL DEFAULT 'USD' CHECK (currency ~ '^[A-Z]{3}$'),
    asked              NUMERIC(14, 2) CHECK (asked > 0),
    provider_reference TEXT UNIQUE,
    refund_reference   TEXT UNIQUE,
    settled_at         TIMESTAMPTZ,
    CHECK (status NOT IN ('CHARGED', 'REFUNDED') OR amount > 0),
    CHECK (status <> 'REFUNDED' OR refund_reference IS NOT NULL),
    CHECK (asked IS NULL OR amount IN (0, asked))
);

-- Payments in doubt, oldest first: what an operator is alerted about.
CREATE INDEX payments_in_doubt ON payments (created_at) WHERE status = 'INIT';

COMMENT ON TABLE payments IS 'One row per payment id, one per order: INIT (in doubt) until the provider answered.';
COMMENT ON COLUMN payments.amount IS 'What was charged; 0 until the provider said so.';
COMMENT ON COLUMN payments.asked IS 'What the provider was asked for; another amount under the same id is refused.';

CREATE FUNCTION payments_moves() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (OLD.status, NEW.status) NOT IN (VALUES
        ('INIT', 'CHARGED'), ('INIT', 'FAILED'), ('CHARGED', 'REFUNDED'))
    THEN
        RAISE EXCEPTION 'payment % cannot go from % to %', OLD.payment_id, OLD.status, NEW.status
            USING ERRCODE = 'check_violation', CONSTRAINT = 'payments_moves';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER payments_moves BEFORE UPDATE OF status ON payments
    FOR EACH ROW WHEN (OLD.status IS DISTINCT FROM NEW.status) EXECUTE FUNCTION payments_moves();

-- The timeline. It has no foreign key, because it outlives its order: rows are never updated or deleted.
CREATE TABLE events (
    id           BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    order_id     TEXT NOT NULL,
    type         TEXT NOT NULL,
    payload_json JSONB NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(payload_json) = 'object'),
    ts           TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    key          TEXT NOT NULL DEFAULT gen_random_uuid()::text,
    UNIQUE (order_id, key)
);

COMMENT ON TABLE events IS 'The timeline, append-only. A row is written in the transaction of the change it tells of.';
COMMENT ON COLUMN events.key IS 'The same for the same happening: a retried activity adds no second row.';

CREATE FUNCTION events_are_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'events is append-only: % is refused', TG_OP USING ERRCODE = 'insufficient_privilege';
END $$;
CREATE TRIGGER events_are_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON events
    FOR EACH STATEMENT EXECUTE FUNCTION events_are_append_only();
"""

DOWNGRADE = """
DROP TABLE events;
DROP TABLE payments;
DROP TABLE orders;
DROP FUNCTION events_are_append_only();
DROP FUNCTION payments_moves();
DROP FUNCTION orders_moves();
"""


def upgrade() -> None:
    op.execute(UPGRADE)


def downgrade() -> None:
    op.execute(DOWNGRADE)
