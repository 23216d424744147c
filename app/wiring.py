"""Where the parts are put together: the one place that reads `Settings` and builds what the features are given."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import asyncpg
from temporalio.client import Client

from app import db, failpoints, health, temporal, tracing
from app.partners import open_partners
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
    readiness: health.Readiness = field(default_factory=health.Readiness)


@asynccontextmanager
async def open_services(settings: Settings) -> AsyncIterator[Services]:
    """Build everything; nothing is connected before it is used. Close it at the end."""
    failpoints.arm(settings.failpoints, seed=settings.failpoints_seed, log=settings.failpoints_log)
    tracing.configure_tracing()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(tracing.flush)
        pool = await stack.enter_async_context(db.create_pool(settings))
        partners = await stack.enter_async_context(open_partners(settings))
        services = Services(
            settings=settings,
            pool=pool,
            temporal=await temporal.connect(settings),
            gateway=HttpPaymentGateway(partners.payment, shows_ledger=not settings.payment_url),
            carrier=HttpCarrier(partners.carrier, shows_ledger=not settings.carrier_url),
        )
        await stack.enter_async_context(health.serving(settings, services.readiness))
        yield services
