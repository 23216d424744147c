"""The HTTP application: routers, errors as problems, health, and one canonical log line per request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

import asyncpg
import structlog
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from temporalio.service import RPCError

from app.db import pool as db
from app.domain.types import shown
from app.errors import DatabaseUnavailable, InvalidRequest, TrellisError
from app.http import docs_page, serving, stopping
from app.http.edge import Edge, is_probe, secure
from app.http.problems import Fault, Problem, ProblemResponse, code_schema
from app.order.api import OrderParts
from app.order.api import router as orders_router
from app.order.feed import EventFeed
from app.order.repository import OrderRepository
from app.order.service import OrderService
from app.services import Services, open_services, require_servers
from app.telemetry import metrics, probes, traces
from app.temporal import client as temporal
from app.temporal.identity import Identity

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from app.settings import Settings

MAX_BODY_BYTES: Final = 64 * 1024
#: So many faults of a request are named in the answer.
MAX_FAULTS: Final = 100
#: Of a body that is refused so much is read, and so long, before the answer.
DISCARD_BYTES: Final = 8 * 1024 * 1024
DISCARD_SECONDS: Final = 5.0

#: Something that runs beside the API while it serves.
Beside = Callable[[Services], AbstractAsyncContextManager[None]]

DESCRIPTION: Final = """
The life of an order - receive, validate, manual review, charge, ship - as a Temporal workflow.

An order that was accepted (202) is never lost, and a payment is never charged twice. Errors are
`application/problem+json` (RFC 9457).
"""

TAGS: Final = [
    {"name": "orders", "description": "Start an order, follow it, change it while that is possible."},
    {"name": "signals", "description": "Sent and not answered: durable with 202, also while no worker runs."},
    {"name": "reviews", "description": "What waits for a person, and the decision."},
    {"name": "health", "description": "For whoever runs this process."},
]

_READINESS: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["status", "checks"],
    "properties": {
        "status": {"enum": ["ready", "not ready"]},
        "checks": {"type": "object", "additionalProperties": {"type": "string"}},
    },
    "example": {"status": "ready", "checks": {"database": "ok", "temporal": "ok"}},
}

log = structlog.get_logger("trellis.request")


def create_app(settings: Settings, beside: Beside | None = None) -> FastAPI:
    """The API. `beside` is entered when the services are there and left before they are closed."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        serving.adopt(settings)
        async with open_services(settings) as services:
            repository = OrderRepository(services.pool)
            feed = EventFeed(
                repository,
                max_streams=settings.max_streams,
                max_streams_per_client=settings.max_streams_per_client,
                max_seconds=settings.stream_max_seconds,
            )
            identity = Identity(services.pool, services.temporal)
            service = OrderService(settings, repository, services.temporal, identity)
            app.state.services = services
            app.state.readiness = probes.Readiness()
            for readiness in (app.state.readiness, services.readiness):
                require_servers(readiness, services.pool, services.temporal)
            app.state.orders = OrderParts(service, repository, feed)
            try:
                with stopping.at_signal(feed.leave):
                    if beside is None:
                        yield
                    else:
                        async with beside(services):
                            yield
            finally:
                await feed.close()

    traces.configure_tracing()
    app = FastAPI(
        title="Trellis",
        version="0.1.0",
        description=DESCRIPTION,
        lifespan=lifespan,
        # Those of FastAPI load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        # FastAPI's own telemetry would double ours.
        telemetry={"tracing": False, "metrics": False, "logs": False},
        openapi_tags=TAGS,
        # Clients are generated from these: they stay when a path changes.
        generate_unique_id_function=lambda route: route.name,
    )
    app.include_router(orders_router, dependencies=[Depends(_before_each_call)])
    docs_page.add(app)
    _add_health(app)
    _add_problems(app)
    app.add_middleware(Edge, settings=settings)
    app.add_middleware(BodyLimit, seconds=settings.api_body_timeout)
    app.add_middleware(CanonicalLog)
    traces.instrument_api(app)
    return app


async def _before_each_call(request: Request) -> None:  # one dependency, because each costs every read
    if request.scope["query_string"]:
        _refuse_unknown_query(request)
    order_id = request.path_params.get("id")
    if order_id is not None:
        # On the spans and log lines of the rest of this request.
        structlog.contextvars.bind_contextvars(order_id=order_id)
        traces.describe(order_id=order_id)


def _refuse_unknown_query(request: Request) -> None:
    """Refuse parameters that the call does not have, as unknown fields of a body are: a misspelt filter would be
    answered with everybody's orders."""
    known = {parameter.alias for parameter in request.scope["route"].dependant.query_params}
    given = [name for name, _ in request.query_params.multi_items()]
    faults = [
        {
            "loc": ("query", name),
            "msg": "given more than once" if name in known else "there is no such parameter",
        }
        for name in dict.fromkeys(given)
        if name not in known or given.count(name) > 1
    ]
    if faults:
        raise RequestValidationError(faults)


# --- health


def _add_health(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def root(request: Request) -> RedirectResponse:
        return RedirectResponse(f"{request.scope.get('root_path', '')}/docs")

    @app.get("/healthz", tags=["health"], summary="The process is alive", response_description="Alive.")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get(
        "/readyz",
        tags=["health"],
        summary="PostgreSQL and Temporal answer",
        response_model=None,
        response_description="Ready.",
        responses={
            200: {"content": {"application/json": {"schema": _READINESS}}},
            503: {
                "description": "Not ready; `checks` has the reason for each part that is not.",
                "content": {"application/json": {"schema": _READINESS}},
            },
        },
    )
    async def readyz(request: Request) -> JSONResponse:
        """200, or 503 with the parts that are not ready. The metrics port says more."""
        return probes.answer(await request.app.state.readiness.states(details=False))


# --- errors


def _add_problems(app: FastAPI) -> None:
    app.add_exception_handler(TrellisError, _trellis_problem)
    app.add_exception_handler(RequestValidationError, _validation_problem)
    app.add_exception_handler(HTTPException, _http_problem)
    app.add_exception_handler(RPCError, _temporal_problem)
    app.add_exception_handler(RuntimeError, _runtime_problem)
    for kind in (DatabaseUnavailable, asyncpg.PostgresError, *db.UNAVAILABLE):
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
        schemas[Problem.__name__]["properties"]["code"] |= code_schema()
        return schema

    app.openapi = openapi  # type: ignore[method-assign] # FastAPI documents this way of extending its schema


def problem(status: int, title: str, detail: str | None = None, *, code: str, **more: Any) -> ProblemResponse:
    return ProblemResponse(Problem(title=title, status=status, detail=detail, code=code, **more))


async def _trellis_problem(_: Request, error: Exception) -> ProblemResponse:
    assert isinstance(error, TrellisError)  # noqa: S101 - it is registered for nothing else
    if isinstance(error, InvalidRequest) and error.field:
        return _invalid(Fault(field=error.field, rule=error.detail))
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
            Fault(
                field=".".join(shown(str(part)) for part in fault["loc"]),
                rule=fault["msg"].removeprefix("Value error, "),
            )
            for fault in error.errors()[:MAX_FAULTS]
        )
    )


async def _http_problem(request: Request, error: Exception) -> ProblemResponse:
    assert isinstance(error, HTTPException)  # noqa: S101
    if error.status_code == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        return _too_large()
    if isinstance(error.__cause__, InvalidRequest):
        return await _trellis_problem(request, error.__cause__)
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
    if temporal.is_namespace_missing(error):
        log.error("Temporal has no such namespace", error=error.message)
        return problem(503, "Temporal has no such namespace", _AGAIN, code="NamespaceNotFound")
    if temporal.is_unavailable(error):
        log.warning("Temporal did not answer", status=error.status.name)
        return problem(503, "Temporal did not answer", _AGAIN, code="TemporalUnavailable")
    return await _unexpected_problem(request, error)


async def _runtime_problem(request: Request, error: Exception) -> ProblemResponse:
    assert isinstance(error, RuntimeError)  # noqa: S101
    if temporal.is_unavailable(error):
        log.warning("Temporal did not answer", reason=str(error)[:200])
        return problem(503, "Temporal did not answer", _AGAIN, code="TemporalUnavailable")
    return await _unexpected_problem(request, error)


async def _database_problem(request: Request, error: Exception) -> ProblemResponse:
    if not db.is_unavailable(error):
        return await _unexpected_problem(request, error)
    log.warning("PostgreSQL did not answer", error=type(error.__cause__ or error).__name__)
    return problem(503, "PostgreSQL did not answer", _AGAIN, code="DatabaseUnavailable")


async def _unexpected_problem(_: Request, error: Exception) -> ProblemResponse:
    log.error("unexpected error", error=type(error).__name__, exc_info=error)
    return problem(500, "Something went wrong here", "The log of the API has the details.", code="Unexpected")


def _invalid(*faults: Fault) -> ProblemResponse:
    detail = "; ".join(f"{fault.field}: {fault.rule}" for fault in faults[:5])
    return problem(422, "The request is not valid", detail, code="InvalidRequest", errors=[*faults])


def _too_large() -> ProblemResponse:
    return problem(413, "The body is too large", f"at most {MAX_BODY_BYTES} bytes", code="BodyTooLarge")


def _encoded() -> ProblemResponse:
    return problem(415, "The body is encoded", "send it without Content-Encoding", code="BodyEncoded")


_AGAIN: Final = "Nothing was changed, or what was changed is not done twice: repeat the same call."


# --- around every request


class BodyLimit:
    """Refuses a body that is too large, by its announced length or when more arrives than was announced; one that
    takes too long; and one that is encoded. As problems, where FastAPI's own limit answers in plain text.

    What a client still sends when its answer is ready is read before it is answered: a connection that is closed
    with something unread is reset, which takes the answer away, and with it all else that a tunnel carries.
    """

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self.app = app
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        announced = headers.get("content-length", "0")
        if announced == "0" and "transfer-encoding" not in headers:
            await self.app(scope, receive, send)
            return
        body = _Body(receive, self.seconds, announced_only="expect" in headers)

        async def read_first(message: Message) -> None:
            if message["type"] == "http.response.start" and not await body.discard():
                message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        if announced.isdecimal() and int(announced) > MAX_BODY_BYTES:
            await _too_large()(scope, receive, read_first)
        elif headers.get("content-encoding", "identity") != "identity":
            await _encoded()(scope, receive, read_first)
        else:
            await self.app(scope, body.receive, read_first)


class _Body:
    """A request's body on its way here.

    Args:
        receive: where it comes from.
        seconds: how long all of it may take.
        announced_only: the client sends it when it is asked to, by the first `receive`.
    """

    def __init__(self, receive: Receive, seconds: float, *, announced_only: bool) -> None:
        self._receive = receive
        self._ends = time.monotonic() + seconds
        self._arrived = 0
        self._more = True
        self._asked = not announced_only

    async def receive(self) -> Message:
        """The next part, as ASGI has it.

        Raises:
            HTTPException: 408 or 413.
        """
        if not self._more:
            return await self._receive()  # until the client is gone
        try:
            message = await asyncio.wait_for(self._next(), self._ends - time.monotonic())
        except TimeoutError:
            raise HTTPException(HTTPStatus.REQUEST_TIMEOUT) from None
        if self._arrived > MAX_BODY_BYTES:
            raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        return message

    async def discard(self) -> bool:
        """Read what is left, within limits; whether that was all."""
        if not self._asked:
            return False
        try:
            async with asyncio.timeout(min(DISCARD_SECONDS, self._ends - time.monotonic())):
                while self._more and self._arrived < DISCARD_BYTES:
                    await self._next()
        except TimeoutError:
            pass  # it is answered, whatever becomes of the rest
        return not self._more

    async def _next(self) -> Message:
        self._asked = True
        message = await self._receive()
        self._arrived += len(message.get("body", b""))
        self._more = message.get("more_body", False)
        return message


class CanonicalLog:
    """One log line and one observation per request: method, route template, status, duration. Never a path, a query
    or a body. An error that nobody answered is answered here: past this, uvicorn would close the connection, and with
    it lose the next request on it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_probe(scope):
            await self.app(_as_get(scope), receive, _secured(send))
            return
        # A request that was sent before the answer to the one before it begins in the context of that one.
        structlog.contextvars.clear_contextvars()
        traces.forget()
        method, scope = scope["method"], _as_get(scope)
        began, status, first_byte = time.monotonic(), 0, None

        async def note_status(message: Message) -> None:
            nonlocal status, first_byte
            if message["type"] == "http.response.start":
                status = message["status"]
                secure(message)
                traces.name_request(scope)
                if (b"content-type", b"text/event-stream; charset=utf-8") in message.get("headers", ()):
                    # Whoever watches an order stays as long as it lasts, which says nothing of how fast we are.
                    first_byte = time.monotonic() - began
            await send(message)

        try:
            await self.app(scope, receive, note_status)
        except Exception as error:
            traces.failed(type(error).__name__)
            if status:
                raise  # the answer has begun: it can only be broken off
            await (await _unexpected_problem(Request(scope), error))(scope, receive, note_status)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            seconds = time.monotonic() - began
            metrics.request_ended(method, route, status or 500, first_byte or seconds)
            log.info(
                "request",
                method=method,
                route=route,
                status=status or 500,
                order_id=scope.get("path_params", {}).get("id"),
                duration_seconds=round(seconds, 4),
            )


def _secured(send: Send) -> Send:
    async def send_secured(message: Message) -> None:
        if message["type"] == "http.response.start":
            secure(message)
        await send(message)

    return send_secured


def _as_get(scope: Scope) -> Scope:
    """HEAD is GET without the body, which uvicorn leaves out. Without `Accept`, because a stream has no end."""
    if scope.get("method") != "HEAD":
        return scope
    return {**scope, "method": "GET", "headers": [header for header in scope["headers"] if header[0] != b"accept"]}
