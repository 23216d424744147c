"""The HTTP application: routers, errors as problems, health, and one canonical log line per request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from temporalio.service import RPCError

from app import db, temporal
from app.errors import TrellisError
from app.order.api import OrderParts
from app.order.api import router as orders_router
from app.order.feed import EventFeed
from app.order.repository import OrderRepository
from app.order.service import OrderService
from app.problems import Fault, Problem, ProblemResponse
from app.wiring import Services, open_services

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from app.settings import Settings

MAX_BODY_BYTES: Final = 64 * 1024

#: Something that runs beside the API while it serves.
Beside = Callable[[Services], AbstractAsyncContextManager[None]]

DESCRIPTION: Final = """
The life of an order - receive, validate, manual review, charge, ship - as a Temporal workflow.

An order that was accepted (202) is never lost, and a payment is never charged twice. Errors are
`application/problem+json` (RFC 9457).
"""

log = structlog.get_logger("trellis.request")


def create_app(settings: Settings, beside: Beside | None = None) -> FastAPI:
    """The API. `beside` is entered when the services are there and left before they are closed."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_services(settings) as services:
            repository = OrderRepository(services.pool)
            feed = EventFeed(repository)
            service = OrderService(settings, repository, services.temporal)
            app.state.services = services
            app.state.orders = OrderParts(service, repository, feed)
            try:
                if beside is None:
                    yield
                else:
                    async with beside(services):
                        yield
            finally:
                await feed.close()

    app = FastAPI(
        title="Trellis",
        version="0.1.0",
        description=DESCRIPTION,
        lifespan=lifespan,
        max_body_size=MAX_BODY_BYTES,
        # FastAPI's own telemetry would double ours.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.include_router(orders_router)
    _add_health(app)
    _add_problems(app)
    app.add_middleware(CanonicalLog)
    return app


# --- health


def _add_health(app: FastAPI) -> None:
    @app.get("/healthz", tags=["health"], summary="The process is alive")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", tags=["health"], summary="PostgreSQL and Temporal answer", response_model=None)
    async def readyz(request: Request) -> JSONResponse:
        """200, or 503 with the reason for each part that is not ready."""
        checks = await _checks(request.app.state.services)
        ready = all(state == "ok" for state in checks.values())
        return JSONResponse(
            {"status": "ready" if ready else "not ready", "checks": checks},
            HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE,
        )


async def _checks(services: Services) -> dict[str, str]:
    database, frontend = await asyncio.gather(
        _reason(_check_database(services)), _reason(temporal.check(services.temporal))
    )
    return {"database": database, "temporal": frontend}


async def _check_database(services: Services) -> None:
    version = await db.schema_version(services.pool)
    if version is None or version < db.SCHEMA_VERSION:
        raise TimeoutError(f"the schema is at {version}, {db.SCHEMA_VERSION} is needed: trellis migrate")


async def _reason(check: Any) -> str:
    try:
        await asyncio.wait_for(check, timeout=3)
    except (RPCError, RuntimeError, *db.UNAVAILABLE) as error:
        return f"{type(error).__name__}: {error}"[:200]
    return "ok"


# --- errors


def _add_problems(app: FastAPI) -> None:
    app.add_exception_handler(TrellisError, _trellis_problem)
    app.add_exception_handler(RequestValidationError, _validation_problem)
    app.add_exception_handler(HTTPException, _http_problem)
    app.add_exception_handler(RPCError, _temporal_problem)
    app.add_exception_handler(RuntimeError, _runtime_problem)
    for kind in db.UNAVAILABLE:
        app.add_exception_handler(kind, _database_problem)
    app.add_exception_handler(Exception, _unexpected_problem)
    _document_problems(app)


def _document_problems(app: FastAPI) -> None:
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        schema = plain()
        schemas = schema.setdefault("components", {}).setdefault("schemas", {})
        for model in (Problem, Fault):
            described = model.model_json_schema(ref_template="#/components/schemas/{model}")
            described.pop("$defs", None)
            schemas[model.__name__] = described
        return schema

    app.openapi = openapi  # type: ignore[method-assign] # FastAPI documents this way of extending its schema


def problem(status: int, title: str, detail: str | None = None, *, code: str, **more: Any) -> ProblemResponse:
    return ProblemResponse(Problem(title=title, status=status, detail=detail, code=code, **more))


async def _trellis_problem(_: Request, error: Exception) -> ProblemResponse:
    assert isinstance(error, TrellisError)  # noqa: S101 - it is registered for nothing else
    return problem(error.status, error.title, error.detail or None, code=type(error).__name__)


async def _validation_problem(_: Request, error: Exception) -> ProblemResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101
    # Without `input`, which FastAPI echoes by default: it can be an address, and NaN breaks the answer itself.
    faults = [Fault(field=".".join(map(str, fault["loc"])), rule=fault["msg"]) for fault in error.errors()]
    detail = "; ".join(f"{fault.field}: {fault.rule}" for fault in faults[:5])
    return problem(422, "The request is not valid", detail, code="InvalidRequest", errors=faults)


async def _http_problem(_: Request, error: Exception) -> ProblemResponse:
    assert isinstance(error, HTTPException)  # noqa: S101
    if error.status_code == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        return problem(413, "The body is too large", f"at most {MAX_BODY_BYTES} bytes", code="BodyTooLarge")
    title = HTTPStatus(error.status_code).phrase
    return ProblemResponse(
        Problem(title=title, status=error.status_code, detail=error.detail, code=title.replace(" ", "")),
        headers=dict(error.headers or {}),
    )


async def _temporal_problem(request: Request, error: Exception) -> ProblemResponse:
    assert isinstance(error, RPCError)  # noqa: S101
    if error.status in temporal.UNAVAILABLE:
        log.warning("Temporal did not answer", status=error.status.name)
        return problem(503, "Temporal did not answer", _AGAIN, code="TemporalUnavailable")
    return await _unexpected_problem(request, error)


async def _runtime_problem(request: Request, error: Exception) -> ProblemResponse:
    # The SDK's client raises a bare RuntimeError as long as it never had a connection.
    if "Failed client connect" in str(error) or "transport error" in str(error):
        return problem(503, "Temporal did not answer", _AGAIN, code="TemporalUnavailable")
    return await _unexpected_problem(request, error)


async def _database_problem(_: Request, error: Exception) -> ProblemResponse:
    log.warning("PostgreSQL did not answer", error=type(error).__name__)
    return problem(503, "PostgreSQL did not answer", _AGAIN, code="DatabaseUnavailable")


async def _unexpected_problem(_: Request, error: Exception) -> ProblemResponse:
    log.error("unexpected error", error=type(error).__name__, exc_info=error)
    return problem(500, "Something went wrong here", "The log of the API has the details.", code="Unexpected")


_AGAIN: Final = "Nothing was changed, or what was changed is not done twice: repeat the same call."


# --- logs


class CanonicalLog:
    """One log line per request: method, route template, status, duration. Never a path, a query or a body."""

    #: Asked every few seconds by whoever watches the process.
    quiet: Final = frozenset({"/healthz", "/readyz"})

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self.quiet:
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 500

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, note_status)
        finally:
            route = scope.get("route")
            log.info(
                "request",
                method=scope["method"],
                route=getattr(route, "path", "unknown"),
                status=status,
                order_id=scope.get("path_params", {}).get("id"),
                duration_seconds=round(time.monotonic() - began, 4),
            )
