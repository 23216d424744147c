"""The connection to Temporal, the same for API, workers and command line."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Final

import structlog
from temporalio.client import Client
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.service import RPCError, RPCStatusCode, TLSConfig

from app.db import pauses

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
    }
)

log = structlog.get_logger(__name__)


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
        data_converter=pydantic_data_converter,
        lazy=lazy,
    )


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
