"""The connection to Temporal, the same for API, workers and command line."""

from __future__ import annotations

import asyncio
import logging
import socket
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, ClassVar, Final, Self

import structlog
from temporalio.client import Client
from temporalio.contrib.pydantic import PydanticPayloadConverter
from temporalio.converter import DataConverter
from temporalio.runtime import (
    LogForwardingConfig,
    LoggingConfig,
    PrometheusConfig,
    Runtime,
    TelemetryConfig,
    TelemetryFilter,
)
from temporalio.service import RetryConfig, RPCError, RPCStatusCode, TLSConfig

from app.telemetry import traces
from app.telemetry.supervision import pauses

if TYPE_CHECKING:
    from app.settings import Settings

#: Answers of Temporal that say "later" rather than "no".
UNAVAILABLE: Final = frozenset(
    {
        RPCStatusCode.UNAVAILABLE,
        RPCStatusCode.DEADLINE_EXCEEDED,
        RPCStatusCode.CANCELLED,
        RPCStatusCode.RESOURCE_EXHAUSTED,
        RPCStatusCode.ABORTED,
        # An update of a workflow whose tasks have just failed or timed out: it is taken when they work again.
        RPCStatusCode.FAILED_PRECONDITION,
    }
)


def is_unavailable(error: RPCError | RuntimeError) -> bool:
    """Whether the same call may well succeed in a moment.

    A connection that breaks in the middle of a call, as behind a proxy or load balancer whose server is gone, is
    UNKNOWN to the SDK; and as long as its client never had a connection, or when a worker of it asks for its namespace
    as it starts, it raises a bare RuntimeError. Only their words tell them from an error of the server, or of ours.
    """
    if isinstance(error, RPCError):
        broken = error.status is RPCStatusCode.UNKNOWN and "transport error" in error.message
        # A worker that was killed or starved in the middle of it; the update is asked for again under the same id.
        undone = error.status is RPCStatusCode.FAILED_PRECONDITION and "workflow task failure" in error.message
        return broken or undone or error.status in UNAVAILABLE
    return any(words in str(error) for words in _LOST)


def is_not_found(error: RPCError) -> bool:
    """Whether the workflow (or schedule) that was asked for is not there; False where it is the namespace that is not,
    which Temporal tells with the same status."""
    return error.status is RPCStatusCode.NOT_FOUND and not is_namespace_missing(error)


def is_namespace_missing(error: RPCError) -> bool:
    """Whether there is no such namespace. Told by the detail of the error, which has the same status as others."""
    return any(detail.type_url.endswith("NamespaceNotFoundFailure") for detail in error.grpc_status.details)


#: What the SDK's errors without a status say of a connection that is not there, or of a status that means "later".
_LOST: Final = (
    "Failed client connect",
    "transport error",
    "code: Unavailable",
    "code: DeadlineExceeded",
    "code: Cancelled",
    "code: ResourceExhausted",
)


log = structlog.get_logger(__name__)


class _PayloadConverter(PydanticPayloadConverter):
    """Pydantic's, once per process: a worker asks for a new one several times per workflow task, and each would begin
    without the type adapters of the one before (docs/decisions/0044-one-payload-converter.md)."""

    _made: ClassVar[Self | None] = None

    def __new__(cls) -> Self:
        if cls._made is None:
            made = super().__new__(cls)
            PydanticPayloadConverter.__init__(made)
            cls._made = made
        return cls._made

    def __init__(self) -> None:
        pass  # done when it was made


#: Models as JSON, the same on both sides of every call.
DATA_CONVERTER: Final = DataConverter(payload_converter_class=_PayloadConverter)


async def connect(settings: Settings, *, lazy: bool = True) -> Client:
    """A client that connects again by itself whenever the connection was lost.

    A lazy one connects when it is first used, so that a process can start before Temporal does. Workers do not
    take it.

    Raises:
        RuntimeError: it is not lazy and Temporal does not answer.
    """
    api_key = settings.temporal_api_key
    return await Client.connect(
        settings.temporal_address,
        namespace=settings.temporal_namespace,
        api_key=api_key.get_secret_value() if api_key else None,
        tls=_tls(settings),
        data_converter=DATA_CONVERTER,
        plugins=traces.temporal_plugins(),
        runtime=_runtime(with_metrics=settings.metrics_port > 0).runtime,
        lazy=lazy,
        retry_config=_impatient(settings) if lazy else None,
    )


def _impatient(settings: Settings) -> RetryConfig:
    # `rpc_timeout` limits an attempt, not the call: a server that refuses connections would be asked for 10 s.
    return RetryConfig(max_elapsed_time_millis=int(settings.temporal_rpc_timeout * 1000))


@dataclass(frozen=True)
class _SdkRuntime:
    runtime: Runtime
    metrics_url: str | None


#: An order's task waits for a worker a few milliseconds when all is well; the defaults begin at 50.
_SDK_BUCKETS: Final = dict.fromkeys(
    (
        "temporal_activity_execution_latency",
        "temporal_activity_schedule_to_start_latency",
        "temporal_request_latency",
        "temporal_workflow_task_execution_latency",
        "temporal_workflow_task_replay_latency",
        "temporal_workflow_task_schedule_to_start_latency",
    ),
    (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)


@cache
def _runtime(*, with_metrics: bool) -> _SdkRuntime:
    """The SDK's threads, logs and metrics: one for the process, whatever the number of its clients and workers."""
    address = f"127.0.0.1:{_free_port()}" if with_metrics else None
    prometheus = address and PrometheusConfig(
        bind_address=address,
        counters_total_suffix=True,
        unit_suffix=True,
        durations_as_seconds=True,
        histogram_bucket_overrides=_SDK_BUCKETS,
    )
    telemetry = TelemetryConfig(
        logging=LoggingConfig(
            filter=TelemetryFilter(core_level="WARN", other_level="ERROR"),
            forwarding=LogForwardingConfig(logging.getLogger("temporalio.core"), append_target_to_name=False),
        ),
        metrics=prometheus or None,
    )
    return _SdkRuntime(Runtime(telemetry=telemetry), f"http://{address}/metrics" if address else None)


def metrics_url(settings: Settings) -> str | None:
    """Where the SDK publishes its metrics, for this process alone; None if it does not."""
    return _runtime(with_metrics=settings.metrics_port > 0).metrics_url


def _free_port() -> int:
    # The SDK takes an address, not a socket, and does not tell which port it got for 0.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _tls(settings: Settings) -> TLSConfig | bool:
    files = (settings.temporal_tls_ca, settings.temporal_tls_cert, settings.temporal_tls_key)
    if not any(files):
        return settings.temporal_tls or settings.temporal_api_key is not None
    ca, cert, key = (file.read_bytes() if file else None for file in files)
    return TLSConfig(server_root_ca_cert=ca, client_cert=cert, client_private_key=key)


async def wait_until_serving(client: Client) -> None:
    """Return when Temporal answers and the namespace exists; says in the log that and why it does not yet."""
    for pause in pauses():
        try:
            await check(client)
        except (RPCError, RuntimeError) as error:
            reason = error.status.name if isinstance(error, RPCError) else str(error)[:200]
            log.warning("waiting for Temporal", namespace=client.namespace, error=reason, retry_in_seconds=pause)
        else:
            return
        await asyncio.sleep(pause)


async def check(client: Client) -> None:
    """One call that needs a live connection and the namespace.

    Raises:
        RPCError: Temporal does not answer, or has no such namespace.
        RuntimeError: there is no connection yet and none could be made.
    """
    from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest

    await client.workflow_service.describe_namespace(
        DescribeNamespaceRequest(namespace=client.namespace), retry=False, timeout=timedelta(seconds=2)
    )
