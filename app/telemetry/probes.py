"""`/metrics`, `/healthz` and `/readyz` of any process, on a port of their own that no ingress leads to.

The server runs on the process's own event loop: a loop that is stuck does not answer, and that is what liveness
asks. Nothing remote is asked for it; readiness asks what the process registered.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

import httpx
import structlog
import uvicorn
from opentelemetry.instrumentation.utils import suppress_instrumentation
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from temporalio.service import RPCError

from app.domain.hosts import bind
from app.errors import DatabaseUnavailable, TrellisError
from app.telemetry.metrics import REGISTRY

if TYPE_CHECKING:
    from starlette.requests import Request

    from app.settings import Settings

#: A check returns when all is well, and raises why not.
Check = Callable[[], Awaitable[None]]

#: Seconds a check may take; probes wait a little longer.
_CHECK_SECONDS: Final = 3.0
#: Seconds the SDK's own endpoint, in this process, may take.
_SDK_SECONDS: Final = 2.0

log = structlog.get_logger(__name__)


class MetricsPortTaken(TrellisError):
    """The port for metrics cannot be used"""


class NotReady(Exception):
    """The process cannot do its work yet, or no longer."""


class Readiness:
    """What a process needs to do its work, by name."""

    def __init__(self) -> None:
        self._checks: dict[str, Check] = {}

    def require(self, name: str, check: Check) -> None:
        """Ask this from now on, in place of an earlier check of the same name."""
        self._checks[name] = check

    def forget(self, name: str) -> None:
        """Ask this no longer."""
        self._checks.pop(name, None)

    async def states(self, *, details: bool = True) -> dict[str, str]:
        """`ok` or the reason, for each.

        Args:
            details: with what the servers and the network said, which has addresses in it.
        """
        checks = dict(self._checks)  # others may come or go while these are asked
        with suppress_instrumentation():
            states = await asyncio.gather(*(_state(check, details=details) for check in checks.values()))
        return dict(zip(checks, states, strict=True))


async def _state(check: Check, *, details: bool) -> str:
    try:
        await asyncio.wait_for(check(), _CHECK_SECONDS)
    except NotReady as error:
        return str(error)[:200]
    except (DatabaseUnavailable, RPCError, RuntimeError, OSError, TimeoutError) as error:
        if not details:
            return "does not answer"
        return f"{type(error).__name__}: {str(error) or 'no answer in time'}"[:200]
    except Exception as error:
        # Whatever is wrong, who asks is answered: an answer of 500 would say less.
        log.exception("a check of readiness failed")
        return f"unexpected {type(error).__name__}"
    return "ok"


def answer(states: dict[str, str]) -> JSONResponse:
    """200, or 503 with the reason for each part that is not ready."""
    ready = all(state == "ok" for state in states.values())
    return JSONResponse(
        {"status": "ready" if ready else "not ready", "checks": states},
        HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE,
    )


@asynccontextmanager
async def serving(settings: Settings, readiness: Readiness, sdk_url: str | None) -> AsyncIterator[None]:
    """Serve while the block runs, if the settings name a port.

    Args:
        sdk_url: where Temporal's SDK publishes its metrics for this process alone; they become part of the page.

    Raises:
        MetricsPortTaken: somebody else has it.
    """
    if not settings.metrics_port:
        yield
        return
    bound = _bind(settings.metrics_host, settings.metrics_port)
    sdk = httpx.AsyncClient(trust_env=False, verify=False, timeout=_SDK_SECONDS)  # noqa: S501 - plain HTTP, to itself
    app = create_app(sdk_url, sdk, readiness)
    server = _Server(
        uvicorn.Config(app, lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=1)
    )
    running = asyncio.create_task(server.serve(sockets=[bound]))
    log.info("metrics are served", url=f"http://{settings.metrics_host}:{settings.metrics_port}/metrics")
    try:
        yield
    finally:
        server.should_exit = True
        await running
        await sdk.aclose()


def create_app(sdk_url: str | None, sdk: httpx.AsyncClient, readiness: Readiness) -> Starlette:
    """The three pages as an ASGI application.

    Args:
        sdk_url: where the SDK publishes its metrics, for `sdk` to fetch.
    """

    async def metrics(request: Request) -> Response:
        theirs = await _sdk_metrics(sdk, sdk_url) if sdk_url else ""
        return _page(request.headers.get("accept", ""), theirs)

    async def healthz(_request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def readyz(_request: Request) -> Response:
        return answer(await readiness.states())

    return Starlette(routes=[Route("/metrics", metrics), Route("/healthz", healthz), Route("/readyz", readyz)])


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the process has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _bind(host: str, port: int) -> socket.socket:
    try:
        return bind(host, port)
    except OSError as error:
        raise MetricsPortTaken(f"{host}:{port}, TRELLIS_METRICS_PORT: {error.strerror}") from error


# --- what is asked for readiness


# --- one page from two sources: the product's registry, and the SDK's own exporter


def _page(accept: str, theirs: str) -> Response:
    encode, content_type = choose_encoder(accept)
    ours = encode(REGISTRY)
    if content_type.startswith("application/openmetrics-text"):
        page = ours.removesuffix(b"# EOF\n") + as_openmetrics(theirs).encode() + b"# EOF\n"
    else:
        page = ours + theirs.encode()
    return Response(page, headers={"content-type": content_type})


async def _sdk_metrics(sdk: httpx.AsyncClient, url: str) -> str:
    """The page of the SDK's exporter; nothing when it does not answer, rather than no metrics at all."""
    try:
        response = await sdk.get(url)
    except httpx.HTTPError as error:
        log.warning("the SDK's metrics cannot be read", error_type=type(error).__name__)
        return ""
    return response.text if response.status_code == HTTPStatus.OK else ""


_DESCRIPTION: Final = re.compile(r"^# (HELP|TYPE) (\S+)(.*)$")


def as_openmetrics(page: str) -> str:
    """A page of Prometheus' older text format in the newer one, in which a counter's name has no `_total`."""
    counters = set(re.findall(r"^# TYPE (\S+)_total counter$", page, re.MULTILINE))
    lines = []
    for line in page.splitlines():
        described = _DESCRIPTION.match(line)
        if described and described[2].removesuffix("_total") in counters:
            lines.append(f"# {described[1]} {described[2].removesuffix('_total')}{described[3]}\n")
        elif line and (described or not line.startswith("#")):
            lines.append(f"{line}\n")
    return "".join(lines)
