"""The sandbox partners as one ASGI application: the provider under `/payments`, the carrier under `/carrier`.

Plain Starlette, not FastAPI: it runs inside the worker by default, and needs neither documentation pages nor
telemetry of its own.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import asyncpg
from opentelemetry.instrumentation.utils import suppress_instrumentation
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.routing import Mount, Route

from app.sandbox.carrier import SandboxCarrier
from app.sandbox.ledger import LEDGER_ERRORS, Ledger
from app.sandbox.protocol import DEFAULT_FAULTS, Faults, RefusalError, out_of_books, refused, unstorable
from app.sandbox.provider import Provider

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request
    from starlette.types import ASGIApp, Receive, Scope, Send

    from app.settings import Settings


def create_sandbox(ledger: Ledger, *, faults: Faults = DEFAULT_FAULTS) -> Starlette:
    """Both partners over one ledger, which stays the caller's to close.

    Needs no lifespan, so it serves through `httpx.ASGITransport` as well as under a server, and comes up
    before its database does.
    """
    return Starlette(
        routes=[
            Route("/healthz", _healthz),
            Mount("/payments", routes=Provider(ledger, faults).routes()),
            Mount("/carrier", routes=SandboxCarrier(ledger, faults).routes()),
        ],
        middleware=[Middleware(_Untraced)],
        exception_handlers={
            RefusalError: refused,
            asyncpg.DataError: unstorable,
            **dict.fromkeys(LEDGER_ERRORS, out_of_books),
        },
    )


@asynccontextmanager
async def open_sandbox(settings: Settings) -> AsyncIterator[Starlette]:
    """The sandbox on the database that the settings name, with the ledger closed at the end."""
    async with ledger_of(settings) as ledger:
        yield create_sandbox(ledger)


def ledger_of(settings: Settings) -> Ledger:
    """The ledger where the settings say; without a word about it, in the product's database."""
    own = settings.sandbox_database_url
    return Ledger(
        (own or settings.database_url).get_secret_value(),
        pooler=settings.database_pooler,
        password_file=None if own else settings.database_password_file,
    )


async def _healthz(_request: Request) -> Response:
    return Response("ok")


class _Untraced:
    """Keeps the partners' SQL out of the product's traces: a real provider's would not be there either."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress_instrumentation():
            await self._app(scope, receive, send)
