"""Where the parts are put together: the one place that reads `Settings` and builds what the features are given."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import asyncpg
import httpx
from temporalio.client import Client

from app import db, temporal
from app.payment.http_gateway import HttpPaymentGateway
from app.shipping.http_carrier import HttpCarrier

if TYPE_CHECKING:
    from app.payment.gateway import PaymentGateway
    from app.settings import Settings
    from app.shipping.carrier import Carrier


@dataclass(frozen=True)
class Services:
    """What a process needs to serve the API or a task queue."""

    settings: Settings
    pool: asyncpg.Pool
    temporal: Client
    gateway: PaymentGateway
    carrier: Carrier


@asynccontextmanager
async def open_services(settings: Settings) -> AsyncIterator[Services]:
    """Build everything; nothing is connected before it is used. Close it at the end."""
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(db.create_pool(settings))
        partners = await stack.enter_async_context(_partners(settings))
        yield Services(
            settings=settings,
            pool=pool,
            temporal=await temporal.connect(settings),
            gateway=HttpPaymentGateway(partners.payment),
            carrier=HttpCarrier(partners.carrier),
        )


@dataclass(frozen=True)
class _Partners:
    payment: httpx.AsyncClient
    carrier: httpx.AsyncClient


@asynccontextmanager
async def _partners(settings: Settings) -> AsyncIterator[_Partners]:
    """HTTP clients of the payment provider and the carrier; the sandbox, in this process, for one without a URL."""
    async with AsyncExitStack() as stack:
        transport = None
        if not (settings.payment_url and settings.carrier_url):
            # Only the sandbox needs it, and a set-up with real partners should not load it.
            from app.sandbox.app import create_sandbox
            from app.sandbox.ledger import Ledger

            ledger = Ledger((settings.sandbox_database_url or settings.database_url).get_secret_value())
            stack.push_async_callback(ledger.close)
            transport = httpx.ASGITransport(app=create_sandbox(ledger), raise_app_exceptions=False)

        def client(url: str | None, path: str) -> httpx.AsyncClient:
            return httpx.AsyncClient(
                base_url=url or f"http://sandbox{path}",
                transport=None if url else transport,
                timeout=settings.partner_timeout,
            )

        yield _Partners(
            payment=await stack.enter_async_context(client(settings.payment_url, "/payments")),
            carrier=await stack.enter_async_context(client(settings.carrier_url, "/carrier")),
        )
