"""Where the parts are put together: the one place that reads `Settings` and builds what the features are given."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import asyncpg
from temporalio.client import Client

from app import failpoints
from app.db.pool import SCHEMA_VERSION, UNAVAILABLE, create_pool, schema_version
from app.errors import WrongNamespace
from app.partners.clients import open_partners
from app.payment.http_gateway import HttpPaymentGateway
from app.shipping.http_carrier import HttpCarrier
from app.telemetry import probes, traces
from app.temporal.client import check, connect, metrics_url
from app.temporal.identity import Identity

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
        await stack.enter_async_context(probes.serving(settings, services.readiness, metrics_url(settings)))
        yield services


def require_servers(readiness: probes.Readiness, pool: asyncpg.Pool, client: Client) -> None:
    """Ask whether PostgreSQL answers and is migrated, and whether Temporal answers and has the namespace."""

    async def database() -> None:
        version = await schema_version(pool)
        if version is None or version < SCHEMA_VERSION:
            raise probes.NotReady(f"the schema is at {version}, {SCHEMA_VERSION} is needed: trellis migrate")

    identity = Identity(pool, client)

    async def namespace() -> None:
        await check(client)
        try:
            await identity.require()
        except WrongNamespace as error:
            raise probes.NotReady(str(error)) from None
        except UNAVAILABLE:
            pass  # that is for the other check to tell

    readiness.require("database", database)
    readiness.require("temporal", namespace)
