"""The tables and statements of the two programs that Trellis is measured against, the same for both.

What somebody writes first: the three tables, a transaction for each step with the state and its event in it, and a
payment row before and after the provider is asked. Every statement may be repeated without harm.
"""

from __future__ import annotations

import json
import os
from typing import Any

import asyncpg
import httpx

SCHEMA = """
CREATE TABLE IF NOT EXISTS orders (
    id TEXT PRIMARY KEY,
    state TEXT NOT NULL,
    address_json JSONB,
    created_at TIMESTAMPTZ NOT NULL DEFAULT now()
);
CREATE TABLE IF NOT EXISTS payments (
    payment_id TEXT PRIMARY KEY,
    order_id TEXT NOT NULL REFERENCES orders (id) ON DELETE CASCADE,
    status TEXT NOT NULL,
    amount NUMERIC NOT NULL,
    created_at TIMESTAMPTZ NOT NULL DEFAULT now()
);
CREATE TABLE IF NOT EXISTS events (
    id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    order_id TEXT NOT NULL,
    type TEXT NOT NULL,
    payload_json JSONB NOT NULL,
    ts TIMESTAMPTZ NOT NULL DEFAULT now(),
    UNIQUE (order_id, type)
);
"""

_EVENT = "INSERT INTO events (order_id, type, payload_json) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING"
_MOVE = "UPDATE orders SET state = $2 WHERE id = $1"


class Books:
    """The steps of an order, as they are written down."""

    def __init__(self, pool: asyncpg.Pool, partners: httpx.AsyncClient) -> None:
        self._pool = pool
        self._partners = partners

    async def receive(self, order_id: str) -> None:
        """A row for the order."""
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute(
                "INSERT INTO orders (id, state) VALUES ($1, 'received') ON CONFLICT DO NOTHING", order_id
            )
            await connection.execute(_EVENT, order_id, "received", "{}")

    async def validate(self, order_id: str) -> None:
        """Into review."""
        await self._enter(order_id, "awaiting_review", {})

    async def charge(self, order_id: str, payment_id: str) -> str:
        """Take the money; the provider's reference."""
        await self._pool.execute(
            "INSERT INTO payments (payment_id, order_id, status, amount) VALUES ($1, $2, 'INIT', 0) "
            "ON CONFLICT DO NOTHING",
            payment_id,
            order_id,
        )
        response = await self._partners.post(
            "/payments/v1/charges",
            json={"payment": payment_id, "amount": "50.00", "currency": "USD"},
            headers={"Idempotency-Key": payment_id},
        )
        reference: str = response.raise_for_status().json()["id"]
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute(
                "UPDATE payments SET status = 'CHARGED', amount = 50.00 WHERE payment_id = $1", payment_id
            )
            await connection.execute(_MOVE, order_id, "charged")
            await connection.execute(_EVENT, order_id, "charged", json.dumps({"reference": reference}))
        return reference

    async def prepare(self, order_id: str) -> None:
        """Make the parcel ready."""
        await self._enter(order_id, "prepared", {})

    async def dispatch(self, order_id: str) -> str:
        """Hand the parcel over; its tracking number."""
        response = await self._partners.post(
            "/carrier/v1/parcels", json={"address": None}, headers={"Idempotency-Key": order_id}
        )
        tracking: str = response.raise_for_status().json()["tracking"]
        await self._enter(order_id, "shipped", {"tracking": tracking})
        return tracking

    async def _enter(self, order_id: str, state: str, payload: dict[str, Any]) -> None:
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute(_MOVE, order_id, state)
            await connection.execute(_EVENT, order_id, state, json.dumps(payload))


def open_partners() -> httpx.AsyncClient:
    """A client of the payment provider and the carrier."""
    return httpx.AsyncClient(base_url=os.environ["BENCH_PARTNERS_URL"], timeout=10)


def open_pool(**options: Any) -> asyncpg.Pool:
    """Connections as asyncpg makes them by default, unless told otherwise."""
    return asyncpg.create_pool(os.environ["BENCH_DATABASE_URL"], **options)
