"""The HTTP application: routers, errors as problems, health, and one canonical log line per request."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

import structlog
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from temporalio.service import RPCError

from app import db, health, metrics, temporal, tracing
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
            app.state.readiness = health.Readiness()
            for readiness in (app.state.readiness, services.readiness):
                health.require_servers(readiness, services.pool, services.temporal)
            app.state.orders = OrderParts(service, repository, feed)
            try:
                if beside is None:
                    yield
                else:
                    async with beside(services):
                        yield
            finally:
                await feed.close()

    tracing.configure_tracing()
    app = FastAPI(
        title="Trellis",
        version="0.1.0",
        description=DESCRIPTION,
        lifespan=lifespan,
        # FastAPI's own telemetry would double ours.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.include_router(orders_router, dependencies=[Depends(_name_order)])
    _add_health(app)
    _add_problems(app)
    app.add_middleware(BodyLimit)
    app.add_middleware(CanonicalLog)
    tracing.instrument_api(app)
    return app


async def _name_order(request: Request) -> None:
    """Puts the order on the spans and log lines of the rest of its request."""
    order_id = request.path_params.get("id")
    if order_id is not None:
        structlog.contextvars.bind_contextvars(order_id=order_id)
        tracing.describe(order_id=order_id)


# --- health


def _add_health(app: FastAPI) -> None:
    @app.get("/healthz", tags=["health"], summary="The process is alive")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", tags=["health"], summary="PostgreSQL and Temporal answer", response_model=None)
    async def readyz(request: Request) -> JSONResponse:
        """200, or 503 with the reason for each part that is not ready."""
        return health.answer(await request.app.state.readiness.states())


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
    answer = problem(error.status, error.title, error.detail or None, code=type(error).__name__)
    if error.retry_after is not None:
        answer.headers["Retry-After"] = str(error.retry_after)
    return answer


async def _validation_problem(_: Request, error: Exception) -> ProblemResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101
    if isinstance(error.body, bytes):
        # FastAPI parses nothing that does not say it is JSON, and finds fault with the bytes; `curl -d` says a form.
        return _invalid(Fault(field="body", rule="not read as JSON: send the header `Content-Type: application/json`"))
    # Without `input`, which FastAPI echoes by default: it can be an address, and NaN breaks the answer itself.
    return _invalid(
        *(
            Fault(field=".".join(map(str, fault["loc"])), rule=fault["msg"].removeprefix("Value error, "))
            for fault in error.errors()
        )
    )


async def _http_problem(_: Request, error: Exception) -> ProblemResponse:
    assert isinstance(error, HTTPException)  # noqa: S101
    if error.status_code == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        return _too_large()
    if error.status_code == HTTPStatus.BAD_REQUEST:
        # FastAPI's word for a body that no parser could take: not UTF-8, nested too deep, a number without end.
        return _invalid(Fault(field="body", rule="JSON decode error"))
    title = HTTPStatus(error.status_code).phrase
    return ProblemResponse(
        Problem(title=title, status=error.status_code, detail=error.detail, code=title.replace(" ", "")),
        headers=dict(error.headers or {}),
    )


async def _temporal_problem(request: Request, error: Exception) -> ProblemResponse:
    assert isinstance(error, RPCError)  # noqa: S101
    if temporal.is_unavailable(error):
        log.warning("Temporal did not answer", status=error.status.name)
        return problem(503, "Temporal did not answer", _AGAIN, code="TemporalUnavailable")
    return await _unexpected_problem(request, error)


async def _runtime_problem(request: Request, error: Exception) -> ProblemResponse:
    assert isinstance(error, RuntimeError)  # noqa: S101
    if temporal.is_unavailable(error):
        return problem(503, "Temporal did not answer", _AGAIN, code="TemporalUnavailable")
    return await _unexpected_problem(request, error)


async def _database_problem(_: Request, error: Exception) -> ProblemResponse:
    log.warning("PostgreSQL did not answer", error=type(error).__name__)
    return problem(503, "PostgreSQL did not answer", _AGAIN, code="DatabaseUnavailable")


async def _unexpected_problem(_: Request, error: Exception) -> ProblemResponse:
    log.error("unexpected error", error=type(error).__name__, exc_info=error)
    return problem(500, "Something went wrong here", "The log of the API has the details.", code="Unexpected")


def _invalid(*faults: Fault) -> ProblemResponse:
    detail = "; ".join(f"{fault.field}: {fault.rule}" for fault in faults[:5])
    return problem(422, "The request is not valid", detail, code="InvalidRequest", errors=[*faults])


def _too_large() -> ProblemResponse:
    return problem(413, "The body is too large", f"at most {MAX_BODY_BYTES} bytes", code="BodyTooLarge")


_AGAIN: Final = "Nothing was changed, or what was changed is not done twice: repeat the same call."


# --- around every request


class BodyLimit:
    """Refuses a large body: by its announced length, or when more arrives than was announced. As a problem, where
    FastAPI's own limit answers in plain text."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        announced = Headers(scope=scope).get("content-length", "") if scope["type"] == "http" else ""
        if announced.isdecimal() and int(announced) > MAX_BODY_BYTES:
            await _too_large()(scope, receive, send)
            return
        arrived = 0

        async def count() -> Message:
            nonlocal arrived
            message = await receive()
            arrived += len(message.get("body", b""))
            if arrived > MAX_BODY_BYTES:
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
            return message

        await self.app(scope, count, send)


class CanonicalLog:
    """One log line and one observation per request: method, route template, status, duration. Never a path, a query
    or a body."""

    #: Asked every few seconds by whoever watches the process.
    quiet: Final = frozenset({"/healthz", "/readyz"})

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self.quiet:
            await self.app(scope, receive, send)
            return
        # A request that was sent before the answer to the one before it begins in the context of that one.
        structlog.contextvars.clear_contextvars()
        tracing.forget()
        began, status, first_byte = time.monotonic(), 500, None

        async def note_status(message: Message) -> None:
            nonlocal status, first_byte
            if message["type"] == "http.response.start":
                status = message["status"]
                tracing.name_request(scope)
                if (b"content-type", b"text/event-stream; charset=utf-8") in message.get("headers", ()):
                    # Whoever watches an order stays as long as it lasts, which says nothing of how fast we are.
                    first_byte = time.monotonic() - began
            await send(message)

        try:
            await self.app(scope, receive, note_status)
        except Exception:
            tracing.name_request(scope)  # it is answered outside
            raise
        finally:
            method, route = scope["method"], getattr(scope.get("route"), "path", "unknown")
            seconds = time.monotonic() - began
            metrics.request_ended(method, route, status, first_byte or seconds)
            log.info(
                "request",
                method=method,
                route=route,
                status=status,
                order_id=scope.get("path_params", {}).get("id"),
                duration_seconds=round(seconds, 4),
            )
