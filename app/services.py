"""Where the parts are put together: the one place that reads `Settings` and builds what the features are given."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import asyncpg
from temporalio.client import Client

from app import failpoints
from app.db.pool import create_pool
from app.partners.clients import open_partners
from app.payment.http_gateway import HttpPaymentGateway
from app.shipping.http_carrier import HttpCarrier
from app.telemetry import probes, traces
from app.temporal.client import connect

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
    readiness: probes.Readiness = field(default_factory=probes.Readiness)


@asynccontextmanager
async def open_services(settings: Settings) -> AsyncIterator[Services]:
    """Build everything; nothing is connected before it is used. Close it at the end."""
    failpoints.arm(settings.failpoints, seed=settings.failpoints_seed, log=settings.failpoints_log)
    traces.configure_tracing()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(traces.flush)
        pool = await stack.enter_async_context(create_pool(settings))
        partners = await stack.enter_async_context(open_partners(settings))
        services = Services(
            settings=settings,
            pool=pool,
            temporal=await connect(settings),
            gateway=HttpPaymentGateway(partners.payment, shows_ledger=not settings.payment_url),
            carrier=HttpCarrier(partners.carrier, shows_ledger=not settings.carrier_url),
        )
        await stack.enter_async_context(probes.serving(settings, services.readiness))
        yield services
