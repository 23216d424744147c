"""Shipped orders by the thousand, written by SQL alone: what the audit and its measurement go through."""

from __future__ import annotations

from typing import Final

import asyncpg

#: Events of each order: six steps, and attempts that failed on the way.
EVENTS_PER_ORDER: Final = 10

_ORDERS: Final = """
INSERT INTO orders (id, state, payment_id, total, currency, tracking)
SELECT 'm-' || lpad(n::text, 8, '0'), 'shipped', 'pay-m-' || n, 50, 'USD', 'trk-' || n
FROM generate_series($1::int, $2) AS n
"""

_PAYMENTS: Final = """
INSERT INTO payments (payment_id, order_id, status, amount, asked, currency, provider_reference)
SELECT 'pay-m-' || n, 'm-' || lpad(n::text, 8, '0'), 'CHARGED', 50, 50, 'USD', 'ch-' || n
FROM generate_series($1::int, $2) AS n
"""

_EVENTS: Final = """
INSERT INTO events (order_id, type, payload_json, key)
SELECT 'm-' || lpad(n::text, 8, '0'), told.type, told.payload, told.key
FROM generate_series($1::int, $2) AS n, (VALUES
    ('received', '{"amount": "50.00", "currency": "USD"}'::jsonb, 'received'),
    ('awaiting_review', '{}', 'awaiting_review'),
    ('charging', '{}', 'charging'),
    ('attempt_failed', '{"error_type": "PaymentUnavailable"}', 'failed:1'),
    ('attempt_retried', '{"error_type": "PaymentUnavailable"}', 'retried:1'),
    ('charged', '{"amount": "50.00", "currency": "USD"}', 'charged'),
    ('attempt_failed', '{"error_type": "CarrierUnavailable"}', 'failed:2'),
    ('attempt_retried', '{"error_type": "CarrierUnavailable"}', 'retried:2'),
    ('prepared', '{}', 'prepared'),
    ('shipped', '{}', 'shipped')) AS told (type, payload, key)
"""


async def fill(connection: asyncpg.Connection, orders: int, *, step: int = 20_000) -> None:
    """Write so many orders, and let the planner know."""
    for first in range(1, orders + 1, step):
        last = min(first + step - 1, orders)
        for statement in (_ORDERS, _PAYMENTS, _EVENTS):
            await connection.execute(statement, first, last, timeout=120)
    await connection.execute("VACUUM ANALYZE", timeout=600)
