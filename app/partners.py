"""The HTTP clients of those the product works with: the payment provider and the carrier."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx
import structlog

from app import tracing
from app.metrics import SANDBOX_IN_USE

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from app.settings import Settings

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Partners:
    """One client for each partner; paths are relative to its URL."""

    payment: httpx.AsyncClient
    carrier: httpx.AsyncClient


@asynccontextmanager
async def open_partners(settings: Settings) -> AsyncIterator[Partners]:
    """The clients of both partners. Where one has no URL, it is the sandbox in this process, if that is allowed.

    Raises:
        SettingsError: neither is said; the message names the variables.
    """
    settings.require_partners()
    async with AsyncExitStack() as stack:
        sandbox = None
        if not (settings.payment_url and settings.carrier_url):
            # Only the sandbox needs it, and a set-up with real partners should not load it.
            from app.sandbox.app import open_sandbox

            sandbox = await stack.enter_async_context(open_sandbox(settings))
            # A command that has set up no logging has its report on standard output.
            if structlog.is_configured():
                log.warning("the sandbox is in use: no money moves, or no parcel leaves", **_chosen(settings))
        yield Partners(
            payment=await stack.enter_async_context(_client("payment", settings.payment_url, settings, sandbox)),
            carrier=await stack.enter_async_context(_client("carrier", settings.carrier_url, settings, sandbox)),
        )


def _chosen(settings: Settings) -> dict[str, str]:
    urls = {"payment": settings.payment_url, "carrier": settings.carrier_url}
    return {partner: "real" if url else "sandbox" for partner, url in urls.items()}


def _client(partner: str, url: str | None, settings: Settings, sandbox: Starlette | None) -> httpx.AsyncClient:
    SANDBOX_IN_USE.labels(partner).set(url is None)
    path = {"payment": "/payments", "carrier": "/carrier"}[partner]
    client = httpx.AsyncClient(
        base_url=url or f"http://sandbox{path}",
        # Each its own: a shared one would be traced twice.
        transport=None if url or not sandbox else httpx.ASGITransport(sandbox, raise_app_exceptions=False),
        timeout=settings.partner_timeout,
    )
    tracing.instrument_client(client)
    return client
