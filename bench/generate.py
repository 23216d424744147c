"""Orders that were never carried: rows as the product would have written them, many in a second."""

from __future__ import annotations

import asyncpg

#: What the timeline of an order that was shipped has.
_TIMELINE = ("received", "awaiting_review", "charging", "charged", "prepared", "shipped")

_SHIPPED = """
INSERT INTO orders (id, state, payment_id, request_hash, run_id, items_json, total, currency, created_at, state_since,
                    review_deadline, dispatch_started_at, tracking)
SELECT 'old-' || n, 'shipped', 'pay-old-' || n, md5(n::text), gen_random_uuid()::text, '[]', 50, 'USD', at,
       at + interval '5 s', at + interval '10 s', at + interval '4 s', 'trk_' || md5('t' || n)
FROM generate_series($1::int, $2::int) AS n, LATERAL (SELECT now() - n * interval '1 s' AS at) AS moment
"""

_PAID = """
INSERT INTO payments (payment_id, order_id, status, amount, asked, currency, provider_reference, settled_at)
SELECT 'pay-old-' || n, 'old-' || n, 'CHARGED', 50, 50, 'USD', 'ch_' || md5('c' || n), now()
FROM generate_series($1::int, $2::int) AS n
"""

_TOLD = """
INSERT INTO events (order_id, type, payload_json, key)
SELECT 'old-' || n, type, jsonb_build_object('payment_id', 'pay-old-' || n), type
FROM generate_series($1::int, $2::int) AS n, unnest($3::text[]) AS type
"""

_IN_REVIEW = """
INSERT INTO orders (id, state, payment_id, request_hash, run_id, total, currency, review_deadline)
SELECT 'waiting-' || n, 'awaiting_review', 'pay-waiting-' || n, md5(n::text), gen_random_uuid()::text, 50, 'USD',
       now() + interval '1 day'
FROM generate_series(1, $1::int) AS n
ON CONFLICT DO NOTHING
"""


async def shipped_orders(url: str, count: int) -> None:
    """`count` shipped orders, `old-1` and so on, with payments and timelines; statistics up to date."""
    connection = await asyncpg.connect(url, ssl=False)
    try:
        there = await connection.fetchval("SELECT count(*) FROM orders WHERE id LIKE 'old-%'")
        async with connection.transaction():
            await connection.execute(_SHIPPED, there + 1, count)
            await connection.execute(_PAID, there + 1, count)
            await connection.execute(_TOLD, there + 1, count, list(_TIMELINE))
        await connection.execute("VACUUM ANALYZE orders")
        await connection.execute("VACUUM ANALYZE payments")
        await connection.execute("VACUUM ANALYZE events")
    finally:
        await connection.close()


async def orders_in_review(url: str, count: int) -> None:
    """`count` orders that wait for a decision, `waiting-1` and so on."""
    connection = await asyncpg.connect(url, ssl=False)
    try:
        await connection.execute(_IN_REVIEW, count)
        await connection.execute("VACUUM ANALYZE orders")
    finally:
        await connection.close()
